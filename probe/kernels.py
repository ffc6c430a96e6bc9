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
from importlib.util import find_spec
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
    """Let a model's norms, gates and rotations run as one kernel each.

    Only this model changes, but for the rotation: transformers calls it as a function of the
    architecture's module, so it changes for all models of the architecture in this process.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    # It tells of every backend that it could use and that is not installed.
    logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)
    names = vars(sys.modules[type(module).__module__])
    before = dict(names)
    own_forward = module.forward
    MODEL_TYPE_TO_APPLY_LIGER_FN[module.config.model_type](
        model=module, cross_entropy=False, fused_linear_cross_entropy=False
    )
    assert module.forward == own_forward
    for name, value in before.items():
        if name != "apply_rotary_pos_emb":
            names[name] = value
