"""Circuits and how faithful they are."""

import json
from dataclasses import asdict

import pytest
import torch

import probe
from probe.attribution import EdgeScores
from probe.causes import Circuit, faithfulness_curves, intervene
from probe.errors import ProbeError
from probe.models import Graph, Heads
from probe.run import _circuits as of_run

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55], "a"),
    probe.Sequence([17, 3, 25, 9], [80, 66, 9, 42], "b"),
]


def scored(graph, values):
    """Scores of one sequence: those of some edges, by name, and 0 of all others."""
    scores = torch.zeros(1, *graph.mask.shape)
    for (source, target), value in values.items():
        scores[0, graph.sources.index(source), graph.targets.index(target)] = value
    return EdgeScores(scores, torch.ones(1), torch.ones(1), graph)


def names(circuit):
    graph = circuit.graph
    return {(graph.sources[s], graph.targets[t]) for s, t in circuit.edges.nonzero().tolist()}


VALUES = {
    ("input", "a0"): 3.0,
    ("input", "m0"): -5.0,
    ("a0", "m1"): 4.0,
    ("m0", "logits"): 2.0,
    ("m1", "logits"): 1.0,
}


def test_the_top_and_the_greedy_circuit():
    scores = scored(Graph.build(2, "block"), VALUES)
    assert names(Circuit.top(scores, 2)) == {("input", "m0"), ("a0", "m1")}
    assert names(Circuit.top(scores, 2, signed=True)) == {("a0", "m1"), ("input", "a0")}
    # Greedily nothing counts that is read by nothing yet.
    assert names(Circuit.greedy(scores, 2)) == {("m0", "logits"), ("input", "m0")}
    assert names(Circuit.greedy(scores, 5)) == set(VALUES)
    assert len(Circuit.greedy(scores, 1000)) == len(Circuit.top(scores, 1000)) == 15
    assert len(Circuit.top(scores, 0)) == 0
    edges = Circuit.top(scores, 5).top_edges(2)
    assert [(edge.source, edge.target, edge.score) for edge in edges] == [
        ("input", "m0", -5.0),
        ("a0", "m1", 4.0),
    ]
    assert Circuit.top(scores, 3).nodes == {"input": 8.0, "a0": 4.0}
    for count in (-1, True, 2.5):
        with pytest.raises(ProbeError, match="give a whole number"):
            Circuit.top(scores, count)


def test_what_reaches_no_output_is_pruned():
    graph = Graph.build(2, "block")
    scores = scored(graph, VALUES)
    assert names(Circuit.top(scores, 3).pruned()) == set()
    assert names(Circuit.top(scores, 4).pruned()) == {("input", "m0"), ("m0", "logits")}
    assert names(Circuit.top(scores, 5).pruned()) == set(VALUES)


def test_heads_are_pruned_with_their_group():
    """Heads 0 and 1 read key and value head 0; a bias needs nothing that comes to it."""
    graph = Graph.build(1, "head", Heads(4, 2, 8), bias=True)

    def left(*pairs):
        return names(Circuit.top(scored(graph, dict.fromkeys(pairs, 1.0)), len(pairs)).pruned())

    kept = {("input", "a0.v.h0"), ("a0.h1", "logits")}
    assert left(*kept) == kept
    assert left(("input", "a0.v.h1"), ("a0.h1", "logits")) == set()
    assert left(("input", "a0.q.h0"), ("a0.h1", "logits")) == set()
    assert left(("a0.bias", "logits")) == {("a0.bias", "logits")}
    assert left(("a0.h1", "logits")) == set()


def test_pruning_leaves_what_a_circuit_does_where_nothing_makes_nothing(llama):
    """Blocks of a Llama write nothing of nothing: what is pruned carries nothing to the end."""
    graph = llama.graph("qkv")
    generator = torch.Generator().manual_seed(3)
    pruned = 0
    for share in (0.2, 0.3, 0.5):
        edges = graph.mask & (torch.rand(graph.mask.shape, generator=generator) < share)
        circuit = Circuit(graph, edges.double(), edges)
        smaller = circuit.pruned()
        assert torch.equal(smaller.pruned().edges, smaller.edges)
        pruned += len(circuit) - len(smaller)
        sets = [circuit.edges, smaller.edges]
        kept = intervene(llama, SEQUENCES, sets, "keep", ablation="zero")
        assert (kept.loss[0] - kept.loss[1]).abs().max() <= 1e-5
    assert pruned > 0


