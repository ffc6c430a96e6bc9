"""Models: loaded from a checkpoint, with the row of the table that names their parts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
