import itertools

import numpy as np
import pytest
import scipy.stats

from probe.stats import compare_accuracy, mcnemar, tango_interval


def table(both, gained, lost, neither):
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


def test_a_fall_that_was_once_called_no_change():
    found = compare_accuracy(*table(43, 3, 23, 31))
    assert (found.before, found.after, found.gained, found.lost) == (0.66, 0.46, 3, 23)
    assert found.p_value == pytest.approx(scipy.stats.binomtest(3, 26).pvalue)
    assert found.p_value == pytest.approx(8.8e-5, rel=0.01)
    low, high = found.interval
    assert -0.30 < low < -0.2 < high < -0.1


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (5, 5), (9, 2), (30, 31)])
def test_mcnemar_against_scipy(gained, lost):
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1
    assert mcnemar(gained, lost) == pytest.approx(expected)
    assert mcnemar(lost, gained) == pytest.approx(expected)


def score_by_hand(gained, lost, count, difference):
    """The score statistic, its nuisance share found on a grid instead of in closed form."""
    shares = np.linspace(max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 400_001)
    up, down = shares + difference, shares
    same = 1 - up - down
    sound = (up > 0) & (down > 0) & (same > 0)
    up, down, same = up[sound], down[sound], same[sound]
    likely = gained * np.log(up) + lost * np.log(down) + (count - gained - lost) * np.log(same)
    best = likely.argmax()
    variance = (up[best] + down[best] - difference**2) / count
    return ((gained - lost) / count - difference) / np.sqrt(variance)


@pytest.mark.parametrize(("gained", "lost", "count"), [(3, 23, 100), (7, 2, 30), (40, 41, 200)])
def test_the_interval_ends_where_the_score_is_the_quantile(gained, lost, count):
    low, high = tango_interval(gained, lost, count)
    assert score_by_hand(gained, lost, count, low) == pytest.approx(1.96, abs=0.005)
    assert score_by_hand(gained, lost, count, high) == pytest.approx(-1.96, abs=0.005)


def test_an_interval_that_was_printed():
    """Tango 1998, of 44 pairs, 1 against 0... by symmetry and the ends of its range."""
    low, high = tango_interval(0, 1, 44)
    assert tango_interval(1, 0, 44) == pytest.approx((-high, -low))
    assert low < -1 / 44 < high


def test_the_ends_of_the_range():
    low, high = tango_interval(0, 0, 50)
    assert low == pytest.approx(-high)
    assert 0 < high < 0.1
    assert tango_interval(10, 0, 10)[1] == pytest.approx(1)


def test_how_often_the_interval_holds_the_truth():
    """Exactly, over all tables of 30 pairs, where a tenth is gained and a fifth lost."""
    count, up, down = 30, 0.1, 0.2
    held = 0.0
    for gained, lost in itertools.product(range(count + 1), repeat=2):
        if gained + lost > count:
            continue
        chance = scipy.stats.multinomial.pmf(
            [gained, lost, count - gained - lost], count, [up, down, 1 - up - down]
        )
        if chance > 1e-7:
            low, high = tango_interval(gained, lost, count)
            held += chance * (low <= up - down <= high)
    assert 0.94 < held < 0.97


def test_clusters_are_flipped_whole():
    before, after = table(10, 10, 0, 0)
    alone = compare_accuracy(before, after)
    assert alone.p_value == pytest.approx(2 * 0.5**10)
    clusters = ["same"] * 10 + [str(place // 5) for place in range(10)]
    found = compare_accuracy(before, after, clusters)
    assert found.clusters == 3
    assert found.p_value == 0.5  # two clusters of copies rose, and two coins agree half the time
    low, high = found.interval
    assert high - low > alone.interval[1] - alone.interval[0]
    # Where every question is alone, flipping signs is McNemar's test.
    single = compare_accuracy(before, after, [str(place) for place in range(20)])
    assert single == alone