@pytest.fixture(scope="module")
def curves(llama):
    scores = {name: probe.attribute(llama, SEQUENCES, name) for name in ("eap", "exact")}
    return scores, faithfulness_curves(llama, SEQUENCES, scores, n_random=4, seed=1)


def test_curves_are_what_keeping_edges_gives(llama, curves):
    scores, found = curves
    assert [curve.method for curve in found] == ["eap", "exact"]
    for curve in found:
        first, *middle, last = curve.points
        assert (first.edges, first.faithfulness, first.without) == (0, 0.0, 1.0)
        assert (last.faithfulness, last.without, last.share) == (1.0, 0.0, 1.0)
        point = middle[-1]
        sets = [[], Circuit.top(scores[curve.method], point.edges).edges]
        kept = intervene(llama, SEQUENCES, sets, "keep", ablation="mean")
        none, some = kept.loss.mean(1).tolist()
        whole = float(kept.whole.loss.mean())
        assert point.faithfulness == pytest.approx((none - some) / (none - whole), abs=1e-4)
        assert point.random_low <= point.random <= point.random_high
        assert curve.needless is None or 0 <= curve.needless <= 1


def test_areas_are_those_of_trapezoids(curves):
    for curve in curves[1]:
        cpr = cmd = 0
        for left, right in zip(curve.points, curve.points[1:], strict=False):
            width = (right.share - left.share) / 2
            cpr += width * (left.faithfulness + right.faithfulness)
            cmd += width * (abs(1 - left.faithfulness) + abs(1 - right.faithfulness))
        assert curve.cpr == pytest.approx(cpr)
        assert curve.cmd == pytest.approx(cmd)


def test_the_same_seed_gives_the_same(llama, curves):
    again = faithfulness_curves(llama, SEQUENCES, curves[0], n_random=4, seed=1)
    assert [asdict(curve) for curve in again] == [asdict(curve) for curve in curves[1]]


def test_scores_of_two_graphs_are_refused(llama):
    scores = {g: probe.attribute(llama, SEQUENCES, granularity=g) for g in ("qkv", "block")}
    with pytest.raises(ProbeError, match="of 2 graphs"):
        faithfulness_curves(llama, SEQUENCES, scores)


SMALL = {
    "solutions.questions": 60,
    "solutions.batch_size": 60,
    "selection.samples": 12,
    "selection.alpha": "[0.5]",
    "attribution.control": "none",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    probe.run_recipe("tiny-math", folder, overrides=SMALL)
    return folder


def test_the_circuits_of_a_run(run, monkeypatch):
    """Stopped behind the first model, the measurement goes on with the second."""
    asked = {"methods": "eap", "n_random": 2, "questions": 8}
    measure, times = of_run.faithfulness_curves, []

    def stopped(*given, **more):
        if len(times) == 1:
            times.append(0)
            raise KeyboardInterrupt
        times.append(0)
        return measure(*given, **more)

    monkeypatch.setattr(of_run, "faithfulness_curves", stopped)
    with pytest.raises(KeyboardInterrupt):
        probe.run_circuits(run, **asked)
    found = probe.run_circuits(run, **asked)
    assert len(times) == 1 + 1 + 2
    assert probe.run_circuits(run, **asked) == found
    assert len(times) == 4
    assert list(found) == ["tiny-math--sft", "tiny-math--grpo", "tiny-math--dpo"]
    for name, (curve,) in found.items():
        table = json.loads((run / "circuits" / f"{name}.json").read_text())
        assert len(table["ranked_on"]) == len(table["measured_on"]) == 4
        assert not set(table["ranked_on"]) & set(table["measured_on"])
        assert table["curves"][0]["cpr"] == curve.cpr
        assert len(table["curves"][0]["top_edges"]) == 20
        for picture in (f"{name}.png", f"{name}.edges.png"):
            assert (run / "circuits" / picture).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ProbeError, match="at least 4"):
        probe.run_circuits(run, methods="eap", questions=3)
    with pytest.raises(ProbeError, match="'magic' is not known"):
        probe.run_circuits(run, methods="magic")
