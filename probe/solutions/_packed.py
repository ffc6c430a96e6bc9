"""Packed weights: matrix products of a few rows at the full speed of a CPU.

A step of decoding multiplies a row for each answer by every weight. torch's product of float32
matrices lays a weight out for the processor's registers each time, and with few rows that takes as
long as the product itself; by weights that were laid out once it takes half the time
(docs/generation.md). The layout is oneDNN's, by the operations that torch's own compiler has for
this. They have no gradient, so they stand in for a layer's forward only while a batch is written.

    >>> packed = Packed(model)
    >>> with packed.used():
    ...     tokens = model.network._module.generate(...)
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from probe.models import Model

PACKED_FROM = 200_000
"""Products by smaller weights are as fast without."""

PACKED_BYTES = 4 * 2**30
"""So much may be there twice; nothing of a larger model is packed."""


class Packed:
    """The weights of a model's linear layers, laid out; none of a model to which it is no use."""

    def __init__(self, model: Model) -> None:
        """Lay them out.

        Args:
            model: A model whose weights are here.
        """
        self._forwards: dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]] = {}
        layers = [part for part in model.network._module.modules() if _gains(part)]
        if sum(layer.weight.nbytes for layer in layers) > PACKED_BYTES or not _can():
            return
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
            self._forwards[layer] = partial(_product, weight, layer.bias)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers multiply by these, for a while."""
        own = {layer: vars(layer).get("forward") for layer in self._forwards}
        try:
            for layer, forward in self._forwards.items():
                layer.forward = forward
            yield
        finally:
            for layer, before in own.items():
                if before is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = before


def _product(weight: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found


def _gains(part: torch.nn.Module) -> bool:
    """Whether it is a layer that is faster so: a plain one in float32 on a CPU, and not small."""
    if type(part) is not torch.nn.Linear:
        return False
    weight = part.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.layout == torch.strided and weight.numel() >= PACKED_FROM


def _can() -> bool:
    """Whether this processor and this torch can."""
    known = (
        platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    )
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return known and all(hasattr(torch.ops.mkldnn, name) for name in names)
