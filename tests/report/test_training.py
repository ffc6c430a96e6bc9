"""The picture of a training: every checkpoint at its step, as it is and at equal loss."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.progress import Progress

from probe.recipe import read_recipe, recipe_from
from probe.report import (
    ExtraTable,
    build_report,
    draw_diversity,
    draw_entropy,
    opening,
    read_strengths,
    render,
    training_figures,
    write_figures,
)
from probe.stats import Accuracy

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STEPS = (1, 2, 100)


@pytest.fixture
def report(half_run):
    """A report of three checkpoints whose changes are known."""
    found = build_report(half_run.path)
    table = {
        "name": "x",
        "trajectories": [
            {"name": "rl", "base": "a/b", "checkpoints": [f"a/rl@step_{step}" for step in STEPS]}
        ],
        "benchmarks": [{"name": "tiny-math"}],
        "selection": {"alpha": [0.5]},
    }
    some = {cell.metric: cell for cell in found.cells if not cell.control}
    intensity = some["activation_intensity"]
    cells = [
        replace(cell, pair=f"rl-step-{step}", control=control, change=change, interval=ends)
        for step in reversed(STEPS)
        for cell, control, change, ends in (
            (intensity, "", -step / 200, (-step / 100, 0.0)),
            (intensity, "equal loss", -step / 400, None),
            (intensity, "sharpness", 5.0, None),
            (some["distribution_kurtosis"], "", 0.25, (0.0, 0.5)),
        )
    ]
    rows = [
        Accuracy(f"rl-step-{step}", "tiny-math", 0.5, 0.5 + step / 1000, 200, interval=(0, 0.2))
        for step in STEPS
    ]
    return replace(
        found, recipe=recipe_from(table, "here"), cells=tuple(cells), accuracy=tuple(rows)
    )


def curves(axes):
    return {
        line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if len(line.get_xdata()) == len(STEPS)
    }


def test_every_checkpoint_is_at_its_step(report):
    ((name, figure),) = training_figures(report)
    assert name == "training.rl.tiny-math.alpha-0.5"
    accuracy, intensity, kurtosis = figure.axes
    points = next(iter(curves(accuracy).values()))
    assert points == pytest.approx({1: 50.1, 2: 50.2, 100: 60})
    found = curves(intensity)
    assert set(found) == {"as it is", "at equal loss"}  # sharpness alone is another question
    assert found["as it is"] == pytest.approx({1: -0.5, 2: -1, 100: -50})
    assert found["at equal loss"] == pytest.approx({1: -0.25, 2: -0.5, 100: -25})
    assert set(curves(kurtosis)) == {"as it is"}
    band = intensity.collections[0].get_paths()[0].vertices
    assert pytest.approx([band[:, 1].min(), band[:, 1].max()]) == [-100.0, 0.0]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert intensity.get_title(loc="left") == "intensity, change (%)"


def test_what_was_measured_of_checkpoints_has_panels(report):
    """From their table: KL with its band, and weights; those of another training are not here."""
    columns = ("benchmark", "training", "alpha", "step", "KL", "KL low", "KL high", "moved")
    rows = [("tiny-math", "rl", 0.5, 0, None, None, None, None)]
    rows += [("tiny-math", "rl", 0.5, n, n / 10, n / 20, n / 5, n / 1000) for n in STEPS]
    rows += [("tiny-math", "rl-2", 0.5, 1, 9.0, 9.0, 9.0, 9.0)]
    table = ExtraTable("Every checkpoint", "", columns, tuple(rows))
    ((_, figure),) = training_figures(replace(report, extras=(table,)))
    *_, divergence, moved = figure.axes
    assert divergence.get_title(loc="left") == "KL to the base (nats)"
    assert moved.get_title(loc="left") == "weights moved (%)"
    (curve,) = curves(divergence).values()
    assert curve == pytest.approx({1: 0.1, 2: 0.2, 100: 10})
    band = divergence.collections[0].get_paths()[0].vertices
    assert [band[:, 1].min(), band[:, 1].max()] == pytest.approx([0.05, 20])
    (curve,) = curves(moved).values()
    assert curve == pytest.approx({1: 0.1, 2: 0.2, 100: 10})
    no_kl = replace(table, rows=tuple((*row[:4], None, None, None, row[7]) for row in rows))
    ((_, figure),) = training_figures(replace(report, extras=(no_kl,)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[-1] == "weights moved (%)"
    assert "KL to the base (nats)" not in titles


def test_a_page_shows_the_training_before_the_cells_of_its_checkpoints(report, monkeypatch):
    monkeypatch.setattr("probe.report._webpage.read_strengths", lambda report: ())
    monkeypatch.setattr("probe.report._webpage.panel_data", lambda report: {"pairs": []})
    columns = ("benchmark", "training", "alpha", "step")
    table = ExtraTable("Every checkpoint", "", columns, (("tiny-math", "rl", 0.5, 7),))
    page = render([replace(report, extras=(table,))], "html")
    marks = ["<h2>Along the training", 'alt="training.rl.', ">Every checkpoint<"]
    places = [page.index(mark) for mark in (*marks, "<h2>Every cell", "<h2>Diversity and")]
    assert places == sorted(places)
    assert all(page.count(mark) == 1 for mark in marks)
    none = [replace(cell, pair="sft-grpo") for cell in report.cells if cell.pair == "rl-step-1"]
    alone = read_recipe("tiny-math", {"selection.alpha": "[0.5]"})
    page = render([replace(report, recipe=alone, cells=tuple(none), accuracy=())], "html")
    assert "Along the training" not in page


def test_one_checkpoint_is_no_training(report):
    cells = [cell for cell in report.cells if cell.pair == "rl-step-1"]
    assert not list(training_figures(replace(report, cells=tuple(cells))))


def test_it_is_among_the_figures_of_a_run(report, tmp_path, monkeypatch):
    monkeypatch.setattr("probe.report._figures.read_strengths", lambda report: ())
    names = [path.name for path in write_figures([report], tmp_path)]
    assert "training.rl.tiny-math.alpha-0.5.png" in names
    assert "training.rl.tiny-math.alpha-0.5.pdf" in names


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (in Debian: apt install chromium)")
def test_a_page_steps_through_the_checkpoints(report, tmp_path, monkeypatch):
    """The circuit of each is drawn when the slider comes to it."""
    (strength,) = read_strengths(build_report(report.path))
    found = [
        replace(strength, pair=f"rl-step-{step}", after=strength.after * step) for step in STEPS
    ]
    monkeypatch.setattr("probe.report._webpage.read_strengths", lambda report: found)
    monkeypatch.setattr("probe.report._webpage.panel_data", lambda report: {"pairs": []})
    text = render(report, "html").replace("</body>", f"{SLIDE}</body>")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *options, profile, "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1])
    title = "rl-step-{} on tiny-math, alpha 0.5".format
    assert seen == [[False, str(step), title(step)] for step in STEPS]


SLIDE = """<script>{
const step = document.getElementById("step"), seen = [];
for (const place of [0, 1, 2]) {
  step.value = place;
  step.dispatchEvent(new Event("input"));
  seen.push(["along", "stepped", "which"].map((name) => document.getElementById(name)).map(
    (part, number) => number ? part.textContent : part.hidden));
}
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
}</script>"""


def test_diversity_names_each_checkpoint_of_a_training(report):
    """One colour of a training, and its checkpoints beside their rows."""
    some = next(cell for cell in report.cells)
    cells = [
        replace(some, metric="sample_diversity", pair=pair, control="", change=0.1, interval=None)
        for pair in ("rl-step-1", "other", "rl-step-2", "rl-step-100")
    ]
    axes = draw_diversity([replace(report, cells=tuple(cells))]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *(f"rl-step-{step}, tiny-math, alpha 0.5" for step in STEPS),
        "tiny-math, alpha 0.5",
    ]
    colours = [line.get_color() for line in axes.lines if line.get_marker() in "os"]
    assert len(set(colours[:3])) == 1
    assert colours[3] != colours[0]
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert legend == ["rl", "other", "average +10.0 %"]


def test_many_checkpoints_have_several_lines_of_panels(report):
    some = next(cell for cell in report.cells if cell.metric == "activation_intensity")
    cells = [
        replace(some, metric="token_entropy", pair=f"rl-step-{step}", control="", benchmark=name)
        for name in ("one", "two")
        for step in range(12)
    ]
    figure = draw_entropy([replace(report, cells=tuple(cells))], "token_entropy")
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 24
    assert {axes.get_subplotspec().get_gridspec().get_geometry() for axes in shown} == {(6, 5)}
    titles = {axes.get_title(): axes.get_subplotspec().num1 for axes in shown}
    assert titles["rl-step-5 on one"] == 5
    assert titles["rl-step-0 on two"] == 15
    assert figure.get_size_inches()[0] < 14


def test_steps_are_plain_numbers(report):
    ((_, figure),) = training_figures(report)
    figure.canvas.draw()
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"1", "10", "100"} <= set(ticks)


def test_the_bar_of_figures_counts_trainings(report, tmp_path, monkeypatch):
    monkeypatch.setattr("probe.report._figures.read_strengths", lambda report: ())
    progress = Progress(disable=True)
    write_figures([report], tmp_path, progress)
    (task,) = progress.tasks
    assert task.completed == 2  # diversity, and the training
    assert task.total == 2 + 2 * len(STEPS)  # and of each checkpoint, its edges and its circuit


def test_a_training_is_told_as_one(report):
    """Where accuracy went, the inside of its last checkpoint, and since when that is sure."""
    cells = [
        replace(cell, significant=cell.pair == "rl-step-100" and cell.control == "")
        for cell in report.cells
    ]
    right = {1: (0.3, 0.001, True), 2: (0.45, 0.4, False), 100: (0.6, 0.01, True)}
    rows = [
        replace(row, after=after, p_value=p, significant=sure)
        for row, (after, p, sure) in zip(report.accuracy, right.values(), strict=True)
    ]
    told, trust = opening([replace(report, cells=tuple(cells), accuracy=tuple(rows))])
    assert trust.subject == "How sure, and what next"
    assert told.subject == "b → rl, 3 checkpoints to step 100, on 200 questions of tiny-math"
    lines = dict(told.lines)
    assert lines["Accuracy"] == (
        "from 50.0 to 60.0 % at step 100; least 30.0 % at step 1. Of 3 checkpoints 1 is "
        "significantly better than the base, and 1 is worse."
    )
    assert lines["Inside"].startswith("at step 100, intensity, the mean strength of an edge, fell")
    assert "At equal loss the change is -25.0 %" in lines["Inside"]
    assert lines["Inside"].endswith("beyond chance at 1 of 3 checkpoints, first at step 100.")
    assert lines["All cells"].startswith("2 of 6 (2 metrics at 1 alpha of 3 checkpoints) moved")


def test_two_checkpoints_are_told_one_by_one(report):
    cells = tuple(cell for cell in report.cells if cell.pair != "rl-step-2")
    *told, _ = opening([replace(report, cells=cells)])
    assert [one.subject for one in told] == [
        f"b → rl@step_{step} on 200 questions of tiny-math" for step in (1, 100)
    ]
