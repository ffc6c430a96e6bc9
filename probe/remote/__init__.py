"""Remote: an NDIF server and servers of answers, and what travels to them and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
