"""Runs: the steps of a recipe in a row, into a folder, and what is known before the first."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
