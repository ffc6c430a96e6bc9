"""The edge product: outputs times gradients, as both come, inside a trace.

Outputs are kept from the forward pass. A gradient is kept only until the few layers around it have
theirs, and is then multiplied with all outputs at once: one thin matrix product for many edges,
and no gradient waits for the end.

It travels with a trace to a server; see `_hooks`.

    >>> product = EdgeProduct(graph.mask, layers=[0, 4], n_sequences=8, points=one, weights=one)
    >>> stream = product.open(embedded)          # then write and take, as they come
    >>> scores = product.close()                 # [sequence, source, target]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.tracing._branch_checks import BranchChecks

# Float32 copies, where a product needs them, stay small beside the activations.
SLICE_BYTES = 64 * 2**20

# Gradients of so many groups of layers are multiplied one after the other: the more groups, the
# less memory, and the more often the outputs are read.
GRADIENT_GROUPS = 8


class EdgeProduct:
    """The scores of one batch: -<G, O - B>, summed in float32 (float64 for a float64 model)."""

    def __init__(
        self,
        mask: torch.Tensor,
        layers: Sequence[int],
        n_sequences: int,
        points: torch.Tensor,
        weights: torch.Tensor,
        baseline: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        corrupted: bool = False,
        on_host: bool = False,
        positions: bool = False,
    ) -> None:
        """Say how large it is.

        Args:
            mask: Where edges are, bool [source, target].
            layers: The first target of each layer of the graph.
            n_sequences: How many of the rows hold sequences as they are: the last ones.
            points: Of the way from B to the embedding, [step]; the last one is 1.
            weights: What the gradient at each counts, [step].
            baseline: B, what an ablation leaves of each source, [source, d_model].
            lengths: How many positions of each sequence are no filling, int64 [sequence], where B
                of the input is the mean of its own embeddings.
            corrupted: Whether B is what the source writes in the first rows.
            on_host: Whether outputs wait in the host's memory.
            positions: Whether scores are kept position by position.
        """
        self.mask, self.baseline, self.corrupted = mask, baseline, corrupted
        self.positions = positions
        self.lengths = lengths
        self.points, self.weights, self.steps = points, weights, len(points)
        self._counts: list[float] = weights.tolist()
        self.n_sequences, self.on_host = n_sequences, on_host
        # Rows come in blocks of all sequences: where the path begins, if it does; then each point.
        self._beside = corrupted or self.steps > 1
        self.n_sources, self.n_targets = mask.shape
        # Sources are in the order in which they write: a target reads so many of them.
        self._reaches: list[int] = mask.sum(0).tolist()
        # Gradients of a group of layers are multiplied at once, from the last group to the first;
        # the final norm's comes alone.
        size = -(-len(layers) // GRADIENT_GROUPS)
        self._starts = [*sorted({0, *list(layers)[::-1][size - 1 :: size]}), self.n_targets - 1]
        # Those of the targets from start to stop are awaited.
        self._start = self._stop = self.n_targets
        self._waiting: dict[int, torch.Tensor] = {}
        self._room: torch.Tensor | None = None

    def place(self, device: torch.device) -> None:
        """Have what it needs on a device already: nothing may come there from the host later."""
        self.mask, self.points = self.mask.to(device), self.points.to(device)
        self.weights = self.weights.to(device)

    def open(self, embedded: torch.Tensor) -> torch.Tensor:
        """Give the stream as it begins, on the way of an integral; make room, keep the input.

        Args:
            embedded: [block * sequence, position, d_model].
        """
        stream = embedded.detach()
        exact = torch.promote_types(stream.dtype, torch.float32)
        if self.steps > 1:
            stream = self._on_the_way(stream[: self.n_sequences], stream[-self.n_sequences :])
        _, length, width = stream.shape
        # The sum over positions falls into equal pieces, about enough of them for a whole GPU.
        wanted = max(1, self.n_sequences * length // 1024)
        divisors = (p for p in range(1, length + 1) if length % p == 0)
        piece = min(divisors, key=lambda p: max(p / wanted, wanted / p))
        self._piece = (length if stream.device.type == "cpu" else piece) * width
        rows = self.n_sequences
        if self.positions:
            self._piece, rows = width, rows * length
        self._outputs = torch.empty(
            (self.n_sources, self.n_sequences, length, width),
            dtype=stream.dtype,
            device="cpu" if self.on_host else stream.device,
            pin_memory=self.on_host,
        )
        self._unwritten = set(range(self.n_sources))
        self._scores = stream.new_zeros(rows, self.n_sources, self.n_targets, dtype=exact)
        self.write(0, stream)
        # The one line that switches the graph on: parameters are frozen.
        return stream.requires_grad_(True)

    def _on_the_way(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The stream of all blocks as it begins, from B to the embeddings.

        Args:
            first: The first block's embeddings, [sequence, position, d_model].
            last: The last block's.
        """
        base = torch.zeros_like(last)
        if self.corrupted:
            base = first
        elif self.lengths is not None:
            base = base + self._own_mean(last)[:, None].to(base.dtype)
        elif self.baseline is not None:
            base = base + self.baseline[0].to(last.device)
        points = self.points[:-1, None, None, None].to(last.device, last.dtype)
        between = base + points * (last - base)  # [step - 1, sequence, position, d_model]
        return torch.cat([base, between.flatten(0, 1), last])

    def _own_mean(self, embedded: torch.Tensor) -> torch.Tensor:
        """The mean of each sequence's embeddings [sequence, position, d_model]: [sequence, d]."""
        assert self.lengths is not None
        lengths = self.lengths.to(embedded.device)[:, None]
        real = torch.arange(embedded.shape[1], device=embedded.device) < lengths
        exact = torch.promote_types(embedded.dtype, torch.float32)
        return torch.einsum("np,npd->nd", real.to(exact), embedded.to(exact)) / lengths

    def removed(self, output: torch.Tensor) -> torch.Tensor:
        """Of an output what an ablation takes away, but for a mean: [sequence, position, d]."""
        kept = output[-self.n_sequences :]
        return kept - output[: self.n_sequences] if self.corrupted else kept

    def write(self, source: int, output: torch.Tensor) -> None:
        """Keep the output of a source, when it comes for the first time.

        Args:
            source: Its index.
            output: [block * sequence, position, d_model].
        """
        if source in self._unwritten:
            self._unwritten.remove(source)
            self._outputs[source].copy_(self.removed(output.detach()), non_blocking=True)

    def take(self, target: int, gradient: torch.Tensor) -> None:
        """Take the gradient of a branch.

        Args:
            target: Its index.
            gradient: [block * sequence, position, d_model].
        """
        if self._beside:
            gradient = gradient[self.n_sequences :]
        while target < self._start:
            self._multiply()
        self._waiting[target] = gradient.to(self._scores.device)
        if len(self._waiting) == self._stop - self._start:
            self._multiply()

    def residual_error(self, end: torch.Tensor, checked: torch.Tensor) -> torch.Tensor:
        """How far the outputs' sum is from the end of the stream, at a few positions: [].

        Args:
            end: The final norm's input, [block * sequence, position, d_model].
            checked: The positions, int64 [sequence, checked].
        """
        checked = checked.to(self._outputs.device)
        rows = torch.arange(self.n_sequences, device=checked.device)[:, None]
        total = self._outputs[:, rows, checked].sum(0, dtype=self._scores.dtype).to(end.device)
        at = rows.to(end.device), checked.to(end.device)
        truth = self.removed(end)[at].to(total.dtype)
        return (total - truth).norm() / end[-self.n_sequences :][at].to(total.dtype).norm()

    def reading_errors(self, checks: BranchChecks) -> torch.Tensor:
        """How far readings are from sums of the outputs; see `BranchChecks.errors`."""
        return checks.errors(self._outputs)

    def close(self) -> torch.Tensor:
        """Give the scores, [sequence, source, target], and let everything else go.

        Position by position they are [sequence * position, source, target].
        """
        self._multiply()
        mask = self.mask.to(self._scores.device, non_blocking=True)
        scores = self._scores.masked_fill(~mask, 0)
        del self._scores, self._outputs
        self._room = None
        return scores

    def _multiply(self) -> None:
        """Multiply the gradients that are there with the outputs that they can have an edge to.

        Then those of the next group are awaited.
        """
        start, stop = self._start, self._stop
        self._start, self._stop = (self._starts.pop() if self._starts else 0), start
        if not self._waiting:
            return
        targets = range(start, stop)
        gradients = self._gathered(targets)  # [target, step, sequence, position, d_model]
        reach = self._reaches[targets[-1]]
        outputs = self._outputs[:reach].flatten(1).unflatten(1, (-1, self._piece))
        scores = self._scores[:, :reach, start : start + len(targets)]
        for step, weight in enumerate(self._counts):
            read = gradients[:, step].flatten(1).unflatten(1, (-1, self._piece))
            found = self._product(outputs, read.permute(1, 2, 0))  # [piece, source, target]
            found = found.unflatten(0, (len(self._scores), -1)).sum(1)[..., : len(targets)]
            scores -= found if self.steps == 1 else found * weight
        if self.baseline is not None or self.lengths is not None:
            weights = self.weights.to(gradients.device, scores.dtype)
            total = gradients[: len(targets)]  # [target, step, sequence, position, d_model]
            if not self.positions:
                total = total.sum(3, keepdim=True, dtype=scores.dtype)
            total = torch.einsum("tknpd,k->tnpd", total.to(scores.dtype), weights).flatten(1, 2)
            if self.lengths is not None:
                begun = self._own_mean(self._outputs[0]).to(total)  # [sequence, d_model]
                begun = begun.repeat_interleave(len(scores) // len(begun), 0)
                scores[:, 0] += torch.einsum("nd,tnd->nt", begun, total)
            if self.baseline is not None:
                baseline = self.baseline[:reach].to(total.dtype)
                scores += torch.einsum("sd,tnd->nst", baseline, total)

    def _gathered(self, targets: range) -> torch.Tensor:
        """Gradients of these targets side by side: [target, step, sequence, position, d_model]."""
        shape = (-1, self.steps, *self._outputs.shape[1:])
        some = next(iter(self._waiting.values()))
        # A branch without influence has sent none.
        none = some if len(self._waiting) == len(targets) else torch.zeros_like(some)
        found = [self._waiting.pop(target, none) for target in targets]
        if len(found) == 1:
            return some.reshape(shape)
        if self._room is None:
            # A multiple of 8, for which matrix products have their fast kernels.
            self._room = some.new_zeros(-(-len(found) // 8) * 8, *some.shape)
        torch.stack(found, out=self._room[: len(found)])
        return self._room.view(shape)

    def _product(self, outputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """[source, piece, ...] times [piece, ..., target], summed in float32 or better."""
        exact = self._scores.dtype
        if gradients.device != outputs.device:
            here = (row.to(gradients.device, non_blocking=True) for row in outputs.split(1))
            return torch.cat([self._product(row, gradients) for row in here], 1)
        outputs = outputs.transpose(0, 1)
        if gradients.dtype == exact:
            return torch.bmm(outputs, gradients)
        if gradients.device.type == "cuda":
            # Products of 16-bit numbers are exact in float32, and are summed there.
            return torch.bmm(outputs, gradients, out_dtype=exact)
        shape = len(outputs), outputs.shape[1], gradients.shape[2]
        found = gradients.new_empty(shape, dtype=exact)
        width = exact.itemsize * outputs.shape[2] * (shape[1] + shape[2])
        step = max(1, SLICE_BYTES // width)
        for start in range(0, len(outputs), step):
            part = slice(start, start + step)
            torch.bmm(outputs[part].to(exact), gradients[part].to(exact), out=found[part])
        return found
