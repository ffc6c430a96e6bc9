"""Where sources and targets of a graph are in a model's layers, and what every source writes.

It travels with a trace to a server; see `_hooks`.

    >>> writes = Writes(wiring_of(model, graph))
    >>> writes.watch(hooks, 0, layer, write)     # write(1, [sequence, position, d_model]), ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.tracing._branch_checks import BranchChecks
    from probe.tracing._hooks import Hooks

    Write = Callable[[int, torch.Tensor], None]
    """Takes a source's index and what it writes."""


class Wiring:
    """How the nodes of a graph lie in a model's layers, as plain numbers."""

    n_targets: int
    """How many targets; the last are the logits."""

    layers: list[tuple[range, range, range, range]]
    """Of each layer the indices of its attention's sources and targets, then of its FFN's; those
    of a block that it does not have are none."""

    by_head: bool
    """Whether each head is a source of its own."""

    n_heads: int
    """How many heads write, in each layer."""

    head_width: int
    """Numbers per head."""

    scale: float
    """By what every output is multiplied before it is added to the stream."""

    transposed: bool
    """Whether weights are [input, output], as in GPT-2's Conv1D."""

    clips: bool
    """Whether projections' outputs are clipped in place."""

    experts: Sequence[int]
    """How many experts of each layer are sources of their own; empty where none is."""

    at_inputs: bool
    """Whether query, key and value part at the inputs of projections of their own; otherwise, and
    head by head, they part at columns of the projections' outputs."""

    columns: list[list[tuple[int, torch.Tensor]]]
    """For each branch of an attention its projections and, as bool [column], the columns of each;
    empty where an attention is one branch."""

    def __init__(
        self,
        n_targets: int,
        layers: list[tuple[range, range, range, range]],
        heads: tuple[int, int],
        columns: list[list[tuple[int, torch.Tensor]]],
        *,
        by_head: bool,
        scale: float,
        transposed: bool,
        at_inputs: bool,
        clips: bool = False,
        experts: Sequence[int] = (),
    ) -> None:
        """Keep what is given; `heads` is (number, width)."""
        self.n_targets, self.layers = n_targets, layers
        self.n_heads, self.head_width = heads
        self.columns = columns
        self.by_head, self.at_inputs, self.clips = by_head, at_inputs, clips
        self.scale, self.transposed = scale, transposed
        self.experts = experts

    def readings(self) -> list[int]:
        """The first target of each block, and that of the final norm."""
        blocks = [part for _, attention, _, ffn in self.layers for part in (attention, ffn)]
        return [*(part.start for part in blocks if part), self.n_targets - 1]

    def weight(self, projection: SimpleNamespace) -> torch.Tensor:
        """A projection's weight as [input, output]."""
        weight: torch.Tensor = projection._module.weight
        return weight if self.transposed else weight.T


