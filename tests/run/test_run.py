import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_recorded, save_dull_model
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import probe
from probe.errors import ProbeError
from probe.metrics import METRICS, TOKEN_METRICS
from probe.report import build_report
from probe.report._wording import caveats
from probe.run import cut
from probe.store import RunFolder

SMALL = {
    "solutions.questions": 60,
    "solutions.batch_size": 16,
    "selection.samples": 6,
    "selection.alpha": "[0.1, 0.5]",
    "attribution.batch_size": 3,
    "attribution.control": "none",
}
ARGUMENTS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def run(folder, overrides=None, fresh=False):
    """Run the small recipe; the report and what was said."""
    return run_recorded(SMALL | (overrides or {}), folder, fresh)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_folder_holds_everything(finished):
    files = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    cells = [f"{pair}.tiny-math.alpha-{a}" for pair in ("sft-grpo", "sft-dpo") for a in (0.1, 0.5)]
    assert files == {
        *("run.json", "report.json", "clusters.json", "questions.json", ".lock"),
        *(f"solutions/tiny-math--{model}.tiny-math.jsonl" for model in ("sft", "grpo", "dpo")),
        *(f"selection/{cell}.json" for cell in cells),
        *(f"edges/{cell}.{side}.safetensors" for cell in cells for side in ("before", "after")),
    }
    record = json.loads((finished / "run.json").read_text())
    assert record["versions"].keys() == {"probe", "python", "torch", "transformers", "nnsight"}
    assert record["recipe"]["selection"]["seed"] == 42
    assert record["finished"] >= record["started"]
    assert record["seconds"].keys() == {"solutions", "selection", "attribution", "report"}


def test_the_report_has_every_cell_once(finished):
    report = report_of(finished)
    assert report["schema"] == 2
    assert report["complete"] is True
    keys = [(c["pair"], c["benchmark"], c["alpha"], c["metric"]) for c in report["cells"]]
    assert len(keys) == len(set(keys)) == 2 * 1 * 2 * len(METRICS | TOKEN_METRICS)
    for cell in report["cells"]:
        assert cell["samples"] == 6
        assert cell["change"] == pytest.approx(
            (cell["after"] - cell["before"]) / abs(cell["before"])
        )
        up = cell["change"] > 0
        assert cell["as_in_paper"] == (up == (cell["paper_direction"] == "up"))
        assert cell["interval"][0] <= cell["interval"][1]
        assert 0 < cell["p_value"] <= cell["p_holm"] <= 1
        assert cell["significant"] == (cell["p_holm"] < 0.05)
        assert cell["clusters"] == 6 - cell["left_out"]


def test_the_cells_are_the_metrics_of_the_attributed_sequences(finished):
    """From the files alone, through the public functions, to the same numbers."""
    lines = (finished / "solutions" / "tiny-math--grpo.tiny-math.jsonl").read_text().splitlines()
    solutions = {row["id"]: row for row in map(json.loads, lines)}
    selection = json.loads(
        (finished / "selection" / "sft-grpo.tiny-math.alpha-0.5.json").read_text()
    )
    sequences = [
        probe.Sequence(row["prompt"], row["answer"][: selection["cut_length"]])
        for row in (solutions[name] for name in selection["ids"])
    ]
    edges = probe.attribute(probe.load_model("probe:tiny-math/grpo"), sequences)
    for cell in report_of(finished)["cells"]:
        if (cell["pair"], cell["alpha"]) == ("sft-grpo", 0.5):
            function = getattr(probe.metrics, cell["metric"])
            if cell["metric"] in TOKEN_METRICS:
                assert function(edges.entropies) == pytest.approx(cell["paper"]["after"], rel=1e-3)
                continue
            assert function(edges.scores) == pytest.approx(cell["paper"]["after"], rel=1e-3)
            real = function(edges.scores, edges.graph.mask)
            assert real == pytest.approx(cell["real_edges"]["after"], rel=1e-3)


def test_running_again_computes_nothing(copy):
    before = {p: p.stat().st_mtime_ns for p in (copy / "edges").iterdir()}
    old = report_of(copy)
    _, said = run(copy)
    assert report_of(copy) == old
    assert {p: p.stat().st_mtime_ns for p in (copy / "edges").iterdir()} == before
    assert "again" not in said


