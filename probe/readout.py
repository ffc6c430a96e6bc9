"""From last hidden states to losses and their gradients, and what traces need beside.

It travels with a trace to a server; see `probe.hooks`.

    >>> readout = Readout(vocabulary=32000, exact=torch.float32)
    >>> readout.score(hidden, scored, unembed, weight, compared=0)
    >>> readout.losses, readout.slopes           # [sequence], [sequence, position, d_model]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Logits stay small beside the activations.
LOGITS_BYTES = 64 * 2**20


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


def mean_losses(
    logits: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor, exact: torch.dtype
) -> torch.Tensor:
    """Mean negative log-likelihood of the scored tokens of each sequence: [sequence].

    Args:
        logits: [sequence, position, token].
        columns: Where each scored token is predicted, int64 [sequence, scored].
        labels: Which it is, int64 [sequence, scored]; -100 past an answer's end.
        exact: The precision of losses.
    """
    columns, labels = columns.to(logits.device), labels.to(logits.device)
    scored = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
    return torch.nn.functional.cross_entropy(
        scored.to(exact).transpose(1, 2), labels, reduction="none", ignore_index=-100
    ).sum(1) / (labels != -100).sum(1)


class Readout:
    """The losses of one batch, and their gradient, a few rows of logits at a time."""

    losses: torch.Tensor
    """[sequence]: mean negative log-likelihood of the scored tokens, in nats."""

    entropies: torch.Tensor
    """[sequence]: mean entropy of the next token there, in nats."""

    compared: torch.Tensor
    """[token]: the logits of the token that was asked for."""

    slopes: torch.Tensor
    """[sequence, position, d_model]: the gradient of all losses at the hidden states."""

    def __init__(
        self, vocabulary: int, exact: torch.dtype, divisor: float = 1.0, cap: float | None = None
    ) -> None:
        """Say how the model makes logits.

        Args:
            vocabulary: How many tokens it knows.
            exact: The precision of losses.
            divisor: By what it divides logits.
            cap: To what size it squashes them.
        """
        self.exact, self.divisor, self.cap = exact, divisor, cap
        self._rows = max(1, LOGITS_BYTES // (4 * vocabulary))

    def score(
        self,
        hidden: torch.Tensor,
        scored: Sequence[torch.Tensor],
        unembed: Callable[[torch.Tensor], torch.Tensor],
        weight: torch.Tensor,
        compared: int,
    ) -> None:
        """Score tokens.

        Sequences do not touch each other, so the gradient of their sum holds each one's own.

        Args:
            hidden: [sequence, position, d_model], without a graph.
            scored: The row, position, label and share of each token, each [scored].
            unembed: The model's unembedding.
            weight: Its weight, [token, d_model].
            compared: A token whose logits are wanted.
        """
        rows, positions, labels, shares = scored
        self.losses = torch.zeros(len(hidden), dtype=self.exact, device=hidden.device)
        self.entropies = torch.zeros_like(self.losses)
        self.slopes = torch.zeros_like(hidden)
        for start in range(0, len(rows), self._rows):
            part = slice(start, start + self._rows)
            at, label, share = (rows[part], positions[part]), labels[part, None], shares[part]
            logits = self._logits(unembed(hidden[at]).detach().to(hidden.device))
            if start <= compared < start + self._rows:
                self.compared = logits[compared - start].clone()
            logs = logits.to(self.exact).log_softmax(-1)  # [scored, token]
            self.losses.index_add_(0, at[0], -logs.gather(1, label)[:, 0] * share)
            slope = logs.exp()
            self.entropies.index_add_(0, at[0], -logs.mul_(slope).sum(-1) * share)
            # -log p falls by the logit of the label, and grows with each logit by its p.
            slope.scatter_add_(1, label, -torch.ones_like(share)[:, None])
            slope *= share[:, None] / self.divisor
            if self.cap is not None:
                slope *= 1 - (logits.to(self.exact) / self.cap).square()
            slope = slope.to(logits.dtype).to(weight.device)
            self.slopes[at] = (slope @ weight).to(hidden.device)

    def _logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What the unembedding gives, as the model's own logits."""
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits
