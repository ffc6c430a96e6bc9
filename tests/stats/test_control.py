import math

import numpy as np
import pytest
import scipy.stats
import torch

from probe.attribution import TokenSequence
from probe.metrics import METRICS, TOKEN_METRICS, Entries, Metric, kurtoses
from probe.stats import CONTROLS, Control, cross_text, split, texts_of


def sides(questions=6, seed=0):
    """Four different sides of the same questions, [model][text]."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(questions, 5, 7, generator=generator) ** 3
    noise = torch.randn(2, 2, questions, 5, 7, generator=generator)
    return [
        [Entries((1 + m) * (1 + 0.3 * t) * base + 0.5 * noise[m, t]) for t in (0, 1)]
        for m in (0, 1)
    ]


def test_a_split_by_hand():
    found = split(np.array([[1.0, 2.0], [3.0, 7.0]]))
    assert found.change == 7 - 1
    assert found.model == ((3 - 1) + (7 - 2)) / 2
    assert found.text == ((2 - 1) + (7 - 3)) / 2
    assert found.interaction == (7 - 3) - (2 - 1)


RATIOS = [name for name, metric in METRICS.items() if metric.estimand.form == "ratio"]


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_multiply_to_the_change(name):
    table = sides()
    (found,) = cross_text(table, metrics=[name])
    v = np.log([[METRICS[name].estimand.values(side) for side in row] for row in table])
    model = (v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1]) / 2
    text = (v[0, 1] - v[0, 0] + v[1, 1] - v[1, 0]) / 2
    assert found.change == pytest.approx(np.expm1((v[1, 1] - v[0, 0]).mean()))
    assert (1 + found.model) * (1 + found.text) == pytest.approx(1 + found.change)
    for part, value, interval in (
        (model, found.model, found.model_interval),
        (text, found.text, found.text_interval),
    ):
        assert value == pytest.approx(np.expm1(part.mean()))
        ends = scipy.stats.ttest_1samp(part, 0).confidence_interval(0.95)
        assert interval == pytest.approx(np.expm1(ends))


def test_means_sum_to_the_change(monkeypatch):
    monkeypatch.setitem(METRICS, "own", Metric("Own", kurtoses))  # joined by a mean, as no other is
    table = sides()
    for control in cross_text(table, metrics=["own", "sample_diversity"]):
        assert control.model + control.text == pytest.approx(control.change)
        assert control.model_interval[0] < control.model < control.model_interval[1]
    kurtosis = cross_text(table, metrics=["own"])[0]
    v = np.array([[METRICS[kurtosis.metric].parts(side).mean() for side in row] for row in table])
    model = (v[1, 0] - v[0, 0] + v[1, 1] - v[0, 1]) / 2
    assert kurtosis.model == pytest.approx(model / v[0, 0])


def test_only_the_model_or_only_the_text():
    scores = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(1))
    once, twice = Entries(scores), Entries(2 * scores)
    for change in cross_text([[once, once], [twice, twice]]):
        assert change.text == 0
        assert change.text_interval == (0, 0)
        assert change.model == pytest.approx(1.0 if "intensity" in change.metric else 0, abs=1e-6)
    by_text = cross_text([[once, twice], [once, twice]])
    assert all(control.model == 0 for control in by_text)
    assert by_text[0].text == pytest.approx(1.0)


def test_clusters_widen_it():
    table = sides(12)
    alone = cross_text(table)[0].model_interval
    paired = cross_text(table, clusters=[str(place // 6) for place in range(12)])[0].model_interval
    assert paired[1] - paired[0] > alone[1] - alone[0]


def test_what_is_not_defined():
    zeros = Entries(torch.zeros(3, 5, 7))
    for control in cross_text([[zeros, zeros], [zeros, zeros]]):
        assert control == Control(control.metric)
    two = Entries(torch.randn(2, 5, 7))
    assert cross_text([[two, two], [two, two]])[0] == Control("activation_intensity")


def test_answers_are_exchanged_and_prompts_kept():
    before = [TokenSequence([1, 2], [3], "a"), TokenSequence([4], [5, 6], "b")]
    after = [TokenSequence([0, 1, 2], [7, 8], "a"), TokenSequence([4], [9], "b")]
    on_after, on_before = CONTROLS["cross-text"].sides
    old, new = texts_of(on_after, before, after), texts_of(on_before, after, before)
    assert old == [TokenSequence([1, 2], [7, 8], "a"), TokenSequence([4], [9], "b")]
    assert new == [TokenSequence([0, 1, 2], [3], "a"), TokenSequence([4], [5, 6], "b")]


def test_metrics_of_tokens_are_split_too():
    scores = torch.rand(3, 5, 7)
    table = [
        [Entries(scores, entropies=torch.full((3,), value)) for value in row]
        for row in ((1.0, 2.0), (3.0, 12.0))
    ]
    (found,) = cross_text(table, metrics=TOKEN_METRICS)
    assert found.change == pytest.approx(11)
    assert found.model == pytest.approx(math.sqrt(3 * 6) - 1)
    assert found.text == pytest.approx(math.sqrt(2 * 4) - 1)
    assert found.interaction == pytest.approx(1)
