"""The rules of relevance patching, RelP (Jafari et al. 2025, arXiv 2508.21258), for FFNs.

The LN rule is in `_norm_vjp`. It travels with a trace to a server; see `_hooks`.

    >>> follow_rules(hooks, layer)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from probe.tracing._hooks import Hooks


def identity_rule(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An activation's output as the line through the origin at this input."""
    slope = torch.where(value == 0, torch.zeros_like(value), output / value)
    return value * slope.detach()


def half_rule(product: torch.Tensor) -> torch.Tensor:
    """A product each factor of which gets half of its gradient."""
    return (product + product.detach()) / 2


def follow_rules(hooks: Hooks, modules: SimpleNamespace) -> None:
    """Let the gradients of a layer's FFN follow the rules.

    Args:
        hooks: Where to hang hooks.
        modules: The layer's modules, from `_layers`.
    """
    if modules.experts is None:
        if modules.activation:
            hooks.at_output(modules.activation, identity_rule)
        if modules.product:
            hooks.at_input(modules.product, half_rule)
        return
    experts = modules.experts._module
    if modules.shared_expert:
        shared = modules.shared_expert._module
        hooks.at_output(SimpleNamespace(_module=shared.act_fn), identity_rule)
        hooks.at_input(SimpleNamespace(_module=shared.down_proj), half_rule)

    def mix(
        _: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output once more, by the rules; `chosen` and `shares` [token, rank]."""
        mixed = torch.zeros_like(tokens)  # [token, d_model]
        for expert in range(experts.num_experts):
            at, rank = (chosen == expert).nonzero(as_tuple=True)
            both = tokens[at] @ experts.gate_up_proj[expert].T
            gate, up = both.chunk(2, dim=-1)
            inner = half_rule(identity_rule(experts.act_fn(gate), gate) * up)
            answer = inner @ experts.down_proj[expert].T
            answer = half_rule(answer * shares[at, rank, None])
            mixed = mixed.index_add(0, at, answer.to(mixed.dtype))
        return mixed

    hooks.at_output(modules.experts, mix)
