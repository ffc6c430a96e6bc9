"""`probe doctor`: what it tells of models, and that it refuses what a run refuses."""

import json
import shutil

import pytest
from click.testing import CliRunner
from test_adapters import lora
from test_fitting import SFT, configure, save, state_of, without

import probe
from probe.cli import main
from probe.models import check_model, diagnosis_lines, doctor

GRPO = SFT.parent / "grpo"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SFT, tmp_path / "model")


def test_two_models_that_ship():
    found = probe.doctor("probe:tiny-math/sft", "probe:tiny-math/grpo")
    assert repr(found) == "\n".join(diagnosis_lines(found))  # what a notebook shows
    assert found.sound
    assert found.differences == ("weights",)
    first = found.models[0]
    assert first.architecture == "llama"
    assert (first.n_layers, first.d_model, first.vocabulary) == (4, 160, (18, 18))
    assert first.dtypes == ("float16",)
    assert first.parameters == sum(tensor.numel() for tensor in state_of(SFT).values())
    assert first.ends == ("<eos> (1)",)
    assert first.files == ("model.safetensors",)
    result = CliRunner().invoke(main, ["doctor", str(SFT), str(GRPO)])
    assert result.exit_code == 0
    assert result.output.count("A run would take it.") == 2
    assert "They differ in: weights." in result.output
    assert len(result.output.splitlines()) <= 24


def test_what_differs_is_named(folder, tmp_path):
    configure(folder, "generation_config.json", repetition_penalty=1.05, eos_token_id=[1, 2])
    configure(folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    save(folder, {name: tensor.float() for name, tensor in state_of(folder).items()})
    found = doctor(str(SFT), str(folder))
    assert found.sound
    assert {"weights", "precision of the files", "chat template", "end tokens"} <= {
        *found.differences
    }
    assert found.models[1].left_out == ("repetition_penalty=1.05",)
    adapter, _ = lora(tmp_path / "lora")
    found = doctor(str(adapter))
    assert str(adapter) in found.models[0].adapter
    assert any("16 tensors on q_proj, v_proj" in line for line in diagnosis_lines(found))


def break_nan(folder):
    state = state_of(folder)
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    save(folder, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: save(f, without("model.norm.weight")(state_of(f))), "model.norm.weight"),
        (break_nan, "model.norm.weight in .* NaN or infinite"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: in_place_of_weights(f, "/dev/zero"), "holds no weights"),
        (lambda f: in_place_of_weights(f, "model.safetensors"), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is empty"),
        (lambda f: (f / "config.json").write_text("{"), "config"),
        (lambda f: configure(f, model_type="opt"), "'opt' is not in the table"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "cannot read the tokenizer"),
        (
            lambda f: configure(f, "tokenizer_config.json", model_specific_special_tokens=["<x>"]),
            "cannot read the tokenizer",
        ),
        (lambda f: configure(f, hidden_size="wide"), "cannot read the config"),
        (lambda f: shutil.rmtree(f), "does not exist"),
    ],
)
def test_what_a_run_refuses(folder, change, message):
    change(folder)
    with pytest.raises(probe.ProbeError, match=message) as caught:
        check_model(str(folder))
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(main, ["doctor", str(folder), str(SFT)])
    assert result.exit_code == 2
    assert str(caught.value) in result.output
    assert "Traceback" not in result.output


def in_place_of_weights(folder, target):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)


def test_a_run_refuses_before_it_starts(folder, tmp_path):
    break_nan(folder)
    with pytest.raises(probe.ProbeError, match="NaN or infinite; train and save"):
        probe.compare(
            str(SFT), str(folder), ["tiny-math"], prompt="{question}", output=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_pair_that_cannot_be_compared(tmp_path):
    other = shutil.copytree(SFT, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    state = state_of(other)
    save(other, {name: x for name, x in state.items() if "layers.3." not in name})
    found = doctor(str(SFT), str(other))
    assert all(model.refusal is None for model in found.models)
    assert "differ in number of layers" in str(found.refusal)
    assert not found.sound


def test_files_that_change_are_looked_at_again(tmp_path):
    folder = shutil.copytree(SFT, tmp_path / "model")
    assert check_model(str(folder)) == ()
    settings = folder / "generation_config.json"
    settings.write_text('{"repetition_penalty": 1.3}')
    assert "repetition_penalty" in check_model(str(folder))[0]
