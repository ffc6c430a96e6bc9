"""From last hidden states to targets and their gradients, and what traces need beside.

It travels with a trace to a server; see `_hooks`.

    >>> readout = Readout(32000, torch.float32, objective, n_sequences=8)
    >>> readout.score(hidden, scored, unembed, weight, compared=0)
    >>> readout.losses, readout.slopes           # [sequence], [sequence, position, d_model]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.tracing._targets import Slope

# Logits stay small beside the activations.
LOGITS_BYTES = 64 * 2**20


NEGLIGIBLE = 50.0
"""What is e to the minus this beside the largest adds nothing that float64 would know, however many
tokens there are of it."""


def settle(away: bool, device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors where the model is; from here on in the precision that they have.

    A server runs traces of a bfloat16 model under autocast, where even a product of float32
    tensors is taken in bfloat16.

    Args:
        away: Whether the model is on a server.
        device: Where tensors go.
        tensors: The tensors.
    """
    if away:
        torch.set_autocast_enabled(device.type, False)
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def bring(away: bool, tensor: torch.Tensor) -> torch.Tensor:
    """What leaves a server: a copy that is no part of something larger."""
    return tensor.detach().cpu().clone() if away else tensor


def losses_at(
    logits: torch.Tensor,
    columns: torch.Tensor,
    labels: torch.Tensor,
    temperatures: torch.Tensor,
) -> torch.Tensor:
    """Mean negative log-likelihood of the scored tokens of each row: [temperature, row].

    Args:
        logits: [row, position, token].
        columns: Where each scored token is predicted, int64 [row, scored].
        labels: Which it is, int64 [row, scored]; -100 past an answer's end.
        temperatures: By what logits are divided, [temperature].
    """
    columns, labels = columns.to(logits.device), labels.to(logits.device)
    found = []
    for row, label, column in zip(logits, labels, columns, strict=True):
        label, column = label[label != -100], column[label != -100]
        scored = row[column].to(temperatures.dtype)  # [scored, token]
        top = scored.amax(1, keepdim=True)
        own = scored.gather(1, label[:, None]) - top
        inverse = 1 / temperatures.to(logits.device)
        found.append((_log_sums(scored - top, inverse) - own[:, 0] * inverse[:, None]).mean(1))
    return torch.stack(found, 1)


def _log_sums(below: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Logarithms of the sums of exp(logit / temperature): [temperature, scored].

    Of a vocabulary, a low temperature leaves few tokens that count; so these are sorted.

    Args:
        below: How far each logit is below the largest, [scored, token].
        inverse: 1 / temperature.
    """
    below = below.sort(1, descending=True).values
    least = (NEGLIGIBLE / inverse).expand(len(below), -1).contiguous()
    counts = torch.searchsorted(-below, least).amax(0).clamp(min=1).tolist()
    # So many numbers at once as a processor has near itself, or as a GPU needs to be busy.
    size = 2**24 if below.is_cuda else 2**17
    rows = min(len(below), max(1, size // below.shape[1]))
    at_once = max(1, size // (rows * below.shape[1]))
    found = []
    for part in below.split(rows):
        sums = [
            (part[:, : max(counts[start : start + at_once])] * some[:, None, None]).exp_().sum(2)
            for start, some in zip(
                range(0, len(inverse), at_once), inverse.split(at_once), strict=True
            )
        ]
        found.append(torch.cat(sums).log())
    return torch.cat(found, 1)


class Objective:
    """What is differentiated, as a trace takes it along."""

    def __init__(self, slope: Slope, temperature: float, own_reference: bool, plain: bool) -> None:
        """Say what.

        Args:
            slope: Gives value and slope; see `_targets`.
            temperature: By what logits are divided first.
            own_reference: Whether its reference is what the model itself says, with all edges.
            plain: Whether it is the plain loss, which is computed in any case.
        """
        self.slope, self.temperature = slope, temperature
        self.own_reference, self.plain = own_reference, plain

    def divided(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits by the temperature."""
        return logits if self.temperature == 1 else logits / self.temperature

    def means(
        self,
        logits: torch.Tensor,
        columns: torch.Tensor,
        labels: torch.Tensor,
        exact: torch.dtype,
        reference: torch.Tensor | None,
        wholes: Sequence[int],
    ) -> torch.Tensor:
        """The target of each row: [row].

        Args:
            logits: [row, position, token].
            columns: Where each scored token is predicted, int64 [row, scored].
            labels: Which it is, int64 [row, scored]; -100 past an answer's end.
            exact: The precision of values.
            reference: Log probabilities, [row, scored, token].
            wholes: For each row, which row is the same sequence with all edges.
        """
        columns, labels = columns.to(logits.device), labels.to(logits.device)
        scored = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1])).to(exact)
        valid = labels != -100  # [row, scored]
        if self.plain:
            losses = torch.nn.functional.cross_entropy(
                scored.transpose(1, 2), labels, reduction="none", ignore_index=-100
            )
            return losses.sum(1) / valid.sum(1)
        scored = self.divided(scored)
        if self.own_reference:
            reference = scored[list(wholes)].log_softmax(-1)
        values = torch.zeros(labels.shape, dtype=exact, device=logits.device)
        picked = None if reference is None else reference.to(logits.device, exact)[valid]
        values[valid], _ = self.slope(scored[valid], labels[valid], picked)
        return values.sum(1) / valid.sum(1)


