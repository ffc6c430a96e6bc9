"""Flash attention for the continuous engine, with torch alone.

With flash attention, transformers runs requests of any lengths together without a mask; without,
its cost per step grows with the square of their number. The package `flash-attn` and the kernels
of the hub are often not there, and take no float32, but torch holds the same kernel, and another
one for float32. This module lends them, and `continuous` makes them known to transformers.
"""

import torch

NAME = "probe_flash"
"""transformers takes a name with `flash` in it for one that needs no mask."""

_CAUSAL_FROM_THE_END = 2
"""How torch's kernel for float32 calls a mask whose last query sees the last key."""


def usable(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether torch's kernels run here: on Ampere or newer."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and head_width % 8 == 0
        and head_width <= 256
    )


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
    if query.dtype == torch.float32:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        return torch.ops.aten._efficient_attention_forward(
            *(query[None], key[None], value[None], None),
            *(ends_query, ends_key, longest_query, longest_key),
            0.0,
            _CAUSAL_FROM_THE_END,
            scale=scaling,
            window_size=window,
        )[0][0]
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


def among_first(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scaling: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each row's queries to its first few keys, `[row, query, heads, width]`.

    Args:
        query: `[row, query, heads, width]`.
        key: `[row, position, heads, width]`.
        value: Likewise.
        seen: How many of its keys each row sees, `[row]`.
        scaling: Of the logits.
        window: Of these the last so many, where there is one query.

    Raises:
        NotImplementedError: A window in float32, which torch's kernel does not have.
    """
    rows, queries, positions = len(query), query.shape[1], key.shape[1]
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    parts = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
    ends = (numbers * queries, numbers * positions, queries, positions)
    seen = seen.to(torch.int32)
    if window is not None and query.dtype == torch.float32:
        raise NotImplementedError("no kernel of torch has a window for one query in float32")
    if query.dtype == torch.float32:
        output = torch.ops.aten._efficient_attention_forward(
            *(part[None] for part in parts), None, *ends, 0.0, 0, scale=scaling, seqlen_k=seen
        )[0][0]
    else:
        output = torch.ops.aten._flash_attention_forward(
            *(*parts, *ends, 0.0, window is not None, False),
            scale=scaling,
            seqused_k=seen,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )[0]
    return output.unflatten(0, (rows, queries))
