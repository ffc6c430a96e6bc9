"""Where each architecture writes to and reads from its residual stream: one table.

A row is data: paths of modules, relative to the model (`layers`, `final_norm`) or to one decoder
layer (all others). The source `input` needs no row: it is what enters layer 0. To add an
architecture, add a row under its `model_type` (the key in the model's config.json):

    >>> ARCHITECTURES["llama"].attention_output
    'self_attn'
"""

from dataclasses import dataclass

from probe.errors import ProbeError


@dataclass(frozen=True)
class Architecture:
    """The module paths of one architecture."""

    layers: str
    """The list of decoder layers."""

    final_norm: str
    """The norm before the unembedding; its input is what the target `logits` reads."""

    attention_norm: str
    """The norm of the attention branch; its input is the residual stream."""

    query: str
    """The projection whose input is the branch `a{layer}.q`, after the norm."""

    key: str
    """The projection whose input is the branch `a{layer}.k`, after the norm."""

    value: str
    """The projection whose input is the branch `a{layer}.v`, after the norm."""

    attention_output: str
    """The module whose output is what the attention adds to the residual stream."""

    ffn_norm: str
    """The norm of the FFN branch; its input is the residual stream."""

    ffn_output: str
    """The module whose output is what the FFN adds to the residual stream."""


_LLAMA = Architecture(
    layers="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn",
    ffn_norm="post_attention_layernorm",
    ffn_output="mlp",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def architecture_of(model_type: str) -> Architecture:
    """Look up the row of a `model_type`.

    Raises:
        ProbeError: The table has no such row; a guess could give wrong scores silently.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ProbeError(
            f"architecture {model_type!r} is not in the table (known: {known}); "
            "add a row to probe/architectures.py"
        )
    return ARCHITECTURES[model_type]
