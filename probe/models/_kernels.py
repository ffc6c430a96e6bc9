"""Fused kernels: the same modules, computed with fewer passes over memory.

A frozen forward and backward pass of a 7B model spends a third of its time on norms, gates and
rotations, which read and write whole activations for a few operations each. `liger-kernel` (extra
`[gpu]`) has them in one kernel each and replaces the modules' forward, so that every boundary that
attribution needs stays. What it cannot keep is the activation inside an FFN, so `relp`, whose
rules need it, runs without.

    >>> resolve_kernels("auto", torch.device("cpu"), "llama")
    'eager'
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import unwrap
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Literal

import torch

from probe.errors import ProbeError
from probe.vocabulary import Kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
"""The architectures that fused kernels are tested with."""


def resolve_kernels(
    kernels: Kernels, device: torch.device, model_type: str
) -> Literal["eager", "liger"]:
    """Decide which kernels a model runs with.

    Raises:
        ProbeError: Fused kernels are asked for where they cannot run.
    """
    if kernels == "eager":
        return "eager"
    missing = None
    if device.type != "cuda":
        missing = f"a CUDA device (this is {device})"
    elif model_type not in FUSED:
        missing = f"another architecture than {model_type} ({', '.join(FUSED)})"
    elif find_spec("liger_kernel") is None or find_spec("triton") is None:
        missing = "liger-kernel; install probe with its extra [gpu]"
    if missing is None:
        return "liger"
    if kernels == "liger":
        raise ProbeError(f"kernels liger need {missing}, or use kernels eager")
    return "eager"


def fuse(module: "PreTrainedModel") -> None:
    """Let a model's norms, gates and rotations run as one kernel each; no other model changes."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    names = vars(sys.modules[type(module).__module__])
    before = dict(names)
    own_forward = module.forward
    # It tells of every backend that it could use and that is not installed.
    with _errors_only("liger_kernel.backends"):
        MODEL_TYPE_TO_APPLY_LIGER_FN[module.config.model_type](
            model=module, cross_entropy=False, fused_linear_cross_entropy=False
        )
    assert module.forward == own_forward
    rotation = names[ROTATION]
    names.update(before)
    rotate_by(module, rotation)


ROTATION = "apply_rotary_pos_emb"
"""What every attention of transformers calls, as a function of its architecture's module."""


def rotate_by(module: "PreTrainedModel", rotation: Callable[..., object]) -> None:
    """Let one model rotate queries and keys by another function.

    Args:
        module: The model.
        rotation: Takes and gives what transformers' own function does.
    """
    for part in module.modules():
        forward = type(part).forward
        if isinstance(forward, FunctionType) and ROTATION in unwrap(forward).__code__.co_names:
            part.forward = MethodType(_with_global(forward, ROTATION, rotation), part)


def _with_global(function: FunctionType, name: str, value: object) -> FunctionType:
    """A copy of a function, and of what it wraps, for which a global is something else."""
    wrapped = getattr(function, "__wrapped__", None)
    cells = function.__closure__ or ()
    if wrapped is not None:
        inner = _with_global(wrapped, name, value)
        cells = tuple(CellType(inner) if c.cell_contents is wrapped else c for c in cells)
    names = {**function.__globals__, name: value}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """Let a logger tell of nothing but errors, for a while."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)
