"""Calibration: how often a report's intervals miss, and how often its stars lie, on real edges.

The questions of a real run are the population: its numbers are the truth, and thousands of samples
are drawn from it, question by question with repetition. The rows of the default controls are
measured as the raw change is: in them, each question has a temperature of its own, so that it is
the same in every sample. Two populations are used: `tiny-math`, and
one with heavier tails, the SFT model against itself with a little noise on its weights, and with a
change of rank 2 to one matrix. Of each sample, what a report would say is computed by the package:

    coverage    how often the 95 % interval holds the truth
    labels      nothing differs: the two sides of each question are exchanged at random
    shape       the mean change is 0, but sides differ in shape (those of the real pair, scaled)
    mix         half the questions rise and half fall, 0 on average
    clusters    as shape, each question five times, said to be a cluster
    shocks      as shape, ten clusters of five questions that rise or fall together
    family      any star in a report of all cells after Holm, none of which has changed
    accuracy    coverage of the interval, and McNemar's false positives where as many rise as fall

    python benchmarks/calibration.py --quick                # a few minutes on two cores
    python benchmarks/calibration.py --draws 4000
    python benchmarks/calibration.py --of FOLDER            # a run of one's own
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from known_answers import CASES, make_model

import probe
from probe.metrics import METRICS, TOKEN_METRICS, Array, Entries, Form, metric_named
from probe.recipe import recipe_from
from probe.report import matched_questions
from probe.stats import (
    CONTROLS,
    SMALLEST,
    contributions,
    defined,
    flip_all,
    flips_for,
    holm,
    mcnemar,
    t_interval,
    tango_interval,
)
from probe.store import RunFolder

SIZES = (20, 50, 100)
FLIPS = 1999
SHOWN = ("sharpness", "loss-matched")
ALL = METRICS | TOKEN_METRICS
NULLS = ("labels", "shape", "mix", "clusters", "shocks")
AGAIN, MORE = 10, 4
"""The lowest and the highest of hundreds of shares are partly luck: so many of them are measured
again, with so many times the draws, before the last line names one."""

Rows = npt.NDArray[np.int64]
"""Which questions."""


@dataclass(frozen=True)
class Population:
    """One metric of all questions of a cell."""

    run: str
    """The run that it is from."""

    pair: str
    """The pair."""

    alpha: float
    """The share of the answer."""

    metric: str
    """The metric."""

    control: str
    """What is held fixed; empty for the raw change."""

    form: Form
    """How values of questions become one."""

    values: Array
    """Of all questions before, and then of all after: [value], or [value, value] for pairs."""

    @property
    def size(self) -> int:
        """How many questions there are."""
        return len(self.values) // 2

    @property
    def truth(self) -> tuple[float, float]:
        """The metric before, and its relative change.

        Questions are drawn with repetition, so one makes pairs with itself, at distance 0.
        """
        old, new = (
            float(np.exp(np.log(side).mean()) if self.form == "ratio" else side.mean())
            for side in self.sides(np.arange(self.size))
        )
        return old, (new - old) / abs(old)

    @property
    def null(self) -> "Population":
        """The same with the after side scaled so that nothing has changed on average."""
        factor = np.ones(2 * self.size)
        factor[self.size :] = 1 / (1 + self.truth[1])
        # Of pairs, those of a question before and one after are of no use to the tests of a null.
        scale = np.minimum.outer(factor, factor) if self.form == "pairs" else factor
        if self.form == "pairs":
            scale[self.size :, self.size :] = factor[-1]
        return replace(self, values=self.values * scale)

    def sides(self, rows: Rows, exchanged: npt.NDArray[np.bool_] | None = None) -> list[Array]:
        """The values of these questions before and after, some of them exchanged."""
        first = rows if exchanged is None else np.where(exchanged, rows + self.size, rows)
        second = 2 * rows + self.size - first
        if self.form == "pairs":
            return [self.values[np.ix_(side, side)] for side in (first, second)]
        return [self.values[side] for side in (first, second)]


@dataclass
class Count:
    """Trials, and how many of them were hits."""

    hits: int = 0
    """How many hit."""

    trials: int = 0
    """How many there were."""

    large: int = 0
    """In how many of them the change was large enough for a star."""

    def add(self, hit: bool) -> None:
        """Count one trial."""
        self.hits += hit
        self.trials += 1

    @property
    def share(self) -> float:
        """Of hits, in percent."""
        return 100 * self.hits / self.trials

    @property
    def error(self) -> float:
        """Its Monte Carlo standard error, in percent."""
        share = self.hits / self.trials
        return 100 * (share * (1 - share) / self.trials) ** 0.5


@dataclass(frozen=True)
class Share:
    """One entry of a table."""

    kind: str
    """`coverage`, or a null."""

    cells: tuple[Population, ...]
    """Of what: the nested alphas of a pair together; of none for what is measured once."""

    size: int
    """How many questions a sample has."""

    count: Count
    """What was counted."""

    def again(self, draws: int, random: np.random.Generator) -> "Share":
        """The same from other samples."""
        if not self.cells:
            return self
        return replace(self, count=counted(self.kind, self.cells, self.size, draws, random))


def counted(
    kind: str, cells: Sequence[Population], size: int, draws: int, random: np.random.Generator
) -> Count:
    """One entry's count, of some cells together."""
    return total(
        coverage(cell, size, draws, random)
        if kind == "coverage"
        else false_positives(kind, cell, size, draws, random)
        for cell in cells
    )


