"""Quantised checkpoints: turned back into plain weights where transformers can, else refused.

Attribution reads weights and takes gradients through them, which kernels for packed numbers do not
give; so nothing runs quantised.
"""

from copy import deepcopy
from typing import TYPE_CHECKING

from probe.errors import ProbeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEQUANTIZED = ("fp8", "mxfp4", "compressed-tensors")
"""The methods that transformers takes back while it loads; the last needs a package of its name."""


def quantization(config: "PretrainedConfig") -> str | None:
    """By what method a config says that its weights are quantised; None where they are not."""
    table = getattr(config, "quantization_config", None)
    if not table:
        return None
    table = table if isinstance(table, dict) else table.to_dict()
    method = table.get("quant_method")
    if method is None and (table.get("load_in_4bit") or table.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method) or "an unknown method")


def dequantized(place: str, config: "PretrainedConfig") -> "PretrainedConfig":
    """The config by which the weights are read as plain numbers.

    Args:
        place: Where the config is from, for messages.
        config: The config; it is not changed.

    Raises:
        ProbeError: They are quantised by a method that cannot be undone.
    """
    method = quantization(config)
    if method is None:
        return config
    if method not in DEQUANTIZED:
        raise ProbeError(
            f"{place} is quantised by {method}, which cannot be turned back into plain weights "
            "here; give the checkpoint that it was made from"
        )
    if method == "compressed-tensors" and not _installed("compressed_tensors"):
        raise ProbeError(
            f"{place} is quantised by compressed-tensors, which needs: "
            "pip install compressed-tensors"
        )
    config = deepcopy(config)
    table = config.quantization_config
    table = dict(table if isinstance(table, dict) else table.to_dict())
    config.quantization_config = table | {"dequantize": True}
    return config


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
