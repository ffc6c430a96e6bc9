import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe.overlap
from probe.architectures import Heads
from probe.graph import Graph
from probe.overlap import compare_circuits, jaccard, rank_biased_overlap
from probe.statistics import halves


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
    mean = scores.abs().double().mean(0)
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
    [Graph.build(4, "qkv"), Graph.build(4, "block"), Graph.build(2, "head", Heads(4, 2, 8))],
)
def test_sets_against_names(graph):
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(6, *graph.mask.shape, generator=generator)
    after = before + torch.randn(6, *graph.mask.shape, generator=generator)
    found = compare_circuits(before, after, graph).models
    left, right = strongest(graph, before), strongest(graph, after)
    assert found.edges == pytest.approx(len(left & right) / len(left | right))

    def ends(edges):
        whole = graph.granularity != "qkv"
        return {s for s, _ in edges} | {t if whole else t.split(".")[0] for _, t in edges}

    left, right = ends(left), ends(right)
    assert found.nodes == pytest.approx(len(left & right) / len(left | right))


def test_the_split_halves():
    graph = Graph.build(3, "qkv")
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(7, *graph.mask.shape, generator=generator)
    after = torch.randn(7, *graph.mask.shape, generator=generator)
    found = compare_circuits(before, after, graph)

    def edges(left, right):
        left, right = strongest(graph, left), strongest(graph, right)
        return len(left & right) / len(left | right)

    across, within = [], ([], [])
    for one, other in zip(*halves(7), strict=True):
        one, other = torch.from_numpy(one), torch.from_numpy(other)
        across += [edges(before[one], after[other]), edges(before[other], after[one])]
        for side, rows in zip((before, after), within, strict=True):
            rows.append(edges(side[one], side[other]))
    assert found.across.edges == pytest.approx(np.mean(across))
    assert found.null.edges == pytest.approx(min(np.percentile(rows, 5) for rows in within))


def test_blocks_of_splits_give_the_same(monkeypatch):
    graph = Graph.build(3, "qkv")
    scores = torch.randn(2, 9, *graph.mask.shape, generator=torch.Generator().manual_seed(5))
    whole = compare_circuits(*scores, graph)
    monkeypatch.setattr(probe.overlap, "_VALUES", 1)
    for one, other in zip(compare_circuits(*scores, graph), whole, strict=True):
        assert one == pytest.approx(other)


def test_one_model_is_within_its_own_noise_and_another_is_not():
    graph = Graph.build(4, "qkv")
    generator = torch.Generator().manual_seed(6)
    circuit = torch.rand(graph.mask.shape, generator=generator) ** 4

    def draws(circuit):
        noise = torch.randn(2, 30, *graph.mask.shape, generator=generator).exp()
        return circuit * noise

    before, after = draws(circuit)  # other questions, the same model
    same = compare_circuits(before, after, graph)
    assert all(a >= n for a, n in zip(same.across, same.null, strict=True))
    identical = compare_circuits(before, before, graph)
    assert identical.models == (1, pytest.approx(1), 1)
    other = draws(torch.rand(graph.mask.shape, generator=generator) ** 4)[0]
    different = compare_circuits(before, other, graph)
    assert different.across.edges < different.null.edges
    assert different.across.ranks < different.null.ranks


def test_one_question_has_no_halves():
    graph = Graph.build(1, "block")
    scores = torch.rand(1, *graph.mask.shape)
    found = compare_circuits(scores, scores, graph)
    assert found.models == (1, pytest.approx(1), 1)
    assert found.across is found.null is None