def populations(path: Path, run: str) -> Iterator[Population]:
    """Every cell of a run, over all questions that have a value."""
    folder = RunFolder(path)
    compared = [(control, *row) for control in SHOWN for row in CONTROLS[control].compared]
    for file in sorted((path / "edges").glob("*.before.safetensors")):
        name = file.name.removesuffix(".before.safetensors")
        pair, alpha = name.split(".")[0], float(name.partition(".alpha-")[2])
        for control, label, first, second in (("", "", "before", "after"), *compared):
            if not all(folder.edges_file(name, side).exists() for side in (first, second)):
                continue  # a run without this control
            sides = folder.read_sides(name, first, second)
            if control:
                counted = matched_questions(folder, name, control, sides[0].ids)
                assert counted is not None
                sides = [side[counted] for side in sides]
            both = Entries(
                torch.cat([side.scores for side in sides]),
                sides[0].graph.mask,
                dense=True,
                entropies=torch.cat([side.entropies for side in sides]),
            )
            for metric, entry in (METRICS if control else ALL).items():
                if entry.estimand is not None:
                    values, form = both.parts(entry.estimand.values), entry.estimand.form
                    sound = defined(form, values, values).reshape(2, -1).all(0)
                    rows = np.flatnonzero(np.tile(sound, 2))
                    values = values[np.ix_(rows, rows)] if form == "pairs" else values[rows]
                    yield Population(run, pair, alpha, metric, label, form, values)


def coverage(part: Population, size: int, draws: int, random: np.random.Generator) -> Count:
    """How often the interval of a sample's change holds that of the population."""
    _, change = part.truth
    count = Count()
    for _ in range(draws):
        sides = part.sides(random.integers(part.size, size=size))
        found = contributions(part.form, *sides)
        ends = t_interval(found.to_change)
        low, high = np.expm1(ends) if part.form == "ratio" else ends
        count.add(low <= change <= high)
        count.large += abs(found.change or 0) >= SMALLEST
    return count


def false_positives(
    kind: str, part: Population, size: int, draws: int, random: np.random.Generator
) -> Count:
    """How often p < 0.05 where nothing has changed."""
    null = part if kind == "labels" else part.null
    tests, large = [], []
    for _ in range(draws):
        rows, units = random.integers(part.size, size=size), np.arange(size)
        if kind == "clusters":
            units = np.repeat(units, 5)
            rows = rows[units]
        exchanged = random.random(size) < 0.5 if kind == "labels" else None
        sides = null.sides(rows, exchanged)
        if kind in ("mix", "shocks"):
            units = units // 5 if kind == "shocks" else units
            sides[1] = shifted(null.form, *sides, steps(kind, units, random))
        found = contributions(null.form, *sides)
        tests.append((found.to_difference, units))
        large.append(abs(found.change or 0) >= SMALLEST)
    count = Count()
    for p_value, enough in zip(flip_all(tests, FLIPS), large, strict=True):
        count.add(p_value < 0.05 and enough)
    return count


