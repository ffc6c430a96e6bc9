"""Where each architecture writes to and reads from its residual stream: one table.

A row is data: paths of modules, relative to the model (`layers`, `final_norm`) or to one decoder
layer (all others), and how their numbers are laid out. The source `input` needs no row: it is what
enters layer 0, after any scaling or position embedding. To add an architecture, add a row under
its `model_type` (the key in the model's config.json); docs/architectures.md shows how, and the
first batch of every run checks that the sources a row names sum to the residual stream.

    >>> ARCHITECTURES["llama"].attention_output
    'self_attn'
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from probe.errors import ProbeError
from probe.registry import Registry

GUIDE = "docs/architectures.md"


@dataclass(frozen=True)
class Architecture:
    """The modules of one architecture, in the order in which a layer runs them."""

    layers: str = "model.layers"
    """The list of decoder layers."""

    unembedding: str = "lm_head"
    """What makes logits of what the final norm gives."""

    final_norm: str = "model.norm"
    """The norm before the unembedding; its input is what the target `logits` reads."""

    attention_norm: str | None = "input_layernorm"
    """The norm of the attention branch, whose input is the residual stream; None where the
    attention reads the stream itself."""

    attention: str = "self_attn"
    """The attention block."""

    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """The query, key and value projections, or the one projection that holds all three."""

    layout: Literal["split", "concatenated", "interleaved", "latent"] = "split"
    """Where query, key and value lie: in modules of their own; behind one another in one output;
    head by head in one output; or, with `latent`, keys and values are made of one narrow vector
    (MLA, DeepSeek-V2, arXiv 2405.04434): `projections` are then where the query begins (of several
    the first that is there), the one to that vector and the keys' rotated part, and the one from
    it to the rest of the keys and to the values."""

    head_norms: tuple[str, ...] = ()
    """Norms inside the attention, where there are such: of query and key, or of what they are
    made of."""

    attention_projection: str = "self_attn.o_proj"
    """The output projection of the attention; its input holds the heads side by side."""

    transposed: bool = False
    """Whether its weight is [input, output], as in GPT-2's Conv1D."""

    attention_output: str = "self_attn"
    """The module whose output is what the attention adds to the residual stream."""

    ffn_norm: str | None = "post_attention_layernorm"
    """The norm of the FFN branch, likewise."""

    ffn: str = "mlp"
    """The FFN block."""

    ffn_activation: str = "mlp.act_fn"
    """Its activation function."""

    ffn_product: str | None = "mlp.down_proj"
    """The module whose input is the product of gate and up projection; None without a gate."""

    experts: str | None = None
    """The experts of a mixture, which hold activation and product; None for a dense FFN."""

    ffn_output: str = "mlp"
    """The module whose output is what the FFN adds to the residual stream."""

    centred_norms: bool = False
    """Whether norms subtract the mean (LayerNorm) or not (RMSNorm)."""

    norm_offset: float = 0.0
    """What is added to norms' weights: 1 where they are kept as a distance from it."""

    logits_divisor: str | None = None
    """The key of the config by which logits are divided."""

    logits_multiplier: str | None = None
    """The key of the config by which logits are multiplied."""

    logits_cap: str | None = None
    """The key of the config that says to what size logits are squashed."""

    residual_scale: str | None = None
    """The key of the config by which every output is multiplied before it is added."""

    parallel: str | bool = False
    """Whether a layer's FFN reads what its attention reads, and not the attention's output too;
    or the key of the config that says so."""

    shared_norm: str | bool = False
    """Whether attention and FFN of a layer read what one norm gives, the attention's, and so are
    parallel; or the key of the config that says so. `ffn_norm` then counts for nothing."""

    other_mixers: tuple[str, ...] = ()
    """What stands in the attention's place in some layers: linear attention, a convolution, a state
    space. It is one source and one target, and has no query, key and value."""

    single_block: str | None = None
    """The key of the config that lists, where a layer is an attention or an FFN and never both,
    which one each layer is."""

    query_gate: bool = False
    """Whether the query projection gives, behind each head's query, a gate for that head's output;
    it counts as a part of the query."""

    key_value_latent: tuple[str, str] | None = None
    """For the layout `latent`: the norm of what keys and values are made of, and the key of the
    config that says how wide that is."""

    experts_projection: str | None = None
    """What makes an output of d_model numbers of the experts' sum, where that is narrower."""

    shared_expert: str | None = None
    """Of a mixture the expert that every token has; for `relp` it holds activation and product like
    an FFN."""

    relp: bool = True
    """Whether the rules of relevance patching are known for its blocks."""

    def __post_init__(self) -> None:
        """Refuse one norm for two branches, unless the row says that they share it.

        Raises:
            ProbeError: It does not say so.
        """
        said = self.shared_norm or self.single_block
        if self.ffn_norm and self.ffn_norm == self.attention_norm and not said:
            raise ProbeError(
                f"a row names one norm, {self.ffn_norm}, for attention and FFN: if both read what "
                f"it gives, say shared_norm=True; see {GUIDE}"
            )


