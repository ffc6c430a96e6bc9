from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DATA, oracle_sequences, save_random_model

import probe
from probe.attribution import METHODS
from probe.errors import ProbeError


def distance(found, truth):
    """Largest and Frobenius distance, relative to the truth's largest score and norm."""
    found, truth = (torch.as_tensor(x).double() for x in (found, truth))
    return (
        float((found - truth).abs().max() / truth.abs().max()),
        float((found - truth).norm() / truth.norm()),
    )


def test_scores_are_the_published_methods_own(oracle):
    model = probe.load_model(str(oracle / "model"))
    sequences, truth = oracle_sequences(oracle)
    edges = probe.attribute(model, sequences, method="eap", granularity="qkv", batch_size=4)
    assert edges.scores.dtype == edges.losses.dtype == torch.float32
    for row in range(len(sequences)):
        assert max(distance(edges.scores[row], truth["iso_scores"][row])) <= 1e-5
    assert np.abs(edges.losses.numpy() - truth["loss"]).max() <= 1e-5
    assert (edges.graph.mask.numpy() == truth["real_edge_mask"]).all()
    assert edges.graph.sources == tuple(truth["forward_nodes"])
    published = [name.replace("<", ".").replace(">", "") for name in truth["backward_nodes"]]
    assert edges.graph.targets == tuple(published)


def test_a_batch_gives_what_each_sequence_gives_alone(oracle):
    model = probe.load_model(str(oracle / "model"))
    sequences, _ = oracle_sequences(oracle)
    together = probe.attribute(model, sequences, batch_size=4)
    alone = probe.attribute(model, sequences, batch_size=1)
    assert max(distance(together.scores, alone.scores)) <= 1e-5
    assert torch.allclose(together.losses, alone.losses, atol=1e-5)


def test_block_is_the_sum_of_query_key_and_value(oracle):
    model = probe.load_model(str(oracle / "model"))
    sequences, _ = oracle_sequences(oracle)
    fine = probe.attribute(model, sequences, granularity="qkv")
    coarse = probe.attribute(model, sequences, granularity="block")
    for column, target in enumerate(coarse.graph.targets):
        parts = [i for i, t in enumerate(fine.graph.targets) if t.partition(".")[0] == target]
        summed = fine.scores[:, :, parts].sum(2)
        assert (coarse.scores[:, :, column] - summed).abs().max() <= 1e-5 * fine.scores.abs().max()
    assert torch.allclose(fine.losses, coarse.losses, atol=1e-6)


@pytest.mark.parametrize("granularity", ["qkv", "block"])
def test_free_invariants(oracle, granularity):
    model = probe.load_model(str(oracle / "model"))
    sequences, _ = oracle_sequences(oracle)
    scores = probe.attribute(model, sequences, granularity=granularity).scores
    mask = probe.Graph.build(model.n_layers, granularity).mask
    # RMSNorm does not see the scale of its input, so a column sums to 0 but for its epsilon.
    assert scores.sum(1).abs().max() <= 2e-4
    first = {"qkv": 3, "block": 1}[granularity]  # what reads `input` alone is rounding noise
    assert scores[:, :, first:].abs().amax(1).min() > 2e-3  # ten times what a column may sum to
    assert (scores[:, ~mask] == 0).all()


def test_grouped_key_and_value_heads_are_not_expanded(tmp_path):
    grouped = probe.load_model(str(save_random_model(tmp_path / "g", num_key_value_heads=1)))
    edges = probe.attribute(grouped, [probe.Sequence([5, 6, 7], [8, 9])])
    assert edges.scores.shape == (1, 5, 9)


def test_one_token_each(llama):
    edges = probe.attribute(llama, [probe.Sequence(prompt=[7], answer=[9])])
    assert edges.losses.shape == (1,)
    assert edges.scores.isfinite().all()


def test_no_sequences(llama):
    edges = probe.attribute(llama, [])
    assert edges.scores.shape == (0, 7, 13)


