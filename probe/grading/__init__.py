"""Grading: what a text gives as its final answer, and whether that is right."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