_LLAMA = Architecture()
_MOE = replace(_LLAMA, experts="mlp.experts")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GEMMA2 = replace(
    _LLAMA,
    attention_output="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_output="post_feedforward_layernorm",
    norm_offset=1.0,
    logits_cap="final_logit_softcapping",
)

_COHERE = replace(_LLAMA, shared_norm=True, centred_norms=True, logits_multiplier="logit_scale")

_NORMED = replace(_LLAMA, head_norms=_QK_NORMS)
_POST_NORMED = replace(
    _NORMED,
    attention_norm=None,
    attention_output="post_attention_layernorm",
    ffn_norm=None,
    ffn_output="post_feedforward_layernorm",
)
_UP_DOWN = replace(_LLAMA, ffn_product=None, centred_norms=True)
_FUSED_FFN = replace(_LLAMA, ffn_activation="mlp.activation_fn")
_SHARED_MOE = replace(_MOE, head_norms=_QK_NORMS, shared_expert="mlp.shared_experts")
_LATENT = replace(
    _MOE,
    projections=(
        *("self_attn.q_proj", "self_attn.q_a_proj"),
        *("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"),
    ),
    layout="latent",
    head_norms=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    key_value_latent=("self_attn.kv_a_layernorm", "kv_lora_rank"),
    shared_expert="mlp.shared_experts",
)
_GATED_DELTA = replace(
    _LLAMA,
    head_norms=_QK_NORMS,
    norm_offset=1.0,
    other_mixers=("linear_attn",),
    query_gate=True,
)
_GATED_DELTA_MOE = replace(
    _GATED_DELTA, experts="mlp.experts", shared_expert="mlp.shared_expert", relp=False
)

