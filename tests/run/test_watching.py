"""Checkpoints are scored as a trainer writes them, into one run folder."""

import json
import shutil
import subprocess
import sys
import threading
import time
from io import StringIO

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import probe
from probe.checkpoints import PACKAGE_DATA, is_whole
from probe.errors import ProbeError
from probe.report import build_report
from probe.store import RunFolder, model_names

TINY = PACKAGE_DATA / "tiny-math"
KEYS = {
    "solutions.questions": 40,
    "selection.alpha": "[0.3]",
    "attribution.control": "none",
    "report.resamples": 0,
    "report.extra": "[]",
}


def put(folder, step, last=30, share=None):
    """Write a checkpoint as a trainer does: part of the way from SFT to GRPO."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    share = step / last if share is None else share
    before, after = (load_file(TINY / name / "model.safetensors") for name in ("sft", "grpo"))
    mixed = {name: before[name].lerp(after[name], share) for name in before}
    shutil.copy(TINY / "grpo" / "config.json", place)
    for path in TINY.glob("sft/tokenizer*"):
        shutil.copy(path, place)
    save_file(mixed, place / "model.safetensors", {"format": "pt"})
    state = {"global_step": step, "max_steps": last}
    (place / "trainer_state.json").write_text(json.dumps(state))
    return place


def watched(folder, keys=KEYS, **options):
    return probe.watch(
        folder, "tiny-math", overrides=keys, console=Console(file=StringIO()), **options
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("probe.run._watching.SECONDS", 0.2)


def test_a_checkpoint_is_whole_or_not(tmp_path):
    place = put(tmp_path, 10)
    assert is_whole(place)
    for name in ("config.json", "trainer_state.json", "model.safetensors"):
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[:-2])
        assert not is_whole(place), name
        (place / name).write_bytes(data)
    (place / "trainer_state.json").unlink()
    assert is_whole(place)
    (place / "config.json").unlink()
    assert not is_whole(place)


def test_checkpoints_as_they_come(tmp_path):
    """Half-written ones wait; what the trainer deletes stays; a stopped watch goes on."""
    runs = tmp_path / "grpo"
    first = put(runs, 10)
    half = put(runs, 20)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:1000])
    steps = watched(runs)
    one = next(steps)
    assert (one.name, one.step) == ("checkpoint-10", 10)
    assert one.line.startswith("checkpoint-10: tiny-math ")
    steps.close()

    first.rename(tmp_path / "first")  # taken away, as by save_total_limit

    def trainer():
        time.sleep(1)
        (half / "model.safetensors").write_bytes(weights)
        time.sleep(1)
        put(runs, 30)

    writes = threading.Thread(target=trainer)
    writes.start()
    found = list(watched(runs))
    writes.join()
    assert [scored.name for scored in found] == [f"checkpoint-{n}" for n in (10, 20, 30)]
    assert found[0].line == one.line

    # The same numbers as of a comparison of the base with the first one alone.
    report = build_report(runs / "probe")
    alone = probe.run_recipe(
        "tiny-math",
        tmp_path / "alone",
        overrides=KEYS | {f"pairs.{n}.after": str(tmp_path / "first") for n in (0, 1)},
        console=Console(file=StringIO()),
    )
    assert numbers(report, "checkpoint-10") == numbers(alone, "sft-grpo")
    assert numbers(report, "checkpoint-30")[-1] != numbers(alone, "sft-grpo")[-1]
    # The later ones have its questions, as far as they solve them, and its lengths.
    kept = RunFolder(runs / "probe")
    chosen = [kept.read_selection(f"checkpoint-{n}.tiny-math.alpha-0.3") for n in (10, 20, 30)]
    assert [one.chosen_by for one in chosen] == ["pair", "first", "first"]
    names = model_names(report.recipe)
    for one, pair in zip(chosen[1:], report.recipe.pairs[1:], strict=True):
        solved = kept.read_whole(names[pair.asked()[1]], "tiny-math")
        right = {solution.id for solution in solved if solution.correct}
        assert one.ids == tuple(name for name in chosen[0].ids if name in right)
        assert one.cut_length == chosen[0].cut_length
    assert len(chosen[0].ids) > len(chosen[2].ids) > 5
    tables = [table.title for table in report.extras]
    assert "Every checkpoint" in tables
    assert len(numbers(report, "checkpoint-10")) == len(numbers(report, "checkpoint-20")) > 5
    assert numbers(report, "checkpoint-10") != numbers(report, "checkpoint-20")
    assert report.missing == ()
    record = json.loads((runs / "probe" / "run.json").read_text())
    assert len(record["models"]) == len(record["residual_error"]) == len(record["solved"]) == 4


def numbers(report, pair):
    cells = [
        (c.metric, c.alpha, c.paper, c.before, c.after) for c in report.cells if c.pair == pair
    ]
    return cells + [(r.before, r.after) for r in report.accuracy if r.pair == pair]


def test_one_that_cannot_be_compared_is_named(tmp_path, capsys):
    put(tmp_path, 10, share=float("nan"))
    with pytest.raises(ProbeError, match=r"not finite|NaN"):
        next(watched(tmp_path))
    put(tmp_path, 5)
    put(tmp_path, 30)
    said = Console(file=StringIO(), record=True, width=300)
    found = [
        scored.name for scored in probe.watch(tmp_path, "tiny-math", overrides=KEYS, console=said)
    ]
    assert found == ["checkpoint-5", "checkpoint-30"]
    assert "left out: checkpoint-10: " in said.export_text()


def test_a_recipe_with_two_bases_is_refused(tmp_path):
    keys = KEYS | {"pairs.1.before": "probe:tiny-math/grpo"}
    with pytest.raises(ProbeError, match="has 2 models before"):
        next(watched(tmp_path, keys))


def test_the_command_prints_a_line_each(tmp_path):
    put(tmp_path, 30)
    settings = [part for key, value in KEYS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "probe.cli", "watch", str(tmp_path), "tiny-math", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["checkpoint-30"]
