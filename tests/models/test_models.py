import io
import json
import shutil

import pytest
import torch
import transformers
from conftest import DATA, save_random_model

import probe
from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.models import check_pair, cpu_threads, resolve_devices

SFT = "probe:tiny-math/sft"


def test_the_shipped_models(tiny):
    assert tiny.n_layers == 4
    assert tiny.dtype == torch.float32
    text = "50-7-67-53=?"
    tokens = tiny.tokenizer(text)["input_ids"]
    assert len(tokens) == len(text)
    assert tiny.tokenizer.decode(tokens) == text
    for name in ("grpo", "dpo"):
        check_pair(SFT, f"probe:tiny-math/{name}")
        assert fingerprint(f"probe:tiny-math/{name}") != fingerprint(SFT)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/folder", "model folder '/no/such/folder' does not exist"),
        ("./nothing", "does not exist"),
        ("nothing", "does not exist"),
        ("probe:tiny-math/ppo", "there are: .*probe:tiny-math/sft"),
        (
            "nobody/never-a-model",
            "'nobody/never-a-model' is not on this machine, and the hub",
        ),
        (str(DATA), "holds no config.json"),
    ],
)
def test_a_missing_model(reference, message):
    with pytest.raises(ProbeError, match=message) as caught:
        probe.load_model(reference)
    assert "\n" not in str(caught.value)


def test_bad_device_and_dtype():
    with pytest.raises(ProbeError, match="dtype 'int8' is not known"):
        probe.load_model(SFT, dtype="int8")
    with pytest.raises(ProbeError, match="device 'gpu' is not known"):
        probe.load_model(SFT, device="gpu")
    with pytest.raises(ProbeError, match="device 'meta' runs no models here"):
        probe.load_model(SFT, device="meta")
    with pytest.raises(ProbeError, match="model folder '~nobody-here/x' does not exist"):
        probe.load_model("~nobody-here/x")
    with pytest.raises(ProbeError, match="only CUDA devices can share a model"):
        probe.load_model(SFT, device="cpu,cpu")
    with pytest.raises(ProbeError, match="not on this machine"):
        resolve_devices("cpu,cuda:99")


def test_an_unknown_architecture_is_refused_not_guessed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(ProbeError, match=r"'opt' is not in the table \(known: .*llama"):
        probe.load_model(str(tmp_path))


def test_damaged_weights_and_config(tmp_path):
    folder = save_random_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ProbeError, match="cannot read the weights"):
        probe.load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ProbeError, match="cannot read the config"):
        probe.load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "differ in number of layers"),
        ({"hidden_size": 64}, "differ in width"),
        ({"model_type": "qwen2"}, "differ in architecture"),
    ],
)
def test_a_pair_that_does_not_fit(tmp_path, changes, message):
    first = save_random_model(tmp_path / "a")
    second = save_random_model(tmp_path / "b", **changes)
    with pytest.raises(ProbeError, match=message):
        check_pair(str(first), str(second))


def test_a_pair_with_other_tokens(tmp_path):
    first = save_random_model(tmp_path / "a")
    second = tmp_path / "b"
    shutil.copytree(first, second)
    check_pair(str(first), str(second))
    tokenizer = json.loads((second / "tokenizer.json").read_text())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[words[-1]], vocabulary[words[-2]] = vocabulary[words[-2]], vocabulary[words[-1]]
    (second / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ProbeError, match="differ in tokenizer"):
        check_pair(str(first), str(second))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_the_fingerprint_sees_training(tmp_path):
    first = save_random_model(tmp_path / "a", seed=0)
    same = save_random_model(tmp_path / "b", seed=0)
    other = save_random_model(tmp_path / "c", seed=1)
    assert fingerprint(str(first)) == fingerprint(str(same)) != fingerprint(str(other))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_a_model_on_two_cards_is_the_model_on_one(tmp_path, name, method):
    from small_models import save_small_model

    folder = str(save_small_model(tmp_path / "m", name))
    sequences = [probe.Sequence([3, 4, 5], [6, 7, 8]), probe.Sequence([9, 10], [11])]
    one, two = (
        probe.attribute(probe.load_model(folder, device), sequences, method)
        for device in ("cuda:0", "cuda:0,cuda:1")
    )
    assert (one.scores - two.scores).abs().max() <= 1e-5 * one.scores.abs().max()


def test_loading_shows_no_bar_of_its_own(capfd):
    before = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()
    try:
        probe.load_model("probe:tiny-math/sft")
        assert transformers.utils.logging.is_progress_bar_enabled()
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""
    finally:
        if not before:
            transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_that_a_model_brings_is_not_run(tmp_path, what, monkeypatch):
    """Nor does anything ask whether to."""
    folder = save_random_model(tmp_path / "m")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    file, changes = {
        "config": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
    }[what]
    table = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(table))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(ProbeError, match=rf"the {what} of .*: it brings code of its own, which is"):
        probe.load_model(str(folder))
    assert not (tmp_path / "ran").exists()
