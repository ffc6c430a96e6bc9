"""Edge scores: slices, arithmetic, and what is refused."""

import numpy as np
import pytest
import torch

import probe
from probe.errors import ProbeError
from probe.graph import Graph

GRAPH = Graph.build(2, "qkv")


def some_edges(ids=("p", "q", "r"), seed=0, graph=GRAPH):
    """Random scores of a small graph."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(ids), *graph.mask.shape, generator=generator) * graph.mask
    losses, entropies = torch.rand(2, len(ids), generator=generator)
    return probe.EdgeScores(scores, losses, entropies, graph, seed * 1e-7, tuple(ids))


@pytest.mark.parametrize(
    ("choice", "places"),
    [
        (1, [1]),
        (-1, [2]),
        (np.int64(2), [2]),
        ("q", [1]),
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0, 2], [2, 0, 2]),
        (["r", "p"], [2, 0]),
        ([True, False, True], [0, 2]),
        ([], []),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([False, True, False]), [1]),
        (np.array([0, 2]), [0, 2]),
    ],
)
def test_slices_hold_the_chosen_sequences(choice, places):
    edges = some_edges()
    part = edges[choice]
    assert len(part) == len(places)
    assert torch.equal(part.scores, edges.scores[places])
    assert torch.equal(part.losses, edges.losses[places])
    assert torch.equal(part.entropies, edges.entropies[places])
    assert part.ids == tuple("pqr"[place] for place in places)
    assert part.graph == edges.graph


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (3, "no sequence 3; there are 3"),
        (-4, "no sequence -4"),
        ("z", "no sequence has the id 'z'"),
        ([True, False], "2 bools do not fit 3 sequences"),
        (True, "True is neither"),
        (1.0, "1.0 chooses no sequences"),
        ([0, 1.5], "1.5 is neither"),
        (None, "None chooses no"),
        ((0, 1, 2, 3), "no sequence 3"),
    ],
)
def test_no_such_sequence(choice, message):
    with pytest.raises(ProbeError, match=message):
        some_edges()[choice]


def test_an_id_of_several_sequences_is_refused():
    edges = some_edges(ids=("p", "q", "p"))
    assert len(edges["q"]) == 1
    with pytest.raises(ProbeError, match="2 sequences have the id 'p'; give the place"):
        edges["p"]


def test_iterating_and_membership():
    edges = some_edges()
    assert [part.ids for part in edges] == [("p",), ("q",), ("r",)]
    assert "q" in edges
    assert "z" not in edges


def test_arithmetic_means_what_it_says():
    first, second = some_edges(seed=1), some_edges(seed=2)
    assert torch.equal((first - second).scores, first.scores - second.scores)
    assert torch.equal((first + second).losses, first.losses + second.losses)
    assert torch.equal((2 * first).entropies, first.entropies * 2)
    assert (np.float64(2) * first) == first * 2 == first + first
    assert torch.equal((first / 2).scores, first.scores / 2)
    assert -first == first * -1
    assert (first - second).residual_error == 2e-7
    assert (first - second).ids == first.ids


def test_equal_is_one_answer():
    assert some_edges() == some_edges()
    assert some_edges() != some_edges(seed=1)
    assert some_edges() != some_edges(ids=("p", "q", "z"))
    assert some_edges() != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(some_edges())


def test_what_does_not_belong_together_is_refused():
    edges = some_edges()
    with pytest.raises(ProbeError, match="different sequences"):
        edges - some_edges(ids=("p", "r", "q"))
    with pytest.raises(ProbeError, match="different graphs"):
        edges + some_edges(graph=Graph.build(2, "block"))
    for wrong in (edges.scores, 1, None):
        with pytest.raises(TypeError):
            edges + wrong
    for wrong in (edges, True, "2"):
        with pytest.raises(TypeError):
            edges * wrong
    with pytest.raises(AttributeError):
        edges.scores = None


def test_shapes_must_fit():
    edges = some_edges()
    with pytest.raises(ProbeError, match=r"scores of shape \[2, 5, 9\] and \[3\] entropies do not"):
        probe.EdgeScores(edges.scores[:2], edges.losses, edges.entropies, GRAPH)
    with pytest.raises(ProbeError, match="2 ids do not fit 3 sequences"):
        probe.EdgeScores(edges.scores, edges.losses, edges.entropies, GRAPH, 0.0, ("a", "b"))


def test_names_are_places_where_none_are_given():
    edges = some_edges()
    assert probe.EdgeScores(edges.scores, edges.losses, edges.entropies, GRAPH).ids == (
        "0",
        "1",
        "2",
    )


def test_the_repr_is_one_line():
    assert repr(some_edges()[0]).startswith("EdgeScores(1 sequence, 23 edges of qkv, mean loss 0.")
    assert repr(some_edges(ids=())) == "EdgeScores(0 sequences, 23 edges of qkv)"
