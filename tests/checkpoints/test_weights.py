import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import save_small_model

import probe.checkpoints._weights
from probe.checkpoints import by_kind, weight_changes, weight_files
from probe.errors import ProbeError

PAIR = ("probe:tiny-math/sft", "probe:tiny-math/grpo")


@pytest.fixture
def loaded():
    return [load_file(weight_files(reference)[0]) for reference in PAIR]


def test_against_whole_matrices(loaded, monkeypatch):
    monkeypatch.setattr(probe.checkpoints._weights, "_ENTRIES", 1000)  # many slices
    before, after = loaded
    found = weight_changes(*PAIR)
    assert {c.name for c in found} == {name for name, x in before.items() if x.ndim == 2}
    assert found[0].name == "model.embed_tokens.weight"
    for change in found:
        old, new = before[change.name].double(), after[change.name].double()
        assert change.entries == old.numel()
        assert change.size == pytest.approx(float(torch.linalg.norm(old)), rel=1e-6)
        assert change.moved == pytest.approx(float(torch.linalg.norm(new - old)), rel=1e-6)
        assert change.equal == int((old == new).sum())


def test_kinds_are_all_layers_as_one(loaded):
    before, after = loaded
    kinds = {kind.name: kind for kind in by_kind(weight_changes(*PAIR))}
    name = "model.layers.*.self_attn.q_proj"
    old, new = (
        torch.cat([side[name.replace("*", str(n)) + ".weight"].double() for n in range(4)])
        for side in (before, after)
    )
    kind = kinds[name]
    assert kind.matrices == 4
    assert kind.relative == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-6)
    assert kind.smallest < kind.relative < kind.largest
    assert kind.unchanged == pytest.approx(float((new == old).double().mean()))
    assert kinds["model.embed_tokens"].matrices == 1


def test_a_model_against_itself_has_not_moved():
    for kind in by_kind(weight_changes(PAIR[0], PAIR[0])):
        assert kind.relative == kind.largest == 0
        assert kind.unchanged == 1


def test_shards_and_dtypes_do_not_matter(tmp_path):
    whole = save_small_model(tmp_path / "whole", "qwen3_moe")  # experts have three dimensions
    sharded = tmp_path / "sharded"
    shutil.copytree(whole, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name].double() for name in part}, sharded / f"model-{number}.safetensors"
        )
    found = weight_changes(str(whole), str(sharded))
    assert any("experts" in change.name for change in found)
    assert all(change.moved == 0 and change.equal == change.entries for change in found)


def test_layers_come_in_their_order(tmp_path):
    model = save_small_model(tmp_path / "deep", "llama", num_hidden_layers=12)
    names = [change.name for change in weight_changes(str(model), str(model))]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert max(layers) == 11


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(ProbeError, match="'nobody/model' are not on this machine"):
        weight_changes(PAIR[0], "nobody/model")
    one = save_small_model(tmp_path / "one", "llama")
    other = save_small_model(tmp_path / "other", "qwen3")
    with pytest.raises(ProbeError, match="do not have the same matrices"):
        weight_changes(str(one), PAIR[0])
    wide = save_small_model(tmp_path / "wide", "llama", vocab_size=120)
    with pytest.raises(ProbeError, match="shape"):
        weight_changes(str(one), str(wide))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(one)}))
    with pytest.raises(ProbeError, match="files of their own; load the models"):
        weight_changes(str(one), str(adapter))
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ProbeError, match="damaged"):
        weight_changes(str(other), str(other))