class Readout:
    """The target of one batch, and its gradient, a few rows of logits at a time."""

    values: torch.Tensor
    """[sequence]: the target."""

    losses: torch.Tensor
    """[sequence]: mean negative log-likelihood of the scored tokens, in nats."""

    entropies: torch.Tensor
    """[sequence]: mean entropy of the next token there, in nats."""

    compared: torch.Tensor
    """[token]: the logits of the token that was asked for."""

    slopes: torch.Tensor
    """[sequence, position, d_model]: the gradient of all targets at the hidden states."""

    def __init__(
        self,
        vocabulary: int,
        exact: torch.dtype,
        objective: Objective,
        n_sequences: int,
        n_silent: int = 0,
        divisor: float = 1.0,
        multiplier: float = 1.0,
        cap: float | None = None,
    ) -> None:
        """Say how the model makes logits, and what of them is differentiated.

        Args:
            vocabulary: How many tokens it knows.
            exact: The precision of losses.
            objective: The target.
            n_sequences: How many of the rows hold sequences as they are: the last ones.
            n_silent: How many of the rows have a value but no slope: the first ones.
            divisor: By what it divides logits.
            multiplier: By what it multiplies them.
            cap: To what size it squashes them.
        """
        self.exact, self.objective, self.divisor, self.cap = exact, objective, divisor, cap
        self.multiplier = multiplier
        self.n_sequences, self.n_silent = n_sequences, n_silent
        self._rows = max(1, LOGITS_BYTES // (4 * vocabulary))

    def score(
        self,
        hidden: torch.Tensor,
        scored: Sequence[torch.Tensor],
        unembed: Callable[[torch.Tensor], torch.Tensor],
        weight: torch.Tensor,
        compared: int,
        reference: torch.Tensor | None = None,
    ) -> None:
        """Score tokens.

        Sequences do not touch each other, so the gradient of their sum holds each one's own.

        Args:
            hidden: [row, position, d_model], without a graph.
            scored: The row, position, label and share of each token, each [scored]; a block of the
                same tokens for each point of an integral, the last one of the whole model.
            unembed: The model's unembedding.
            weight: Its weight, [token, d_model].
            compared: A token whose logits are wanted.
            reference: Log probabilities of the tokens of a block, [scored of a block, token].
        """
        rows, positions, labels, shares = scored
        self.losses = torch.zeros(len(hidden), dtype=self.exact, device=hidden.device)
        self.entropies, self.values = torch.zeros_like(self.losses), torch.zeros_like(self.losses)
        self.slopes = torch.zeros_like(hidden)
        if self.objective.own_reference:
            reference = self._own(hidden, rows, positions, unembed)
        for start in range(0, len(rows), self._rows):
            part = slice(start, start + self._rows)
            at, label, share = (rows[part], positions[part]), labels[part], shares[part]
            logits = self._logits(unembed(hidden[at]).detach().to(hidden.device))
            if start <= compared < start + self._rows:
                self.compared = logits[compared - start].clone()
            logs = logits.to(self.exact).log_softmax(-1)  # [scored, token]
            losses = -logs.gather(1, label[:, None])[:, 0] * share
            self.losses.index_add_(0, at[0], losses)
            chances = logs.exp()
            self.entropies.index_add_(0, at[0], -logs.mul_(chances).sum(-1) * share)
            if self.objective.plain:
                self.values.index_add_(0, at[0], losses)
                # -log p falls by the logit of the label, and grows with each logit by its p.
                slope = chances.scatter_add_(1, label[:, None], -torch.ones_like(share)[:, None])
            else:
                del logs, chances
                picked = None
                if reference is not None:
                    block = torch.arange(start, start + len(label), device=reference.device)
                    picked = reference[block % len(reference)].to(logits.device, self.exact)
                divided = self.objective.divided(logits.to(self.exact))
                values, slope = self.objective.slope(divided, label, picked)
                self.values.index_add_(0, at[0], values * share)
            slope *= share[:, None] / (self.divisor * self.objective.temperature)
            if self.multiplier != 1:
                slope *= self.multiplier
            if self.cap is not None:
                slope *= 1 - (logits.to(self.exact) / self.cap).square()
            slope = slope.to(logits.dtype).to(weight.device)
            self.slopes[at] = (slope @ weight).to(hidden.device)
        self.slopes[: self.n_silent] = 0

    def _own(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        unembed: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What the model itself says at the tokens of the last block: log probabilities."""
        # A block holds the tokens of so many rows: the last ones.
        whole = rows >= len(hidden) - self.n_sequences
        rows, positions = rows[whole], positions[whole]
        found = []
        for at in zip(rows.split(self._rows), positions.split(self._rows), strict=True):
            logits = self._logits(unembed(hidden[at]).detach().to(hidden.device)).to(self.exact)
            found.append(self.objective.divided(logits).log_softmax(-1))
        return torch.cat(found)

    def _logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the unembedding gives, as the model's own logits."""
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.multiplier != 1:
            logits = logits * self.multiplier
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits
