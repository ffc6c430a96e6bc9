"""Experts as sources of their own, against the plain computation, which has its own formulas."""

import pytest
import torch
from plain import edge_losses, edge_slopes, edges, loss_without, node_outputs
from small_models import MIXERS, save_small_model

import probe
from probe.attribution import Edge, ablation_means, as_sequences, exact_effects, make_batch
from probe.causes import Circuit, intervene
from probe.errors import ProbeError
from probe.models import ARCHITECTURES
from probe.tracing import MemoryMode, edge_scores

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25], [80, 66, 9, 42]),
]
LATENT = "nemotron_h-latent"
"""Its experts write to a narrower vector, which one projection makes an output of."""

MIXTURES = (
    *("mixtral", "qwen3_moe", "qwen3_moe-dense", "qwen3_moe-sparse", "olmoe", "qwen2_moe"),
    *("phimoe", "granitemoe", "gpt_oss", "minimax_m2", "hunyuan_v1_moe", "ernie4_5_moe"),
    *("glm4_moe", "dots1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "llama4_text"),
    *("qwen3_next", "qwen3_next-attention", "qwen3_5_moe_text", "nemotron_h", LATENT),
)
KINDS = ("mixtral", "glm4_moe", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoe", LATENT)
"""No two of these mix alike."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: save_small_model(root / name, name) for name in MIXTURES if name != LATENT}
    return made | {LATENT: save_small_model(root / LATENT, "nemotron_h", moe_latent_size=16)}


@pytest.fixture(params=MIXTURES)
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def load(folders, name, dtype="float64"):
    return probe.load_model(str(folders[name]), dtype=dtype)


def coarser(name):
    """The granularity that differs in mixtures alone."""
    return "block" if name in (*MIXERS, LATENT) else "qkv"


def summed(fine, coarse):
    """Scores of experts added up to those of their mixtures."""
    wholes = [coarse.graph.sources.index(name.partition(".")[0]) for name in fine.graph.sources]
    return torch.zeros_like(coarse.scores).index_add_(1, torch.tensor(wholes), fine.scores)


def test_every_mixture_of_the_table_is_here():
    rows = {name for name, row in ARCHITECTURES.items() if row.experts}
    assert rows - {name.partition("-")[0] for name in MIXTURES} == {"flex_olmo"}


def test_every_score_is_the_slope_by_plain_autograd(folders, name):
    model = load(folders, name)
    graph, module = model.graph("expert"), model.network._module
    found = probe.attribute(model, SEQUENCES[:1], granularity="expert")
    assert found.residual_error < 1e-7  # Nemotron-H adds in float32
    every = graph.mask.nonzero().tolist()
    names = [(graph.sources[row], graph.targets[column]) for row, column in every]
    readable = edges(module)
    for column, target in enumerate(graph.targets):
        own = {s for row, s in enumerate(graph.sources) if graph.mask[row, column]}
        assert own == set(readable[target]) & set(graph.sources)
    truth = torch.zeros_like(found.scores[0])
    truth[graph.mask] = edge_slopes(module, SEQUENCES[0], names)
    assert (found.scores[0] - truth).abs().max() <= 3e-6 * truth.abs().max()
    parts = [row for row, source in enumerate(graph.sources) if source.startswith("m")]
    assert (truth[parts].abs().amax(1) > 0).sum() > len(parts) / 2  # most experts are chosen


def test_experts_and_what_is_beside_them_sum_to_their_mixture(folders, name):
    model = load(folders, name)
    fine = probe.attribute(model, SEQUENCES, granularity="expert")
    coarse = probe.attribute(model, SEQUENCES, granularity=coarser(name))
    assert fine.graph.attention == coarser(name)
    assert fine.graph.targets == coarse.graph.targets
    assert (summed(fine, coarse) - coarse.scores).abs().max() <= 2e-6 * coarse.scores.abs().max()
    assert torch.equal(fine.losses, coarse.losses)


def test_exact_is_plain_zero_ablation(folders, kind):
    model = load(folders, kind)
    graph, module = model.graph("expert"), model.network._module
    parts = [row for row, source in enumerate(graph.sources) if source.startswith("m")]
    last = len(graph.targets) - 1
    some = [Edge(0, row, column) for row in parts for column in (last - 1, last)]
    some = [edge for edge in some if graph.mask[edge.source, edge.target]]
    effects = exact_effects(model, SEQUENCES, some, "expert", batch_size=7).tolist()
    for edge, effect in zip(some, effects, strict=True):
        names = graph.sources[edge.source], graph.targets[edge.target]
        lost = edge_losses(module, SEQUENCES[0], *names, strength=1.0)
        assert effect == pytest.approx(lost - edge_losses(module, SEQUENCES[0], *names), abs=1e-5)


def test_sets_of_edges_are_removed_as_in_plain_torch(folders, kind):
    model = load(folders, kind)
    graph = model.graph("expert")
    sources = [s for s in graph.sources if s.partition(".")[0] == graph.sources[-1].split(".")[0]]
    one, all_of_them = [(sources[1], "logits")], [(source, "logits") for source in sources]
    found = intervene(model, SEQUENCES[:1], [one, all_of_them], granularity="expert")
    for place, removed in enumerate((one, all_of_them)):
        taken = {"logits": {source: 1.0 for source, _ in removed}}
        loss = loss_without(model.network._module, SEQUENCES[0], taken)
        assert float(found.loss[place, 0]) == pytest.approx(loss, abs=1e-5)


@pytest.mark.filterwarnings("ignore:eap-ig")  # two points are few
@pytest.mark.parametrize(
    "options", [{"method": "eap-ig", "ig_steps": 2}, {"method": "relp"}, {"ablation": "mean"}]
)
def test_other_methods_sum_to_their_mixture_too(folders, kind, options):
    if "relp" in options.values() and not ARCHITECTURES[kind.partition("-")[0]].relp:
        pytest.skip("no rules for this one, which is said")
    model = load(folders, kind)
    fine = probe.attribute(model, SEQUENCES, granularity="expert", **options)
    coarse = probe.attribute(model, SEQUENCES, granularity=coarser(kind), **options)
    assert (summed(fine, coarse) - coarse.scores).abs().max() <= 1e-6 * coarse.scores.abs().max()


def test_what_an_ablation_leaves_of_an_expert(folders, kind):
    """Its mean over all positions, and what it writes on another text."""
    model = load(folders, kind)
    graph, module = model.graph("expert"), model.network._module
    texts = as_sequences(model, SEQUENCES)
    means = ablation_means(model, texts, graph, "mean", "auto")
    outputs = [node_outputs(module, sequence) for sequence in SEQUENCES]
    for row, source in enumerate(graph.sources):
        truth = torch.cat([found[source] for found in outputs]).mean(0)
        assert (means[row] - truth).norm() <= 1e-6 * (truth.norm() + 1e-3), source
    beside = probe.Sequence([9, 8, 70, 31, 2, 66], SEQUENCES[0].answer)
    found = probe.attribute(model, SEQUENCES[:1], granularity="expert", corrupted=[beside])
    names = [(source, "logits") for source in graph.sources]
    slopes = edge_slopes(module, SEQUENCES[0], names, beside=beside)
    assert (found.scores[0, :, -1] - slopes).abs().max() <= 3e-6 * slopes.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_as_plain_autograd_does(folders, kind, dtype):
    truth = probe.attribute(load(folders, kind, "float32"), SEQUENCES, granularity="expert")
    model = load(folders, kind, dtype)
    found = probe.attribute(model, SEQUENCES, granularity="expert")
    mask = truth.graph.mask
    every = mask.nonzero().tolist()
    names = [(truth.graph.sources[row], truth.graph.targets[column]) for row, column in every]
    plain = torch.stack([edge_slopes(model.network._module, one, names) for one in SEQUENCES])
    right = truth.scores[:, mask].double()
    ours, theirs = (
        (x.double() - right).norm() / right.norm() for x in (found.scores[:, mask], plain)
    )
    assert ours <= 1.5 * theirs


def test_experts_are_the_same_where_layers_are_computed_again(folders):
    model = load(folders, "glm4_moe", "float32")
    graph, batch = model.graph("expert"), make_batch(as_sequences(model, SEQUENCES))
    plain = edge_scores(model, batch, graph)
    lean = edge_scores(model, batch, graph, memory=MemoryMode(recompute=True))
    assert (lean.scores - plain.scores).abs().max() <= 1e-6 * plain.scores.abs().max()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "no layer of llama is a mixture of experts; use granularity qkv"),
        ("gemma2", "no layer of gemma2 is a mixture of experts"),
        ("flex_olmo", "flex_olmo norms the sum of a mixture's experts before adding it"),
    ],
)
def test_where_there_is_no_expert_it_is_said(tmp_path, name, reason):
    model = load({name: save_small_model(tmp_path / "m", name)}, name)
    with pytest.raises(ProbeError, match=reason) as refused:
        probe.attribute(model, SEQUENCES, granularity="expert")
    assert "\n" not in str(refused.value)


def test_experts_that_are_kept_in_another_way_are_refused(folders, monkeypatch):
    model = load(folders, "mixtral")
    experts = type(model.part(0, "mlp.experts"))
    monkeypatch.setattr(experts, "forward", lambda self, tokens, index, weights, more: tokens)
    with pytest.raises(ProbeError, match="MixtralExperts is not known to keep experts apart"):
        model.graph("expert")


def test_experts_that_do_not_sum_are_refused(folders):
    """What an expert gives a token alone is not what it gives it beside others."""
    model = load(folders, "mixtral")
    part = model.part(1, "mlp.experts")
    part.register_forward_hook(lambda _, given, output: 1.5 * output)
    with pytest.raises(ProbeError, match="experts do not sum to what it makes of them"):
        probe.attribute(model, SEQUENCES, granularity="expert")
    probe.attribute(model, SEQUENCES, granularity="qkv")  # where nothing is wrong


def test_what_is_added_to_experts_is_the_shared_expert(folders):
    model = load(folders, "glm4_moe")
    model.part(1, "mlp").register_forward_hook(lambda _, given, output: output + given[0].sin())
    with pytest.raises(ProbeError, match="adds something else to its experts than the row's"):
        probe.attribute(model, SEQUENCES, granularity="expert")


def test_circuits_of_experts(folders):
    """An expert comes to be by all that its mixture reads."""
    model = load(folders, "glm4_moe")
    found = probe.attribute(model, SEQUENCES, granularity="expert")
    circuit = Circuit.greedy(found, 12)
    assert circuit.pruned().edges.sum() <= 12
    fed = torch.zeros_like(found.graph.mask)
    column = found.graph.targets.index("m1")
    for expert in ("m1.e0", "m1.shared"):
        fed[found.graph.sources.index(expert), -1] = True
    assert not Circuit(found.graph, circuit.scores, fed).pruned().edges.any()
    fed[0, column] = True
    assert len(Circuit(found.graph, circuit.scores, fed).pruned()) == 3