def test_what_does_not_change_the_result_may_change(copy):
    old = report_of(copy)
    run(copy, {"attribution.batch_size": 2, "solutions.batch_size": 5, "compute.device": "cpu"})
    run(copy, {"attribution.ig_steps": 7})  # of a method that takes none
    assert report_of(copy) == old


def test_damaged_parts_are_computed_again_and_said(copy):
    old = report_of(copy)
    edges = copy / "edges" / "sft-grpo.tiny-math.alpha-0.5.after.safetensors"
    edges.write_bytes(edges.read_bytes()[:500])
    other = copy / "edges" / "sft-dpo.tiny-math.alpha-0.1.before.safetensors"
    other.write_bytes(b"")
    solutions = copy / "solutions" / "tiny-math--sft.tiny-math.jsonl"
    content = solutions.read_bytes()
    solutions.write_bytes(content[: len(content) // 2])
    foreign = copy / "solutions" / "tiny-math--dpo.tiny-math.jsonl"
    text = foreign.read_text().splitlines()
    foreign.write_text("\n".join(["{}", '{"id": 3}', "\x00\xff", *text[2:]]))
    half = build_report(copy)
    assert len(half.missing) == 3
    assert f"{solutions}: 29 of 60 solutions are left; run the recipe again" in half.missing
    assert len(half.cells) == 2 * len(METRICS | TOKEN_METRICS)

    _, said = run(copy)
    assert report_of(copy) == old
    assert solutions.read_bytes() == content
    assert f"{edges}: damaged" in said
    assert f"{other}: damaged" in said
    assert f"{solutions}: 1 damaged lines" in said
    assert f"{foreign}: 3 damaged lines" in said


def test_batches_that_an_earlier_run_kept_are_not_computed_again(copy):
    old = report_of(copy)
    folder = RunFolder(copy)
    path = folder.edges_file("sft-grpo.tiny-math.alpha-0.5", "after")
    with safe_open(path, "pt") as file:
        key = file.metadata()["key"]
    edges = folder.read_edges(path)
    part = edges[[4, 1]]
    part.scores[0, 0, 3] = 7.5  # a mark that tells whether this part was used
    folder.write_part(path, part, [4, 1], key)
    folder.write_part(path, part, [2, 0], "another key")
    path.unlink()
    _, said = run(copy)
    found = folder.read_edges(path, key)
    assert found.scores[4, 0, 3] == 7.5
    found.scores[4, 0, 3] = edges.scores[4, 0, 3]
    assert (found.scores - edges.scores).abs().max() <= 1e-5 * edges.scores.abs().max()
    assert "part-2.safetensors: computed from other solutions" in said
    assert folder.parts(path) == []
    path.unlink()
    run(copy)
    assert report_of(copy) == old


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"attribution.method": "exact", "attribution.batch_size": 64}, (9, 17)),
        ({"attribution.method": "eap-ig", "attribution.ig_steps": 3}, (9, 17)),
        ({"attribution.method": "relp", "attribution.ablation": "mean"}, (9, 17)),
        ({"attribution.granularity": "head"}, (21, 53)),
        ({"attribution.granularity": "block"}, (9, 9)),
    ],
)
def test_every_way_of_scoring_is_a_recipe(tmp_path, changes, shape):
    short = {"selection.samples": 2, "selection.alpha": "[0.1]"}
    report, _ = run(tmp_path / "run", short | changes)
    assert len(report.cells) == 2 * len(METRICS | TOKEN_METRICS)
    for path in (tmp_path / "run" / "edges").iterdir():
        edges = RunFolder(tmp_path / "run").read_edges(path)
        assert edges.scores.shape[1:] == edges.graph.mask.shape == shape
        assert 0 <= edges.residual_error < 1e-5  # 0 where both sums round alike
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["residual_error"].keys() == set(record["models"])


def test_the_cross_text_control_comes_to_a_finished_run(copy):
    old = {p: p.stat().st_mtime_ns for p in (copy / "edges").iterdir()}
    run(copy, {"attribution.control": "cross-text"})
    found = {p: p.stat().st_mtime_ns for p in (copy / "edges").iterdir()}
    assert len(found) == 2 * len(old)
    assert old.items() <= found.items()  # nothing is computed twice
    next(path for path in found if path not in old).unlink()  # a stopped control goes on
    run(copy, {"attribution.control": "cross-text"})
    assert len(list((copy / "edges").iterdir())) == 2 * len(old)


