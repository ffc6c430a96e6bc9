"""Matching and exchanging within strata, against independent computation and under the null."""

import numpy as np
import pytest
from scipy.stats import rankdata

from probe.stats._matching import (
    balance,
    log_levels,
    matched_sets,
    rank_correlation,
    strata_of,
    treated_edges,
    two_sided,
)


def made(seed, edges=300):
    """Levels with a heavy tail, and what reads the edges."""
    random = np.random.default_rng(seed)
    fine = [f"{layer}{kind}" for layer, kind in random.integers(0, 4, (edges, 2))]
    return random, np.exp(1.3 * random.standard_normal(edges)), fine


def test_strata_are_narrow_and_of_one_cell():
    _, levels, fine = made(0)
    kinds = [name[1] for name in fine]
    strata = strata_of([fine, kinds, [""] * len(fine)], levels, 0.2)
    logs = log_levels(levels)
    sizes = np.bincount(strata.numbers)
    for number, size in enumerate(sizes):
        own = np.flatnonzero(strata.numbers == number)
        (stage,) = set(strata.stages[own])
        assert (stage == 3) == (size == 1)
        assert np.ptp(logs[own]) <= 0.2 * logs.std() + 1e-9
        names = (fine, kinds)[stage] if stage < 2 else None
        assert names is None or len({names[edge] for edge in own}) == 1
    assert (strata.stages == 0).mean() > 0.5
    assert len(strata.numbers) == len(levels)


def test_levels_of_edges_that_do_nothing_are_one():
    levels = np.array([0.0, 1e-9, 0.5, 0.5])
    assert np.ptp(log_levels(levels)[:2]) == 0
    assert strata_of([["m0"] * 4], levels).numbers.tolist() == [0, 0, 1, 1]


def test_sets_are_drawn_from_the_strata_of_the_treated():
    random, levels, fine = made(1)
    strata = strata_of([fine], levels).numbers
    labels = random.standard_normal(len(levels))
    treated, unlike = treated_edges(labels, strata, 12)
    alike = np.bincount(strata)[strata] > 1
    assert treated.tolist() == [edge for edge in np.argsort(-labels) if alike[edge]][:12]
    assert unlike == sum(labels[~alike] > labels[treated[-1]])
    drawn = matched_sets(treated, strata, 400, 3)
    assert drawn.shape == (400, 12)
    for one in drawn:
        assert len(set(one)) == 12
        assert sorted(strata[one]) == sorted(strata[treated])
    assert np.array_equal(drawn, matched_sets(treated, strata, 400, 3))
    # Every edge of a stratum comes as often, the treated ones too.
    number = strata[treated[0]]
    share = (strata[treated] == number).sum() / (strata == number).sum()
    often = (drawn == treated[0]).any(1).mean()
    assert often == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 400))
    before, after = balance(levels, treated, drawn)
    logs = log_levels(levels)
    others = np.setdiff1d(np.arange(len(levels)), treated)
    assert before == pytest.approx((logs[treated].mean() - logs[others].mean()) / logs.std())
    assert abs(after) < 0.1


def test_the_regression_is_that_of_least_squares():
    random, levels, fine = made(2)
    strata = strata_of([fine], levels).numbers
    labels, noise = random.standard_normal((2, len(levels)))
    damage = levels + 0.5 * labels + noise
    keep = np.bincount(strata)[strata] > 1
    found = rank_correlation(damage[keep], labels[keep], levels[keep], strata[keep], 0, 199)
    y, x, level = (rankdata(values[keep]) for values in (damage, labels, levels))
    dummies = (strata[keep][:, None] == np.unique(strata[keep])).astype(float)
    design = np.column_stack([dummies, level])
    y, x = (values - design @ np.linalg.lstsq(design, values)[0] for values in (y, x))
    assert found.correlation == pytest.approx(np.corrcoef(y, x)[0, 1])
    assert found.p_value == 2 / 200
    assert 0 < found.detectable < found.correlation


def test_under_the_null_p_values_are_even():
    """Damage depends on level, cell and an edge's own quirks, and not on the label."""
    edge_tests, set_tests = [], []
    for seed in range(300):
        random, levels, fine = made(seed, 200)
        strata = strata_of([fine], levels).numbers
        damage = levels * np.exp(random.standard_normal(200)) * np.array([ord(f[1]) for f in fine])
        # Strong edges change more, either way.
        labels = levels * random.standard_normal(200)
        keep = np.bincount(strata)[strata] > 1
        parts = damage[keep], labels[keep], levels[keep], strata[keep]
        edge_tests.append(rank_correlation(*parts, seed, 199).p_value)
        treated, _ = treated_edges(labels, strata, 8)
        drawn = matched_sets(treated, strata, 199, seed)
        set_tests.append(two_sided(damage[treated].sum(), damage[drawn].sum(1)))
    for found in (edge_tests, set_tests):
        rate = np.mean(np.array(found) <= 0.05)
        assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
        assert rate > 0.005  # nor is it a test that never finds anything


def test_a_label_that_matters_is_found():
    random, levels, fine = made(5)
    strata = strata_of([fine], levels).numbers
    labels = levels * random.standard_normal(len(levels))
    damage = levels * np.exp(random.standard_normal(len(levels)))
    treated, _ = treated_edges(labels, strata, 10)
    assert (
        two_sided(damage[treated].sum(), damage[matched_sets(treated, strata, 999, 0)].sum(1))
        > 0.05
    )
    damage[treated] *= 3
    drawn = matched_sets(treated, strata, 999, 0)
    assert two_sided(damage[treated].sum(), damage[drawn].sum(1)) <= 0.02


def test_two_sided_p_values():
    null = np.arange(99.0)
    assert two_sided(1000.0, null) == two_sided(-1.0, null) == 0.02
    assert two_sided(49.0, null) == 1.0
    assert two_sided(0.0, np.zeros(99)) == 1.0
