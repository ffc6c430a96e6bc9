"""What becomes of each row's logits: several outcomes at once.

It travels with a trace to a server; see `_hooks`.

    >>> outcomes = RowOutcomes(3, torch.float32)
    >>> outcomes.read(logits, columns, labels)
    >>> outcomes.values                             # [outcome, row]
"""

from __future__ import annotations

import torch

OUTCOMES = ("loss", "margin", "kl", "accuracy")
"""The mean over a sequence's answer of: the negative log-likelihood, in nats; the logit of the
answer's token minus the largest of another token; KL(row 0 || row), in nats; and whether the
answer's token is the likeliest."""

# So many numbers of logits are looked at at once (64 MB in float32).
NUMBERS = 2**24


class RowOutcomes:
    """The outcomes of rows, the first of which is the model as it is."""

    values: torch.Tensor
    """[outcome, row]."""

    choices: torch.Tensor
    """int64 [row, scored]: the likeliest token at each scored position."""

    def __init__(self, rows: int, exact: torch.dtype) -> None:
        """Say how many rows there are, and how precise values are."""
        self.rows, self.exact = rows, exact

    def read(self, logits: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor) -> None:
        """Read logits.

        Args:
            logits: [row, position, token].
            columns: Where each scored token is predicted, int64 [row or 1, scored].
            labels: Which it is, int64 [row or 1, scored]; -100 past an answer's end.
        """
        columns, labels = (
            part.to(logits.device).expand(self.rows, -1) for part in (columns, labels)
        )
        size = max(1, NUMBERS // (columns.shape[1] * logits.shape[-1]))
        whole = self._scored(logits[:1], columns[:1]).log_softmax(-1)
        parts = [
            self._outcomes(self._scored(*some[:2]), some[2], whole)
            for some in zip(
                logits.split(size), columns.split(size), labels.split(size), strict=True
            )
        ]
        self.values = torch.cat([part[0] for part in parts], 1)
        self.choices = torch.cat([part[1] for part in parts])

    def _scored(self, logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        at = columns[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, at).to(self.exact)

    def _outcomes(
        self, scored: torch.Tensor, labels: torch.Tensor, whole: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outcomes [outcome, row] and choices [row, scored] of logits [row, scored, token]."""
        valid = labels != -100
        label = labels.clamp_min(0)[..., None]
        logs = scored.log_softmax(-1)
        losses = -logs.gather(2, label)[..., 0]
        rivals = scored.scatter(2, label, float("-inf")).amax(2)
        margins = scored.gather(2, label)[..., 0] - rivals
        chances = whole.exp()
        # A token that the whole model never gives counts nothing.
        terms = torch.where(chances > 0, chances * (whole - logs), torch.zeros_like(logs))
        choices = scored.argmax(2)
        right = (choices == labels).to(self.exact)
        found = torch.stack([losses, margins, terms.sum(2), right])
        means = torch.where(valid, found, torch.zeros_like(found)).sum(2) / valid.sum(1)
        return means, choices
