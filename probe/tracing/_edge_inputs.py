"""What a pass that scores edges is given, as tensors: all in which two batches of a shape differ.

>>> inputs = edge_inputs(batch, RowBlocks(steps=1), torch.float32)
>>> inputs.input_ids.shape, len(inputs.scored[0])
(torch.Size([2, 31]), 58)
"""

from typing import NamedTuple

import torch

# At so many positions of each sequence the sources' sum is compared with the residual stream.
CHECKED_POSITIONS = 16


class Batch(NamedTuple):
    """Sequences that run together, filled up on the right.

    No attention mask goes with them: attention is causal, so what is scored never sees the
    filling behind it.
    """

    input_ids: torch.Tensor
    """int64 [sequence, position]: prompt and answer, without the answer's last token."""

    lengths: torch.Tensor
    """int64 [sequence]: how many positions are no filling."""

    positions: torch.Tensor
    """int64 [sequence, scored]: where each scored token is predicted."""

    labels: torch.Tensor
    """int64 [sequence, scored]: the answer tokens, -100 past an answer's end."""

    corrupted: torch.Tensor | None = None
    """int64 [sequence, position]: the texts beside them whose activations an ablation leaves."""

    reference: torch.Tensor | None = None
    """[sequence, scored, token]: log probabilities that a target compares with."""


class RowBlocks(NamedTuple):
    """How often the sequences of a batch stand in its rows, one block after the other."""

    steps: int
    """Once for each point of a path; the last block is the sequences as they are."""

    corrupted: bool = False
    """Whether the first block is the corrupted texts beside them."""

    @property
    def beside(self) -> bool:
        """Whether a block has no slope: where a path begins, or the corrupted texts."""
        return self.steps > 1 or self.corrupted

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return self.steps + self.beside


class Room(NamedTuple):
    """A size that batches are filled up to, so that many have the same."""

    positions: int
    """Of a sequence."""

    scored: int
    """Scored tokens of a block; one of them at least is none."""


class EdgeInputs(NamedTuple):
    """The tensors of a batch."""

    input_ids: torch.Tensor
    """int64 [row, position]: the tokens of each block."""

    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    """Row and position of each scored token, which it is (int64 [scored]), and what it counts
    ([scored]; those of a sequence sum to 1)."""

    checked: torch.Tensor
    """int64 [sequence, checked]: where the sources' sum is compared with the stream."""

    lengths: torch.Tensor
    """int64 [sequence]: how many positions are no filling."""

    compared: int
    """A scored token whose logits the model itself gives too."""

    compared_row: int
    """Its row."""

    kept: int | torch.Tensor = 1
    """Of which positions the model itself gives logits, as transformers' `logits_to_keep`."""

    reference: torch.Tensor | None = None
    """What a target compares the scored tokens of a block with, [scored of a block, token]."""

    baseline: torch.Tensor | None = None
    """What an ablation leaves of each source, [source, d_model]."""

    def to(self, device: torch.device) -> "EdgeInputs":
        """The same on a device, but for what a target compares with, which comes in parts.

        What is copied without waiting lets one batch begin while the one before is computed.
        """
        input_ids, checked, lengths, *scored = (
            part.to(device, non_blocking=True)
            for part in (self.input_ids, self.checked, self.lengths, *self.scored)
        )
        return self._replace(
            input_ids=input_ids,
            checked=checked,
            lengths=lengths,
            scored=(scored[0], scored[1], scored[2], scored[3]),
        )


def edge_inputs(
    batch: Batch, blocks: RowBlocks, exact: torch.dtype, room: Room | None = None
) -> EdgeInputs:
    """The tensors of a batch, on the CPU.

    Args:
        batch: The sequences.
        blocks: How often they stand there.
        exact: The precision of what a token counts.
        room: What they are filled up to. The tokens that are filled in stand at the first position
            of each block, which must be none that is scored, and count nothing.
    """
    valid = batch.labels != -100
    shares = valid.double() / valid.sum(1, keepdim=True)
    parts = [
        valid.nonzero()[:, 0],
        batch.positions[valid],
        batch.labels[valid],
        shares[valid].to(exact),
    ]
    tokens = [batch.input_ids] * blocks.number
    if batch.corrupted is not None:
        tokens[0] = batch.corrupted
    reference = None if batch.reference is None else batch.reference[valid]
    if room is not None:
        parts = [_filled(part, room.scored) for part in parts]
        tokens = [_filled(part.T, room.positions).T for part in tokens]
        # Divided by it, or compared with it, numbers stay finite.
        reference = None if reference is None else _filled(reference, room.scored, 1)
    rows, positions, labels, shares = (part.repeat(blocks.number) for part in parts)
    rows += torch.arange(blocks.number).repeat_interleave(len(parts[0])) * len(valid)
    # The longest sequence is scored at the last position, of which the model gives its logits.
    compared = len(rows) - 1
    if room is None:
        compared = int((positions == batch.input_ids.shape[1] - 1).nonzero()[-1])
    return EdgeInputs(
        torch.cat(tokens),
        (rows, positions, labels, shares),
        checked_positions(batch),
        batch.lengths,
        compared,
        int(rows[compared]),
        kept=1 if room is None else torch.zeros(1, dtype=torch.int64),
        reference=reference,
    )


def checked_positions(batch: Batch) -> torch.Tensor:
    """Where the sources' sum is compared with the stream: int64 [sequence, checked]."""
    spread = torch.linspace(0, 1, CHECKED_POSITIONS)[None]
    return (spread * (batch.lengths[:, None] - 1)).long()


def _filled(part: torch.Tensor, size: int, value: int = 0) -> torch.Tensor:
    """A tensor as long as `size`, with a value behind what it has."""
    return torch.cat([part, part.new_full((size - len(part), *part.shape[1:]), value)])