def test_each_model_is_scored_on_the_others_answers(copy):
    """Where both solve a problem these models write the same, so one gets other answers here."""
    folder, cell = RunFolder(copy), "sft-grpo.tiny-math.alpha-0.5"
    paths = [folder.solutions_file(f"tiny-math--{m}", "tiny-math") for m in ("sft", "grpo")]
    before, after = (folder.read_solutions(path)[0] for path in paths)
    before = [replace(s, answer=[*s.answer[1:], s.answer[0]]) for s in before]
    folder.write_solutions(paths[0], before)
    report, _ = run(copy, {"attribution.control": "cross-text"})

    selection = folder.read_selection(cell)
    old, new = (cut(solutions, selection) for solutions in (before, after))
    assert [s.answer for s in old] != [s.answer for s in new]
    losses = {}
    for side, model, text in (
        ("before", "sft", old),
        ("before-on-after", "sft", new),
        ("after-on-before", "grpo", old),
        ("after", "grpo", new),
    ):
        edges = folder.read_edges(folder.edges_file(cell, side))
        expected = probe.attribute(probe.load_model(f"probe:tiny-math/{model}"), text)
        largest = expected.scores.abs().max()
        assert (edges.scores - expected.scores).abs().max() < 1e-4 * largest
        losses[side] = edges.losses.mean()
    # The answers that neither model would give cost both of them more.
    assert losses["before"] > 2 * losses["before-on-after"]
    assert losses["after-on-before"] > 2 * losses["after"]
    table = next(extra for extra in report.extras if extra.title == "Cross-text control")
    estimands = [metric.estimand for metric in (METRICS | TOKEN_METRICS).values()]
    ratios = {e.label for e in estimands if e is not None and e.form == "ratio"}
    for row in table.rows:
        values = dict(zip(table.columns, row, strict=True))
        if values["pair"] == "sft-grpo":
            assert values["text %"] != 0
            model, text = values["model %"], values["text %"]
            whole = model + text
            if values["metric"] in ratios:  # the two parts multiply
                whole += model * text / 100
            assert whole == pytest.approx(values["change %"], rel=1e-6, abs=1e-6)


def test_edges_of_other_solutions_are_computed_again(copy):
    edges = copy / "edges"
    first = edges / "sft-grpo.tiny-math.alpha-0.5.after.safetensors"
    old = {name: x.clone() for name, x in load_file(first).items()}  # not the file's own memory
    other = edges / "sft-dpo.tiny-math.alpha-0.5.after.safetensors"
    shutil.copy(other, first)
    _, said = run(copy)
    assert f"{first}: damaged (it is {other.name})" in said
    folder = RunFolder(copy)
    found = folder.read_edges(other)
    folder.write_edges(first, found, found.ids, "key of others")
    _, said = run(copy)
    assert f"{first}: computed from other solutions" in said
    new = load_file(first)
    assert all(torch.equal(new[name], old[name]) for name in ("scores", "losses"))


def test_a_folder_of_another_recipe_is_refused(copy):
    with pytest.raises(ProbeError, match=r"another recipe \(selection.samples: 6 there, 7 here\)"):
        run(copy, {"selection.samples": 7})
    report, _ = run(copy, {"selection.samples": 7}, fresh=True)
    assert report.cells[0].samples == 7


def test_retrained_weights_in_the_same_folder_are_refused(tmp_path):
    models = tmp_path / "models"
    for name in ("sft", "grpo"):
        source = Path(probe.__file__).parent / "data" / "tiny-math" / name
        shutil.copytree(source, models / name)
    overrides = {f"pairs.{n}.before": str(models / "sft") for n in (0, 1)}
    overrides |= {f"pairs.{n}.after": str(models / "grpo") for n in (0, 1)}
    run(tmp_path / "run", overrides)
    shutil.copy(models / "sft" / "model.safetensors", models / "grpo" / "model.safetensors")
    grpo = models / "grpo"
    with pytest.raises(ProbeError, match=f"^model.safetensors of {grpo} has changed since "):
        run(tmp_path / "run", overrides)


def test_a_damaged_record(copy):
    (copy / "run.json").write_text('{"schema": 1, "rec')
    with pytest.raises(ProbeError, match="--fresh"):
        run(copy)
    run(copy, fresh=True)


