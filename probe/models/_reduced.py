"""A model of reduced size with random weights, made from a config alone.

Whether an architecture is understood does not depend on its size, so a config is enough to check
one whose weights are not here, or too large.

    >>> model = reduced_model("org/large", read_config("org/large"))
    >>> model.n_layers, model.d_model
    (2, 64)
"""

import math
from copy import deepcopy
from typing import TYPE_CHECKING

from probe.errors import ProbeError, reason
from probe.models._architectures import Architecture
from probe.models._loading import Model, read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTH, HEAD, VOCABULARY, MOST_LAYERS = 64, 16, 512, 12

_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "moe_latent_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "linear_num_value_heads"), WIDTH // HEAD),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "n_groups"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "mamba_head_dim"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_num_heads"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "vocab_size": VOCABULARY,
}
"""What a size becomes where a config has it and it is larger."""

_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")


def reduced_model(
    reference: str, config: "PretrainedConfig", row: Architecture, dtype: str = "float64"
) -> Model:
    """Build a small model of an architecture, its weights random.

    Args:
        reference: What it is called, and where its tokenizer may be.
        config: Its config, which is not changed.
        row: Its row of the architecture table.
        dtype: Its precision.

    Raises:
        ProbeError: transformers cannot build it so small.
    """
    import torch
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoModelForCausalLM

    small = _reduced(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
            for parameter in module.parameters():
                if parameter.ndim == 1:  # norms start equal, and biases at zero
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
            module.eval()(input_ids=torch.arange(4)[None], use_cache=False)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ProbeError(
            f"{reference}: cannot build {config.model_type} of reduced size: {reason(error)}"
        ) from error
    if hasattr(module, "set_experts_implementation") and row.experts:
        module.set_experts_implementation("eager")  # the fast kernel knows no float64
    module = module.to(getattr(torch, dtype)).requires_grad_(False).eval()
    try:
        tokenizer = read_tokenizer(reference)
    except ProbeError:
        tokenizer = read_tokenizer("probe:tiny-math/sft")
    device = torch.device("cpu")
    network = TransformersModel(module, task="text-generation", tokenizer=tokenizer, device=device)
    return Model(reference, network, tokenizer, module.config, row, device, module.dtype)


def _reduced(config: "PretrainedConfig") -> "PretrainedConfig":
    """The same config with small sizes, and as many layers as show every kind of layer."""
    small = deepcopy(config)
    heads = getattr(config, "num_attention_heads", None)
    for key, size in _SIZES.items():
        now = getattr(config, key, None)
        if key == "num_key_value_heads" and now == heads:
            size = WIDTH // HEAD
        if isinstance(now, int) and now > size:
            setattr(small, key, size)
    kinds = next(filter(None, (list(getattr(config, key, None) or ()) for key in _LISTS[:2])), [])
    first = [kinds.index(kind) for kind in set(kinds)]
    layers = min(MOST_LAYERS, max(2, 1 + max(first, default=0)), int(config.num_hidden_layers))
    dense = getattr(config, "first_k_dense_replace", None)
    if dense:
        small.first_k_dense_replace = 1
    for key in _LISTS:
        found = getattr(config, key, None)
        if found:
            setattr(small, key, list(found)[:layers])
    if getattr(config, "moe_layers", None):
        small.moe_layers = [layer for layer in config.moe_layers if layer < layers]
    if not getattr(config, "layers_block_type", None):
        small.num_hidden_layers = layers
    for key, size in (("head_dim", HEAD), ("num_key_value_heads", WIDTH // HEAD)):
        if getattr(config, key, size) is None:
            setattr(small, key, size)
    if getattr(small, "qk_rope_head_dim", None) and getattr(small, "head_dim", None):
        small.head_dim = small.qk_rope_head_dim  # which positions are made for
    small.initializer_range = 0.2
    _shorten_rotation(small)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, key, None) is not None:
            setattr(small, key, 0)
    return small


def _shorten_rotation(config: "PretrainedConfig") -> None:
    """Let what is said of parts of a head fit the smaller head."""
    tables = getattr(config, "rope_parameters", None) or {}
    for table in (tables, *(part for part in tables.values() if isinstance(part, dict))):
        share = float(table.get("partial_rotary_factor") or 1)
        half = math.floor(HEAD * share) // 2
        if "mrope_section" in table:
            third = half // 3
            table["mrope_section"] = [half - 2 * third, third, third]
        for key in ("short_factor", "long_factor"):
            if key in table:
                table[key] = list(table[key])[:half]
