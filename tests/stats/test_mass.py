import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.metrics import Entries
from probe.models import Graph, Heads
from probe.stats import _mass as mass

GRAPHS = [
    Graph.build(3, "qkv"),
    Graph.build(3, "block"),
    Graph.build(2, "head", Heads(4, 2, 8), bias=True),
    Graph.build(3, "qkv", parallel=True),
]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
def test_gini_is_half_the_relative_mean_difference(values):
    pairs = [abs(a - b) for a in values for b in values]
    expected = np.mean(pairs) / (2 * np.mean(values))
    assert mass.gini(np.array([values]))[0] == pytest.approx(expected, abs=1e-9)


def test_gini_by_hand():
    table = np.array([[1.0, 1, 1, 1], [0, 0, 0, 5], [1, 2, 3, 4]])
    assert mass.gini(table) == pytest.approx([0, 0.75, 0.25])


def test_a_question_without_scores_is_not_defined():
    zeros = np.zeros((1, 4))
    assert np.isnan(mass.gini(zeros)).all()


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.granularity}{g.parallel}")
@pytest.mark.parametrize("groups", [mass.kinds, mass.layers, mass.distances])
def test_shares_against_a_loop_over_edges(graph, groups):
    scores = torch.randn(2, *graph.mask.shape, generator=torch.Generator().manual_seed(1))
    values = Entries(scores * graph.mask, graph.mask).strengths
    found = groups(graph)
    shares = dict(zip([name for name, _ in found], mass.shares(values, found), strict=True))

    def layer(name):
        ends = {"input": -1, "logits": graph.n_layers}
        return ends[name] if name in ends else int(name.split(".")[0][1:])

    def kind(name):
        return name if name in ("input", "logits") else {"a": "attention", "m": "FFN"}[name[0]]

    def step(name):
        return name if name in ("input", "logits") else f"layer {layer(name)}"

    expected = {name: np.zeros(2) for name in shares}
    for s, source in enumerate(graph.sources):
        for t, target in enumerate(graph.targets):
            if graph.mask[s, t]:
                names = {
                    mass.kinds: (f"from {kind(source)}", f"into {kind(target)}"),
                    mass.layers: (f"from {step(source)}", f"into {step(target)}"),
                    mass.distances: (f"{layer(target) - layer(source)}",),
                }[groups]
                for name in names:
                    expected[name] += scores[:, s, t].abs().numpy()
    total = sum(value.sum() for value in values)
    assert total == pytest.approx(float((scores * graph.mask).abs().sum()), rel=1e-5)
    for name, share in shares.items():
        assert share == pytest.approx(expected[name] / values.sum(1), rel=1e-5)
    sides = 1 if groups is mass.distances else 2
    assert sum(shares.values()) == pytest.approx(np.full(2, sides))
