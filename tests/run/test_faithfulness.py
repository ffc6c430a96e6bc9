import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import pearsonr, spearmanr
from test_output_docs import documented

import probe
import probe.run._faithfulness as module
from probe.cli import main
from probe.errors import ProbeError
from probe.recipe import AttributionOptions
from probe.report import build_report, render
from probe.report import view as report_view
from probe.run import draw_edges, measure, run_faithfulness
from probe.stats import Agreement, Estimate, agreement_from, compare, view
from probe.store import RunFolder

SMALL = {
    "solutions.questions": 60,
    "solutions.batch_size": 60,
    "selection.samples": 6,
    "selection.alpha": "[0.1, 0.5]",
    "faithfulness.batch_size": 8,
}
OPTIONS = {"edges": 20, "sequences": 3, "methods": ("eap", "relp"), "batch_size": 8}
MODELS = ["tiny-math--sft", "tiny-math--grpo", "tiny-math--dpo"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A run that has not been measured."""
    folder = tmp_path_factory.mktemp("runs") / "solved"
    with open(os.devnull, "w") as nowhere:
        probe.run_recipe("tiny-math", folder, overrides=SMALL, console=Console(file=nowhere))
    return folder


@pytest.fixture(scope="module")
def measured(solved, tmp_path_factory):
    folder = Path(shutil.copytree(solved, tmp_path_factory.mktemp("runs") / "measured"))
    run(folder)
    return folder


@pytest.fixture
def copy(measured, tmp_path):
    return Path(shutil.copytree(measured, tmp_path / "copy"))


def run(folder, **changes):
    """Measure a run; the agreements and what was said."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=300)
        found = run_faithfulness(folder, **(OPTIONS | changes), console=console)
    return found, console.export_text()


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "faithfulness").glob("*.json")}


# The sample


GRAPHS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))


