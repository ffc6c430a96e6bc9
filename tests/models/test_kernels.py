"""Fused kernels: where they run, and that they change nothing beyond rounding."""

import sys

import pytest
import torch
from small_models import save_small_model

import probe
from probe.models import FUSED, fuse, resolve_kernels, rotate_by

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SEQUENCES = [
    probe.Sequence(list(range(3, 13)), list(range(20, 29))),
    probe.Sequence(list(range(5, 10)), list(range(30, 35))),
]


def test_a_cpu_runs_as_transformers_has_it():
    assert resolve_kernels("auto", CPU, "llama") == "eager"
    assert resolve_kernels("eager", CPU, "llama") == "eager"


def test_fused_kernels_where_they_cannot_run():
    with pytest.raises(probe.ProbeError, match="kernels liger need a CUDA device"):
        resolve_kernels("liger", CPU, "llama")
    with pytest.raises(probe.ProbeError, match="another architecture than gpt2"):
        resolve_kernels("liger", torch.device("cuda"), "gpt2")


def test_relp_refuses_fused_kernels(tiny):
    from dataclasses import replace

    with pytest.raises(probe.ProbeError, match="relp needs what fused kernels leave out"):
        probe.attribute(replace(tiny, kernels="liger"), SEQUENCES, "relp")


@pytest.mark.parametrize("name", FUSED)
def test_only_this_model_rotates_otherwise(name, tmp_path):
    folder = str(save_small_model(tmp_path / "m", name))
    changed, other = probe.load_model(folder), probe.load_model(folder)
    module = changed.network._module
    file = sys.modules[type(module).__module__]
    own, calls = file.apply_rotary_pos_emb, []

    def rotation(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    rotate_by(module, rotation)
    assert file.apply_rotary_pos_emb is own
    there = probe.attribute(other, SEQUENCES)
    assert not calls
    here = probe.attribute(changed, SEQUENCES)
    assert len(calls) >= changed.n_layers
    assert torch.equal(here.scores, there.scores)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("granularity", ["qkv", "block"])
def test_fused_kernels_give_the_same_scores(name, granularity, tmp_path):
    folder = str(save_small_model(tmp_path / "m", name))
    plain, fused = (
        probe.attribute(
            probe.load_model(folder, "cuda", kernels=kernels), SEQUENCES, granularity=granularity
        )
        for kernels in ("eager", "liger")
    )
    assert (plain.scores - fused.scores).abs().max() <= 1e-5 * plain.scores.abs().max()
    torch.testing.assert_close(plain.losses, fused.losses, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@gpu
def test_only_this_model_is_changed(tmp_path):
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    folder = save_small_model(tmp_path / "m", "llama")
    before = dict(vars(modeling_llama))
    fuse(AutoModelForCausalLM.from_pretrained(folder))
    assert vars(modeling_llama) == before
