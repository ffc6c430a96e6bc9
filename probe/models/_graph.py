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

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch

from probe.errors import ProbeError
from probe.models._architectures import Heads
from probe.models._blocks import Mixture
from probe.vocabulary import Granularity


@dataclass(frozen=True)
class Graph:
    """The nodes of a decoder's residual graph."""

    n_layers: int
    """Number of decoder layers."""

    granularity: Granularity
    """`qkv`: query, key and value of an attention are three targets (the published code).
    `block`: an attention is one target (the paper's text), its score the sum of the three.
    `head`: each head is a source, and each head's query, key and value a target.
    `expert`: each expert of a mixture is a source; attentions as in `qkv`, or as in `block` where
    some have no query, key and value."""

    sources: tuple[str, ...]
    """What writes to the residual stream, in order: input, a0, m0, a1, m1, ...; with `head`
    input, a0.h0, a0.h1, ..., m0, ..., and a0.bias where the heads' outputs get one added; with
    `expert` input, a0, m0.e0, m0.e1, ..., and m0.shared where experts get one added that every
    token has."""

    targets: tuple[str, ...]
    """What reads from it, in order, ending with logits; with `head` a0.q.h0, ..., a0.v.h1, m0."""

    parallel: bool = False
    """Whether a layer's FFN reads the same as its attention, and not the attention too."""

    @classmethod
    def build(
        cls,
        n_layers: int,
        granularity: Granularity,
        heads: Heads | None = None,
        bias: bool = False,
        parallel: bool = False,
        blocks: Sequence[str] | None = None,
        mixtures: Sequence[Mixture] | None = None,
        splits: bool = True,
    ) -> "Graph":
        """Lay out the graph of a model; `Model.graph` does it for a loaded one.

        Args:
            n_layers: Number of decoder layers.
            granularity: How fine attentions and mixtures are.
            heads: Its heads; needed for `head`.
            bias: Whether its output has a bias, which belongs to no head.
            parallel: Whether attention and FFN of a layer read the same.
            blocks: Which blocks each layer has: `am`, `a` or `m`; both if not given.
            mixtures: The experts of each layer; needed for `expert`.
            splits: Whether every attention has query, key and value, so that they are apart with
                `expert`.

        Raises:
            ProbeError: The granularity is not known.
        """
        if granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise ProbeError(f"granularity {granularity!r} is not known; choose one of: {known}")
        sources = ["input"]
        targets = []
        for layer in range(n_layers):
            attention, here = f"a{layer}", "am" if blocks is None else blocks[layer]
            if "a" not in here:
                pass
            elif granularity == "head":
                if heads is None:
                    raise ProbeError("granularity 'head' needs the number of heads")
                sources += [f"{attention}.h{head}" for head in range(heads.query)]
                sources += [f"{attention}.bias"] if bias else []
                counts = (heads.query, heads.key_value, heads.key_value)
                for branch, count in zip("qkv", counts, strict=True):
                    targets += [f"{attention}.{branch}.h{head}" for head in range(count)]
            else:
                sources.append(attention)
                split = granularity == "qkv" or (granularity == "expert" and splits)
                targets += [f"{attention}.{branch}" for branch in "qkv"] if split else [attention]
            if granularity == "expert" and mixtures is None:
                raise ProbeError("granularity 'expert' needs the number of experts")
            parts = mixtures[layer].parts if granularity == "expert" and mixtures else ()
            sources += [f"m{layer}.{part}" for part in parts] or [f"m{layer}"] * ("m" in here)
            targets += [f"m{layer}"] * ("m" in here)
        return cls(n_layers, granularity, tuple(sources), (*targets, "logits"), parallel)

    @cached_property
    def attention(self) -> Granularity:
        """How fine an attention is: `qkv`, `block` or `head`."""
        if self.granularity != "expert":
            return self.granularity
        return "qkv" if any(Node.parse(name).branch for name in self.targets) else "block"

    @cached_property
    def mask(self) -> torch.Tensor:
        """Where the matrix holds an edge: bool [source, target], source before target."""
        written = torch.tensor([Node.parse(name).time for name in self.sources])
        read = torch.tensor([self._read_time(Node.parse(name)) for name in self.targets])
        return written[:, None] < read[None, :]

    @cached_property
    def layers(self) -> list[tuple[range, range, range, range]]:
        """Of each layer the indices of its attention's sources and targets, then of its FFN's.

        Those of a block that a layer does not have are none.
        """
        found: dict[tuple[str, int], list[int]] = {}
        for nodes, side in ((self.sources, "source"), (self.targets, "target")):
            for index, name in enumerate(nodes):
                node = Node.parse(name)
                found.setdefault((f"{node.kind} {side}", node.layer), []).append(index)

        def indices(what: str, layer: int) -> range:
            own = found.get((what, layer), [])
            return range(own[0], own[-1] + 1) if own else range(0)

        kinds = ("attention source", "attention target", "ffn source", "ffn target")
        return [
            tuple(indices(kind, layer) for kind in kinds)  # type: ignore[misc]
            for layer in range(self.n_layers)
        ]

    @cached_property
    def reaches(self) -> list[int]:
        """How many sources have written before any block, and behind each: 1, ..., all."""
        blocks = [part for parts in self.layers for part in (parts[0], parts[2])]
        return [1, *(part.stop for part in blocks if part)]

    def first_layers(self, changed: torch.Tensor) -> torch.Tensor:
        """For each set of edges the layer of the first target that it has, int64 [set].

        Of none, and of those into the logits, it is the one behind the last.

        Args:
            changed: The edges, bool [set, source, target].
        """
        layer = torch.tensor([self.layer(target) for target in self.targets])
        never = torch.full_like(layer, self.n_layers)
        return torch.where(changed.any(1), layer, never).amin(1)

    def layer(self, name: str) -> int:
        """A node's layer; the input counts as -1, the logits as the one behind the last."""
        node = Node.parse(name)
        return self.n_layers if node.kind == "logits" else node.layer

    def _read_time(self, target: "Node") -> int:
        if target.kind == "logits":
            return 2 * self.n_layers + 1
        # A branch reads what was written before its own block; in parallel, before its layer.
        return target.time - (self.parallel and target.kind == "ffn")


