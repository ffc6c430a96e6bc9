import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe.stats._overlap
from probe.models import Graph, Heads, Mixture
from probe.stats import compare_circuits, jaccard, rank_biased_overlap


def slow_rbo(left, right, p, depth):
    """The extrapolated point estimate of Webber, Moffat and Zobel 2010, with sets."""
    orders = [sorted(range(len(v)), key=lambda i: -v[i]) for v in (left, right)]
    depth = min(depth, len(left))
    total = 0.0
    for d in range(1, depth + 1):
        agreed = len(set(orders[0][:d]) & set(orders[1][:d]))
        total += agreed / d * p**d
    return agreed / depth * p**depth + (1 - p) / p * total


@given(st.permutations(range(15)), st.sampled_from([0.5, 0.9]), st.integers(1, 20))
def test_rank_biased_overlap_against_sets(order, p, depth):
    left, right = np.arange(15.0), np.array(order, dtype=float)
    found = rank_biased_overlap(left, right, p, depth)
    assert found == pytest.approx(slow_rbo(left.tolist(), right.tolist(), p, depth))


def test_the_ends_of_rank_biased_overlap():
    values = np.random.default_rng(0).random(300)
    assert rank_biased_overlap(values, values) == pytest.approx(1)
    top = np.where(np.arange(300) < 150, 1.0, 0.0) + values / 10
    assert rank_biased_overlap(top, -top) == pytest.approx(0)
    swapped = np.array([2.0, 1.0])
    assert rank_biased_overlap(swapped, swapped[::-1].copy(), 0.9) == pytest.approx(0.9)


def test_jaccard():
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    assert jaccard(np.array([1]), np.array([2])) == 0


def strongest(graph, scores, share=0.1):
    """By hand: the set of the strongest real edges of the mean |score|, by names."""
    totals = scores.abs().double()[:, graph.mask].sum(1)
    mean = (scores.abs().double() / totals[:, None, None]).mean(0)
    edges = [
        (float(mean[s, t]), source, target)
        for s, source in enumerate(graph.sources)
        for t, target in enumerate(graph.targets)
        if graph.mask[s, t]
    ]
    edges.sort(reverse=True)
    return {edge[1:] for edge in edges[: max(1, round(share * len(edges)))]}


@pytest.mark.parametrize(
    "graph",
    [
        Graph.build(4, "qkv"),
        Graph.build(4, "block"),
        Graph.build(2, "head", Heads(4, 2, 8)),
        Graph.build(2, "expert", mixtures=[Mixture(0, False), Mixture(3, True)]),
    ],
)
def test_sets_against_names(graph):
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(6, *graph.mask.shape, generator=generator)
    after = before + torch.randn(6, *graph.mask.shape, generator=generator)
    found = compare_circuits(before, after, graph).models
    left, right = strongest(graph, before), strongest(graph, after)
    assert found.edges == pytest.approx(len(left & right) / len(left | right))

    def ends(edges):
        whole = graph.granularity not in ("qkv", "expert")
        return {s for s, _ in edges} | {t if whole else t.split(".")[0] for _, t in edges}

    left, right = ends(left), ends(right)
    assert found.nodes == pytest.approx(len(left & right) / len(left | right))


def test_the_exchanges_by_hand():
    """All of them for four questions, against as many random ones."""
    graph = Graph.build(3, "qkv")
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(4, *graph.mask.shape, generator=generator) * graph.mask
    after = torch.randn(4, *graph.mask.shape, generator=generator) * graph.mask
    found = compare_circuits(before, after, graph, np.arange(4), 4000)
    old, new = (side / side.abs().sum((1, 2), keepdim=True) for side in (before, after))

    def edges(left, right):
        left, right = strongest(graph, left), strongest(graph, right)
        return len(left & right) / len(left | right)

    assert found.models.edges == pytest.approx(edges(old, new))
    values = []
    for signs in itertools.product((True, False), repeat=4):
        chosen = torch.tensor(signs)[:, None, None]
        values.append(edges(torch.where(chosen, old, new), torch.where(chosen, new, old)))
    assert found.chance.edges == pytest.approx(np.mean(values), abs=0.02)
    expected = np.mean(np.array(values) <= found.models.edges + 1e-12)
    assert found.p_values.edges == pytest.approx(expected, abs=0.03)


def test_blocks_of_exchanges_give_the_same(monkeypatch):
    graph = Graph.build(3, "qkv")
    scores = torch.randn(2, 9, *graph.mask.shape, generator=torch.Generator().manual_seed(5))
    whole = compare_circuits(*scores, graph, np.arange(9), 50)
    monkeypatch.setattr(probe.stats._overlap, "_VALUES", 1)
    for one, other in zip(compare_circuits(*scores, graph, np.arange(9), 50), whole, strict=True):
        assert one == pytest.approx(other)


def test_one_model_is_like_itself_and_another_is_not():
    graph = Graph.build(4, "qkv")
    generator = torch.Generator().manual_seed(6)
    circuit = torch.rand(graph.mask.shape, generator=generator) ** 4

    def draws(circuit):
        noise = torch.randn(2, 30, *graph.mask.shape, generator=generator).exp()
        return circuit * noise

    before, after = draws(circuit)  # other noise, the same model
    units = np.arange(30)
    same = compare_circuits(before, after, graph, units, 199)
    assert min(same.p_values) > 0.05
    identical = compare_circuits(before, before, graph, units, 199)
    assert identical.models == (1, pytest.approx(1), 1)
    assert identical.p_values == (1, 1, 1)
    scaled = compare_circuits(before, before * torch.rand(30, 1, 1) ** 5, graph, units, 199)
    assert scaled.models == (1, pytest.approx(1), 1)  # one question does not make the circuit
    other = draws(torch.rand(graph.mask.shape, generator=generator) ** 4)[0]
    different = compare_circuits(before, other, graph, units, 199)
    assert different.models.edges < different.chance.edges
    assert different.p_values.edges == different.p_values.ranks == 1 / 200
    # In two clusters, there are but two ways to exchange.
    assert min(compare_circuits(before, other, graph, units % 2, 199).p_values) > 0.3


def test_one_question_has_no_chance():
    graph = Graph.build(1, "block")
    scores = torch.rand(1, *graph.mask.shape)
    found = compare_circuits(scores, scores, graph, np.arange(1))
    assert found.models == (1, pytest.approx(1), 1)
    assert found.chance is found.p_values is None
