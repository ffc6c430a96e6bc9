"""The residual graph: which sub-module can write to which, and in what order.

Every sub-module reads the sum of what was written to the residual stream before it, so an edge
runs from each source to each later target (paper, Eq. 5-7). Scores are kept as one dense matrix
[source, target]: the paper's metrics are means over that whole matrix, entries that are no
edge included, and `Graph.mask` says which entries are.

    >>> graph = Graph.build(n_layers=1, granularity="qkv")
    >>> graph.sources
    ('input', 'a0', 'm0')
    >>> graph.targets
    ('a0.q', 'a0.k', 'a0.v', 'm0', 'logits')
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from probe.errors import ProbeError

Granularity = Literal["qkv", "block"]


@dataclass(frozen=True)
class Graph:
    """The nodes of a decoder's residual graph."""

    n_layers: int
    """Number of decoder layers."""

    granularity: Granularity
    """`qkv`: query, key and value of an attention are three targets (the published code).
    `block`: an attention is one target (the paper's text), its score the sum of the three."""

    sources: tuple[str, ...]
    """What writes to the residual stream, in order: input, a0, m0, a1, m1, ..."""

    targets: tuple[str, ...]
    """What reads from it, in order, ending with logits."""

    @classmethod
    def build(cls, n_layers: int, granularity: Granularity) -> "Graph":
        """Lay out the graph of a model with `n_layers` sequential layers.

        Raises:
            ProbeError: The granularity is not known.
        """
        if granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise ProbeError(f"granularity {granularity!r} is not known; choose one of: {known}")
        sources = ["input"]
        targets = []
        for layer in range(n_layers):
            sources += [f"a{layer}", f"m{layer}"]
            branches = [f"a{layer}.{b}" for b in "qkv"] if granularity == "qkv" else [f"a{layer}"]
            targets += [*branches, f"m{layer}"]
        return cls(n_layers, granularity, tuple(sources), (*targets, "logits"))

    @property
    def mask(self) -> torch.Tensor:
        """Where the matrix holds an edge: bool [source, target], source before target."""
        order = {name: position for position, name in enumerate(self.sources)}
        order["logits"] = len(self.sources)
        reads = torch.tensor([order[name.partition(".")[0]] for name in self.targets])
        return torch.arange(len(self.sources))[:, None] < reads[None, :]
