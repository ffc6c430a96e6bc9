"""What each difference between the paper's text and its code would change, on the tiny pairs.

Prints the tables of docs/reproduction.md. Runs go to a folder and are gone on with, so that a
second call takes a minute:

    python benchmarks/reproduction.py runs/reproduction
"""

import argparse
from pathlib import Path

import torch

import probe
from probe.attribution import EdgeScores, TokenSequence
from probe.metrics import METRICS, compute_metric
from probe.recipe import Comparison
from probe.report import Report
from probe.run import cut
from probe.store import RunFolder, first_names

VARIANTS: dict[str, dict[str, str | int | float]] = {
    "as the recipes do": {},
    'selection of the text (`convention = "paper"`)': {"selection.convention": "paper"},
    'one target per sub-module (`granularity = "block"`)': {"attribution.granularity": "block"},
    "bfloat16 weights and activations": {"compute.dtype": "bfloat16"},
}
BINS = (10, 20, 50, 100, 200, 500, 1000, 10000)
ALPHA = 0.3

Changes = dict[tuple[str, float, str], float]
Scores = dict[tuple[str, float, str], torch.Tensor]


def changes_of(report: Report, real: bool = False) -> Changes:
    """The change of every cell, in percent."""
    found = {}
    for cell in report.cells:
        change = cell.real_edges.change if real else cell.change
        assert change is not None
        found[cell.pair, cell.alpha, cell.metric] = 100 * change
    return found


def row(name: str, base: Changes, other: Changes) -> str:
    """GRPO's changes at one alpha, and how many of all cells turn around."""
    parts = []
    for metric in METRICS:
        turned = sum(base[key] * other[key] < 0 for key in base if key[2] == metric)
        total = sum(key[2] == metric for key in base)
        value = f"{other['sft-grpo', ALPHA, metric]:+.1f}"
        parts.append(value if name == "as the recipes do" else f"{value} ({turned} of {total})")
    return f"| {name} | {' | '.join(parts)} |"


def header(first: str) -> str:
    """The heading of a table with a column per metric."""
    labels = " | ".join(entry.label for entry in METRICS.values())
    return f"| {first} | {labels} |\n|---|{'---:|' * len(METRICS)}"


def running_sum(scores: torch.Tensor) -> torch.Tensor:
    """Each matrix as the difference of a running sum in bfloat16: the published accumulation."""
    total = torch.zeros_like(scores[0], dtype=torch.bfloat16)
    found = []
    for matrix in scores:
        before = total
        total = total + matrix.to(torch.bfloat16)
        found.append((total - before).float())
    return torch.stack(found)


def bfloat16_scores(folder: RunFolder, report: Report) -> Scores:
    """The same sequences, scored one at a time by a bfloat16 model; by pair, alpha and side."""
    recipe, names = report.recipe, first_names(report.recipe)
    models = {name: probe.load_model(name, dtype="bfloat16") for name in recipe.models()}
    found = {}
    for pair in recipe.pairs:
        for alpha in recipe.selection.alpha:
            selection = folder.read_selection(Comparison(pair, "tiny-math", alpha).name)
            assert selection is not None
            for side, reference in (("before", pair.before), ("after", pair.after)):
                path = folder.solutions_file(names[reference], "tiny-math")
                solutions, _ = folder.read_solutions(path)
                sequences: list[TokenSequence] = cut(solutions, selection)
                edges = probe.attribute(models[reference], sequences, batch_size=1)
                found[pair.name, alpha, side] = edges.scores
    return found


def changes_from(scores: Scores) -> Changes:
    """The change of every cell, in percent, from scores by pair, alpha and side."""
    found = {}
    for pair, alpha, side in scores:
        if side == "before":
            for metric in METRICS:
                before, after = (
                    compute_metric(metric, scores[pair, alpha, s]) for s in ("before", "after")
                )
                found[pair, alpha, metric] = 100 * (after - before) / abs(before)
    return found


def rounding(exact: torch.Tensor, rounded: torch.Tensor) -> list[float]:
    """How far each matrix is from the exact one, in percent of its Frobenius norm."""
    distance = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return [float(100 * part.median()) for part in (distance[:10], distance[-10:])]


def bins_table(folder: RunFolder, report: Report) -> list[str]:
    """Both entropies under other numbers of bins, at one alpha."""
    lines = []
    edges: dict[tuple[str, str], EdgeScores] = {}
    for pair in report.recipe.pairs:
        for side in ("before", "after"):
            path = folder.edges_file(Comparison(pair, "tiny-math", ALPHA).name, side)
            found = folder.read_edges(path)
            assert found is not None
            edges[pair.name, side] = found
    for bins in BINS:
        parts = [f"| {bins} "]
        for metric in ("information_complexity", "output_entropy"):
            for pair in ("sft-grpo", "sft-dpo"):
                before, after = (
                    compute_metric(metric, edges[pair, side].scores, bins=bins)
                    for side in ("before", "after")
                )
                change = 100 * (after - before) / before
                parts.append(f"| {before:.3g} → {after:.3g} ({change:+.0f} %) ")
        lines.append("".join(parts) + "|")
    return lines


def main() -> None:
    """Run the variants and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    reports = {
        name: probe.run_recipe(
            "tiny-math",
            folder / str(number),
            overrides={"report.resamples": 0} | changes,
        )
        for number, (name, changes) in enumerate(VARIANTS.items())
    }
    report = reports["as the recipes do"]
    base, run = changes_of(report), RunFolder(folder / "0")

    print(header("GRPO, alpha 0.3: change in %"))
    for name, other in reports.items():
        print(row(name, base, changes_of(other)))
    print(row('real edges only (`entries = "real"`)', base, changes_of(report, real=True)))
    half = bfloat16_scores(run, report)
    summed = {key: running_sum(scores) for key, scores in half.items()}
    print(row("bfloat16 model, batch 1, same answers", base, changes_from(half)))
    print(row("the same, as differences of a running bfloat16 sum", base, changes_from(summed)))

    print(
        "\n| pair, alpha | side | bfloat16, first 10 | last 10 | running sum, first 10 | last 10 |"
    )
    print("|---|---|---:|---:|---:|---:|")
    for (pair, alpha, side), scores in half.items():
        cell = next(p for p in report.recipe.pairs if p.name == pair)
        exact = run.read_edges(run.edges_file(Comparison(cell, "tiny-math", alpha).name, side))
        assert exact is not None
        parts = rounding(exact.scores, scores) + rounding(scores, summed[pair, alpha, side])
        shown = " | ".join(f"{part:.2g} %" for part in parts)
        print(f"| {pair}, {alpha:g} | {side} | {shown} |")

    print("\n| bins | Info.Complex., GRPO | DPO | Out.Entropy, GRPO | DPO |")
    print("|---:|---:|---:|---:|---:|")
    print("\n".join(bins_table(run, report)))


if __name__ == "__main__":
    main()
