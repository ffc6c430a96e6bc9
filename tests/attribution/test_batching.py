"""Batches: every place once, no more rows than allowed, and none lost where memory runs out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe
from probe.attribution import ENOUGH_TOKENS, METHODS, Batching, Method, bytes_per_token
from probe.attribution._batching import ONE_MORE
from probe.tracing import FASTEST, MemoryMode

GRAPH = probe.Graph.build(4, "qkv")
SEQUENCES = [probe.Sequence([5, 6, 7], [4 + n] * (1 + n % 5), str(n)) for n in range(11)]


def run(batching, lengths, done=()):
    return [indices for indices, _ in batching.run(lengths, lambda indices, memory: None, done)]


@given(
    st.lists(st.integers(1, 3000), max_size=40),
    st.one_of(st.just("auto"), st.integers(1, 9)),
    st.integers(1, 5),
)
def test_every_place_once_the_longest_first(tiny_model, lengths, size, steps):
    batches = run(Batching(tiny_model, GRAPH, size, steps), lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    longest = [lengths[batch[0]] for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        assert lengths[batch[0]] == max(lengths[index] for index in batch)
        if size != "auto":
            assert len(batch) <= size
        elif len(batch) > 1:
            assert len(batch) * lengths[batch[0]] * steps <= ENOUGH_TOKENS["cpu"]


@pytest.fixture(scope="module")
def tiny_model():
    return probe.load_model("probe:tiny-math/sft")


@pytest.mark.parametrize(
    ("one_more", "sizes"),
    [
        (0, [2, 3, 1, 10]),  # none is filled up
        (30, [6, 10]),  # 8 is filled up; nine more tokens for each of the ten are too many
        (1000, [16]),
    ],
)
def test_a_batch_is_filled_up_no_more_than_it_is_worth(tiny_model, monkeypatch, one_more, sizes):
    monkeypatch.setitem(ONE_MORE, "cpu", one_more * tiny_model.d_model**2)
    lengths = [1] * 10 + [8] + [9] * 3 + [10] * 2
    assert [len(batch) for batch in run(Batching(tiny_model, GRAPH, "auto"), lengths)] == sizes
    assert [len(batch) for batch in run(Batching(tiny_model, GRAPH, 7), lengths)] == [7, 7, 2]


def test_what_is_done_is_left_out(tiny_model):
    assert run(Batching(tiny_model, GRAPH, 2), [3, 9, 5, 7], done=[1]) == [[3, 2], [0]]


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one(tiny_model, size):
    with pytest.raises(probe.ProbeError, match="must be at least 1, or auto"):
        Batching(tiny_model, GRAPH, size)


def forgetful(most_tokens, sequences, seen, without=FASTEST):
    """A method that has memory for so many tokens, and for any number once it saves enough."""
    method = METHODS["eap"]

    def limited(model, part, graph, options):
        tokens = sum(len(s.prompt) + len(s.answer) - 1 for s in part)
        seen.append((tokens, options.memory))
        if tokens > most_tokens and options.memory == without:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method.score(model, part, graph, options)

    return replace(method, score=limited)


def test_a_batch_that_does_not_fit_is_halved_and_not_lost(tiny_model, monkeypatch):
    truth = probe.attribute(tiny_model, SEQUENCES, batch_size=4)
    seen = []
    monkeypatch.setitem(METHODS, "eap", forgetful(14, SEQUENCES, seen))
    edges = probe.attribute(tiny_model, SEQUENCES, batch_size=8)
    assert seen[0][0] > 14
    assert [tokens for tokens, _ in seen[1:] if tokens > 28] == []
    assert (edges.scores - truth.scores).abs().max() <= 1e-5 * truth.scores.abs().max()
    torch.testing.assert_close(edges.losses, truth.losses)


def test_one_sequence_that_does_not_fit_computes_its_activations_again(tiny_model, monkeypatch):
    truth = probe.attribute(tiny_model, SEQUENCES, batch_size=1)
    seen = []
    monkeypatch.setitem(METHODS, "eap", forgetful(5, SEQUENCES, seen))
    edges = probe.attribute(tiny_model, SEQUENCES, batch_size=2)
    assert MemoryMode(recompute=True) in [memory for _, memory in seen]
    assert (edges.scores - truth.scores).abs().max() <= 1e-5 * truth.scores.abs().max()


def test_a_sequence_that_cannot_fit_says_so(tiny_model, monkeypatch):
    def never(model, part, graph, options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(METHODS, "eap", Method(never))
    with pytest.raises(probe.ProbeError, match="7 tokens does not fit into the memory of cpu"):
        probe.attribute(tiny_model, SEQUENCES)


def test_saving_memory_costs_less(tiny_model):
    plain, recomputed, on_host = (
        bytes_per_token(tiny_model, GRAPH, memory)
        for memory in (FASTEST, MemoryMode(True), MemoryMode(True, True))
    )
    assert plain > recomputed > on_host > 0
