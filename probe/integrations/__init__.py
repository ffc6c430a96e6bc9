"""Integrations: what scores checkpoints from inside of other programs."""