@given(st.data(), GRAPHS, st.integers(0, 70), st.integers(0, 3))
def test_a_draw_holds_each_real_edge_at_most_once(data, shape, count, seed):
    numbers = st.integers(-4, 4)  # so few that many are equal
    size = int(np.prod(shape))
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).float()
    scores = scores.reshape(shape)
    bits = data.draw(st.lists(st.booleans(), min_size=size // shape[0], max_size=size // shape[0]))
    mask = torch.tensor(bits).reshape(shape[1:])
    real = shape[0] * int(mask.sum())

    drawn = draw_edges(scores, mask, count, seed)
    assert len({edge for edge, _ in drawn}) == len(drawn) == min(count, real)
    assert all(mask[edge.source, edge.target] for edge, _ in drawn)
    assert draw_edges(scores, mask, count, seed) == drawn

    strength = {edge: abs(float(scores[edge])) for edge, _ in drawn}
    every = sorted(scores[:, mask].abs().flatten().tolist(), reverse=True)
    top = [strength[edge] for edge, stratum in drawn if stratum == "top"]
    assert top == every[: len(top)]
    assert len(top) == -(-len(drawn) // 3)
    middle = [strength[edge] for edge, stratum in drawn if stratum == "middle"]
    third = every[real // 3 : real - real // 3]
    assert all(third[-1] <= value <= third[0] for value in middle)
    assert len(middle) <= (len(drawn) + 1) // 3
    if len(top) <= real // 3 and len(third) >= (len(drawn) + 1) // 3:
        assert len(middle) == (len(drawn) + 1) // 3


def test_another_seed_draws_others():
    scores = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 6, dtype=torch.bool)
    one, other = (draw_edges(scores, mask, 30, seed) for seed in (1, 2))
    assert one != other
    assert one[:10] == other[:10]  # the strongest are no matter of chance


# The numbers


@given(st.integers(3, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_values_are_those_of_an_independent_computation(size, seed):
    generator = np.random.default_rng(seed)
    exact = generator.standard_t(2, size)
    score = exact + generator.standard_t(2, size)
    found = compare("m", "eap", score.tolist(), exact.tolist(), resamples=5)
    assert found.edges == size
    assert found.pearson.value == pytest.approx(pearsonr(score, exact)[0])
    assert found.spearman.value == pytest.approx(spearmanr(score, exact)[0])
    assert found.sign_agreement.value == np.mean(score * exact > 0)
    count = max(1, round(size / 10))
    best = [set(sorted(range(size), key=lambda i: -abs(x[i]))[:count]) for x in (score, exact)]
    assert found.top_overlap.value == len(best[0] & best[1]) / count
    errors = sorted(abs(score[i] - exact[i]) / abs(exact[i]) for i in range(size))
    middle = (errors[(size - 1) // 2] + errors[size // 2]) / 2
    assert found.median_relative_error.value == pytest.approx(middle)


def test_intervals_are_those_of_a_plain_bootstrap():
    generator = np.random.default_rng(0)
    exact = generator.normal(size=200)
    score = exact + generator.normal(size=200)
    found = compare("m", "eap", score.tolist(), exact.tolist())
    draws = [generator.integers(200, size=200) for _ in range(2000)]
    plain = np.quantile([pearsonr(score[i], exact[i])[0] for i in draws], [0.025, 0.975])
    assert found.pearson[1:] == pytest.approx(plain, abs=0.02)
    plain = np.quantile([np.mean(score[i] * exact[i] > 0) for i in draws], [0.025, 0.975])
    assert found.sign_agreement[1:] == pytest.approx(plain, abs=0.02)
    for estimate in vars(found).values():
        if isinstance(estimate, Estimate):
            assert estimate.low < estimate.value < estimate.high


def test_a_large_sample_is_resampled_in_parts(monkeypatch):
    numbers = np.random.default_rng(0).normal(size=(2, 50)).tolist()
    whole = compare("m", "eap", *numbers)
    monkeypatch.setattr("probe.stats._agreement._VALUES", 999)
    parts = compare("m", "eap", *numbers)
    assert parts.pearson.value == whole.pearson.value
    assert parts.pearson[1:] == pytest.approx(whole.pearson[1:], abs=0.05)


def test_what_is_not_defined_is_null():
    constant = compare("m", "eap", [0.1] * 7, [1.0, 2, 3, 4, 5, 6, 7])
    assert constant.pearson == constant.spearman == (None, None, None)
    assert constant.sign_agreement == (1, 1, 1)
    one = compare("m", "eap", [2.0], [1.0])
    assert one.pearson.value is None
    assert one.median_relative_error == (1, 1, 1)
    zeros = compare("m", "eap", [1.0, 0, 2], [0.0, 0, 0])
    assert zeros.median_relative_error.value is None
    assert zeros.sign_agreement.value == pytest.approx(1 / 3)
    for found in (constant, one, zeros, compare("m", "eap", [], [])):
        assert agreement_from(json.loads(json.dumps(found.table, allow_nan=False))) == found


def test_tiny_effects_do_not_underflow():
    exact = [1e-200, 2e-200, 4e-200]
    assert compare("m", "eap", exact, exact).pearson.value == pytest.approx(1)


# A model


def test_exact_against_itself(tiny):
    sequences = [probe.Sequence([5, 16, 4, 7], [5, 16, 4, 17][:n]) for n in (4, 2)]
    rows = measure(tiny, sequences, ["exact", "eap"], edges=30, batch_size=7)
    assert {row.sequence for row in rows} == {"0", "1"}
    itself, eap = (
        compare("tiny", m, [r.scores[m] for r in rows], [r.exact for r in rows])
        for m in ("exact", "eap")
    )
    assert itself.pearson.value == pytest.approx(1, abs=1e-5)
    assert itself.median_relative_error.value <= 1e-3
    assert itself.top_overlap.value == 1
    assert eap.pearson.value < 0.99


def test_rows_name_their_edges(tiny):
    sequences = [probe.Sequence([5, 16, 4, 7], [5, 16, 4], name) for name in ("p", "q")]
    rows = measure(tiny, sequences, ["eap"], edges=10, batch_size=4)
    edges = probe.attribute(tiny, sequences)
    for row in rows:
        place = edges.graph.sources.index(row.source), edges.graph.targets.index(row.target)
        score = float(edges.scores["pq".index(row.sequence)][place])
        assert row.scores["eap"] == pytest.approx(score, abs=1e-6)


def test_the_recipes_ablation_and_steps_count(tiny):
    sequences = [probe.Sequence([3, 4, 5, 6], [7, 8, 9], "p"), probe.Sequence([9, 4], [7, 3], "q")]
    options = AttributionOptions(ablation="mean", ig_steps=2)
    (row, *_) = measure(tiny, sequences, ["eap-ig", "exact"], edges=3, options=options)
    for method in ("eap-ig", "exact"):
        edges = probe.attribute(tiny, sequences, method, ablation="mean", ig_steps=2)
        place = edges.graph.sources.index(row.source), edges.graph.targets.index(row.target)
        score = float(edges.scores["pq".index(row.sequence)][place])
        assert row.scores[method] == pytest.approx(score, abs=1e-5)
    assert row.exact == pytest.approx(row.scores["exact"], abs=1e-5)


def test_fewer_edges_than_asked(llama):
    mask = llama.graph("block").mask
    said = []
    rows = measure(
        *(llama, [probe.Sequence([5, 6], [7, 8])], ["eap"]),
        options=AttributionOptions(granularity="block"),
        edges=1000,
        progress=lambda sample, new: said.append((len(sample), new)),
    )
    assert len(rows) == int(mask.sum())
    assert said == [(len(rows), 0), (len(rows), len(rows))]


# A run


def test_a_run_is_measured(measured):
    assert {p.name for p in (measured / "faithfulness").iterdir()} == {
        f"{model}.{kind}" for model in MODELS for kind in ("json", "png")
    }
    report = json.loads((measured / "report.json").read_text())
    assert report["complete"] is True
    found = report["faithfulness"]
    assert [(row["model"], row["method"]) for row in found] == [
        (model, method) for model in MODELS for method in ("eap", "relp")
    ]
    for row in found:
        assert row["edges"] == 20
        table = json.loads((measured / "faithfulness" / f"{row['model']}.json").read_text())
        exact = [edge["exact"] for edge in table["sample"]]
        scores = [edge["scores"][row["method"]] for edge in table["sample"]]
        assert row["pearson"]["value"] == pytest.approx(pearsonr(exact, scores)[0])
        assert row["spearman"]["low"] <= row["spearman"]["value"] <= row["spearman"]["high"]
        assert len({edge["sequence"] for edge in table["sample"]}) <= 3
    record = json.loads((measured / "run.json").read_text())
    assert record["seconds"]["faithfulness"] > 0
    for picture in (measured / "faithfulness").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_sequences_are_those_of_the_largest_alpha_of_the_first_pair(measured):
    cells = ("sft-grpo", "before"), ("sft-grpo", "after"), ("sft-dpo", "after")
    for model, (pair, side) in zip(MODELS, cells, strict=True):
        table = json.loads((measured / "faithfulness" / f"{model}.json").read_text())
        assert table["cell"] == f"{pair}.tiny-math.alpha-0.5.{side}"
        path = measured / "selection" / f"{pair}.tiny-math.alpha-0.5.json"
        assert {edge["sequence"] for edge in table["sample"]} <= set(
            json.loads(path.read_text())["ids"][:3]
        )


def test_scores_are_those_of_the_run(measured):
    """The same sequences, cut the same way: one of the run's own edge matrices holds them."""
    table = RunFolder(measured).read_json("faithfulness/tiny-math--grpo.json")
    assert documented("Faithfulness") == list(table)
    edges = RunFolder(measured).read_edges(measured / "edges" / f"{table['cell']}.safetensors")
    selection = RunFolder(measured).read_selection("sft-grpo.tiny-math.alpha-0.5")
    for edge in table["sample"]:
        place = edges.graph.sources.index(edge["source"]), edges.graph.targets.index(edge["target"])
        score = float(edges.scores[selection.ids.index(edge["sequence"])][place])
        assert edge["scores"]["eap"] == pytest.approx(score, abs=1e-5)


def test_measuring_again_computes_nothing(copy, monkeypatch):
    old = {p: p.stat().st_mtime_ns for p in (copy / "faithfulness").iterdir()}
    first = build_report(copy).faithfulness
    monkeypatch.setattr("probe.run._measuring.measure", None)
    found, said = run(copy)
    assert found == first
    assert {p: p.stat().st_mtime_ns for p in (copy / "faithfulness").iterdir()} == old
    assert "again" not in said


def count_exact(monkeypatch, stop_after=None):
    """Count the edges that are computed exactly; be stopped after some batches."""
    counts, original = [], module.exact_effects

    def counted(model, sequences, edges, *rest, **options):
        if len(counts) == stop_after:
            raise KeyboardInterrupt
        counts.append(len(edges))
        return original(model, sequences, edges, *rest, **options)

    monkeypatch.setattr(module, "exact_effects", counted)
    return counts


def test_a_stopped_measurement_goes_on_and_ends_in_the_same_files(
    solved, measured, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(solved, tmp_path / "run"))
    with monkeypatch.context() as patch:
        count_exact(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    half = build_report(folder)
    assert half.missing == ("faithfulness of tiny-math--grpo: not computed yet",)
    assert {row.model for row in half.faithfulness} == {"tiny-math--sft"}
    counts = count_exact(monkeypatch)
    found, said = run(folder)
    assert counts == [8, 4, 8, 8, 4]
    assert "again" not in said
    assert files(folder) == files(measured)
    assert found == build_report(measured).faithfulness


def test_damaged_and_foreign_files_are_computed_again_and_said(copy):
    good = files(copy)
    cut, foreign, other = (copy / "faithfulness" / f"{model}.json" for model in MODELS)
    cut.write_bytes(cut.read_bytes()[:700])
    folder, name = RunFolder(copy), f"faithfulness/{foreign.name}"
    table = folder.read_json(name)
    table["sample"][0].pop("source")
    folder.write_json(name, table)
    table = folder.read_json("faithfulness/tiny-math--grpo.json")
    folder.write_json(f"faithfulness/{other.name}", table | {"key": "another"})
    (copy / "faithfulness" / "tiny-math--dpo.png").unlink()
    _, said = run(copy)
    assert files(copy) == good
    assert f"{cut}: damaged" in said
    assert f"{foreign}: damaged (not a sample of edges)" in said
    assert f"{other}: computed from other solutions or settings" in said
    assert (copy / "faithfulness" / "tiny-math--dpo.png").exists()


def test_more_edges_and_methods_keep_the_exact_effects_that_are_there(copy, monkeypatch):
    counts = count_exact(monkeypatch)
    found, said = run(copy, edges=30, methods=("eap", "eap-ig"))
    assert "again" not in said
    assert {(row.edges, row.method) for row in found} == {(30, "eap"), (30, "eap-ig")}
    assert 0 < sum(counts) < 3 * 30


def test_other_sequences_make_the_files_stale(copy):
    _, said = run(copy, sequences=2)
    for model in MODELS:
        file = copy / "faithfulness" / f"{model}.json"
        assert f"{file}: computed from other solutions or settings; computing it again" in said


def test_a_recipe_measures_as_the_command_does(copy, measured):
    shutil.rmtree(copy / "faithfulness")
    shutil.rmtree(copy / "edges")
    overrides = SMALL | {
        "faithfulness.edges": 20,
        "faithfulness.sequences": 3,
        "faithfulness.methods": '["eap", "relp"]',
    }
    with open(os.devnull, "w") as nowhere:
        report = probe.run_recipe(
            "tiny-math", copy, overrides=overrides, console=Console(file=nowhere)
        )
    assert files(copy) == files(measured)
    assert report.faithfulness == build_report(measured).faithfulness
    found, _ = run(copy, edges=None, sequences=None, methods=None, batch_size=None)
    assert found == report.faithfulness  # what is not given is as in the recipe


def test_reports_show_it(measured):
    report = build_report(measured)
    text = render(report, "markdown")
    row = report.faithfulness[0]
    assert f"| {row.model} | eap | {row.pearson.value:.2f} (" in text
    for width in (80, 100):
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(report_view([report]))
        text = console.export_text()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert "Spearman" in text


def test_the_table_fits_whatever_the_numbers(measured):
    wide = Estimate(-0.99, -0.99, -0.99)
    row = Agreement("organisation--a-model-of-a-long-name-7b", "eap-ig", 400, *[wide] * 5)
    huge = Agreement("short", "exact", 400, *[wide] * 4, Estimate(123.4, 99.1, 2345.6))
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(view([row, huge, huge]))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "12340 %" in text
    # Once in each part of the table: the first columns stand again where it goes on below.
    assert text.count("short") == len(re.findall(r"^model +method", text, re.MULTILINE))


# Mistakes


def test_the_command(copy):
    arguments = ["--edges", "20", "--sequences", "3", "--methods", "eap, relp", "--device", "cpu"]
    result = CliRunner().invoke(main, ["faithfulness", str(copy), *arguments])
    assert result.exit_code == 0, result.output
    assert "tiny-math--dpo" in result.stdout
    assert "faithfulness" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-mth"], "no run folder tiny-mth, and no recipe 'tiny-mth'; did you mean tiny-math?"),
        (["tiny-math", "--methods", "eap,acdc"], "is 'acdc'; known: eap, eap-ig, relp, exact"),
        (["tiny-math", "--device", "tpu"], "device 'tpu' is not known"),
        (["/no/recipe.toml"], "cannot read the recipe"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["faithfulness", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("probe: ")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_measured(copy, tmp_path):
    with pytest.raises(ProbeError, match="has no run.json"):
        run(tmp_path)
    with pytest.raises(ProbeError, match="faithfulness.methods is 'acdc'"):
        run(copy, methods=("acdc",))
    with pytest.raises(ProbeError, match="edges is 0"):
        run(copy, edges=0)
    with pytest.raises(ProbeError, match="faithfulness.sequences is -1"):
        run(copy, sequences=-1)
    solutions = copy / "solutions" / "tiny-math--dpo.tiny-math.jsonl"
    solutions.write_text("".join(solutions.open().readlines()[:9]))
    with pytest.raises(
        ProbeError, match="no whole selection or solutions of sft-dpo.*probe recipe"
    ):
        run(copy)
    (copy / "selection" / "sft-grpo.tiny-math.alpha-0.5.json").unlink()
    with pytest.raises(ProbeError, match="no whole selection or solutions of sft-grpo"):
        run(copy)
    record = RunFolder(copy).read_record()
    record["models"]["probe:tiny-math/grpo"] = "another"
    RunFolder(copy).write_json("run.json", record)
    with pytest.raises(ProbeError, match="weights of a model have changed"):
        run(copy)
