import fnmatch
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, save_random_model
from transformers import AutoModelForCausalLM

import probe
from probe.checkpoints import _references as checkpoints
from probe.checkpoints import find_checkpoint, fingerprint, weight_files
from probe.errors import ProbeError
from probe.models import check_pair, read_config
from probe.recipe import read_recipe
from probe.run import make_plan

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"


def save_adapter(folder, base, seed=0, **changes):
    """A LoRA adapter as peft saves it, with weights that change what the model says."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    adapted = get_peft_model(module, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # new adapters are zero here, and change nothing
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "lora", SFT)


def test_an_adapter_is_its_base_with_it(adapter, tiny):
    """Its logits are those that peft computes without merging."""
    from peft import PeftModel

    module = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    tokens = torch.tensor([tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]])
    with torch.no_grad():
        plain = module(tokens).logits
        expected = PeftModel.from_pretrained(module, adapter).eval()(tokens).logits
        model = probe.load_model(str(adapter))
        found = model.network._module(tokens).logits
        half = probe.load_model(str(adapter), dtype="bfloat16").network._module
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    assert model.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert not any(parameter.requires_grad for parameter in model.network._module.parameters())
    # In a short dtype the merged weights are rounded once, at the end.
    for name, weight in model.network._module.named_parameters():
        assert torch.equal(half.get_parameter(name), weight.to(torch.bfloat16)), name


def test_a_pair_of_a_base_and_an_adapter(adapter, tmp_path):
    check_pair(str(SFT), str(adapter))
    assert read_config(str(adapter)).num_hidden_layers == 4
    found = find_checkpoint(str(adapter))
    assert (found.folder, found.adapter, found.tokenizer) == (SFT, adapter, SFT)
    assert [path.name for path in weight_files(str(adapter))] == [
        "model.safetensors",
        "adapter_model.safetensors",
    ]
    other = save_adapter(tmp_path / "other", SFT, seed=1)
    assert len({fingerprint(str(folder)) for folder in (SFT, adapter, other)}) == 3
    plan = make_plan(read_recipe("tiny-math", {"pairs.0.after": str(adapter)}))
    assert all(model.here for model in plan.models)
    assert len({model.shape.parameters for model in plan.models}) == 1
    report = probe.compare(
        str(SFT),
        str(adapter),
        ["tiny-math"],
        alpha=[0.3],
        prompt="{question}",
        overrides={
            "solutions.questions": 60,
            "selection.samples": 4,
            "compute.dtype": "float32",
            "report.resamples": 0,
        },
        output=tmp_path / "run",
    )
    assert {cell.samples for cell in report.cells} == {4}
    assert all(cell.change != 0 for cell in report.cells)
    assert report.recipe.name == "sft-vs-lora"


def test_an_adapters_own_tokenizer_is_taken(adapter, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(adapter, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SFT / file, folder / file)
    assert find_checkpoint(str(folder)).tokenizer == folder


def test_adapters_that_cannot_be_used(adapter, tmp_path, monkeypatch):
    def changed(base):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(folder)

    for base, message in (
        (None, "names no base model; set base_model_name_or_path in it"),
        ("/gone", "is for the base '/gone', which does not exist; correct base_model_name_or_path"),
        (str(adapter), "is an adapter too; merge it"),
        ("nobody/base", "the model 'nobody/base' is not on this machine, and the hub cannot be"),
        (str(DATA / "oracle/llama/model"), "does not fit its base .*: 4 tensors .* fit nowhere"),
    ):
        with pytest.raises(ProbeError, match=message) as caught:
            probe.load_model(changed(base))
        assert "\n" not in str(caught.value)
    folder = changed(str(SFT))
    (Path(folder) / "adapter_config.json").write_text("{")
    with pytest.raises(ProbeError, match="cannot read the config of the adapter"):
        probe.load_model(folder)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ProbeError, match=r'in a checkout of probe: pip install -e "\.\[peft\]"$'):
        probe.load_model(str(adapter))


def test_weights_of_either_format(tmp_path):
    """Several of the paper's models are on the hub as pytorch_model*.bin only."""
    folder = save_random_model(tmp_path / "m")
    expected = probe.load_model(str(folder))
    state = {name: tensor.clone() for name, tensor in expected.network._module.state_dict().items()}
    (folder / "model.safetensors").unlink()
    assert weight_files(str(folder)) == []
    first, second = (dict(list(state.items())[part::2]) for part in (0, 1))
    for number, shard in enumerate((first, second), start=1):
        torch.save(shard, folder / f"pytorch_model-0000{number}-of-00002.bin")
    names = {
        name: f"pytorch_model-0000{number}-of-00002.bin"
        for number, shard in enumerate((first, second), start=1)
        for name in shard
    }
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert [path.name[-12:] for path in weight_files(str(folder))] == ["of-00002.bin"] * 2
    assert fingerprint(str(folder)) != "e3b0c44298fc1c14"  # that of no files at all
    found = probe.load_model(str(folder))
    for name, tensor in found.network._module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    plan = make_plan(read_recipe("tiny-math", {"pairs.0.after": str(folder)}))
    assert all(model.here for model in plan.models)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert weight_files(str(folder)) == []
    index.write_text("{}")
    with pytest.raises(ProbeError, match="not an index of weight files"):
        weight_files(str(folder))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_downloaded(tmp_path, monkeypatch, weights):
    """Config, tokenizer and weights in one format, once; not what else lies in a repository."""
    hub = tmp_path / "hub"
    (hub / "x").mkdir(parents=True)
    other = ("pytorch_model.bin", "consolidated.safetensors", "README.md", "x/model.safetensors")
    for name in ("config.json", "tokenizer.json", "merges.txt", weights, *other):
        (hub / name).write_text("{}")
    files = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
    asked = []

    def snapshot_download(reference, revision, allow_patterns):
        asked.append(reference)
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr("probe.checkpoints._hub.hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files", lambda self, reference, revision: files
    )
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda reference, name, revision: (
            str(tmp_path / "cache" / name)
            if reference == "me/model" and (tmp_path / "cache" / name).is_file()
            else None
        ),
    )
    assert find_checkpoint("me/model") is None
    small = checkpoints.fetch_checkpoint("me/model", weights=False).folder
    assert {path.name for path in small.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
    }
    assert weight_files("me/model") == []
    folder = checkpoints.fetch_checkpoint("me/model").folder
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
        weights,
    }
    checkpoints.fetch_checkpoint("me/model")
    checkpoints.fetch_checkpoint("me/model", weights=False)
    assert asked == ["me/model"] * 2

    def gone(*_, **__):
        raise OSError("404 no such repository\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    with pytest.raises(
        ProbeError, match="cannot download the model 'me/none': 404 no such"
    ) as caught:
        checkpoints.fetch_checkpoint("me/none", weights=False)
    assert "\n" not in str(caught.value)
