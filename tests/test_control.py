import numpy as np
import pytest
import torch

from probe.control import Control, cross_text, split
from probe.metrics import compute_metric
from probe.run import cross
from probe.sequences import TokenSequence


def sides(questions=6, seed=0):
    """Four different sides of the same questions, [model][text]."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(questions, 5, 7, generator=generator) ** 3
    noise = torch.randn(2, 2, questions, 5, 7, generator=generator)
    return [[(1 + m) * (1 + 0.3 * t) * base + 0.5 * noise[m, t] for t in (0, 1)] for m in (0, 1)]


def test_a_split_by_hand():
    found = split(np.array([[1.0, 2.0], [3.0, 7.0]]))
    assert found.change == 7 - 1
    assert found.model == ((3 - 1) + (7 - 2)) / 2
    assert found.text == ((2 - 1) + (7 - 3)) / 2
    assert found.interaction == (7 - 3) - (2 - 1)


def test_the_parts_sum_to_the_change_for_every_metric():
    table = sides()
    for control in cross_text(table, resamples=50):
        v = np.array([[compute_metric(control.metric, s) for s in row] for row in table])
        size = abs(v[0, 0])
        assert control.change == pytest.approx((v[1, 1] - v[0, 0]) / size, rel=1e-9)
        assert control.model + control.text == pytest.approx(control.change, rel=1e-9)
        model = np.mean([v[1, text] - v[0, text] for text in (0, 1)])
        text = np.mean([v[model, 1] - v[model, 0] for model in (0, 1)])
        assert control.model == pytest.approx(model / size, rel=1e-9)
        assert control.text == pytest.approx(text / size, rel=1e-9)
        low, high = control.model_interval
        assert low < high


def test_only_the_model_or_only_the_text():
    scores = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(1))
    for change in cross_text([[scores, scores], [2 * scores, 2 * scores]], resamples=20):
        assert change.text == 0
        assert change.text_interval == (0, 0)
        assert change.model == pytest.approx(1.0 if "intensity" in change.metric else 0, abs=1e-6)
    by_text = cross_text([[scores, 2 * scores], [scores, 2 * scores]], resamples=20)
    assert all(control.model == 0 for control in by_text)
    assert by_text[0].text == pytest.approx(1.0)


def test_intervals_are_those_of_resampled_questions(monkeypatch):
    table = sides(5)
    found = {c.metric: c for c in cross_text(table, resamples=30)}["activation_intensity"]
    from probe.statistics import _Draws

    models, texts = [], []
    for counts in _Draws(5, 30, 0).resampled:
        picked = torch.from_numpy(np.repeat(np.arange(5), counts))
        v = [[float(s[picked].abs().double().mean()) for s in row] for row in table]
        models.append(((v[1][0] - v[0][0]) + (v[1][1] - v[0][1])) / 2 / v[0][0])
        texts.append(((v[0][1] - v[0][0]) + (v[1][1] - v[1][0])) / 2 / v[0][0])
    assert found.model_interval == pytest.approx(np.percentile(models, [2.5, 97.5]), rel=1e-9)
    assert found.text_interval == pytest.approx(np.percentile(texts, [2.5, 97.5]), rel=1e-9)


def test_what_is_not_defined():
    zeros = torch.zeros(3, 5, 7)
    found = {c.metric: c for c in cross_text([[zeros, zeros], [zeros, zeros]])}
    for name in ("activation_intensity", "distribution_kurtosis", "sample_diversity"):
        assert found[name] == Control(name)
    assert found["information_complexity"].change == 0
    one = torch.randn(1, 5, 7)
    found = {c.metric: c for c in cross_text([[one, one], [one, one]], resamples=0)}
    assert found["sample_diversity"] == Control("sample_diversity")
    assert found["activation_intensity"].change == 0
    assert found["activation_intensity"].model_interval is None


def test_answers_are_exchanged_and_prompts_kept():
    before = [TokenSequence([1, 2], [3], "a"), TokenSequence([4], [5, 6], "b")]
    after = [TokenSequence([0, 1, 2], [7, 8], "a"), TokenSequence([4], [9], "b")]
    old, new = cross(before, after)
    assert old == [TokenSequence([1, 2], [7, 8], "a"), TokenSequence([4], [9], "b")]
    assert new == [TokenSequence([0, 1, 2], [3], "a"), TokenSequence([4], [5, 6], "b")]


def test_metrics_of_tokens_are_split_too():
    table = [[torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])], 2 * [torch.tensor([6.0, 6.0])]]
    (found,) = cross_text(table, resamples=20, metrics=["token_entropy"])
    assert (found.change, found.model, found.text) == pytest.approx((2, 1.75, 0.25))
    assert found.interaction == pytest.approx(-0.5)