def steps(kind: str, units: Rows, random: np.random.Generator) -> Array:
    """How far each question is moved, 0 on average: up or down, or as its cluster is."""
    if kind == "mix":
        return np.where(random.random(len(units)) < 0.5, 2.0, -2.0)
    return random.normal(size=units.max() + 1)[units]


def shifted(form: Form, before: Array, after: Array, step: Array) -> Array:
    """The after side with questions moved, in standard deviations of their own change."""
    if form == "pairs":
        return after * (1 + 0.05 * (step[:, None] + step) / 2)
    if form == "ratio":
        return after * np.exp(step * np.log(after / before).std())
    return after + step * (after - before).std()


def family(
    parts: Sequence[Population], size: int, draws: int, random: np.random.Generator
) -> Count:
    """How often any cell of a report is starred where none has changed."""
    count = Count()
    nulls = [part.null for part in parts]
    for _ in range(draws):
        drawn: dict[str, Array] = {}
        tests, large = [], []
        for null in nulls:
            # The same questions of a pair in all of its cells, but for one that has no value.
            places = drawn.setdefault(null.pair, random.random(size))
            rows = (places * null.size).astype(np.int64)
            found = contributions(null.form, *null.sides(rows))
            tests.append((found.to_difference, np.arange(size)))
            large.append(abs(found.change or 0) >= SMALLEST)
        adjusted = holm(flip_all(tests, flips_for(len(tests)) // 4))
        count.add(any(p < 0.05 and enough for p, enough in zip(adjusted, large, strict=True)))
    return count


def accuracy(path: Path, size: int, draws: int, random: np.random.Generator) -> list[Count]:
    """Of the accuracies of a run: the interval's coverage, and McNemar's false positives."""
    folder, found = RunFolder(path), [Count(), Count()]
    right = [
        {s.id: s.correct for s in folder.read_solutions(file)[0]}
        for file in sorted((path / "solutions").glob("*.jsonl"))
    ]
    for other in right[1:]:
        values = np.array([(right[0][name], other[name]) for name in right[0]], dtype=int)
        change = (values[:, 1] - values[:, 0]).mean()
        for _ in range(draws):
            rows = values[random.integers(len(values), size=size)]
            gained, lost = ((rows[:, 1] - rows[:, 0] == sign).sum() for sign in (1, -1))
            low, high = tango_interval(int(gained), int(lost), size)
            found[0].add(low <= change <= high)
            differ = int(gained + lost)
            gained = random.binomial(differ, 0.5)
            found[1].add(mcnemar(int(gained), differ - int(gained)) < 0.05)
    return found


def line(*texts: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(texts) + " |"


def shown(count: Count | None) -> str:
    """A share in percent, with its standard error."""
    if count is None:
        return "-"
    return f"{count.share:.1f} ± {count.error:.1f}"


def measure(
    parts: Sequence[Population], draws: int, random: np.random.Generator
) -> tuple[list[Share], list[Share]]:
    """Print the tables of one run; every coverage, and all false positives, of an entry each."""
    held: list[Share] = []
    false: list[Share] = []
    columns = [f"coverage, n = {size}" for size in SIZES] + [f"{kind}, n = 50" for kind in NULLS]
    print(f"\n{parts[0].run}: {parts[0].size} questions\n")
    print(line("pair", "metric", *columns))
    print("|---|---|" + "---:|" * len(columns))
    for pair in dict.fromkeys(part.pair for part in parts):
        kinds = dict.fromkeys((p.metric, p.control) for p in parts if p.pair == pair)
        for metric, control in sorted(kinds, key=lambda kind: [*ALL].index(kind[0])):
            chosen = (pair, metric, control)
            cells = tuple(p for p in parts if (p.pair, p.metric, p.control) == chosen)
            asked = [("coverage", size) for size in SIZES] + [(null, 50) for null in NULLS]
            row = [
                Share(what, cells, size, counted(what, cells, size, draws, random))
                for what, size in asked
            ]
            # What is hardly ever large enough for a star is none of what a report stars.
            covered, nulls = row[: len(SIZES)], row[len(SIZES) :]
            held += [s for s in covered if s.count.large >= 0.05 * s.count.trials]
            false += nulls
            estimand = metric_named(metric).estimand
            assert estimand is not None
            name = f"{estimand.label}{control and f', {control}'}"
            print(line(pair, name, *(shown(share.count) for share in row)), flush=True)
    return held, false


def extreme(
    shares: Sequence[Share], sign: int, draws: int, random: np.random.Generator
) -> tuple[Share, Share]:
    """The lowest (sign 1) or the highest (-1) share: as it was measured, and after a second look.

    Chosen from so many it is luck in part. The ten furthest are measured again, by other draws.
    """

    def key(share: Share) -> float:
        return sign * share.count.share

    ordered = sorted(shares, key=key)
    looked = [share.again(MORE * draws, random) for share in ordered[:AGAIN]]
    return ordered[0], min([*looked, *ordered[AGAIN:]], key=key)


def total(counts: Iterable[Count]) -> Count:
    """Several counts as one: those of the nested alphas of a pair."""
    found = Count()
    for count in counts:
        found.hits += count.hits
        found.trials += count.trials
        found.large += count.large
    return found


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws: a few minutes")
    parser.add_argument("--draws", type=int, help="samples of each cell and size")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are, or go")
    parser.add_argument("--of", type=Path, help="a run of your own as the one population")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draws = options.draws or (1000 if options.quick else 5000)
    start, random = time.monotonic(), np.random.default_rng(options.seed)
    held: list[Share] = []
    false: list[Share] = []
    for name in (options.of.name,) if options.of else ("tiny-math", "noise"):
        path = options.of or options.runs / f"calibration-{name}"
        if not options.of:
            run(name, path)
        parts = list(populations(path, name))
        found = measure(parts, draws, random)
        held, false = held + found[0], false + found[1]
        if name != "noise":
            report = family(parts, 50, draws, random)
            false.append(Share("family", (), 50, report))
            print(f"\nany star of {len(parts)} cells after Holm, n = 50: {shown(report)} %")
        if name == "tiny-math":
            for size in SIZES:
                interval, p_value = accuracy(path, size, draws, random)
                held.append(Share("accuracy", (), size, interval))
                false.append(Share("accuracy", (), size, p_value))
                print(f"accuracy, n = {size}: {shown(interval)} %, {shown(p_value)} %")
    first, low = extreme(held, 1, draws, random)
    top, high = extreme(false, -1, draws, random)
    print(
        f"\nfirst look: {shown(first.count)} % and {shown(top.count)} %, the furthest of "
        f"{len(held)} and {len(false)}; the {AGAIN} furthest again, {MORE} times the draws: "
        f"{shown(low.count)} % ({told(low)}) and {shown(high.count)} % ({told(high)})"
    )
    print(f"{time.monotonic() - start:.0f} s; {draws} draws of each cell, alphas pooled")
    print(
        f"lowest coverage {low.count.share:.1f} %, highest false positives {high.count.share:.1f} %"
    )


def told(share: Share) -> str:
    """Which entry it is, in words."""
    of = share.cells[0] if share.cells else None
    words = (of.run, of.pair, of.metric, of.control) if of else ()
    return ", ".join(word for word in (*words, share.kind, f"n = {share.size}") if word)


def run(name: str, path: Path) -> None:
    """Make one of the runs that are the populations, or go on with it."""
    if name == "tiny-math":
        probe.run_recipe(
            "tiny-math",
            path,
            overrides={
                "report.extra": "[]",
                "attribution.control": ",".join(SHOWN),
                "selection.samples": "1000",
            },
        )
        return
    pairs = [
        {
            "name": word,
            "before": "probe:tiny-math/sft",
            "after": str(make_model(CASES[case], path.with_name(f"{path.name}-{word}"))),
            "max_new_tokens": 64,
        }
        for word, case in (("noise", "noise of 0.1 %"), ("lora", "LoRA on one matrix"))
    ]
    table = {
        "name": "noise",
        "pairs": pairs,
        "benchmarks": [{"name": "tiny-math"}],
        "compute": {"dtype": "float32", "threads": 1, "device": "cpu"},
        "solutions": {"questions": 600, "batch_size": 100},
        "selection": {"alpha": [0.1, 0.3]},
        "attribution": {"batch_size": 25, "control": list(SHOWN)},
        "report": {"extra": []},
    }
    probe.run_recipe(recipe_from(table, name), path)


if __name__ == "__main__":
    main()
