"""Tracing: what is done inside a model while it runs.

Every nnsight context is in `_contexts`; the other modules need torch alone and travel with a trace
to a server.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
