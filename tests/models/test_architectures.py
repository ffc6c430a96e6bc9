import numpy as np
import pytest
import torch
from plain import edge_losses, edge_slopes, edges, last_stream, node_outputs
from small_models import MIXERS, MODELS, STRUCTURES, WITHOUT_RULES, finest, save_small_model

import probe
from probe.attribution import METHODS, Edge, exact_effects
from probe.errors import ProbeError
from probe.models import ARCHITECTURES

POST_NORMED = ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "flex_olmo", "glm4")
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25], [80, 66, 9, 42]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved small model of each architecture."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_small_model(root / name, name) for name in MODELS}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return request.param


@pytest.fixture(params=["qkv", "block", "head"])
def granularity(request):
    return request.param


def load(folders, name, dtype="float64"):
    return probe.load_model(str(folders[name]), dtype=dtype)


def graph_of(model, name, granularity):
    reasons = {
        "is no attention and has no query, key and value": granularity != "block"
        and name in MIXERS,
        "norms the sum of an attention's heads": granularity == "head" and name in POST_NORMED,
        "share their rotated part over all heads": granularity == "head" and name in LATENT,
    }
    for reason, here in reasons.items():
        if here:
            with pytest.raises(ProbeError, match=reason):
                model.graph(granularity)
            pytest.skip(f"refused: it {reason}")
    return model.graph(granularity)


def some_edges(graph, count, seed=0):
    """Edges of the graph at random, and one into each kind of target."""
    every = graph.mask.nonzero().tolist()
    drawn = np.random.default_rng(seed).choice(len(every), min(count, len(every)), replace=False)
    kinds = {}
    for edge in reversed(every):
        kinds[graph.targets[edge[1]].lstrip("am0123456789")] = edge
    return [*kinds.values(), *(every[place] for place in drawn)]


def test_every_row_is_tested():
    covered = {name.partition("-")[0] for name in MODELS}
    assert covered == set(ARCHITECTURES)


def test_the_sources_sum_to_the_residual_stream(folders, structure, granularity):
    name = structure
    model = load(folders, name, "float32")
    graph_of(model, name, granularity)
    edges = probe.attribute(model, SEQUENCES, granularity=granularity)
    assert edges.residual_error < 1e-6
    # and to the stream that a plain hook sees
    module = model.network._module
    outputs = node_outputs(module, SEQUENCES[0])
    end = last_stream(module, SEQUENCES[0])
    total = sum(outputs[source] for source in edges.graph.sources)
    assert (total - end).norm() <= 1e-5 * end.norm()


def test_eap_is_the_slope_of_the_loss(folders, structure, granularity):
    """-<dL/dH, O> is what (L(H - eps O) - L(H)) / eps tends to, by an independent path."""
    name = structure
    model = load(folders, name)
    graph = graph_of(model, name, granularity)
    sequence = SEQUENCES[0]
    edges = probe.attribute(model, [sequence], granularity=granularity)
    assert edges.scores.dtype == torch.float64
    module = model.network._module
    assert edge_losses(module, sequence, "input", "logits") == pytest.approx(
        float(edges.losses[0]), abs=1e-6
    )
    scale = float(edges.scores.abs().max())
    eps = 5e-3  # norms compute in float32 even here: smaller steps drown in that
    for row, column in some_edges(graph, 12):
        names = graph.sources[row], graph.targets[column]
        up, down = (edge_losses(module, sequence, *names, strength=s) for s in (eps, -eps))
        slope = (up - down) / (2 * eps)
        assert abs(slope - float(edges.scores[0, row, column])) <= 3e-4 * scale, names


def test_the_graph_has_the_edges_that_a_plain_look_finds(folders, name, granularity):
    model = load(folders, name)
    graph = graph_of(model, name, granularity)
    readable = edges(model.network._module)
    for column, target in enumerate(graph.targets):
        found = {s for row, s in enumerate(graph.sources) if graph.mask[row, column]}
        assert found == set(readable[target]) & set(graph.sources)


