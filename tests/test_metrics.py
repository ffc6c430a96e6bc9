import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probe
from probe.errors import ProbeError
from probe.metrics import (
    METRICS,
    Entries,
    compute_metric,
    effective_number,
    metric_named,
    paper_number,
    token_entropy,
)

MASK = probe.Graph.build(2, "qkv").mask


@pytest.fixture
def scores():
    torch.manual_seed(0)
    heavy = torch.randn(7, *MASK.shape) ** 3
    return heavy * MASK


def entries(scores, mask):
    flat = scores.flatten(1) if mask is None else scores[:, mask]
    return flat.double().numpy()


@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "real"])
def test_against_scipy(scores, mask):
    values = entries(scores, mask)
    assert probe.metrics.activation_intensity(scores, mask) == pytest.approx(
        np.mean([np.abs(row).mean() for row in values]), rel=1e-12
    )
    assert probe.metrics.distribution_kurtosis(scores, mask) == pytest.approx(
        np.mean([scipy.stats.kurtosis(row) for row in values]), rel=1e-10
    )
    pearson = [1 - scipy.stats.pearsonr(a, b)[0] for a, b in itertools.combinations(values, 2)]
    assert probe.metrics.sample_diversity(scores, mask) == pytest.approx(
        np.mean(pearson), rel=1e-10
    )


@pytest.mark.parametrize("bins", [1, 7, 100])
@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "real"])
def test_entropies_by_counting(scores, mask, bins):
    def entropy(values):
        values = np.abs(values).ravel()
        width = values.max() / bins
        counts = np.zeros(bins)
        for value in values:
            counts[min(int(value / width), bins - 1)] += 1
        return scipy.stats.entropy(counts)

    found = probe.metrics.information_complexity(scores, mask, bins=bins)
    assert found == pytest.approx(entropy(entries(scores, mask)), abs=1e-6)
    last = probe.metrics.output_entropy(scores, mask, bins=bins)
    assert last == pytest.approx(entropy(scores[:, :, -1].double().numpy()), abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_zeros_that_are_not_stored_count(scores, name):
    """Real edges and a number of zeros give what the dense matrix gives."""
    edges = Entries(scores, MASK, dense=True)
    assert paper_number(METRICS[name], edges, 20) == pytest.approx(
        compute_metric(name, scores, bins=20), rel=1e-9
    )
    assert paper_number(METRICS[name], edges.without_zeros(), 20) == pytest.approx(
        compute_metric(name, scores, MASK, bins=20), rel=1e-9
    )


def test_effective_number_against_scipy():
    values = np.random.default_rng(0).lognormal(size=(3, 40))
    expected = [math.exp(scipy.stats.entropy(row)) for row in values]
    assert effective_number(values) == pytest.approx(expected)
    assert effective_number(np.array([[0.0, 2, 0, 2]])) == pytest.approx([2])
    assert np.isnan(effective_number(np.zeros((1, 4)))).all()


def test_a_constant_matrix_has_no_correlation():
    scores = torch.rand(3, 4, 5)
    scores[1] = 0.1
    found = METRICS["sample_diversity"].parts(Entries(scores))
    assert np.isnan(found[1, [0, 2]]).all()
    assert np.isfinite(found[0, 2])


def test_a_value_known_by_hand():
    scores = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    assert probe.metrics.activation_intensity(scores) == 0.5
    assert probe.metrics.information_complexity(scores, bins=2) == pytest.approx(math.log(2))
    assert probe.metrics.distribution_kurtosis(scores) == pytest.approx(-1.0)


def test_structural_zeros_count_in_the_dense_convention(scores):
    share = float(MASK.double().mean())
    dense = probe.metrics.activation_intensity(scores)
    assert dense == pytest.approx(share * probe.metrics.activation_intensity(scores, MASK))


@pytest.mark.parametrize("name", METRICS)
def test_a_model_against_itself_is_identical(scores, name):
    assert compute_metric(name, scores) == compute_metric(name, scores.clone())
    assert compute_metric(name, scores, MASK) == compute_metric(name, scores.clone(), MASK)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_scale(seed, factor):
    """Intensity scales with the scores; the shape metrics do not move."""
    torch.manual_seed(seed)
    scores = torch.randn(3, 4, 5, dtype=torch.float64)
    for name in METRICS:
        expected = compute_metric(name, scores) * (factor if name == "activation_intensity" else 1)
        # A value on a bin's edge may fall to the other side: allow one value to move.
        slack = 0.2 if METRICS[name].form == "histogram" else 1e-9 * max(1, abs(expected))
        assert compute_metric(name, scores * factor) == pytest.approx(expected, abs=slack)


def test_where_a_metric_is_not_defined():
    assert math.isnan(probe.metrics.sample_diversity(torch.randn(1, 3, 3)))
    assert math.isnan(probe.metrics.distribution_kurtosis(torch.zeros(2, 3, 3)))
    assert probe.metrics.information_complexity(torch.zeros(2, 3, 3)) == pytest.approx(0, abs=1e-9)


def test_bad_input():
    with pytest.raises(ProbeError, match=r"\[0, 3, 3\]"):
        probe.metrics.activation_intensity(torch.zeros(0, 3, 3))
    with pytest.raises(ProbeError, match="'intensity' is not known"):
        compute_metric("intensity", torch.zeros(1, 3, 3))


def test_token_entropy_is_a_mean_over_questions():
    entropies = torch.tensor([0.5, 1.5, 4.0])
    assert token_entropy(entropies) == 2
    edges = Entries(torch.rand(3, 2, 2), entropies=entropies)
    assert metric_named("token_entropy").parts(edges).tolist() == [0.5, 1.5, 4]
    with pytest.raises(ProbeError, match="'entropy' is not known; one of: .*token_entropy"):
        metric_named("entropy")