class Node(NamedTuple):
    """A source or target, by the parts of its name: the one place that reads them."""

    kind: Literal["input", "attention", "ffn", "logits"]
    """What it is, or is a part of."""

    layer: int = -1
    """The layer that it is in; -1 for the two ends."""

    branch: str = ""
    """`q`, `k` or `v` of an attention; empty for all of them."""

    part: str = ""
    """`h0` for a head, `bias` for what is added behind all heads, `e0` for an expert, `shared` for
    what is added to all experts; empty for all of it."""

    @classmethod
    def parse(cls, name: str) -> "Node":
        """Read a name: `input`, `a3`, `a3.q`, `a3.q.h0`, `a3.h0`, `m3`, `m3.e0`, `logits`, ...

        Raises:
            ProbeError: It is no name of a node.
        """
        found = _NODE.fullmatch(name)
        if found is None:
            raise ProbeError(f"{name!r} is no node; nodes are input, a0, a0.q, a0.h1, m0, logits")
        if found["end"]:
            return cls("input" if name == "input" else "logits")
        if found["ffn"]:
            return cls("ffn", int(found["ffn"]), "", found["expert"] or "")
        return cls("attention", int(found["layer"]), found["branch"] or "", found["part"] or "")

    @property
    def block(self) -> str:
        """The name of the whole that it is a part of: `a3` of `a3.q.h0`."""
        if self.layer < 0:
            return self.kind
        return f"{'a' if self.kind == 'attention' else 'm'}{self.layer}"

    @property
    def whole(self) -> str:
        """Its name without the part: `a3.q` of `a3.q.h0`, `a3` of `a3.h0`, `m3` of `m3.e0`."""
        return f"{self.block}.{self.branch}" if self.branch else self.block

    @property
    def time(self) -> int:
        """When its block writes: input, a0, m0, a1, ... are 0, 1, 2, 3, ..."""
        return 0 if self.kind == "input" else 2 * self.layer + (2 if self.kind == "ffn" else 1)


_NODE = re.compile(
    r"(?P<end>input|logits)"
    r"|a(?P<layer>\d+)(\.(?P<branch>[qkv]))?(\.(?P<part>h\d+|bias))?"
    r"|m(?P<ffn>\d+)(\.(?P<expert>e\d+|shared))?"
)
