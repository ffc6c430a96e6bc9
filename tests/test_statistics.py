import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch

import probe.statistics
from probe.errors import ProbeError
from probe.metrics import METRICS, Metric, compute_metric
from probe.statistics import Statistics, compare_sides, holm, permutations_for

SIZE = (5, 7)


@pytest.fixture(autouse=True)
def _strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def heavy(questions, seed, factor=1.0):
    """Two sides of the same questions: heavy tails, and questions of unlike strength."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.exp(torch.randn(questions, 1, 1, generator=generator))
    sides = (strength * torch.randn(questions, *SIZE, generator=generator) ** 3 for _ in range(2))
    before, after = sides
    return before, factor * after


def draws_of(questions, resamples, permutations):
    return probe.statistics._Draws(questions, resamples, permutations)


def picked(scores, counts):
    return scores.repeat_interleave(torch.as_tensor(counts, dtype=torch.long), 0)


def diversity_without_copies(scores, counts):
    """By hand: the mean over pairs of draws of different questions."""
    rows = np.repeat(np.arange(len(scores)), counts)
    flat = scores.flatten(1).double().numpy()
    found = [
        1 - scipy.stats.pearsonr(flat[a], flat[b])[0]
        for place, a in enumerate(rows)
        for b in rows[place + 1 :]
        if a != b
    ]
    return np.mean(found) if found else np.nan


def slow_metric(name, scores, counts):
    if name == "sample_diversity":
        return diversity_without_copies(scores, counts)
    return compute_metric(name, picked(scores, counts), bins=20)


def one_scale(name, before, after):
    """What a histogram's sides are divided by before they are exchanged."""
    if not METRICS[name].histogram:
        return before, after
    sides = []
    for scores in (before.double(), after.double()):
        part = scores[..., -1:] if name == "output_entropy" else scores
        sides.append(scores / math.exp(np.mean([math.log(q.abs().mean()) for q in part])))
    return sides


@pytest.mark.parametrize("name", METRICS)
def test_against_slow_loops(name):
    before, after = heavy(7, seed=3, factor=0.6)
    found = compare_sides(before, after, bins=20, resamples=40, permutations=60)[name]
    draws = draws_of(7, 40, 60)
    old, new = (compute_metric(name, side, bins=20) for side in (before, after))

    pairs = [
        [slow_metric(name, side, counts) for side in (before, after)] for counts in draws.resampled
    ]
    changes = [(y - x) / abs(x) for x, y in pairs]
    assert found.interval == pytest.approx(np.percentile(changes, [2.5, 97.5]), rel=1e-9)

    scaled = one_scale(name, before, after)
    observed = compute_metric(name, scaled[1], bins=20) - compute_metric(name, scaled[0], bins=20)
    assert observed == pytest.approx(new - old, rel=1e-6, abs=1e-9)
    extreme = 1
    for kept in draws.kept:
        chosen = torch.from_numpy(kept)[:, None, None]
        left, right = torch.where(chosen, *scaled), torch.where(chosen, *scaled[::-1])
        difference = compute_metric(name, right, bins=20) - compute_metric(name, left, bins=20)
        extreme += abs(difference) >= abs(observed) - 1e-9
    assert found.p_value == pytest.approx(extreme / 61)

    if name in ("activation_intensity", "distribution_kurtosis"):
        each = [
            compute_metric(name, after[i : i + 1]) - compute_metric(name, before[i : i + 1])
            for i in range(7)
        ]
        deviation = np.std(each, ddof=1)
    else:
        deviation = np.std([y - x for x, y in pairs], ddof=1) * math.sqrt(7)
    assert found.effect_size == pytest.approx((new - old) / deviation, rel=1e-9)

    floors = []
    for side in (before, after):
        sizes = []
        for one, other in zip(*draws.halves, strict=True):
            assert one.sum() == other.sum() == 3
            assert not (one & other).any()
            values = [
                compute_metric(name, side[torch.from_numpy(h)], bins=20) for h in (one, other)
            ]
            for first, second in (values, values[::-1]):
                if (second <= first) if new < old else (second >= first):
                    sizes.append(abs(second - first) / abs(first))
        floors.append(np.percentile(sizes, 95, method="higher"))
    assert found.noise_floor == pytest.approx(max(floors), rel=1e-9)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.per_sample])
