"""Batches that are filled up to be recorded: as the plain ones; and, on a GPU, what is played."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import save_small_model

import probe
from probe.attribution import make_batch
from probe.models._recordings import MOST, MOST_SHAPES, Recordings
from probe.tracing import FASTEST, HERE, Target, edge_scores, even, recordable, room_for
from probe.tracing._contexts import edge_pass_of, run_edge_pass
from probe.tracing._edge_inputs import Room, RowBlocks, edge_inputs
from probe.tracing._recorded import _placed, room_of

SEQUENCES = [
    probe.TokenSequence([5, 61, 33, 7, 90, 12], [44, 8, 71]),
    probe.TokenSequence([17, 3, 25], [80, 66, 9, 42]),
]
CORRUPTED = [
    probe.TokenSequence([5, 60, 33, 7, 91, 12], [44, 8, 71]),
    probe.TokenSequence([18, 3, 26], [80, 66, 9, 42]),
]
TARGETS = [Target(), Target("margin"), Target("loss", 1.7), Target("loss", (0.6, 2.5))]


def gap(found, truth):
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of several architectures, loaded once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            folder = save_small_model(tmp_path_factory.mktemp(name) / "model", name)
            loaded[name] = probe.load_model(str(folder), device="cpu", dtype="float64")
        return loaded[name]

    return load


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.name}-{target.divisors}")
@pytest.mark.parametrize("path", [HERE, even(3), even(3)._replace(from_mean=True)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_batch_that_is_filled_up_scores_as_it_is(models, name, path, target):
    model = models(name)
    for corrupted in (None, CORRUPTED) if path is HERE else (None,):
        references = target.beside(range(2), [len(s.answer) for s in SEQUENCES])
        batch, graph = make_batch(SEQUENCES, corrupted, references), model.graph("qkv")
        plain = edge_scores(model, batch, graph, path, target=target)
        blocks = RowBlocks(len(path.points), corrupted is not None)
        inputs = edge_inputs(batch, blocks, torch.float64, room_of(batch))
        assert inputs.input_ids.shape == (2 * blocks.number, 16)
        asked = (path, False, FASTEST, target, False, False)
        edge_pass = edge_pass_of(model, _placed(inputs, model.device), blocks, graph, *asked)
        edge_pass.product.place(model.device)
        filled = run_edge_pass(model, inputs, edge_pass)
        # Gemma 2 takes its softmax in float32.
        rounding = 1e-5 if name == "gemma2" else 1e-12
        assert gap(filled.scores, plain.scores) < rounding
        for part in ("values", "ablated_values", "losses", "entropies"):
            torch.testing.assert_close(getattr(filled, part), getattr(plain, part))
        # These are measured at the filling too, where it is the model that is looked at.
        assert filled.residual_error < 1e-12
        assert filled.logits_error < 1e-12


def test_the_filling_counts_nothing():
    batch = make_batch(SEQUENCES)
    inputs = edge_inputs(batch, RowBlocks(1), torch.float32, Room(32, 16))
    rows, positions, _, shares = inputs.scored
    plain = edge_inputs(batch, RowBlocks(1), torch.float32).scored
    for part, whole in zip(inputs.scored, plain, strict=True):
        assert torch.equal(part[:7], whole)
    assert not shares[7:].any()
    assert not rows[7:].any()
    assert not positions[7:].any()
    assert (inputs.compared, inputs.compared_row) == (15, 0)
    assert not inputs.input_ids[:, 8:].any()


@given(st.integers(1, 100_000))
def test_rooms_are_few_and_little_larger(count):
    room = room_for(count)
    assert count <= room <= max(count + 15, count * 1.25)
    assert room % 16 == 0
    assert room_for(room) == room
    assert room_for(count + 1) >= room


class Pass:
    """Stands for a recorded pass."""

    bytes = 10


def test_the_pass_that_was_not_played_for_longest_is_forgotten():
    recordings = Recordings()
    for number in range(MOST):
        recordings.put(number, Pass())
    assert (len(recordings), recordings.bytes) == (MOST, 10 * MOST)
    first = recordings.get(0)
    assert isinstance(first, Pass)
    recordings.put("new", Pass())
    assert len(recordings) == MOST
    assert recordings.get(0) is first
    assert recordings.get(1) == 0
    for number in range(1000, 1000 + 2 * MOST_SHAPES):
        recordings.put(number, 1)
    assert len(recordings._known) == MOST_SHAPES
    recordings.clear()
    assert (len(recordings), recordings.some()) == (0, None)


def test_nothing_is_recorded_on_a_cpu(tiny):
    assert not recordable(tiny)
    before = tiny.recordings.played
    for _ in range(3):
        probe.attribute(tiny, SEQUENCES_OF_TINY)
    assert (len(tiny.recordings), tiny.recordings.played) == (0, before)


SEQUENCES_OF_TINY = [probe.TokenSequence([5, 6, 7], [8, 9, 4]), probe.TokenSequence([3, 4], [5])]

CASES = {
    "eap": {},
    "relp": {"method": "relp"},
    "eap-ig": {"method": "eap-ig", "ig_steps": 5},
    "eap-ig from the mean": {"method": "eap-ig"},
    "mean ablation": {"ablation": "mean"},
    "corrupted": {"corrupted": [probe.TokenSequence(p, []) for p in ([4, 6, 9], [8, 3])]},
    "own temperatures": {"target": Target("loss", (0.6, 2.5))},
    "block": {"granularity": "block"},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_what_is_played_equals_plain_passes(case):
    model, other = (probe.load_model("probe:tiny-math/sft", "cuda") for _ in range(2))
    other.recordings.refused = True
    for turn in range(5):
        sequences = [
            probe.TokenSequence(s.prompt[::-1], [*s.answer, *[5 + turn] * turn])
            for s in SEQUENCES_OF_TINY
        ]
        found = probe.attribute(model, sequences, **CASES[case])
        truth = probe.attribute(other, sequences, **CASES[case])
        assert gap(found.scores, truth.scores) < 1e-5
        torch.testing.assert_close(found.losses, truth.losses)
        torch.testing.assert_close(found.entropies, truth.entropies)
        torch.testing.assert_close(found.values, truth.values)
    assert model.recordings.played >= 3
    assert other.recordings.played == 0
    assert len(model.recordings) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_target_that_cannot_be_recorded_is_said_once():
    def waits(logits, labels):
        return logits.gather(1, labels[:, None])[:, 0] * float(logits.sum().item() != 0)

    model = probe.load_model("probe:tiny-math/sft", "cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [probe.attribute(model, SEQUENCES_OF_TINY, target=waits) for _ in range(4)]
    assert len([w for w in said if "cannot be recorded" in str(w.message)]) == 1
    assert model.recordings.played == 0
    assert torch.randn(2, device="cuda").isfinite().all()  # random numbers are as they were
    for edges in found[1:]:
        assert gap(edges.scores, found[0].scores) < 1e-5
