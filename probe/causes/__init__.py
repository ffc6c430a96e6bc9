"""Causes: what a model does when edges are removed, kept, scaled, or carried over from another."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