def test_folders_that_cannot_be_run_folders(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ProbeError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(ProbeError, match="cannot write to the run folder"):
        run(tmp_path / "file" / "below")
    with pytest.raises(ProbeError, match="holds files but no run.json"):
        run(tmp_path)
    with pytest.raises(ProbeError, match="holds files but no run.json"):
        run(tmp_path, fresh=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_against_itself_is_identical(tmp_path):
    same = {
        f"pairs.{n}.{side}": "probe:tiny-math/sft" for n in (0, 1) for side in ("before", "after")
    }
    report, _ = run(tmp_path / "run", same)
    for cell in report.cells:
        assert cell.before == cell.after
        assert cell.change == 0
        assert cell.as_in_paper is False
        assert cell.real_edges.change == 0
        assert cell.interval == (0, 0)
        assert cell.p_value == cell.p_holm == 1
        assert cell.significant is False
    assert len(list((tmp_path / "run" / "solutions").iterdir())) == 1  # asked once


def test_no_question_that_both_models_solve(tmp_path):
    dull = save_dull_model(tmp_path / "dull")
    report, said = run(tmp_path / "run", {"pairs.0.after": str(dull)})
    reason = "no question that both models solve (before "
    assert f"left out: pair sft-grpo, benchmark tiny-math: {reason}" in said
    assert said.count(reason) == 1
    assert {cell.pair for cell in report.cells} == {"sft-dpo"}
    assert [line[:32] for line in report.missing] == [
        "sft-grpo.tiny-math.alpha-0.1: no",
        "sft-grpo.tiny-math.alpha-0.5: no",
    ]
    assert reason in report.missing[0]
    with pytest.raises(ProbeError, match=r"pair sft-grpo, benchmark tiny-math: no question that"):
        run(tmp_path / "none", {"pairs.0.after": str(dull), "pairs.1.after": str(dull)})
    assert len(list((tmp_path / "none" / "solutions").iterdir())) == 2  # nothing lost


def start(folder):
    # What a shell starts in the background ignores Ctrl-C, and so does all that this starts.
    here = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "probe.cli",
                *("recipe", "tiny-math", "--output", folder),
                *ARGUMENTS,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, here)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
@pytest.mark.parametrize("after", ["solutions/tiny-math--grpo.tiny-math.jsonl", "edges/*"])
def test_a_stopped_run_goes_on_and_ends_in_the_same_report(finished, tmp_path, stop, after):
    folder = tmp_path / "run"
    process = start(folder)
    while not list(folder.glob(after)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(stop)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert not (folder / "report.json").exists()
    if stop == signal.SIGINT:
        assert time.monotonic() - asked < 5
        assert process.returncode == 130
        assert errors.strip().endswith("probe: stopped; the same command goes on from here")
        assert "Traceback" not in errors
    run(folder)
    assert report_of(folder) == report_of(finished)


def test_files_hold_no_pickle(finished):
    for path in (finished / "edges").iterdir():
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"scores", "losses", "entropies"}
            assert file.get_tensor("scores").shape == (6, 9, 17)


@pytest.mark.slow
def test_the_whole_tiny_recipe(tmp_path):
    """What the README shows: both pairs, all held-out questions."""
    with open(os.devnull, "w") as nowhere:
        report = probe.run_recipe("tiny-math", tmp_path / "run", console=Console(file=nowhere))
    accuracy = {row.pair: row for row in report.accuracy}
    assert accuracy["sft-grpo"].questions == 1000
    assert 0.45 <= accuracy["sft-grpo"].before <= 0.75
    assert accuracy["sft-grpo"].after > accuracy["sft-grpo"].before
    assert {cell.samples for cell in report.cells} == {200}


def asked(folder, model="sft"):
    lines = (folder / "solutions" / f"tiny-math--{model}.tiny-math.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_larger_limit_extends_the_run(copy):
    first = asked(copy)
    report, said = run(copy, {"solutions.questions": 63})
    assert [row.questions for row in report.accuracy] == [63, 63]
    assert "damaged" not in said
    more = {row["id"]: row for row in asked(copy)}
    assert len(more) == 63
    assert all(more[row["id"]] == row for row in first)


def test_a_smaller_limit_asks_less_and_loses_nothing(copy, monkeypatch):
    whole = asked(copy)
    report, said = run(copy, {"solutions.questions": 50})
    assert [row.questions for row in report.accuracy] == [50, 50]
    assert "damaged" not in said
    few = asked(copy)
    assert few == [row for row in whole if row["id"] in {part["id"] for part in few}]
    # What was solved once is not solved again.
    monkeypatch.setattr("probe.run._solving.solve", None)
    assert run(copy, {"solutions.questions": 60})[0].accuracy[0].questions == 60
    assert asked(copy) == whole


def test_a_later_command_adds_to_what_is_shown(copy):
    def titles():
        return [table.title for table in build_report(copy).extras]

    run(copy, {"attribution.control": "cross-text"})
    run(copy, {"report.extra": '["overlap", "weights"]'})
    everything = [
        "Cross-text control",
        "Overlap of the circuits",
        "Change of the weights",
    ]
    assert titles() == everything
    run(copy, {"solutions.questions": 61})
    assert titles() == everything
    assert not build_report(copy).missing
    run(copy, fresh=True)
    assert titles() == everything[1:2]


@pytest.mark.parametrize(
    "place",
    [
        ".",
        "report.json",
        "run.json",
        "edges",
        "selection/sft-dpo.tiny-math.alpha-0.1.json",
        "page.html",
    ],
)
def test_a_file_of_a_run_stands_for_the_run(copy, monkeypatch, place):
    (copy / "page.html").touch()
    assert build_report(copy / place).cells == build_report(copy).cells
    monkeypatch.chdir(copy.parent)
    assert build_report(f"{copy.name}/{place}").cells
    monkeypatch.chdir(copy)
    assert build_report(place).cells


def test_a_file_of_no_run_is_no_damaged_run(copy, tmp_path):
    shutil.copy(copy / "report.json", tmp_path / "report.json")
    for place in (tmp_path / "report.json", copy / "no-such-file.json"):
        with pytest.raises(ProbeError, match=r"is not a run folder: it has no run\.json"):
            build_report(place)


def test_answers_that_do_not_end_are_told(tmp_path):
    """In the run, in the report, and as a number; a few are no news."""
    keys = {f"pairs.{i}.max_new_tokens": 26 for i in (0, 1)}
    keys |= {"solutions.questions": 40, "selection.alpha": "[0.1]", "attribution.control": "none"}
    report, told = run_recorded(keys, tmp_path / "run")
    assert "tiny-math--sft on tiny-math: 28 of 40 answers did not end within 26 tokens" in told
    assert [row.cut_off for row in report.accuracy] == [(28, 28), (28, 28)]
    (line,) = (line for line in caveats(report) if "answers of sft-grpo on tiny-math" in line)
    assert line.startswith("Of 40 answers of sft-grpo on tiny-math, 28 before and 28 after did not")
    for row in report.accuracy:
        files = tmp_path / "run" / "solutions"
        before = (files / "tiny-math--sft.tiny-math.jsonl").read_text().splitlines()
        assert sum(len(json.loads(text)["answer"]) >= 26 for text in before) == row.cut_off[0]
    few = replace(report.accuracy[0], cut_off=(4, 4))
    assert not any("did not end" in line for line in caveats(replace(report, accuracy=(few,))))


@pytest.mark.slow
def test_the_shipped_training(tmp_path):
    """What its documentation says is there."""
    with open(os.devnull, "w") as nowhere:
        quiet = Console(file=nowhere)
        report = probe.run_recipe("tiny-math-trajectory", tmp_path / "run", console=quiet)
    assert report.missing == ()
    tables = {table.title: table for table in report.extras}
    every, along = tables["Every checkpoint"], tables["Along the training"]
    rows = [dict(zip(every.columns, row, strict=True)) for row in every.rows]
    slopes = [dict(zip(along.columns, row, strict=True)) for row in along.rows]
    assert [row["step"] for row in rows] == [0, 9, 18, 37, 75, 150, 300, 600]
    assert len({row["questions"] for row in rows}) == 1  # one set for all
    assert rows[0]["questions"] > 50
    # Greedy answers get worse before they get better; the weights go one way.
    accuracy = [row["accuracy"] for row in rows]
    assert min(accuracy) < accuracy[0] - 0.05 < accuracy[0] + 0.05 < accuracy[-1]
    moved = [row["moved"] for row in rows[1:]]
    assert moved == sorted(moved)
    for row in rows[1:]:
        assert 0 < row["KL low"] < row["KL"] < row["KL high"]
        assert row["on base text %"] is not None
    assert {(row["text"], row["metric"]) for row in slopes} >= {
        ("own", "intensity"),
        ("of the base", "intensity"),
    }
    assert {row["checkpoints"] for row in slopes} == {7}
