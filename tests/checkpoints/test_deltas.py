"""Deltas: a checkpoint as what differs from another one, and the training that ships as such."""

import json
import lzma
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from probe.checkpoints import (
    PACKAGE_DATA,
    checkpoints_in,
    find_checkpoint,
    fingerprint,
    local_folder,
    model_inputs,
    weight_changes,
    write_delta,
)
from probe.errors import ProbeError
from probe.models import load_model, read_tokenizer

TINY = PACKAGE_DATA / "tiny-math"
STEPS = "probe:tiny-math/grpo-steps"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(tmp_path):
    """A copy of the base, and the GRPO model as a delta of it."""
    shutil.copytree(TINY / "sft", tmp_path / "run" / "sft")
    folder = tmp_path / "run" / "steps" / "checkpoint-7"
    write_delta(tmp_path / "run" / "sft", TINY / "grpo", folder)
    return folder


def bits(path):
    return {name: x.view(torch.int16) for name, x in load_file(path).items()}


def test_a_delta_is_the_model_bit_for_bit(packed):
    found = find_checkpoint(str(packed))
    ours, theirs = (bits(x / "model.safetensors") for x in (found.folder, TINY / "grpo"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert weight_changes(str(packed), "probe:tiny-math/grpo")[0].moved == 0
    assert sum(path.stat().st_size for path in packed.iterdir()) < 1_600_000
    # In the folder around, too, as a trainer's checkpoints are named.
    assert local_folder(f"{packed.parent}#checkpoint-7") == found.folder
    assert read_tokenizer(str(packed)).get_vocab() == read_tokenizer(str(TINY / "sft")).get_vocab()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pair_of_numbers(tmp_path, dtype):
    """Also from one end to the other, with both zeros and what is no number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    sides = {"a": every, "b": every.flip(0)}
    for name, numbers in sides.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        tensors = {"x": numbers.reshape(256, 256), "y": numbers[3].clone()}
        save_file(
            {key: x.view(dtype) for key, x in tensors.items()},
            tmp_path / name / "model.safetensors",
        )
    write_delta(tmp_path / "a", tmp_path / "b", tmp_path / "delta")
    ours = bits(local_folder(str(tmp_path / "delta")) / "model.safetensors")
    theirs = bits(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_is_unpacked_once(packed, cache):
    first = local_folder(str(packed))
    stamp = (first / "model.safetensors").stat()
    assert local_folder(str(packed)) == first
    assert (first / "model.safetensors").stat() == stamp
    assert [path.name for path in (cache / "deltas").iterdir()] == [first.name]


def test_another_config_of_the_base_is_another_model(packed):
    first = local_folder(str(packed))
    path = packed.parent.parent / "sft" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    second = local_folder(str(packed))
    assert second != first
    assert json.loads((second / "config.json").read_text())["rms_norm_eps"] == 1e-5


def test_damage_is_one_line_and_leaves_nothing(packed, cache):
    base = packed.parent.parent / "sft"

    def refused(words):
        with pytest.raises(ProbeError, match=words) as error:
            find_checkpoint(str(packed))
        assert "\n" not in str(error.value)
        assert not list(cache.glob("deltas/*"))

    note, xz = (packed / "delta.json").read_text(), (packed / "delta.xz").read_bytes()
    for wrong in ("{", "[]", "{}", '{"base": 3, "sha256": ""}'):
        (packed / "delta.json").write_text(wrong)
        refused("cannot read .*delta.json")
    (packed / "delta.json").write_text(note.replace("../sft", "../none"))
    refused("of the base .*none, which is not there")
    (packed / "delta.json").write_text(note)
    (packed / "delta.xz").write_bytes(xz[: len(xz) // 2])
    refused("not of as many weights as its base has|cannot read .*delta.xz")
    (packed / "delta.xz").write_bytes(b"PK" + xz)
    refused("cannot read .*delta.xz")
    (packed / "delta.xz").write_bytes(lzma.compress(bytes(10**7)))  # a bomb is not let off
    refused("not of as many weights")
    (packed / "delta.xz").write_bytes(xz)
    shutil.copy(TINY / "dpo" / "model.safetensors", base)
    refused("is not a delta of the weights in")
    (base / "model.safetensors").unlink()
    refused("holds no model.safetensors")


def test_what_cannot_be_packed(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(TINY / "grpo", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(ProbeError, match=r"norm.weight is torch.float32; a delta is of 16-bit"):
        write_delta(TINY / "sft", folder, tmp_path / "delta")
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ProbeError, match="do not have the same tensors"):
        write_delta(TINY / "sft", folder, tmp_path / "delta")


def test_the_training_that_ships():
    """Seven checkpoints of one GRPO, each farther from SFT, in less than 10 MB."""
    found = checkpoints_in(f"{STEPS}#checkpoint-*")
    assert [int(name.rpartition("-")[2]) for name in found] == [9, 18, 37, 75, 150, 300, 600]
    moved = []
    for reference in found:
        changes = weight_changes("probe:tiny-math/sft", reference)
        moved.append(sum(change.moved**2 for change in changes) ** 0.5)
    assert moved == sorted(moved)
    assert moved[0] > 0
    assert len({fingerprint(reference) for reference in found}) == 7
    assert sum(p.stat().st_size for p in TINY.glob("grpo-steps/*/*")) < 10_000_000
    model = load_model(found[0])
    assert model.reference == found[0]
    assert model.n_layers == 4
    assert set(model_inputs(found[0])) == set(model_inputs("probe:tiny-math/sft"))


def test_a_name_that_does_not_ship():
    for wrong in (STEPS, "probe:tiny-math/none", "probe:tiny-math"):
        with pytest.raises(ProbeError, match=r"ships with probe; there are: .*grpo-steps#check"):
            local_folder(wrong)
    with pytest.raises(ProbeError, match="names 7 checkpoints; name one of them, as probe:tiny"):
        local_folder(f"{STEPS}#checkpoint-*")
    with pytest.raises(ProbeError, match="holds no checkpoint-8; it holds checkpoint-9, "):
        local_folder(f"{STEPS}#checkpoint-8")


def test_a_cache_that_cannot_be_written(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ProbeError, match="cannot unpack the delta .*checkpoint-7") as error:
        local_folder(str(packed))
    assert "\n" not in str(error.value)