def test_every_score_is_the_slope_by_plain_autograd(folders, name, granularity):
    model = load(folders, name)
    graph = graph_of(model, name, granularity)
    for sequence in SEQUENCES:
        scores = probe.attribute(model, [sequence], granularity=granularity).scores[0]
        every = graph.mask.nonzero().tolist()
        names = [(graph.sources[row], graph.targets[column]) for row, column in every]
        slopes = edge_slopes(model.network._module, sequence, names)
        truth = torch.zeros_like(scores)
        for place, (row, column) in enumerate(every):
            truth[row, column] = slopes[place]
        assert (scores - truth).abs().max() <= 3e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_is_plain_zero_ablation(folders, name, granularity, dtype):
    if dtype == "float32" and name not in STRUCTURES:
        pytest.skip("float64 is enough for those that differ in names only")
    model = load(folders, name, dtype)
    graph = graph_of(model, name, granularity)
    edges = [Edge(i, *edge) for i in (0, 1) for edge in some_edges(graph, 10, seed=i)]
    effects = exact_effects(model, SEQUENCES, edges, granularity, batch_size=7)
    module = model.network._module
    for edge, effect in zip(edges, effects.tolist(), strict=True):
        sequence = SEQUENCES[edge.sequence]
        names = graph.sources[edge.source], graph.targets[edge.target]
        whole = edge_losses(module, sequence, *names)
        removed = edge_losses(module, sequence, *names, strength=1.0)
        assert effect == pytest.approx(removed - whole, abs=1e-5), names


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(folders, structure, method):
    name = structure
    model = load(folders, name, "float32")
    options = {"method": method, "batch_size": 64, "granularity": finest(name)}
    if method == "relp" and name in WITHOUT_RULES:
        with pytest.raises(ProbeError, match="relp has no rules for the"):
            probe.attribute(model, SEQUENCES, **options)
        return
    edges = probe.attribute(model, SEQUENCES, **options)
    alone = probe.attribute(model, SEQUENCES[1:], **options)
    assert edges.scores.isfinite().all()
    assert (edges.scores[:, ~edges.graph.mask] == 0).all()
    assert (edges.scores[1] - alone.scores[0]).abs().max() <= 1e-4 * edges.scores.abs().max()
    later = edges.scores[:, :, edges.graph.mask.sum(0) > 1]
    assert (later.abs().amax(1) > 0).all()
    mean = probe.attribute(model, SEQUENCES, ablation="mean", **options)
    assert mean.scores.isfinite().all()
    assert not torch.allclose(mean.scores, edges.scores)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_as_plain_autograd_does(folders, structure, dtype):
    name = structure
    truth = probe.attribute(load(folders, name, "float32"), SEQUENCES, granularity=finest(name))
    model = load(folders, name, dtype)
    found = probe.attribute(model, SEQUENCES, granularity=finest(name))
    assert found.scores.dtype == torch.float32
    mask = truth.graph.mask
    every = mask.nonzero().tolist()
    names = [(truth.graph.sources[row], truth.graph.targets[column]) for row, column in every]
    module = model.network._module
    plain = torch.stack([edge_slopes(module, sequence, names) for sequence in SEQUENCES])
    right = truth.scores[:, mask].double()
    ours, theirs = (
        (x.double() - right).norm() / right.norm() for x in (found.scores[:, mask], plain)
    )
    assert ours <= 1.5 * theirs  # two right ways round differently; neither has less to go on
    assert theirs < {"bfloat16": 0.05, "float16": 0.01}[dtype]


def test_heads_sum_to_their_attention(folders, structure):
    name = structure
    model = load(folders, name)
    graph_of(model, name, "head")
    heads = probe.attribute(model, SEQUENCES, granularity="head")
    blocks = probe.attribute(model, SEQUENCES, granularity="block")
    rows = torch.tensor(
        [blocks.graph.sources.index(s.partition(".")[0]) for s in heads.graph.sources]
    )
    columns = torch.tensor(
        [blocks.graph.targets.index(t.partition(".")[0]) for t in heads.graph.targets]
    )
    summed = torch.zeros_like(blocks.scores)
    by_row = torch.zeros(*summed.shape[:1], summed.shape[1], heads.scores.shape[2]).double()
    by_row.index_add_(1, rows, heads.scores)
    summed.index_add_(2, columns, by_row)
    assert (summed - blocks.scores).abs().max() <= 2e-6 * blocks.scores.abs().max()


def test_a_wrong_row_is_refused(folders, monkeypatch):
    from dataclasses import replace

    wrong = replace(ARCHITECTURES["gemma2"], ffn_output="mlp")
    monkeypatch.setitem(ARCHITECTURES, "gemma2", wrong)
    model = load(folders, "gemma2", "float32")
    with pytest.raises(ProbeError, match="do not sum to the residual stream .*'gemma2'"):
        probe.attribute(model, SEQUENCES)
