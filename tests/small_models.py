"""A small random model of every architecture, made from a config, without the network.

What makes an architecture special is turned up until it matters: windows are shorter than the
sequences, caps bite, multipliers are far from 1, and no norm weight or bias is neutral.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = Path(__file__).parent / "data" / "oracle" / "llama" / "model"

_COMMON = {
    "vocab_size": 97,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_GROUPED_8 = _GROUPED | {"head_dim": 8}
# Not hidden_size / heads: only q, k, v and the output projection know the size of a head.
_GROUPED_12 = _GROUPED | {"head_dim": 12}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

MODELS = {
    "llama": _GROUPED_8 | {"model_type": "llama"},
    "mistral": _GROUPED_8 | {"model_type": "mistral", "sliding_window": 4},
    "qwen2": _GROUPED | {"model_type": "qwen2"},
    "qwen3": _GROUPED_12 | {"model_type": "qwen3"},
    "gemma2": _GROUPED_12
    | _ALTERNATING
    | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": _GROUPED_12
    | _ALTERNATING
    | {"model_type": "gemma3_text", "query_pre_attn_scalar": 4},
    "gpt2": _COMMON
    | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _WIDE | {"model_type": "gpt_neox", "use_parallel_residual": True},
    "gpt_neox-sequential": _WIDE | {"model_type": "gpt_neox", "use_parallel_residual": False},
    "phi3": _GROUPED
    | {"model_type": "phi3", "original_max_position_embeddings": 128, "sliding_window": 4},
    "phi": _WIDE | {"model_type": "phi", "partial_rotary_factor": 0.5},
    "cohere": _GROUPED | {"model_type": "cohere", "logit_scale": 0.4},
    "cohere2": _GROUPED_12 | _ALTERNATING | {"model_type": "cohere2", "logit_scale": 0.4},
    "olmo2": _GROUPED | {"model_type": "olmo2"},
    "granite": _GROUPED
    | {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.6,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "mixtral": _GROUPED_8
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _GROUPED_12
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # Its first layer is dense.
    "qwen3_moe-dense": _GROUPED_12
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    # Every other layer is dense.
    "qwen3_moe-sparse": _GROUPED_12
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
}
"""The settings of each model's config; a name may add to its `model_type` after a hyphen."""


def small_model(name, seed=0, **changes):
    """Build one model of `MODELS`, some settings changed, ready for inference."""
    settings = MODELS[name] | changes
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norm weights start equal and biases at zero
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def save_small_model(folder, name, seed=0, **changes):
    """Save one model of `MODELS`, some settings changed, with the oracle's toy tokenizer."""
    folder = Path(folder)
    small_model(name, seed, **changes).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder
