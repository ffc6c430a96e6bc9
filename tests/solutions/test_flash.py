import random

import pytest
import torch
from small_models import MODELS, runs_continuously, save_small_model

import probe
from probe.solutions import _continuous as continuous
from probe.solutions import _flash as flash
from probe.solutions import generate


def one_by_one(query, key, value, ends_query, ends_key, longest_query, longest_key, scale, window):
    """What `flash.varlen` is to compute, without a GPU: each sequence for itself."""
    output = torch.zeros_like(query)
    starts = zip(ends_query[:-1].tolist(), ends_key[:-1].tolist(), strict=True)
    stops = zip(ends_query[1:].tolist(), ends_key[1:].tolist(), strict=True)
    for (first, first_key), (last, last_key) in zip(starts, stops, strict=True):
        queries, keys = last - first, last_key - first_key
        if queries == 0:
            continue
        assert queries <= longest_query
        assert queries <= keys <= longest_key
        groups = query.shape[1] // key.shape[1]
        k, v = (part[first_key:last_key].repeat_interleave(groups, 1) for part in (key, value))
        logits = scale * torch.einsum("qhd,khd->hqk", query[first:last], k)
        ago = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        seen = (ago >= 0) & (ago < (window or keys))
        shares = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        output[first:last] = torch.einsum("hqk,khd->qhd", shares, v)
    return output


@pytest.mark.parametrize("name", filter(runs_continuously, MODELS))
def test_every_architecture_asks_for_it_as_it_is_given(tmp_path, monkeypatch, no_slots, name):
    """All but the kernel: packing, caches, windows, groups of heads, scaling."""
    model = probe.load_model(str(save_small_model(tmp_path, name)))
    if model.network._module.config._attn_implementation == "eager":
        pytest.skip("has an attention of its own, which the continuous engine does not take")
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randrange(3, 30))] for _ in range(8)]
    limits = [draw.randrange(5, 40) for _ in prompts]
    layers = []

    def counted(*given):
        layers.append(given)
        return one_by_one(*given)

    monkeypatch.setattr(flash, "usable", lambda *given: True)
    monkeypatch.setattr(flash, "varlen", counted)
    static, continuous = (
        {
            answer.place: answer.tokens
            for batch in generate(model, prompts, limits, engine=engine)
            for answer in batch
        }
        for engine in ("static", "continuous")
    )
    assert static == continuous
    assert len(layers) >= model.n_layers * max(limits) / 2


def test_what_it_cannot_do_is_refused():
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="flash attention of torch has no softcap"):
        continuous.paged_attention(torch.nn.Module(), states, states, states, None, softcap=30.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_for_a_gpu(dtype):
    assert not flash.usable(torch.device("cpu"), dtype, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_the_kernel(window, heads, dtype, apart):
    torch.manual_seed(0)
    ends_query = torch.tensor([0, 7, 8, 9, 29, 29], dtype=torch.int32)
    ends_key = torch.tensor([0, 7, 40, 41, 100, 100], dtype=torch.int32)
    query = torch.randn(29, heads[0], 64)
    key, value = torch.randn(2, 100, heads[1], 64)
    given = ends_query, ends_key, 20, 59, 0.125, window
    expected = one_by_one(query, key, value, *given)
    states = [part.to("cuda", dtype) for part in (query, key, value)]
    ends = [ends.cuda() for ends in (ends_query, ends_key)]
    found = flash.varlen(*states, *ends, *given[2:])
    torch.testing.assert_close(found.float().cpu(), expected, atol=apart, rtol=apart)