def test_weights_stay_frozen_and_unchanged(llama):
    before = {n: p.clone() for n, p in llama.network._module.named_parameters()}
    probe.attribute(llama, [probe.Sequence([5, 6], [7, 8])])
    for name, parameter in llama.network._module.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_each_batch_is_handed_over(llama):
    seen = []
    sequences = [probe.Sequence([5, 6, 7], [8] * n) for n in (1, 5, 2, 3, 4)]
    everything = probe.attribute(
        llama,
        sequences,
        batch_size=2,
        finished=lambda indices, batch: seen.append((indices, batch)),
    )
    assert [indices for indices, _ in seen] == [[1, 4], [3, 2], [0]]  # the longest first
    for indices, batch in seen:
        assert torch.equal(everything.scores[indices], batch.scores)
        assert torch.equal(everything.losses[indices], batch.losses)


def test_what_is_done_is_left_out(llama):
    sequences = [probe.Sequence([5, 6, 7], [8] * n) for n in (1, 5, 2)]
    everything = probe.attribute(llama, sequences, batch_size=1).scores
    rest = probe.attribute(llama, sequences, batch_size=1, done=[1]).scores
    assert (rest[1] == 0).all()
    assert torch.equal(rest[[0, 2]], everything[[0, 2]])


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (probe.Sequence([], [1]), "sequence 0: the prompt is empty"),
        (probe.Sequence([1], []), "sequence 0: the answer is empty"),
        (probe.Sequence([1], [97], "q7"), "sequence q7: token 97 .*0 to 96"),
        (probe.Sequence([-1], [5]), "token -1"),
        (probe.Sequence([1] * 100, [5] * 30, "q8"), "q8: 129 tokens are more .* of 128"),
    ],
)
def test_bad_sequences(llama, sequence, message):
    with pytest.raises(ProbeError, match=message):
        probe.attribute(llama, [sequence])


def test_bad_arguments(llama):
    good = [probe.Sequence([1], [2])]
    with pytest.raises(ProbeError, match="'eapp' is not known; one of: eap, eap-ig"):
        probe.attribute(llama, good, method="eapp")
    with pytest.raises(ProbeError, match="batch_size is 0"):
        probe.attribute(llama, good, batch_size=0)


def test_a_score_that_is_not_finite_stops_with_the_samples_id():
    model = probe.load_model(str(DATA / "oracle" / "llama" / "model"))
    with torch.no_grad():
        model.network._module.model.embed_tokens.weight[50] = float("nan")
    sequences = [probe.Sequence([5, 6], [7], "good"), probe.Sequence([5, 50], [7], "bad")]
    with pytest.raises(ProbeError, match="sequence bad: its loss or a score is NaN"):
        probe.attribute(model, sequences)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores(oracle):
    sequences, truth = oracle_sequences(oracle)
    edges = probe.attribute(probe.load_model(str(oracle / "model"), "cuda"), sequences)
    assert max(distance(edges.scores, truth["iso_scores"])) <= 1e-5


def test_the_first_batch_is_checked_though_it_did_not_fit_at_first(monkeypatch):
    """A batch that comes again in halves is the first one still; a later call checks no more."""
    model = probe.load_model("probe:tiny-math/sft")
    checked, way = [], METHODS["eap"]

    def score(model, sequences, graph, options):
        checked.append(options.check)
        if len(checked) == 1:
            raise torch.OutOfMemoryError("this is too much")
        return way.score(model, sequences, graph, options)

    monkeypatch.setitem(METHODS, "eap", replace(way, score=score))
    sequences = [probe.TokenSequence([5, 6, 7], [8, 9, part]) for part in range(4, 12)]
    probe.attribute(model, sequences, batch_size=4)
    assert checked[:2] == [True, True]
    assert len(checked) > 2
    assert not any(checked[2:])
    before = len(checked)
    probe.attribute(model, sequences, batch_size=4)
    probe.attribute(model, sequences, granularity="block", batch_size=8)
    assert checked[before:] == [False, False, True]
