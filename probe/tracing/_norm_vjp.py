"""Gradients through norms in closed form, without a walk through autograd.

It travels with a trace to a server; see `_hooks`.

    >>> vjp = NormVjp(centred=False, offset=0.0, epsilon=1e-5).at(value, norm.weight)
    >>> vjp(gradient)                            # [..., d_model], as value
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    Vjp = Callable[[torch.Tensor], torch.Tensor]
    """A vector-Jacobian product: from the gradient behind a norm to the gradient before it."""


class NormVjp:
    """The norms of one model.

    With x the (centred) input, r = 1 / sqrt(mean(x^2) + epsilon) and a = weight * gradient, the
    gradient before a norm is r a - r^3 <a, x> x / d (a centred too).
    """

    def __init__(
        self, centred: bool, offset: float, epsilon: float, constant_rate: bool = False
    ) -> None:
        """Say what norms they are.

        Args:
            centred: Whether norms subtract the mean.
            offset: What is added to norms' weights.
            epsilon: What norms add to the mean square.
            constant_rate: Whether r counts as a constant (the LN rule of relevance patching).
        """
        self.centred, self.offset, self.epsilon = centred, offset, epsilon
        self.constant_rate = constant_rate

    def through(self, value: torch.Tensor, norm: torch.nn.Module) -> Vjp:
        """The product of one norm at one input; see `at`."""
        return self.at(value, getattr(norm, "weight", None), self._epsilon(norm))

    def output(self, value: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        """What a norm should give by the formula whose gradient is taken, [..., d_model]."""
        if self.centred:
            value = value - value.mean(-1, keepdim=True)
        rate = (value.square().mean(-1, keepdim=True) + self._epsilon(norm)).rsqrt()
        output = value * rate * self._gain(getattr(norm, "weight", None), value)
        bias = getattr(norm, "bias", None)
        return output if bias is None else output + bias.to(value.device, value.dtype)

    def _epsilon(self, norm: torch.nn.Module) -> float:
        """What a norm adds to the mean square."""
        for name in ("variance_epsilon", "eps", "epsilon"):
            if isinstance(getattr(norm, name, None), float | int):
                return float(getattr(norm, name))
        return self.epsilon

    def _gain(self, weight: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        """By what a norm multiplies: [d_model]."""
        if weight is None:
            return value.new_ones(value.shape[-1])
        return weight.to(value.device, value.dtype) + self.offset

    def at(
        self, value: torch.Tensor, weight: torch.Tensor | None, epsilon: float | None = None
    ) -> Vjp:
        """The product at one input.

        What does not depend on the gradient is computed once for the query, key and value that
        read one norm.

        Args:
            value: What the norm reads, [..., d_model].
            weight: Its weight, [d_model]; None where it has none.
            epsilon: What it adds to the mean square; the model's if not given.
        """
        width, exact = value.shape[-1], torch.promote_types(value.dtype, torch.float32)
        centred, constant_rate = self.centred, self.constant_rate
        epsilon = self.epsilon if epsilon is None else epsilon
        # Looked up here: it cannot be sent.
        native = getattr(torch.ops.aten, "_fused_rms_norm_backward", None)
        plain = weight is not None and not (centred or self.offset or constant_rate)
        if native is not None and plain and value.device.type == "cuda":
            # torch's own kernels read and write each gradient once; they are for CUDA alone.
            _, rate = torch.ops.aten._fused_rms_norm(value, [width], weight, epsilon)
            wanted = [True, False]
            return lambda gradient: native(gradient, value, [width], rate, weight, wanted)[0]
        wide = value.to(exact)
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        rate = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()  # [..., 1]
        gain = self._gain(weight, wide)
        straight, along = rate * gain, wide * gain  # [..., d_model]
        shrink = rate**3 / -width

        def vjp(gradient: torch.Tensor) -> torch.Tensor:
            result = gradient * straight
            if not constant_rate:
                radial = (gradient * along).sum(-1, keepdim=True)  # [..., 1]
                result = torch.addcmul(result, wide, radial * shrink, out=result)
            if centred:
                result -= result.mean(-1, keepdim=True)
            return result.to(value.dtype)

        return vjp
