"""A report's numbers from the files of a run: numpy, scipy and safetensors, nothing of probe.

Written from docs/statistics.md and docs/controls.md, as somebody else would who checks a report.
"""

import json

import numpy as np
import scipy.stats
from safetensors.numpy import load_file

ROWS = {
    "": ("before", "after"),
    "sharpness": ("before", "before-sharp"),
    "equal loss": ("before-matched", "after-matched"),
    "margin": ("before-margin", "after-margin"),
}
"""The sides of a raw cell, and of the rows of some controls."""


def read_sides(folder, comparison, label):
    """Scores [question, entry] before and after, those into logits, and token entropies."""
    names = ROWS[label]
    sides = [load_file(folder / "edges" / f"{comparison}.{name}.safetensors") for name in names]
    counted = np.ones(len(sides[0]["losses"]), dtype=bool)
    for name in names:
        file = folder / "extras" / f"{comparison}.{name}.json"
        if label in ("sharpness", "equal loss") and file.exists():
            counted &= [t is not None for t in json.loads(file.read_text())["temperatures"]]
    return [
        {
            "all": side["scores"][counted].reshape(counted.sum(), -1).astype(float),
            "logits": side["scores"][counted][:, :, -1].astype(float),
            "entropies": side["entropies"][counted].astype(float),
        }
        for side in sides
    ]


def effective_number(values):
    """exp(H) of the shares of each row."""
    return np.array([np.exp(scipy.stats.entropy(np.abs(row))) for row in values])


RATIOS = {
    "activation_intensity": lambda side: np.abs(side["all"]).mean(1),
    "information_complexity": lambda side: effective_number(side["all"]),
    "distribution_kurtosis": lambda side: scipy.stats.kurtosis(side["all"], axis=1, fisher=False),
    "output_entropy": lambda side: effective_number(side["logits"]),
    "token_entropy": lambda side: side["entropies"],
}


def recompute(metric, before, after):
    """Change, interval, and what each question contributes to the difference."""
    if metric in RATIOS:
        parts = np.log(RATIOS[metric](after) / RATIOS[metric](before))
        ends = scipy.stats.ttest_1samp(parts, 0).confidence_interval(0.95)
        return np.expm1(parts.mean()), np.expm1([*ends]), parts
    old, new = (leave_one_out(side["all"]) for side in (before, after))
    a, b = new.mean(), old.mean()
    parts = (a - b) / abs(b) + (new - old * a / b) / abs(b)
    ends = scipy.stats.ttest_1samp(parts, 0).confidence_interval(0.95)
    return (a - b) / abs(b), np.array([*ends]), new - old


def leave_one_out(values):
    """The jackknife's pseudo-values of the mean of 1 - r over pairs of questions, one by one."""
    apart = 1 - np.corrcoef(values)

    def mean(rows):
        return np.mean([apart[i, j] for i in rows for j in rows if i < j])

    rows = list(range(len(values)))
    whole = mean(rows)
    return np.array(
        [len(rows) * whole - (len(rows) - 1) * mean(rows[:i] + rows[i + 1 :]) for i in rows]
    )


def sign_flips(parts, flips=20_000, seed=7):
    """How often the signs of contributions at random make a sum as far from 0."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (flips, len(parts)))
    reached = np.abs(signs @ parts) >= abs(parts.sum()) - 1e-9 * np.abs(parts).sum()
    return (1 + reached.sum()) / (1 + flips)


def holm(p_values):
    """Adjusted as `scipy` has no Holm: by its definition, the smallest first."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = largest
    return found