def test_exchanging_sides_of_a_mean_is_flipping_signs(name):
    before, after = heavy(9, seed=1)
    values = METRICS[name].per_sample(after) - METRICS[name].per_sample(before)
    signs = np.where(draws_of(9, 1, 500).kept, 1, -1)
    means = np.abs((signs * values).mean(1))
    expected = (1 + (means >= abs(values.mean()) * (1 - 1e-9)).sum()) / 501
    assert compare_sides(before, after, permutations=500)[name].p_value == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_parts_make_up_the_metric(name):
    scores, _ = heavy(6, seed=0)
    metric = METRICS[name]
    expected = compute_metric(name, scores)
    if metric.per_sample:
        assert metric.per_sample(scores).mean() == pytest.approx(expected, rel=1e-14)
    elif metric.pairwise:
        pairs = metric.pairwise(scores)[np.triu_indices(6, k=1)]
        assert pairs.mean() == pytest.approx(expected, rel=1e-14)
    else:
        assert metric.histogram
        counts, _ = np.histogram(metric.pooled(scores), bins=100)
        assert probe.metrics.entropy(counts) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_without_parts_is_slow_but_right(name, monkeypatch):
    before, after = heavy(6, seed=5)
    few = {"resamples": 15, "permutations": 30}
    fast = compare_sides(before, after, **few)[name]
    bare = Metric(*METRICS[name][:4])
    monkeypatch.setitem(METRICS, name, bare)
    slow = compare_sides(before, after, **few)[name]
    assert slow.noise_floor == pytest.approx(fast.noise_floor, rel=1e-9)
    if name != "sample_diversity":  # which leaves out pairs with a copy, as only pairs can
        assert slow.interval == pytest.approx(fast.interval, rel=1e-9)
    if not bare.histogram:  # whose sides are brought to one scale
        assert slow.p_value == fast.p_value


def test_many_draws_are_cut_into_blocks(monkeypatch):
    before, after = heavy(8, seed=2)
    whole = compare_sides(before, after)
    monkeypatch.setattr(probe.statistics, "_WEIGHTS", 100)
    for name, found in compare_sides(before, after, permutations=10_000).items():
        for one, other in zip(vars(found).values(), vars(whole[name]).values(), strict=True):
            assert one == pytest.approx(other, rel=1e-9)


def test_holm_by_hand():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04: the last would fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_never_puts_significance_out_of_reach():
    for cells in (1, 40, 400, 4000):
        assert cells / (1 + permutations_for(cells)) < 0.05


@pytest.fixture(scope="module")
def without_effect():
    """p-values [seed, metric] where both sides are draws of one distribution, or of one scaled."""
    table = {1.0: [], 0.25: []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe.statistics, "SPLITS", 2)  # not what is tested, and slow
        for factor, rows in table.items():
            for seed in range(200):
                found = compare_sides(*heavy(20, seed, factor), resamples=2, permutations=399)
                rows.append([statistics.p_value for statistics in found.values()])
    return {factor: np.array(rows) for factor, rows in table.items()}


def at_most(rate, trials=200):
    """What a test of that rate exceeds once in a thousand times."""
    return scipy.stats.binom.ppf(0.999, trials, rate)


def test_false_positives_are_within_the_nominal_rate(without_effect):
    for level in (0.01, 0.05, 0.2):
        assert ((without_effect[1.0] < level).sum(0) <= at_most(level)).all()


def test_the_family_of_a_report_is_within_the_nominal_rate(without_effect):
    families = [any(p < 0.05 for p in holm(row)) for row in without_effect[1.0]]
    assert sum(families) <= at_most(0.05)


def test_another_scale_alone_changes_intensity_and_nothing_else(without_effect):
    rejected = dict(zip(METRICS, (without_effect[0.25] < 0.05).sum(0), strict=True))
    assert rejected.pop("activation_intensity") > 190
    assert all(count <= at_most(0.05) for count in rejected.values())


