"""The pieces of the edge product that whole attributions do not take apart."""

import gc

import pytest
import torch
from small_models import MIXERS, MODELS, save_small_model

import probe
from probe.attribution import make_batch
from probe.tracing import MemoryMode, NormVjp, ablated_values, edge_scores, source_sums

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5, 7, 96), (4, 2, 1, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("centred", "offset", "held"),
    [
        (False, 0.0, False),
        (False, 1.0, False),
        (True, 0.0, False),
        (False, 0.0, True),
        (True, 0.0, True),
    ],
)
def test_a_vjp_through_a_norm_is_its_derivative(device, shape, dtype, centred, offset, held):
    torch.manual_seed(0)
    gradients = torch.randn(shape, dtype=dtype, device=device)
    value = 3 + torch.randn(shape[1:], dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)

    wide = value.double().requires_grad_(True)
    middle = wide - wide.mean(-1, keepdim=True) if centred else wide
    rate = (middle.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normed = middle * (rate.detach() if held else rate) * (weight.double() + offset)
    truth = torch.stack(
        [torch.autograd.grad(normed, wide, g.double(), retain_graph=True)[0] for g in gradients]
    )
    vjp = NormVjp(centred, offset, 1e-5, held).at(value, weight)
    gradients = torch.stack([vjp(gradient) for gradient in gradients])
    largest = 1e-5 if dtype == torch.float32 else 5e-3
    assert (gradients.double() - truth).abs().max() <= largest * truth.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["qkv", "block"])
def test_activations_computed_again_change_nothing(name, granularity, tmp_path, monkeypatch):
    model = probe.load_model(str(save_small_model(tmp_path / "m", name)))
    batch = make_batch(
        [
            probe.Sequence(list(range(3, 13)), list(range(20, 29))),
            probe.Sequence(list(range(5, 10)), list(range(30, 35))),
        ]
    )
    if granularity == "qkv" and name in MIXERS:
        pytest.skip("it has no query, key and value")
    graph = model.graph(granularity)
    plain = edge_scores(model, batch, graph)

    runs = []
    attend = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda *a, **k: runs.append(1) or attend(*a, **k)
    )
    module = model.network._module
    module.set_attn_implementation("eager")
    expected = edge_scores(model, batch, graph)
    once = len(runs)
    again = edge_scores(model, batch, graph, memory=MemoryMode(recompute=True))
    assert len(runs) == 3 * once  # both layers compute them again
    assert torch.equal(again.scores, expected.scores)
    torch.testing.assert_close(again.scores, plain.scores, rtol=1e-4, atol=1e-5)
    assert not any(layer.training for layer in module.modules())
    after = edge_scores(model, batch, graph)
    assert torch.equal(after.scores, expected.scores)


def hooks(module):
    return [h for m in module.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def scored(model, batch, graph):
    return edge_scores(model, batch, graph)


def scored_again(model, batch, graph):
    return edge_scores(model, batch, graph, memory=MemoryMode(recompute=True))


def ablated(model, batch, graph):
    return [ablated_values(model, batch, graph, [(0, 0), (1, len(graph.targets) - 1)])]


def summed(model, batch, graph):
    return [source_sums(model, batch, graph)]


@pytest.mark.parametrize("granularity", ["qkv", "block", "head"])
@pytest.mark.parametrize("run", [scored, scored_again, ablated, summed])
def test_a_batch_leaves_nothing_behind(granularity, run):
    model = probe.load_model("probe:tiny-math/sft")
    batch = make_batch([probe.Sequence([5, 6, 7, 8], [4, 5, 6]), probe.Sequence([7, 8], [9])])
    run(model, batch, model.graph(granularity))

    gc.collect()
    gc.disable()  # what is left then would wait for a collection, on a GPU too
    try:
        before = {id(one) for one in gc.get_objects()}
        result = run(model, batch, model.graph(granularity))
        given = {value.untyped_storage().data_ptr() for value in result}
        new = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        new = [one for one in new if id(one) not in before]
        assert {one.untyped_storage().data_ptr() for one in new} <= given
    finally:
        gc.enable()
    assert not hooks(model.network._module)


def test_a_batch_that_fails_takes_its_hooks_along():
    model = probe.load_model("probe:tiny-math/sft")
    module = model.network._module

    def fail(*_):
        raise RuntimeError("out of order")

    handle = module.model.layers[-1].mlp.register_forward_hook(fail)
    batch = make_batch([probe.Sequence([5, 6, 7, 8], [4, 5, 6])])
    with pytest.raises(RuntimeError, match="out of order"):
        edge_scores(model, batch, model.graph("qkv"))
    assert len(hooks(module)) == 1
    handle.remove()
