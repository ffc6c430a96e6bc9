"""What every branch reads, compared with what the graph says that it reads.

A row of the architecture table may name modules that all run, and still be wrong: then scores come
out for edges that are none. So in the first batch, at a few positions, these things are compared:

- what a branch reads, with the sum of the sources that have an edge to it;
- what each norm gives, with the formula whose gradient is taken;
- what blocks and projections behind a norm are given, with what that norm gives;
- the gradient of the stream where it begins, with the sum of the gradients of all branches: these
  are too few where something else reads the stream;
- where experts are apart, their sum with what their mixture makes of them, and what that adds to
  them with its shared expert.

It travels with a trace to a server; see `_hooks`.

    >>> checks = BranchChecks([0, 3, 4], reaches=[1, 2, 3], rows=slice(-2, None), checked=at)
    >>> checks.errors(outputs)                               # [reading, 2 + reach]
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.tracing._norm_vjp import NormVjp

# So many positions are compared in all.
POSITIONS = 16


class Reading:
    """What was seen where one branch reads; relative errors are tensors [], infinite if unseen."""

    value: torch.Tensor | None = None
    """What it reads of what the graph's sources write, [sequence, checked, d_model]."""

    size: torch.Tensor | None = None
    """The norm of all that it reads, []."""

    normed: torch.Tensor | None = None
    """What its norm makes of it, [sequence, checked, d_model]."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.by_formula: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []


class BranchChecks:
    """The comparisons of one batch."""

    gradient_error: torch.Tensor
    """[]: how far the branches' gradients are from that of the stream, relative to the largest of
    the sums on the way there."""

    def __init__(
        self, targets: Sequence[int], reaches: Sequence[int], rows: slice, checked: torch.Tensor
    ) -> None:
        """Say where to look.

        Args:
            targets: For each reading its first target's index.
            reaches: The numbers of sources whose sums readings are compared with, ascending.
            rows: The rows of a batch that hold sequences as they are.
            checked: Positions of these, int64 [sequence, checked].
        """
        self.reaches, self.rows = reaches, rows
        self.checked = checked[:, :: max(1, checked.numel() // POSITIONS)]
        self.readings = {target: Reading() for target in targets}
        # Norms that no branch reads: those inside a block, and behind it.
        self.others = Reading()
        self.mixtures = Reading()
        self._total: torch.Tensor | None = None
        self._largest = torch.zeros(())
        self._done = False

    def see(self, target: int, value: torch.Tensor, kept: torch.Tensor) -> None:
        """See what a branch reads.

        Args:
            target: Its index.
            value: What it reads, [row, position, d_model].
            kept: What of that the graph's sources have written, [sequence, position, d_model].
        """
        reading = self.readings[target]
        if not self._done:
            reading.value = self._picked(kept)
            reading.size = self._picked(value[self.rows]).norm()

    def see_norm(
        self,
        target: int | None,
        value: torch.Tensor,
        normed: torch.Tensor,
        norm: SimpleNamespace | None,
        norm_vjp: NormVjp,
    ) -> None:
        """See what a branch's norm makes of a value; another norm, if there is no target."""
        if self._done:
            return
        reading = self.others if target is None else self.readings[target]
        if target is not None:
            reading.normed = self._picked(normed[self.rows])
        if norm is not None:
            before, after = (_first(part[self.rows]) for part in (value, normed))
            expected = norm_vjp.output(before, norm._module)
            reading.by_formula.append(_distance(expected, after))

    def see_given(self, target: int, value: torch.Tensor) -> None:
        """See what a block or a projection behind a branch's norm is given."""
        reading = self.readings[target]
        if self._done:
            return
        if reading.normed is None:  # it comes before its norm
            reading.given.append(torch.full((), torch.inf, device=value.device))
        else:
            reading.given.append(_distance(self._picked(value[self.rows]), reading.normed))

    def see_same(self, found: torch.Tensor, truth: torch.Tensor) -> None:
        """See two ways to compute the same, each [row, ..., d]."""
        if not self._done:
            parts = (_first(part[self.rows]) for part in (found, truth))
            self.others.given.append(_distance(*parts))

    def see_mixture(
        self,
        experts: tuple[torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        beside: torch.Tensor,
        shared: torch.Tensor | None,
    ) -> None:
        """See what a mixture's experts write, and what it adds to them.

        Args:
            experts: The sum of what they write, and what the mixture makes of them.
            output: What the mixture writes, [row, position, d_model].
            beside: That less what its experts write.
            shared: What its shared expert gives, which a gate may still make smaller.
        """
        if self._done:
            return
        self.mixtures.given.append(_distance(*experts))
        exact = torch.promote_types(output.dtype, torch.float32)
        found, size = beside.to(exact), output.to(exact).norm()
        if shared is not None:
            shared = shared.view(found.shape).to(found)
            length = shared.square().sum(-1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
            found = found - shared * ((found * shared).sum(-1, keepdim=True) / length)
        self.mixtures.by_formula.append(found.norm() / size)

    def see_gradient(self, gradient: torch.Tensor) -> None:
        """See the gradient of one branch, [sequence, position, d_model]."""
        found = self._picked(gradient[self.rows])
        self._total = found if self._total is None else self._total + found.to(self._total.device)
        self._largest = torch.maximum(self._largest.to(found.device), found.norm())
        self._largest = torch.maximum(self._largest, self._total.norm().to(found.device))

    def see_stream(self, gradient: torch.Tensor) -> None:
        """See the gradient of the stream where it begins, [row, position, d_model]."""
        found = self._picked(gradient[self.rows])
        total = found.new_zeros(()) if self._total is None else self._total.to(found.device)
        kind = torch.finfo(found.dtype)
        # A model that is sure of all that it is scored on has no gradient: nothing to compare.
        largest = self._largest.to(found.device).clamp_min(kind.tiny / kind.eps)
        self.gradient_error = (found - total).norm() / largest

    def errors(self, outputs: torch.Tensor) -> torch.Tensor:
        """How far each reading is from what the row says, all relative: [reading, 2 + reach].

        Behind the branches come norms and vectors inside blocks, then mixtures. First of all that
        is given, then of the norm's output from its formula, then of what is read from the sum of
        the first so many sources, for each of `reaches`. Of mixtures the first is how far the
        experts are from their sum, the second what is added that is no shared expert.

        Args:
            outputs: What sources write, [source, sequence, position, d_model].
        """
        self._done = True
        there, lost = outputs.device, torch.full((), torch.inf, device=outputs.device)
        exact = torch.promote_types(outputs.dtype, torch.float32)
        found = []
        for reading in (*self.readings.values(), self.others, self.mixtures):
            for errors in (reading.given, reading.by_formula):
                parts = [error.to(there, torch.float32) for error in errors]
                found.append(torch.stack(parts).max() if parts else torch.zeros_like(lost))
        rows = torch.arange(outputs.shape[1], device=there)[:, None]
        checked = self.checked.to(there)
        total, start = torch.zeros((), dtype=exact, device=there), 0
        columns = []
        for reach in self.reaches:
            total = total + outputs[start:reach, rows, checked].sum(0, dtype=exact)
            start = reach
            column = [
                lost
                if reading.value is None or reading.size is None
                else (reading.value.to(there) - total).norm() / reading.size.to(there)
                for reading in self.readings.values()
            ]
            columns.append(torch.stack([error.to(torch.float32) for error in column]))
        beside = torch.stack(found).view(-1, 2)
        last = torch.zeros(2, len(self.reaches), device=there)
        return torch.cat([beside, torch.cat([torch.stack(columns, 1), last])], 1)

    def _picked(self, value: torch.Tensor) -> torch.Tensor:
        """A value where it is looked at: [sequence, checked, d_model], in float32 or better."""
        rows = torch.arange(len(value), device=value.device)[:, None]
        found = value.detach()[rows, self.checked.to(value.device)]
        return found.to(torch.promote_types(value.dtype, torch.float32))


def _first(value: torch.Tensor) -> torch.Tensor:
    """The first vectors of a norm, whatever stands before their dimension: [few, d]."""
    value = value.detach().flatten(0, -2)[:POSITIONS]
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _distance(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far a tensor is from another, relative to that: []; infinite if the shapes differ."""
    if found.shape != truth.shape:
        return torch.full((), torch.inf, device=truth.device)
    size = truth.norm()
    return (found.to(truth.device) - truth).norm() / size.clamp_min(torch.finfo(size.dtype).tiny)