def test_halves_of_one_model_give_no_significant_cell_beyond_the_nominal_rate(monkeypatch):
    monkeypatch.setattr(probe.statistics, "SPLITS", 2)  # not what is tested, and slow
    scores, _ = heavy(60, seed=11)
    families = 0
    for seed in range(200):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        found = compare_sides(scores[order[:30]], scores[order[30:]], resamples=2, permutations=299)
        families += any(p < 0.05 for p in holm([s.p_value for s in found.values()]))
    assert families <= at_most(0.05)


def test_the_same_model_is_never_significant():
    for seed in range(200):
        scores, _ = heavy(12, seed)
        found = compare_sides(scores, scores.clone(), resamples=10, permutations=50)
        for statistics in found.values():
            assert statistics.p_value == 1
            assert statistics.interval == (0, 0)
            assert statistics.effect_size is None
            assert statistics.noise_floor > 0


def test_a_planted_difference_is_found():
    before, _ = heavy(40, seed=4)
    generator = torch.Generator().manual_seed(5)
    after = 1.5 * before + 0.1 * torch.randn(before.shape, generator=generator)
    after[:, 0, :] *= 4  # fewer, stronger edges
    found = compare_sides(before, after)
    for name in ("activation_intensity", "distribution_kurtosis", "sample_diversity"):
        assert found[name].p_value < 0.01
        change = compute_metric(name, after) / compute_metric(name, before) - 1
        low, high = found[name].interval
        assert low < change < high
        assert change * found[name].effect_size > 0
    assert found["activation_intensity"].interval[0] > 0
    # A distribution of another shape, for the histograms.
    flat = compare_sides(before, torch.sign(before) * before.abs() ** 0.3)
    assert flat["information_complexity"].p_value < 0.001
    assert flat["output_entropy"].p_value < 0.001


def test_a_fall_can_exceed_the_noise():
    """A fall ends at -100 %, also where the rises between halves are larger than that."""
    before, _ = heavy(20, seed=6)
    rises = compare_sides(before, before * 1.1)["activation_intensity"]
    falls = compare_sides(before, before * 0.01)["activation_intensity"]
    assert falls.noise_floor < rises.noise_floor
    assert falls.noise_floor < 0.99


def test_the_same_numbers_every_time():
    sides = heavy(10, seed=8)
    assert compare_sides(*sides) == compare_sides(*sides)
    fewer = compare_sides(*sides, resamples=100)
    for name, found in compare_sides(*sides).items():  # one number does not depend on another
        assert found.p_value == fewer[name].p_value
        assert found.noise_floor == fewer[name].noise_floor


def test_one_question_says_nothing():
    assert set(compare_sides(*heavy(1, seed=0)).values()) == {Statistics()}


def test_two_questions_say_little():
    found = compare_sides(*heavy(2, seed=0))
    for name, statistics in found.items():
        assert statistics.p_value > 0.4, name
        assert all(map(math.isfinite, statistics.interval))
        assert (statistics.noise_floor is None) == (name == "sample_diversity")
    json.dumps([vars(s) for s in found.values()], allow_nan=False)


@pytest.mark.parametrize("which", ["before", "after", "both", "one question"])
def test_where_nothing_is_defined(which):
    before, after = heavy(4, seed=0)
    if which in ("before", "both"):
        before = torch.zeros_like(before)
    if which in ("after", "both"):
        after = torch.zeros_like(after)
    if which == "one question":
        after[2] = 0
    found = compare_sides(before, after)
    for name in ("distribution_kurtosis", "sample_diversity"):
        assert found[name] == Statistics()
    assert (found["activation_intensity"] == Statistics()) == (which in ("before", "both"))
    json.dumps([vars(s) for s in found.values()], allow_nan=False)


def test_no_resamples_and_no_permutations():
    for found in compare_sides(*heavy(5, seed=0), resamples=0, permutations=0).values():
        assert found.interval is None
        assert found.p_value == 1


def test_sides_of_different_shapes():
    with pytest.raises(ProbeError, match=r"before have shape \[3, 5, 7\] and after \[2, 5, 7\]"):
        compare_sides(torch.zeros(3, *SIZE), torch.zeros(2, *SIZE))
