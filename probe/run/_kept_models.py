"""Models that stay in memory from one phase of a run to the next.

A run solves with a model, scores it, and scores it again as a control: each time it is loaded, its
adapter merged, its row of the table checked. Models that are small beside the memory of their
device need not leave it meanwhile.

    >>> kept = KeptModels()
    >>> kept.get("probe:tiny-math/sft", "cpu", "eager", load)
"""

import os
from collections.abc import Callable

import torch

from probe.models import Model

EACH, ALL = 0.05, 0.2
"""Of a device's memory one model that stays may take so much, and all together so much."""


class KeptModels:
    """The models of a run, in one process."""

    def __init__(self) -> None:
        """Start with none."""
        self._models: dict[tuple[str, str, str], Model] = {}

    def __reduce__(self) -> tuple[type["KeptModels"], tuple[()]]:
        """Models do not travel to another process."""
        return KeptModels, ()

    def get(self, reference: str, device: str, kernels: str, load: Callable[[], Model]) -> Model:
        """A model that is here, or that is loaded now.

        Args:
            reference: Which one.
            device: Where it runs; several joined by commas are never kept.
            kernels: Its kernels.
            load: What loads it.
        """
        key = (reference, device, kernels)
        for other in self._models.values():
            other.recordings.clear()  # of those that do not run now
        if key in self._models:
            return self._models[key]
        model = load()
        sizes = [_bytes(other) for other in self._models.values() if other.device == model.device]
        memory, size = _memory(model.device), _bytes(model)
        if "," not in device and size <= EACH * memory and sum(sizes) + size <= ALL * memory:
            self._models[key] = model
        return model


def _bytes(model: Model) -> int:
    """What a model's weights take."""
    return sum(weight.nbytes for weight in model.network._module.parameters())


def _memory(device: torch.device) -> int:
    """What a device has in all; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0
