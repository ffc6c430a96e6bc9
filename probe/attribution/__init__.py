"""Attribution: the score of every edge of the residual graph, for each sequence by itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
