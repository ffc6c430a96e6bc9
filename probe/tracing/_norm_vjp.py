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

    def at(self, value: torch.Tensor, weight: torch.Tensor) -> Vjp:
        """The product at one input.

        What does not depend on the gradient is computed once for the query, key and value that
        read one norm.

        Args:
            value: What the norm reads, [..., d_model].
            weight: Its weight, [d_model].
        """
        width, exact = value.shape[-1], torch.promote_types(value.dtype, torch.float32)
        centred, constant_rate = self.centred, self.constant_rate
        # Looked up here: it cannot be sent.
        native = getattr(torch.ops.aten, "_fused_rms_norm_backward", None)
        plain = not (centred or self.offset or constant_rate)
        if native is not None and plain and value.device.type == "cuda":
            # torch's own kernels read and write each gradient once; they are for CUDA alone.
            _, rate = torch.ops.aten._fused_rms_norm(value, [width], weight, self.epsilon)
            wanted = [True, False]
            return lambda gradient: native(gradient, value, [width], rate, weight, wanted)[0]
        wide = value.to(exact)
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        rate = (wide.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()  # [..., 1]
        gain = weight.to(exact) + self.offset  # [d_model]
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
