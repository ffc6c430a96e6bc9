"""Recordings of what a GPU does, as CUDA graphs, and what a model keeps of them.

>>> with recording(graph, torch.device("cuda")):
...     run_edge_pass(model, inputs, edge_pass)
>>> graph.replay()
"""

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

MOST = 8
"""So many recorded passes are kept; the one that was not played for longest goes first."""

MOST_SHAPES = 256
"""So many shapes are remembered."""


@contextmanager
def recording(
    graph: "torch.cuda.CUDAGraph",
    device: "torch.device",
    beside: "torch.cuda.CUDAGraph | None" = None,
) -> Iterator[None]:
    """Record what a GPU is asked to do. Another thread may use it meanwhile, for another model.

    Args:
        graph: What it becomes.
        device: The GPU.
        beside: Another one, whose memory it shares: they never run at once.

    Raises:
        RuntimeError: What cannot be recorded.
    """
    import torch

    here, pool = torch.cuda.device(device), beside.pool() if beside else None
    try:
        with here, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except Exception:
        # torch's random numbers go on waiting for the end of a recording that failed, and none can
        # be drawn any more (torch 2.11). They find it in one that does not fail.
        something = torch.zeros(1, device=device)
        with here, torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            something.add_(1)
        raise


class Recorded(Protocol):
    """One recorded pass."""

    bytes: int
    """What it holds of the GPU's memory."""


class Recordings:
    """The recorded passes of one model, by their shape."""

    played: int = 0
    """How often one was played instead of a plain pass."""

    refused: bool = False
    """Whether one could not be recorded: then no more is tried."""

    enough: float = math.inf
    """From so many tokens on the GPU is busy all the time, and nothing is gained by recording."""

    def __init__(self) -> None:
        """Start with none."""
        self._known: dict[Hashable, Recorded | int] = {}

    def __len__(self) -> int:
        """How many passes are recorded."""
        return sum(not isinstance(known, int) for known in self._known.values())

    @property
    def bytes(self) -> int:
        """What they hold of the GPU's memory."""
        return sum(known.bytes for known in self._known.values() if not isinstance(known, int))

    def get(self, shape: Hashable) -> Recorded | int:
        """The recorded pass of a shape, or what else is known of it; 0 for nothing.

        It is the last now of those that may be forgotten.
        """
        known = self._known.pop(shape, 0)
        if known:
            self._known[shape] = known
        return known

    def put(self, shape: Hashable, known: Recorded | int) -> None:
        """Remember the recorded pass of a shape, or what else is known of it."""
        self._known[shape] = known
        if len(self) > MOST:
            del self._known[next(s for s, k in self._known.items() if not isinstance(k, int))]
        if len(self._known) > MOST_SHAPES:
            del self._known[next(iter(self._known))]

    def some(self) -> Recorded | None:
        """One of them."""
        return next((k for k in self._known.values() if not isinstance(k, int)), None)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
