"""Text decoders inside multimodal models: the same scores as the decoder by itself."""

import pytest
import torch
from small_models import MODELS, save_small_model, small_model
from transformers import AutoConfig, AutoModelForImageTextToText

import probe
from probe.errors import ProbeError
from probe.models import REFUSED, architecture_of

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25], [80, 66, 9, 42]),
]
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPERS = {
    "gemma3": ("gemma3_text", {"vision_config": _VISION, "mm_tokens_per_image": 4}),
    "mistral3": (
        "mistral",
        {"vision_config": _VISION | {"model_type": "pixtral"}, "tie_word_embeddings": False},
    ),
    "qwen2_5_vl": (
        "qwen2",
        {"vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}},
    ),
    "llama4": (
        "llama4_text",
        {
            "vision_config": _VISION
            | {
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {"vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}},
    ),
}


def save_wrapper(folder, name):
    """Save a multimodal model around the weights of one of the small text models."""
    inner, settings = WRAPPERS[name]
    text = {**MODELS[inner]}
    if name == "qwen2_5_vl":
        text["model_type"] = "qwen2_5_vl_text"
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        }
        text["rms_norm_eps"] = 1e-6  # as the text model has it by itself
    config = AutoConfig.for_model(name, text_config=text, **settings)
    torch.manual_seed(0)
    wrapper = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    state = small_model(inner).state_dict()
    own = wrapper.state_dict()
    ends = {
        key: key.replace("language_model.", "").replace("model.model.", "model.") for key in own
    }
    replaced = {key: state[end] for key, end in ends.items() if end in state}
    assert {ends[key] for key in replaced} == set(state)
    wrapper.load_state_dict(own | replaced)
    save_small_model(folder, inner)  # for the tokenizer
    for file in folder.glob("*.safetensors"):
        file.unlink()
    wrapper.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_decoder_inside_has_the_scores_of_the_decoder(tmp_path, name):
    inner, _ = WRAPPERS[name]
    whole = probe.load_model(str(save_wrapper(tmp_path / "whole", name)))
    alone = probe.load_model(str(save_small_model(tmp_path / "alone", inner)))
    assert (whole.n_layers, whole.d_model) == (alone.n_layers, alone.d_model)
    granularity = "block" if inner == "qwen3_5_text" else "qkv"
    for method in ("eap", "exact"):
        one, other = (
            probe.attribute(model, SEQUENCES, method, granularity) for model in (whole, alone)
        )
        assert (one.scores - other.scores).abs().max() <= 1e-5 * other.scores.abs().max()
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    with pytest.raises(ProbeError, match=f"architecture '{name}' is refused: .*; see docs"):
        architecture_of(name)
