"""Every file that a model's numbers depend on counts whole, and large ones are read once."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import probe
from probe.checkpoints import _file_digests, model_inputs, unread_inputs
from probe.checkpoints._file_digests import file_digests, unread_bytes

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"
LATER = 3 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, on files that were touched long enough ago."""
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "cache"))
    now = time.time_ns
    monkeypatch.setattr(_file_digests.time, "time_ns", lambda: now() + LATER)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(SFT, tmp_path / "model"))


NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", [*NAMES, "model.safetensors"])
@pytest.mark.parametrize("place", [0, 0.3, 0.999])
def test_one_bit_anywhere_counts(model, name, place):
    before = model_inputs(str(model))
    assert {*NAMES, "model.safetensors"} <= before.keys()
    file = model / name
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been written
    after = model_inputs(str(model))
    assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "vocab.txt"])
def test_a_new_file_counts(model, name):
    before = model_inputs(str(model))
    (model / name).write_text("{}")
    assert model_inputs(str(model)).keys() - before.keys() == {name}


def test_what_numbers_do_not_depend_on_does_not_count(model):
    before = model_inputs(str(model))
    for name in ("README.md", "trainer_state.json", "optimizer.pt"):
        (model / name).write_text("{}")
    assert model_inputs(str(model)) == before


def test_a_large_file_is_read_once(model, cache, monkeypatch):
    large = (model / "model.safetensors").stat().st_size
    assert unread_inputs(str(model)) > large
    first = model_inputs(str(model))
    assert unread_inputs(str(model)) < large
    read = []
    whole = _file_digests._read
    monkeypatch.setattr(_file_digests, "_read", lambda path: read.append(path.name) or whole(path))
    assert model_inputs(str(model)) == first
    assert "config.json" in read
    assert "model.safetensors" not in read
    (cache / "digests.json").write_text("[" * 100000)
    assert model_inputs(str(model)) == first
    assert "model.safetensors" in read
    (model / "model.safetensors").unlink()
    other = model / "other.safetensors"
    other.write_bytes(b"x" * 2**20)
    file_digests([other])
    assert list(json.loads((cache / "digests.json").read_text())) == [str(other)]  # no more of it


def test_a_file_that_was_touched_just_now_is_not_taken_from_the_cache(model, monkeypatch):
    now = time.time_ns
    monkeypatch.setattr(_file_digests.time, "time_ns", lambda: now() - LATER)
    model_inputs(str(model))
    assert unread_inputs(str(model)) > (model / "model.safetensors").stat().st_size


def test_names_in_the_hubs_cache_are_digests(tmp_path):
    folder = tmp_path / "models--org--name"
    blob = folder / "blobs" / ("a" * 64)
    snapshot = folder / "snapshots" / "0123"
    for each in (blob.parent, snapshot):
        each.mkdir(parents=True)
    blob.write_bytes(b"x" * 7)
    link = snapshot / "model.safetensors"
    link.symlink_to(blob)
    assert unread_bytes([link]) == 0
    assert file_digests([link]) == {link: f"blob {'a' * 64} 7"}


def test_an_adapter_counts_with_its_base(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model)})
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    names = model_inputs(str(adapter))
    assert {"base/model.safetensors", "base/config.json", "adapter_model.safetensors"} <= {*names}
    assert "adapter_config.json" in names


def test_a_cache_that_cannot_be_written_is_done_without(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "file"))
    assert model_inputs(str(model)) == model_inputs(str(model))
