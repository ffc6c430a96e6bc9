"""One forward and one backward pass that give all edges of a batch.

It travels with a trace to a server; see `_hooks`.

    >>> edge_pass.watch(layers, final, final_norm)   # then the model runs
    >>> scores = edge_pass.finish(lm_head, scored, compared, reference, checked)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import torch

from probe.tracing._relp_rules import follow_rules

if TYPE_CHECKING:
    from probe.tracing._branches import Branches
    from probe.tracing._edge_product import EdgeProduct
    from probe.tracing._hooks import Hooks
    from probe.tracing._readout import Readout
    from probe.tracing._wiring import Writes

    class Unembedding(Protocol):
        """From hidden states to logits."""

        weight: torch.Tensor

        def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor:
            """Logits [token, vocabulary] of [token, d_model]."""
            ...


class EdgePass:
    """What watches the model, what multiplies, and what reads the target."""

    residual_error: torch.Tensor
    """[]: how far the sources' sum is from the end of the stream."""

    reading_errors: torch.Tensor
    """What the checks of the branches found, see `_branch_checks`; empty where there are none."""

    gradient_error: torch.Tensor
    """[]: how far the branches' gradients are from the stream's; 0 where nobody looked."""

    def __init__(
        self,
        hooks: Hooks,
        writes: Writes,
        branches: Branches,
        product: EdgeProduct,
        readout: Readout,
        relp: bool,
    ) -> None:
        """Keep its parts; `relp` says whether gradients follow the rules of relevance patching."""
        self.hooks, self.writes, self.branches = hooks, writes, branches
        self.product, self.readout, self.relp = product, readout, relp

    def watch(
        self,
        layers: Sequence[SimpleNamespace],
        final: SimpleNamespace,
        final_norm: SimpleNamespace | None,
    ) -> None:
        """Hang all hooks.

        Args:
            layers: The model's layers, from `_layers`.
            final: The final norm, or what stands in its place.
            final_norm: The final norm, if there is one.
        """
        self.branches.watch_ends(layers[0].module, final, final_norm)
        for number, layer in enumerate(layers):
            self.branches.watch(number, layer)
            if self.relp:
                follow_rules(self.hooks, layer)
            self.writes.watch(self.hooks, number, layer, self.product.write)

    def finish(
        self,
        lm_head: Unembedding,
        scored: Sequence[torch.Tensor],
        compared: int,
        reference: torch.Tensor | None,
        checked: torch.Tensor,
    ) -> torch.Tensor:
        """Score when the model has run: [sequence, source, target].

        Args:
            lm_head: The unembedding.
            scored: The scored tokens, and the others as `Readout.score` takes them.
            compared: See there.
            reference: See there.
            checked: Where the sources' sum is compared, int64 [sequence, checked].
        """
        self.residual_error = self.product.residual_error(self.branches.end.detach(), checked)
        checks = self.branches.checks
        self.reading_errors = self.residual_error.new_zeros(0, 0)
        self.gradient_error = self.residual_error.new_zeros(())
        if checks:
            self.reading_errors = self.product.reading_errors(checks)
        hidden = self.branches.hidden.detach()
        scored = [part.to(hidden.device, non_blocking=True) for part in scored]
        weight = lm_head.weight.detach()
        self.readout.score(hidden, scored, lm_head, weight, compared, reference)
        # From here on nobody needs the hidden states themselves.
        del hidden
        self.branches.backward(self.readout.slopes)
        if checks:
            self.gradient_error = checks.gradient_error
        return self.product.close()
