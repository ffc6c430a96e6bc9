"""`probe check`: what of a model is understood."""

from dataclasses import replace

import pytest
from click.testing import CliRunner
from small_models import save_small_model
from transformers import AutoConfig

from probe.attribution import check, check_lines
from probe.cli import main
from probe.errors import ProbeError
from probe.models import ARCHITECTURES


def config_only(folder, name, **changes):
    folder.mkdir()
    AutoConfig.for_model(name, **changes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("llama", ("expert",)),
        ("phi", ("expert",)),
        ("gemma3_text", ("head", "expert")),
        ("deepseek_v3", ("head",)),
        ("nemotron_h", ("qkv", "head")),
        ("gpt_oss", ()),
    ],
)
def test_a_model_with_its_weights(tmp_path, name, refused):
    found = check(str(save_small_model(tmp_path / "m", name)))
    assert found.sound
    assert "with its own weights, in float64" in found.model
    parts = found.granularities
    assert [key for key, part in parts.items() if part.refusal] == list(refused)
    for key, part in parts.items():
        if part.refusal is None:
            # Nemotron-H adds its experts up in float32.
            in_float32 = (name, key) == ("nemotron_h", "expert")
            assert part.residual_error < (1e-7 if in_float32 else 1e-12)
            assert 0 < part.gap < 2e-4
    assert found.methods["eap"] is None
    assert ("no rules" in (found.methods["relp"] or "")) == (name in ("gpt_oss", "nemotron_h"))


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi", "mixtral", "cohere2"),
        *("qwen3_next", "deepseek_v3", "nemotron_h", "llama4_text", "gpt_oss", "stablelm"),
    ],
)
def test_a_config_is_enough(tmp_path, name):
    """That of the full size, as transformers has it."""
    found = check(config_only(tmp_path / "m", name))
    assert found.sound
    assert "reduced, with random weights" in found.model
    assert all(part.gap < 1e-3 for part in found.granularities.values())


def test_what_has_no_row_is_told_which_fits(tmp_path, monkeypatch):
    folder = config_only(tmp_path / "m", "cohere2")
    rows = {name: row for name, row in ARCHITECTURES.items() if name != "cohere2"}
    monkeypatch.setattr(ARCHITECTURES, "_rows", rows)
    found = check(folder)
    assert found.sound
    assert 'register("cohere2", probe.Architecture(' in found.row
    assert "logits_multiplier='logit_scale'" in found.row
    monkeypatch.setattr(ARCHITECTURES, "_rows", {"llama": rows["llama"], "gpt2": rows["gpt2"]})
    found = check(folder)
    assert not found.sound
    assert "None of the table fits (layers='model.layers'; a layer has self_attn" in found.row


def test_a_wrong_row_is_seen(tmp_path, monkeypatch):
    folder = str(save_small_model(tmp_path / "m", "gpt_neox"))
    wrong = replace(ARCHITECTURES["gpt_neox"], parallel=False)
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", wrong)
    found = check(folder)
    assert not found.sound
    wrong = [part.refusal for key, part in found.granularities.items() if key != "expert"]
    assert all("m0 reads what is in" in refusal for refusal in wrong)
    assert "gpt_neox is a mixture" in found.granularities["expert"].refusal


def test_scores_that_are_no_slopes_are_seen(tmp_path, monkeypatch):
    """A norm's gradient by another formula than its output, which no comparison of sums sees."""
    from probe.tracing import NormVjp

    through = NormVjp.through

    def longer(self, value, norm):
        vjp = through(self, value, norm)
        return lambda gradient: 1.01 * vjp(gradient)

    monkeypatch.setattr(NormVjp, "through", longer)
    found = check(str(save_small_model(tmp_path / "m", "llama")))
    assert not found.sound
    assert "of the largest score from finite differences" in found.granularities["qkv"].refusal


def test_on_the_command_line(tmp_path, monkeypatch):
    folder = config_only(tmp_path / "m", "qwen3")
    shown = CliRunner().invoke(main, ["check", folder])
    assert shown.exit_code == 0
    assert shown.output.splitlines() == check_lines(check(folder))
    assert "It can be attributed." in shown.output
    monkeypatch.setattr(ARCHITECTURES, "_rows", {"gpt2": ARCHITECTURES["gpt2"]})
    assert CliRunner().invoke(main, ["check", folder]).exit_code == 2


def test_what_cannot_be_built_is_one_line(tmp_path):
    folder = config_only(tmp_path / "m", "llama", hidden_act="nothing")
    with pytest.raises(ProbeError, match="cannot build llama of reduced size"):
        check(folder)
