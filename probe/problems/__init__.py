"""Problems: questions with their answers, from a benchmark or a file of one's own."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
