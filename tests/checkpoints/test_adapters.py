"""PEFT adapters that fit, and those that would leave their base as it was."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fitting import LFS, SFT, configure, refused
from transformers import AutoModelForCausalLM

import probe
from probe.models import check_weights, read_config


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SFT, tmp_path / "model")


def lora(folder, base=SFT, deviation=0.04, **settings):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    adapted = get_peft_model(module, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and deviation:
                parameter.add_(deviation * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder, adapted.eval()


def same_logits(model, expected):
    tokens = torch.tensor([[5, 16, 4, 17, 3, 9]])
    with torch.no_grad():
        found, truth = model.network._module(tokens).logits, expected(tokens).logits
    assert (found - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_a_whole_model_with_an_adapter_beside_it_is_the_whole_model(folder, tmp_path):
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    beside, _ = lora(tmp_path / "a")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(beside / file, folder / file)
    same_logits(probe.load_model(str(folder)), truth)
    (remark,) = remarks_of(str(folder))
    assert "is taken as it is, without the adapter" in remark


def test_an_adapter_with_its_bases_config_beside_it_is_an_adapter(tmp_path):
    folder, adapted = lora(tmp_path / "a")
    shutil.copy(SFT / "config.json", folder / "config.json")
    same_logits(probe.load_model(str(folder)), adapted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "LORA .rank 4. merged into .*16 tensors on q_proj, v_proj"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules: lm_head"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "whole modules: embed_tokens, lm_head"),
        ({"trainable_token_indices": [3, 4]}, "single tokens"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"target_modules": ["lm_head"]}, "on lm_head"),
        ({"target_modules": "all-linear"}, "on .*proj"),
        ({"bias": "lora_only"}, "LORA"),
        ({"layers_to_transform": [1, 2]}, "8 tensors"),
        ({"rank_pattern": {"q_proj": 8}}, "LORA"),
    ],
)
def test_adapters_that_fit_are_applied_and_named(tmp_path, settings, said):
    folder, adapted = lora(tmp_path / "a", **settings)
    (remark,) = remarks_of(str(folder))
    assert re.search(said, remark), remark
    same_logits(probe.load_model(str(folder)), adapted)


def change_adapter(folder, change):
    file = folder / "adapter_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    changed = [change(name, tensor) for name, tensor in state.items()]
    state = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
    save_file(state, file, metadata={"format": "pt"})


BASE = "base_model.model.model."
FIRST = BASE + "layers.0.self_attn.q_proj.lora_A.weight"
NONE = FIRST.replace("self_attn.q", "mlp.up")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, x: (name.replace(BASE, "base_model.model."), x),
            r"16 tensors \(.* fit nowhere in the base; 16 tensors \(.* are missing",
        ),
        (lambda name, x: (name.removeprefix("base_model.model."), x), "fit nowhere"),
        (lambda name, x: (name.replace("q_proj", "wq"), x), "8 tensors .* fit nowhere"),
        (lambda name, x: None if name == FIRST else (name, x), r"1 tensor \(.* is missing"),
        (lambda name, x: None if "layers.3." in name else (name, x), "4 tensors .* are missing"),
        (lambda name, x: (name, x[:, :2] if "lora_B" in name else x), "another shape"),
        (lambda name, x: (name, x[:0]), "another shape"),
        (lambda name, x: (name, x * 0 if "lora_B" in name else x), "changes nothing"),
        (lambda name, x: (NONE if name == FIRST else name, x), "mlp.up_proj.* fits nowhere"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, change, message):
    folder, _ = lora(tmp_path / "a")
    change_adapter(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "another shape"),
        ({"target_modules": ["nothing"]}, "does not fit its base"),
        ({"target_modules": ".*[q_proj"}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "8 tensors .* fit nowhere"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "8 tensors .* are missing"),
        ({"modules_to_save": ["lm_head"]}, "missing"),
        ({"peft_type": "NEW"}, "cannot read the config of the adapter"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "adds tokens to the prompt"),
    ],
)
def test_an_adapters_config_that_does_not_fit(tmp_path, changes, message):
    folder, _ = lora(tmp_path / "a")
    configure(folder, "adapter_config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"([a-z0-9_.]+)+!"},
        {"rank_pattern": {"(.*)*(.*)*!": 8}},
        {"layers_pattern": ["([a-z0-9_.]+)+!"], "layers_to_transform": [0]},
    ],
)
def test_a_pattern_that_never_ends(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("probe.checkpoints._patterns.SECONDS", 1.0)
    folder, _ = lora(tmp_path / "a")
    configure(folder, "adapter_config.json", **changes)
    refused(folder, "its patterns .* take more than")


def test_a_pattern_that_ends_is_one(tmp_path):
    pattern = r"(model\.)*layers\.\d+\..+\.(q|v)_proj"
    folder, adapted = lora(tmp_path / "a", target_modules=pattern)
    same_logits(probe.load_model(str(folder)), adapted)


def test_an_adapter_without_weights(tmp_path):
    folder, _ = lora(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(LFS)
    refused(folder, "is a Git LFS pointer")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "holds no weights .adapter_model.safetensors")


def test_a_base_that_moved(tmp_path):
    base = tmp_path / "models" / "base"
    shutil.copytree(SFT, base)
    folder, adapted = lora(tmp_path / "models" / "lora", base)
    for place in ("base", "../base"):
        configure(folder, "adapter_config.json", base_model_name_or_path=place)
        same_logits(probe.load_model(str(folder)), adapted)
    configure(folder, "adapter_config.json", base_model_name_or_path="/cluster/base")
    refused(folder, f"does not exist; correct base_model_name_or_path in {folder}")
    (base / "model.safetensors").unlink()
    configure(folder, "adapter_config.json", base_model_name_or_path=str(base))
    refused(folder, f"the base of the adapter {folder}: {base} holds no weights")


def test_an_adapter_with_more_tokens_than_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    module = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    module.resize_token_embeddings(20)
    torch.manual_seed(0)
    adapted = get_peft_model(
        module,
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.04)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    (remark,) = remarks_of(str(tmp_path / "a"))
    assert "a resized vocabulary" in remark
    model = probe.load_model(str(tmp_path / "a"))
    same_logits(model, adapted)
    assert model.config.vocab_size == 20


def remarks_of(reference):
    """What a model's files leave out or apply."""
    return check_weights(reference, read_config(reference))