def in_rows(output: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    """A block's output as [row, position, d_model]; some mixtures give one row of all tokens."""
    return output.view(given[0].shape) if output.ndim == 2 and given else output


def project(
    wiring: Wiring,
    modules: SimpleNamespace,
    number: int,
    normed: torch.Tensor,
    columns: torch.Tensor | slice = slice(None),
) -> torch.Tensor:
    """Some columns of what a projection of an attention makes of what the attention is given.

    Args:
        wiring: Which way round weights are.
        modules: The layer's modules, from `_layers`.
        number: Which projection.
        normed: [..., d_model].
        columns: Which columns, bool [column]; all if not given.

    Returns:
        [..., chosen column].
    """
    if modules.latent and number == 2:
        narrow = project(wiring, modules, 1, normed)[..., : modules.latent.width]
        # By .forward: a call would run the hooks.
        normed = modules.latent.norm._module.forward(narrow)
    projection = modules.projections[number]
    projected: torch.Tensor = normed @ wiring.weight(projection)[:, columns]
    bias = projection._module.bias
    return projected if bias is None else projected + bias[columns]


class ExpertOutputs:
    """What each expert of a mixture writes on one pass: of tokens that it does not get, zero."""

    total: torch.Tensor
    """What the mixture itself makes of them all, [token, d_model]."""

    def __init__(
        self,
        modules: SimpleNamespace,
        count: int,
        output: torch.Tensor,
        given: tuple[torch.Tensor, ...],
    ) -> None:
        """Compute it.

        Args:
            modules: The layer's modules, from `_layers`.
            count: How many experts.
            output: What the module of the experts has given.
            given: What it was given: tokens, [token, d_model], and their experts and these
                experts' weights, [token, rank]; or tokens alone, weighted already, once for each
                expert one after the other.
        """
        self._projection = modules.experts_projection
        self._places: torch.Tensor | None = None
        given = tuple(part.detach() for part in given)
        if len(given) == 1:
            self._parts = output.detach().unflatten(0, (count, -1)).transpose(0, 1)
            self.total = self._projected(self._parts.sum(1))
            return
        tokens, chosen, shares = given
        ranks = chosen.shape[1]
        # With each of a token's experts as the only one of a token of its own: as many products
        # as the mixture's own. By .forward: a call would run the hooks.
        alone = modules.experts._module.forward(
            tokens.repeat_interleave(ranks, 0), chosen.reshape(-1, 1), shares.reshape(-1, 1)
        )
        alone = alone.view(len(tokens), ranks, -1)
        self._parts = torch.cat([alone, torch.zeros_like(alone[:, :1])], 1)
        # Of each token and expert the rank, or the zero behind them.
        self._places = chosen.new_full((len(tokens), count), ranks)
        self._places.scatter_(
            1, chosen, torch.arange(ranks, device=chosen.device).expand_as(chosen)
        )
        self.total = self._projected(output.detach())

    def of(self, expert: int) -> torch.Tensor:
        """What one expert writes, [token, d_model]."""
        if self._places is None:
            return self._projected(self._parts[:, expert])
        rows = torch.arange(len(self._parts), device=self._parts.device)
        return self._projected(self._parts[rows, self._places[:, expert]])

    def sum(self) -> torch.Tensor:
        """What all of them write, [token, d_model]."""
        exact = torch.promote_types(self._parts.dtype, torch.float32)
        return self._projected(self._parts.sum(1, dtype=exact).to(self._parts.dtype))

    def _projected(self, value: torch.Tensor) -> torch.Tensor:
        if self._projection is None:
            return value
        return torch.nn.functional.linear(value, self._projection._module.weight)


class Seen:
    """What waits of a mixture from one hook to the next."""

    experts: ExpertOutputs | None = None
    """What its experts write."""

    shared: torch.Tensor | None = None
    """What its shared expert gives, where that is checked."""

    done: bool = False
    """Whether all was written: a layer that is computed again comes here again."""


class Writes:
    """What every source writes to the residual stream, heads and biases included.

    The one place that knows it: scores, exact effects and means all read it here.
    """

    def __init__(
        self,
        wiring: Wiring,
        wanted: Collection[int] | None = None,
        summed: torch.Tensor | None = None,
        checks: BranchChecks | None = None,
    ) -> None:
        """Say which.

        Args:
            wiring: Where sources are.
            wanted: Their indices; all of them if not given.
            summed: bool [sequence, position]: writes are summed over these positions, in float32
                or better. What is linear comes after the sum.
            checks: Compares experts' outputs with what their mixture gives.
        """
        self.wiring = wiring
        self.wanted = wanted
        self.summed = summed
        self.checks = checks

    def hang(self, hooks: Hooks, layers: Sequence[SimpleNamespace], write: Write) -> None:
        """Let a function take what all sources write."""
        self.watch_input(hooks, layers[0].module, write)
        for number, layer in enumerate(layers):
            self.watch(hooks, number, layer, write)

    def watch_input(self, hooks: Hooks, first: SimpleNamespace, write: Write) -> None:
        """Let a function take what enters the first layer: the source `input`."""
        if self._wants(0):
            hooks.at_input(first, lambda value: write(0, self.total(value)))

    def watch(self, hooks: Hooks, layer: int, modules: SimpleNamespace, write: Write) -> None:
        """Let a function take what the sources of a layer write, when it comes.

        Args:
            hooks: Where to hang hooks.
            layer: The layer's number.
            modules: Its modules, from `_layers`.
            write: Takes the index and [sequence, position, d_model], or its sum, [d_model].
        """
        attention, _, ffn, _ = self.wiring.layers[layer]
        if attention and self.wiring.by_head:
            projection, first = modules.attention_projection, attention.start
            hooks.at_input(projection, lambda mixed: self._heads(projection, mixed, first, write))
        elif attention:
            self._watch_block(hooks, modules.attention_output, attention.start, write)
        if ffn and self.wiring.experts and self.wiring.experts[layer]:
            self._watch_mixture(hooks, modules, ffn, self.wiring.experts[layer], write)
        elif ffn:
            self._watch_block(hooks, modules.ffn_output, ffn.start, write)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """A write as it is wanted: [sequence, position, d], or summed over positions: [d]."""
        value = value.detach()
        if self.summed is None:
            return value
        exact = torch.promote_types(value.dtype, torch.float32)
        return value[self.summed.to(value.device)].to(exact).sum(0)

    def _wants(self, source: int) -> bool:
        return self.wanted is None or source in self.wanted

    def _watch_block(
        self, hooks: Hooks, module: SimpleNamespace, source: int, write: Write
    ) -> None:
        if self._wants(source):
            hooks.at_output(
                module,
                lambda output, *given: write(source, self._scaled(in_rows(output, *given))),
            )

    def _watch_mixture(
        self, hooks: Hooks, modules: SimpleNamespace, sources: range, count: int, write: Write
    ) -> None:
        """Take what each expert of a mixture writes, and what is added to them.

        Args:
            hooks: Where to hang hooks.
            modules: The layer's modules.
            sources: The experts' indices, and behind them that of what is added.
            count: How many experts.
            write: Takes a source's index and what it writes.
        """
        if not any(map(self._wants, sources)):
            return
        seen = Seen()

        def part(own: torch.Tensor, *given: torch.Tensor) -> None:
            if not seen.done:
                seen.experts = ExpertOutputs(modules, count, own, given)

        def aside(output: torch.Tensor, *_: object) -> None:
            # Llama 4 adds its experts' outputs to it in place.
            seen.shared = output.detach().clone()

        def done(output: torch.Tensor, *given: torch.Tensor) -> None:
            experts, shared, seen.experts, seen.shared = seen.experts, seen.shared, None, None
            if experts is None:
                return
            seen.done = True
            output = in_rows(output, *given).detach()
            beside = output - experts.total.view(output.shape)
            if self.checks:
                self.checks.see_mixture((experts.sum(), experts.total), output, beside, shared)
            for number, source in enumerate(sources):
                if self._wants(source):
                    value = experts.of(number).view(output.shape) if number < count else beside
                    write(source, self._scaled(value))

        hooks.at_output(modules.experts, part)
        if self.checks and len(sources) > count:
            hooks.at_output(modules.shared_expert, aside)
        hooks.at_output(modules.ffn_output, done)

    def _scaled(self, output: torch.Tensor) -> torch.Tensor:
        output, scale = self.total(output), self.wiring.scale
        return output if scale == 1 else output * scale

    def _heads(
        self, projection: SimpleNamespace, mixed: torch.Tensor, first: int, write: Write
    ) -> None:
        """What each head writes, and the bias behind them.

        Args:
            projection: The output projection of an attention.
            mixed: What it is given, [sequence, position, head * head_width].
            first: The first head's index.
            write: Takes a source's index and what it writes.
        """
        wiring = self.wiring
        shape = mixed.shape[:-1]
        mixed = self.total(mixed)
        weight, scale = wiring.weight(projection), wiring.scale  # [head * head_width, d_model]
        if self.summed is not None:  # in the precision of the sums
            weight, scale = weight.to(mixed.dtype) * scale, 1.0
        for head in range(wiring.n_heads):
            if self._wants(first + head):
                part = slice(head * wiring.head_width, (head + 1) * wiring.head_width)
                write(first + head, mixed[..., part] @ weight[part] * scale)
        bias = projection._module.bias
        if bias is not None and self._wants(first + wiring.n_heads):
            bias = bias.to(mixed.dtype) * wiring.scale
            if self.summed is None:
                bias = bias.expand(*shape, -1)
            else:
                bias = bias * self.summed.sum().to(bias.device)
            write(first + wiring.n_heads, bias)


class Readings:
    """What every block reads of the residual stream: as it is, or as it is given."""

    def __init__(self, given: torch.Tensor | None = None) -> None:
        """Say what blocks are to read, [block, sequence, position, d_model]; None to watch only."""
        self.given = given

    def hang(self, hooks: Hooks, layers: Sequence[SimpleNamespace], write: Write) -> None:
        """Let a function take what blocks read, or give it to them."""
        place = 0
        for layer in layers:
            readers = [layer.attention_norm or layer.attention]
            if not (layer.shared_norm and layer.attention_norm):
                readers.append(layer.ffn_norm or layer.ffn)
            for reader in readers:
                if reader is not None:
                    self._read(hooks, reader, place, write)
                    place += 1

    def _read(self, hooks: Hooks, reader: SimpleNamespace, place: int, write: Write) -> None:
        def read(stream: torch.Tensor) -> torch.Tensor | None:
            if self.given is None:
                write(place, stream.detach())
                return None
            return self.given[place].to(stream.device, stream.dtype)

        hooks.at_input(reader, read)