_ROWS: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, head_norms=_QK_NORMS),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norms=_QK_NORMS),
    "gpt2": Architecture(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention="attn",
        projections=("attn.c_attn",),
        layout="concatenated",
        attention_projection="attn.c_proj",
        transposed=True,
        attention_output="attn",
        ffn_norm="ln_2",
        ffn_activation="mlp.act",
        ffn_product=None,
        centred_norms=True,
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        projections=("attention.query_key_value",),
        layout="interleaved",
        attention_projection="attention.dense",
        attention_output="attention",
        ffn_activation="mlp.act",
        ffn_product=None,
        centred_norms=True,
        parallel="use_parallel_residual",
    ),
    "phi3": replace(
        _LLAMA,
        projections=("self_attn.qkv_proj",),
        layout="concatenated",
        ffn_activation="mlp.activation_fn",
    ),
    "phi": replace(
        _LLAMA,
        final_norm="model.final_layernorm",
        attention_projection="self_attn.dense",
        shared_norm=True,
        ffn_activation="mlp.activation_fn",
        ffn_product=None,
        centred_norms=True,
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "olmo": replace(_LLAMA, centred_norms=True),
    "olmo2": _POST_NORMED,
    "olmo3": _POST_NORMED,
    "olmoe": replace(_MOE, head_norms=_QK_NORMS),
    "flex_olmo": replace(_POST_NORMED, experts="mlp.experts"),
    "exaone4": _POST_NORMED,
    "smollm3": _LLAMA,
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "seed_oss": _LLAMA,
    "cwm": _LLAMA,
    "helium": _LLAMA,
    "arcee": replace(_LLAMA, ffn_product=None),
    "apertus": replace(
        _NORMED,
        attention_norm="attention_layernorm",
        ffn_norm="feedforward_layernorm",
        ffn_product=None,
    ),
    "nemotron": replace(_UP_DOWN, norm_offset=1.0),
    "starcoder2": replace(_UP_DOWN, ffn_activation="mlp.act"),
    "stablelm": replace(_LLAMA, centred_norms=True, shared_norm="use_parallel_residual"),
    "glm": _FUSED_FFN,
    "glm4": replace(
        _FUSED_FFN,
        attention_output="post_self_attn_layernorm",
        ffn_output="post_mlp_layernorm",
    ),
    "glm4_moe": _SHARED_MOE,
    "glm4_moe_lite": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": _SHARED_MOE,
    "minimax_m2": replace(_MOE, head_norms=_QK_NORMS),
    "qwen2_moe": replace(_MOE, shared_expert="mlp.shared_expert", relp=False),
    "phimoe": replace(_MOE, centred_norms=True),
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": replace(_MOE, shared_expert="mlp.shared_experts"),
    "hunyuan_v1_dense": replace(
        _LLAMA, head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
    "hunyuan_v1_moe": replace(
        _MOE,
        head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        shared_expert="mlp.shared_mlp",
    ),
    "granitemoe": replace(
        _LLAMA,
        ffn="block_sparse_moe",
        experts="block_sparse_moe.experts",
        ffn_output="block_sparse_moe",
        residual_scale="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    "gpt_oss": replace(_MOE, relp=False),
    "llama4_text": replace(
        _LLAMA,
        ffn="feed_forward",
        ffn_activation="feed_forward.activation_fn",
        ffn_product="feed_forward.down_proj",
        experts="feed_forward.experts",
        shared_expert="feed_forward.shared_expert",
        ffn_output="feed_forward",
        relp=False,
    ),
    "qwen3_next": _GATED_DELTA_MOE,
    "qwen3_5_text": replace(_GATED_DELTA, relp=False),
    "qwen3_5_moe_text": _GATED_DELTA_MOE,
    "lfm2": replace(
        _LLAMA,
        final_norm="model.embedding_norm",
        attention_norm="operator_norm",
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        attention_projection="self_attn.out_proj",
        ffn_norm="ffn_norm",
        ffn="feed_forward",
        ffn_output="feed_forward",
        other_mixers=("conv",),
        relp=False,
    ),
    "nemotron_h": replace(
        _LLAMA,
        final_norm="model.norm_f",
        attention_norm="norm",
        attention="mixer",
        projections=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        attention_projection="mixer.o_proj",
        attention_output="mixer",
        ffn_norm="norm",
        ffn="mixer",
        experts="mixer.experts",
        experts_projection="mixer.fc2_latent_proj",
        shared_expert="mixer.shared_experts",
        ffn_output="mixer",
        single_block="layers_block_type",
        relp=False,
    ),
    "gptj": Architecture(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention="attn",
        projections=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        attention_projection="attn.out_proj",
        attention_output="attn",
        ffn_activation="mlp.act",
        ffn_product=None,
        centred_norms=True,
        shared_norm=True,
    ),
    "granite": replace(
        _LLAMA, residual_scale="residual_multiplier", logits_divisor="logits_scaling"
    ),
    "mixtral": _MOE,
    "qwen3_moe": replace(_MOE, head_norms=_QK_NORMS),
}

ARCHITECTURES = Registry("architecture", Architecture, _ROWS)

INSIDE = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text decoders that exist inside a multimodal model only, by the row whose modules they have."""

REFUSED = {
    "deepseek_v4": "its residual stream is four streams that every block mixes (hyper-connections)",
    "gemma3n": "its residual stream is four streams that every block mixes (AltUp)",
    "gemma3n_text": "its residual stream is four streams that every block mixes (AltUp)",
    "gemma4": "routers read the residual stream beside the branches, and layers multiply it",
    "gemma4_text": "routers read the residual stream beside the branches, and layers multiply it",
    "minimax": "every block multiplies the residual stream, so sources do not sum to it",
    "falcon_h1": "attention and state space of a layer are added with factors of their own",
    "granitemoeshared": "a layer's FFN is two modules side by side",
    "granitemoehybrid": "a layer's FFN is two modules side by side",
    "longcat_flash": "a layer has two attentions and two FFNs",
    "deepseek_v32": "an indexer chooses what is attended to, which a gradient does not see",
    "glm_moe_dsa": "an indexer chooses what is attended to, which a gradient does not see",
    "mamba": "it has no attention and no FFN: a layer is one state space",
    "mamba2": "it has no attention and no FFN: a layer is one state space",
    "rwkv": "it has no attention: a layer mixes in time by a recurrence",
    "olmo_hybrid": "its layers have norms before or behind blocks, by their kind",
}
"""Architectures that are known and cannot be right, each with the reason."""


class Heads(NamedTuple):
    """How many heads an attention has, and how wide."""

    query: int
    """Query heads; each writes to the residual stream."""

    key_value: int
    """Key and value heads, as they are: never expanded to the query heads."""

    width: int
    """Numbers per head."""


def architecture_of(model_type: str) -> Architecture:
    """Look up the row of a `model_type`.

    Raises:
        ProbeError: The table has no such row; a guess could give wrong scores silently.
    """
    model_type = INSIDE.get(model_type, model_type)
    if model_type in REFUSED and model_type not in ARCHITECTURES:
        raise ProbeError(
            f"architecture {model_type!r} is refused: {REFUSED[model_type]}; see {GUIDE}"
        )
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ProbeError(
            f"architecture {model_type!r} is not in the table (known: {known}); "
            f"{GUIDE} shows how to add it"
        )
    return ARCHITECTURES[model_type]


def projection_columns(
    layout: str, heads: Heads, branch: int, head: int | None, gates: int = 1
) -> tuple[int, list[int]]:
    """Where one branch of an attention lies: which projection, and which columns of its output.

    Args:
        layout: `Architecture.layout`.
        heads: The model's heads.
        branch: 0 for query, 1 for key, 2 for value.
        head: One head of the branch, or None for all of them.
        gates: How many times as wide a query is as a head.
    """
    counts = (heads.query, heads.key_value, heads.key_value)
    chosen = range(counts[branch]) if head is None else (head,)
    if layout == "split":
        wide = heads.width * (gates if branch == 0 else 1)
        return branch, [number * wide + offset for number in chosen for offset in range(wide)]
    if layout == "concatenated":
        before = sum(counts[:branch])
        starts = [(before + number) * heads.width for number in chosen]
    else:
        starts = [(3 * number + branch) * heads.width for number in chosen]
    columns = [start + offset for start in starts for offset in range(heads.width)]
    return 0, columns
