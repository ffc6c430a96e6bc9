"""Flash attention for the continuous engine, with torch alone.

With flash attention, transformers runs requests of any lengths together without a mask; without,
its cost per step grows with the square of their number. The package `flash-attn` and the kernels
of the hub are often not there, but torch holds the same kernel. This module lends it, under a
name that transformers knows from `register`.

    >>> model.config._attn_implementation = register()
"""

import inspect
from typing import Any

import torch

NAME = "probe_flash"
"""transformers takes a name with `flash` in it for one that needs no mask."""


def register() -> str:
    """Make the attention known to transformers, and give the name to set."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    name = paged(NAME)
    AttentionInterface.register(name, paged_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def paged(attention: str) -> str:
    """The name of an attention when it works for the continuous engine; older versions differ."""
    from transformers import ContinuousBatchingConfig

    known = ContinuousBatchingConfig.__dataclass_fields__
    return attention if "auto_switch_to_flash" in known else f"paged|{attention}"


def usable(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether torch's kernel runs here: on Ampere or newer, in half precision."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_width % 8 == 0
        and head_width <= 256
    )


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **given: Any,  # noqa: ANN401 - what transformers hands on differs in type
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over packed requests, as transformers asks for it.

    Args:
        module: The layer's attention.
        query: Of the new tokens of all requests, `[1, heads, tokens, width]`.
        key: Likewise, with the heads of keys.
        value: Likewise.
        attention_mask: Not there.
        scaling: Of the logits.
        sliding_window: How many tokens each sees, itself included; None for all before it.
        given: The cache, and where each request begins and ends in it.

    Returns:
        `[1, tokens, heads, width]`.

    Raises:
        NotImplementedError: The model asks for something else, such as a soft cap.
    """
    for name in ("softcap", "s_aux", "position_bias", "block_table"):
        if given.get(name) is not None:
            raise NotImplementedError(f"flash attention of torch has no {name}")
    cache, layer = given["cache"], module.layer_idx
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(key, value, layer, given)  # says in `given` what is this layer's
        key, value = (states.squeeze(0).transpose(0, 1) for states in (key, value))
    else:
        indices = {name: given[name] for name in ("read_index", "write_index")}
        key, value = cache.update(key, value, layer, **indices)
    kind = "sliding_attention" if sliding_window else "full_attention"
    ends_query, ends_key, longest_query, longest_key = (
        part[kind] if isinstance(part, dict) else part
        for part in (
            given["cu_seq_lens_q"],
            given["cu_seq_lens_k"],
            given["max_length_q" if "max_length_q" in given else "max_seqlen_q"],
            given["max_length_k" if "max_length_k" in given else "max_seqlen_k"],
        )
    )
    output = varlen(
        query.squeeze(0).transpose(0, 1).contiguous(),
        key.contiguous(),
        value.contiguous(),
        ends_query.to(torch.int32),
        ends_key.to(torch.int32),
        longest_query,
        longest_key,
        scaling,
        sliding_window,
    )
    return output.unsqueeze(0), None


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_query: torch.Tensor,
    ends_key: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each of several sequences, `[tokens, heads, width]`.

    The last query of a sequence is at its last key. Sequences end where `ends_*` say, from 0 on.
    """
    output = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ends_query,
        ends_key,
        longest_query,
        longest_key,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return output
