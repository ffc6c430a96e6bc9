"""Recipes: what is compared, on what, and how, as data.

Nothing here computes; a recipe can be read where no engine is installed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
