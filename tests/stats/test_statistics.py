import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.metrics import METRICS, TOKEN_METRICS, Entries, Metric, compute_metric, kurtoses
from probe.stats import (
    Statistics,
    compare_sides,
    describe,
    flip_all,
    flip_largest,
    flips_for,
    holm,
    influence,
    paper_numbers,
    pseudo_values,
    t_interval,
    units_of,
)

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


def values_of(name, scores):
    """Our number of each question, by hand."""
    found = []
    for matrix in scores.double().numpy():
        size = np.abs(matrix)
        if name == "activation_intensity":
            found.append(size.mean())
        elif name == "distribution_kurtosis":
            found.append(scipy.stats.kurtosis(matrix, axis=None, fisher=False))
        else:
            shares = size if name == "information_complexity" else size[:, -1]
            found.append(math.exp(scipy.stats.entropy(shares.ravel())))
    return np.array(found)


RATIOS = (
    "activation_intensity",
    "information_complexity",
    "distribution_kurtosis",
    "output_entropy",
)


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_against_scipy(name):
    before, after = heavy(9, seed=3, factor=0.6)
    found = compare_sides(Entries(before), Entries(after))[name]
    old, new = values_of(name, before), values_of(name, after)
    logs = np.log(new / old)
    assert found.before == pytest.approx(scipy.stats.gmean(old), rel=1e-9)
    assert found.after == pytest.approx(scipy.stats.gmean(new), rel=1e-9)
    assert found.change == pytest.approx(scipy.stats.gmean(new / old) - 1, rel=1e-9)
    ends = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert found.interval == pytest.approx(np.expm1(ends), rel=1e-9)
    exact = scipy.stats.permutation_test(
        (logs,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p_value == pytest.approx(exact.pvalue, rel=1e-9)
    assert found.effect_size == pytest.approx(logs.mean() / logs.std(ddof=1), rel=1e-9)
    assert (found.samples, found.clusters) == (9, 9)
    top = np.abs(logs).argmax()
    assert found.influence.question == top
    assert found.influence.share == pytest.approx(np.abs(logs).max() / np.abs(logs).sum())
    assert found.influence.sign_survives == (np.delete(logs, top).sum() * logs.sum() > 0)


def test_a_mean_against_a_jackknife(monkeypatch):
    monkeypatch.setitem(METRICS, "own", Metric("Own", kurtoses))  # joined by a mean, as no other is
    before, after = heavy(11, seed=4, factor=2)
    found = compare_sides(Entries(before), Entries(after))["own"]
    old, new = (values_of("distribution_kurtosis", side) - 3 for side in (before, after))
    assert found.change == pytest.approx(new.mean() / old.mean() - 1, rel=1e-9)
    exact = scipy.stats.permutation_test(
        (new - old,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p_value == pytest.approx(exact.pvalue, rel=1e-9)
    # The interval is first order, the jackknife nearly: they agree as far as this mean is even.
    without = [np.delete(new, i).mean() / np.delete(old, i).mean() for i in range(11)]
    error = math.sqrt(10 / 11 * ((without - np.mean(without)) ** 2).sum())
    width = scipy.stats.t.ppf(0.975, 10) * error
    assert found.interval == pytest.approx((found.change - width, found.change + width), rel=0.15)


def test_pairs_against_a_jackknife():
    before, after = heavy(8, seed=5)
    found = compare_sides(Entries(before), Entries(after))["sample_diversity"]

    def diversity(scores, rows):
        flat = scores.flatten(1).double().numpy()[list(rows)]
        pairs = itertools.combinations(flat, 2)
        return np.mean([1 - scipy.stats.pearsonr(a, b)[0] for a, b in pairs])

    everyone = range(8)
    old, new = (diversity(side, everyone) for side in (before, after))
    assert (found.before, found.after) == pytest.approx((old, new), rel=1e-9)
    pseudo = [
        8 * (new - old) - 7 * (diversity(after, rows) - diversity(before, rows))
        for rows in (set(everyone) - {i} for i in everyone)
    ]
    exact = scipy.stats.permutation_test(
        (np.array(pseudo),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p_value == pytest.approx(exact.pvalue, rel=1e-9)
    ratios = [
        diversity(after, rows) / diversity(before, rows)
        for rows in (set(everyone) - {i} for i in everyone)
    ]
    error = math.sqrt(7 / 8 * ((ratios - np.mean(ratios)) ** 2).sum())
    width = scipy.stats.t.ppf(0.975, 7) * error
    assert found.interval == pytest.approx((found.change - width, found.change + width), rel=0.1)


def test_pseudo_values_are_those_of_leaving_one_out():
    values = np.random.default_rng(0).random((6, 6))
    values = values + values.T

    def mean(rows):
        return np.mean([values[a, b] for a, b in itertools.combinations(rows, 2)])

    whole = mean(range(6))
    by_hand = [6 * whole - 5 * mean([r for r in range(6) if r != i]) for i in range(6)]
    assert pseudo_values(values) == pytest.approx(by_hand)


def test_many_flips_are_drawn():
    parts = np.random.default_rng(1).normal(0.3, 1, 40)
    (found,) = flip_all([(parts, np.arange(40))], 20_000)
    expected = scipy.stats.permutation_test(
        (parts,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert found == pytest.approx(expected, abs=0.01)
    assert found * 20_001 == pytest.approx(round(found * 20_001))
    (again,) = flip_all([(parts, np.arange(40))], 20_000)
    assert again == found
    (surest,) = flip_all([(np.full(40, 1.0), np.arange(40))], 999)
    assert surest == 1 / 1000  # itself among all


def test_blocks_of_flips_give_the_same(monkeypatch):
    parts = np.random.default_rng(2).normal(0.2, 1, 64)
    whole = flip_all([(parts, np.arange(64))], 1000)
    monkeypatch.setattr("probe.stats._statistics._SIGNS", 64 * 8)
    assert flip_all([(parts, np.arange(64))], 1000) == whole


@pytest.mark.parametrize("clusters", [15, 16, 41, 300])
def test_sums_that_are_looked_up_are_those_of_signs(clusters):
    """The flips are the same bits of one generator, one by one."""
    parts = np.random.default_rng(clusters).normal(0.1, 1, (clusters, 3))
    parts[:, 2] = 1.0  # ties: many flips have the same sum
    bits = np.unpackbits(
        np.frombuffer(np.random.default_rng([42, 1]).bytes(500 * clusters // 8 + 1), np.uint8)
    )
    signs = bits[: 500 * clusters].reshape(500, clusters) * 2.0 - 1
    extreme = (np.abs(signs @ parts) >= np.abs(parts.sum(0)) * (1 - 1e-12)).sum(0)
    units = np.arange(clusters)
    found = flip_all([(column, units) for column in parts.T], 500)
    assert found == pytest.approx(((1 + extreme) / 501).tolist())


def test_flips_of_several_sizes_at_once():
    random = np.random.default_rng(3)
    tests = [(random.normal(0.5, 1, size), np.arange(size)) for size in (5, 9, 5)]
    found = flip_all(tests)
    for (parts, _), p_value in zip(tests, found, strict=True):
        signs = np.array(list(itertools.product((1, -1), repeat=len(parts))))
        extreme = np.abs(signs @ parts) >= abs(parts.sum()) - 1e-12
        assert p_value == pytest.approx(extreme.mean())


def test_clusters_of_one_size_are_their_means():
    random = np.random.default_rng(4)
    units = random.permutation(np.repeat(np.arange(8), 5))
    parts = random.normal(0.4, 1, 40) + random.normal(0, 1, 8)[units]
    means = np.array([parts[units == unit].mean() for unit in range(8)])
    ends = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert t_interval(parts, units) == pytest.approx(tuple(ends), rel=1e-9)
    exact = scipy.stats.permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert flip_all([(parts, units)]) == [pytest.approx(exact.pvalue)]


def test_copies_say_nothing_new():
    """Five copies of every question, as a cluster, give what the questions give."""
    before, after = heavy(10, seed=6, factor=1.3)
    once = compare_sides(Entries(before), Entries(after))
    clusters = [str(place) for place in range(10) for _ in range(5)]
    copies = [Entries(side.repeat_interleave(5, 0)) for side in (before, after)]
    found = compare_sides(*copies, clusters=clusters)
    for name in METRICS:
        if name == "sample_diversity":
            continue  # copies have no diversity among them, so the metric itself is another
        assert found[name].change == pytest.approx(once[name].change)
        assert found[name].interval == pytest.approx(once[name].interval)
        assert found[name].p_value == pytest.approx(once[name].p_value)
        assert (found[name].samples, found[name].clusters) == (50, 10)
    free = compare_sides(*copies)["activation_intensity"].interval
    bound = once["activation_intensity"].interval
    assert free[1] - free[0] < 0.6 * (bound[1] - bound[0])


def test_a_cluster_with_half_of_all_questions_leaves_few_degrees_of_freedom():
    random = np.random.default_rng(5)
    parts = random.normal(0, 1, 40)
    units = np.minimum(np.arange(40), 20)  # the last twenty are one
    low, high = t_interval(parts, units)
    left_out = np.array([parts[units != unit].mean() for unit in range(21)])
    error = math.sqrt(20 / 21 * ((left_out - parts.mean()) ** 2).sum())
    freedom = 1 / (0.5**2 + 20 * 0.025**2) - 1
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * error)


def test_units():
    assert units_of(None, 3).tolist() == [0, 1, 2]
    assert units_of(["a", None, "a", None, "2"], 5).tolist() == [0, 1, 0, 2, 3]
    with pytest.raises(ProbeError, match="2 clusters were given for 3"):
        units_of(["a", "b"], 3)


def test_one_cluster_tells_nothing():
    before, after = heavy(6, seed=1)
    found = compare_sides(Entries(before), Entries(after), clusters=["a"] * 6)
    for statistics in found.values():
        assert statistics.change is not None
        assert statistics.interval is statistics.p_value is None
        assert (statistics.samples, statistics.clusters) == (6, 1)


def test_a_model_against_itself():
    before, _ = heavy(20, seed=7)
    for statistics in compare_sides(Entries(before), Entries(before.clone())).values():
        assert statistics.change == 0
        assert statistics.interval == (0, 0)
        assert statistics.p_value == 1
        assert statistics.effect_size is statistics.influence is None


@pytest.mark.parametrize("name", METRICS)
def test_scale_moves_intensity_alone(name):
    before, _ = heavy(20, seed=8)
    found = compare_sides(Entries(before), Entries(before * 0.25))[name]
    if name == "activation_intensity":
        assert found.change == pytest.approx(-0.75)
        assert found.p_value == pytest.approx(1 / 20_001)
    else:
        assert found.change == pytest.approx(0, abs=1e-9)
        assert found.p_value == 1


def test_questions_without_a_value_are_left_out():
    before, after = heavy(12, seed=9)
    before[3] = 0
    after[5] = 0
    found = compare_sides(Entries(before), Entries(after))
    rest = [place for place in range(12) if place not in (3, 5)]
    alone = compare_sides(Entries(before[rest]), Entries(after[rest]))
    for name in METRICS:
        assert found[name].samples == 10
        assert found[name].change == pytest.approx(alone[name].change)
        assert found[name].interval == pytest.approx(alone[name].interval)
        assert found[name].influence.question == rest[alone[name].influence.question]


def test_few_questions():
    before, after = heavy(2, seed=2)
    one = compare_sides(Entries(before[:1]), Entries(after[:1]))
    assert one["activation_intensity"].change is not None
    assert one["activation_intensity"].interval is one["activation_intensity"].p_value is None
    assert one["sample_diversity"] == Statistics(samples=1, clusters=1)
    two = compare_sides(Entries(before), Entries(after))
    assert two["activation_intensity"].p_value in (0.5, 1)
    assert two["sample_diversity"].before == pytest.approx(
        compute_metric("sample_diversity", before)
    )
    assert two["sample_diversity"].interval is None
    none = compare_sides(Entries(torch.zeros(2, *SIZE)), Entries(after))["activation_intensity"]
    assert none == Statistics()


def test_a_mean_before_of_zero_has_no_relative_change():
    units = np.arange(3)
    statistics, _, _ = describe("mean", np.array([1.0, -1, 0]), np.array([1.0, 2, 3]), units)
    assert statistics.change is statistics.interval is None
    assert (statistics.before, statistics.after) == (0, 2)


def test_statistics_can_be_left_out():
    before, after = heavy(5, seed=2)
    for statistics in compare_sides(Entries(before), Entries(after), flips=0).values():
        assert statistics.change is not None
        assert statistics.interval is statistics.p_value is None


def test_a_metric_of_ones_own_has_statistics_unless_it_is_a_histogram(monkeypatch):
    own = Metric("Own", lambda edges: edges.strengths.max(1))
    monkeypatch.setitem(METRICS, "own", own)
    monkeypatch.setitem(METRICS, "counts", own._replace(form="histogram"))
    before, after = heavy(10, seed=11)
    found = compare_sides(Entries(before), Entries(after))
    old, new = (side.abs().amax((1, 2)).double().mean().item() for side in (before, after))
    assert found["own"].change == pytest.approx(new / old - 1)
    assert found["counts"] == Statistics()


def test_token_entropy():
    before, _ = heavy(6, seed=1)
    sides = [
        Entries(before, entropies=factor * torch.tensor([1.0, 2, 3, 4, 5, 6]))
        for factor in (1.0, 0.5)
    ]
    found = compare_sides(*sides, metrics=TOKEN_METRICS)["token_entropy"]
    assert found.change == pytest.approx(-0.5)
    assert found.p_value == 2 / 2**6


def test_sides_of_other_shapes():
    with pytest.raises(ProbeError, match=r"\[3, 35\] and after \[2, 35\]"):
        compare_sides(Entries(torch.rand(3, *SIZE)), Entries(torch.rand(2, *SIZE)))


@pytest.mark.parametrize("name", METRICS)
def test_influence_on_the_papers_number(name):
    """Against the jackknife with the metric computed anew without each question."""
    before, after = heavy(7, seed=12)
    old, new, found = paper_numbers(METRICS[name], Entries(before), Entries(after), 20)
    assert (old, new) == pytest.approx(
        tuple(compute_metric(name, side, bins=20) for side in (before, after))
    )
    pseudo = []
    for place in range(7):
        rest = [row for row in range(7) if row != place]
        without = [compute_metric(name, side[rest], bins=20) for side in (before, after)]
        pseudo.append(7 * (new - old) - 6 * (without[1] - without[0]))
    sizes = np.abs(pseudo)
    assert found.question == sizes.argmax()
    assert found.share == pytest.approx(sizes.max() / sizes.sum(), rel=1e-6)
    rest = np.delete(pseudo, sizes.argmax()).sum()
    assert found.sign_survives == (np.sign(rest) == np.sign(np.sum(pseudo)))


def test_one_question_that_holds_all():
    found = influence(np.array([-1.0, -1, -1, 20]))
    assert found.question == 3
    assert found.share == pytest.approx(20 / 23)
    assert not found.sign_survives
    assert influence(np.zeros(3)) is None


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_against_its_definition(p_values):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        expected = max((len(p_values) - r) * p_values[order[r]] for r in range(rank + 1))
        assert adjusted[place] == pytest.approx(min(1, expected))


@pytest.mark.parametrize("cells", [1, 24, 1000])
def test_flips_let_every_cell_be_significant(cells):
    assert holm([1 / (1 + flips_for(cells))] * cells)[0] < 0.05


def test_flips_of_many_tests_together():
    """As by going through all flips one by one; one test alone has the p-value of `flip_all`."""
    random = np.random.default_rng(3)
    parts, units = random.normal(size=(9, 4)), np.array([0, 0, 1, 2, 2, 3, 4, 5, 5])
    parts[:, 0] += 1
    sums = np.array([parts[units == unit].sum(0) for unit in range(6)])
    largest = [abs(np.array(s) @ sums).max() for s in itertools.product((1, -1), repeat=6)]
    expected = [np.mean(np.array(largest) >= abs(total) - 1e-12) for total in sums.sum(0)]
    assert flip_largest(parts, units) == pytest.approx(expected)
    for number in (6, 40):
        alone, own = random.normal(0.3, size=(number, 1)), np.arange(number)
        assert flip_largest(alone, own, 999)[0] == flip_all([(alone[:, 0], own)], 999)[0]
    assert flip_largest(np.zeros((5, 3)), np.arange(5)).tolist() == [1, 1, 1]


def test_one_in_twenty_families_finds_what_is_not_there():
    """Tests that depend on each other, of very different sizes, up as often as down."""
    random, found = np.random.default_rng(5), 0
    for _ in range(400):
        shared = random.standard_t(3, size=(40, 1))
        parts = (shared + random.standard_t(3, size=(40, 30))) * 10.0 ** random.integers(-3, 1, 30)
        found += (flip_largest(parts, np.arange(40), 199) <= 0.05).any()
    assert 8 <= found <= 34  # 20 expected, standard error 4.4
