"""A run goes on only with what it was begun with, and names what is different."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_recorded
from safetensors import safe_open
from safetensors.torch import save_file

import probe
from probe.checkpoints import PACKAGE_DATA
from probe.errors import ProbeError
from probe.recipe import read_recipe
from probe.report import build_report, render
from probe.run import check_output, run_circuits, run_faithfulness
from probe.store import RunFolder

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of models and questions of one's own; its folder, and how it is gone on with."""
    top = tmp_path_factory.mktemp("inputs")
    for name in ("before", "after"):
        shutil.copytree(SFT, top / name)
    shutil.copy(PACKAGE_DATA / "tiny-math" / "problems.jsonl", top / "problems.jsonl")
    overrides = {
        f"pairs.{n}.{side}": str(top / side) for n in (0, 1) for side in ("before", "after")
    }
    overrides |= {
        "benchmarks.0.path": str(top / "problems.jsonl"),
        "benchmarks.0.grading": "exact",
        "solutions.questions": 12,
        "selection.samples": 3,
        "selection.alpha": "[0.3]",
        "attribution.control": "none",
        "report.resamples": 0,
    }
    run_recorded(overrides, top / "run")
    return top, overrides


@pytest.fixture
def again(begun, tmp_path):
    """The run with its inputs where they were, and back as they were behind the test."""
    top, overrides = begun
    kept = shutil.copytree(top, tmp_path / "kept")
    yield top, lambda: run_recorded(overrides, top / "run")
    shutil.rmtree(top)
    shutil.copytree(kept, top)


def rewritten(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def early_tensor(path):
    """Change the first tensor of a file, which is long before its last MiB."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = next(iter(sorted(tensors)))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata)


CHANGES = {
    "model.safetensors": early_tensor,
    "config.json": lambda path: rewritten(path, lambda t: t | {"rms_norm_eps": 0.1}),
    "generation_config.json": lambda path: rewritten(path, lambda t: t | {"eos_token_id": 2}),
    "tokenizer.json": lambda path: path.write_text(path.read_text() + " "),
    "tokenizer_config.json": lambda path: rewritten(path, lambda t: t | {"a": 1}),
    "chat_template.jinja": lambda path: path.write_text("{{ messages[0].content }}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_a_model_that_changed_is_named(again, name):
    top, run = again
    CHANGES[name](top / "after" / name)
    how = "is new" if name == "chat_template.jinja" else "has changed"
    line = f"^{name} of {top / 'after'} {how} since {top / 'run'} was begun; put it back, give "
    calls = [run, lambda: run_faithfulness(top / "run"), lambda: run_circuits(top / "run")]
    recipe = read_recipe("tiny-math", begun_overrides(top))
    calls.append(lambda: check_output(recipe, top / "run"))
    for call in calls:
        with pytest.raises(ProbeError, match=line):
            call()


def begun_overrides(top):
    """What `begun` runs, from the run's own record."""
    table = json.loads((top / "run" / "run.json").read_text())["recipe"]
    pairs = {f"pairs.{n}.{side}": str(top / side) for n in (0, 1) for side in ("before", "after")}
    return pairs | {
        "benchmarks.0.path": table["benchmarks"][0]["path"],
        "benchmarks.0.grading": "exact",
        "solutions.questions": 12,
        "selection.samples": 3,
        "selection.alpha": "[0.3]",
        "attribution.control": "none",
        "report.resamples": 0,
    }


def test_a_question_that_changed_is_named(again):
    top, run = again
    file = top / "problems.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    key = next(key for key in ("question", "problem") if key in rows[0])
    asked = json.loads((top / "run" / "questions.json").read_text())["tiny-math"]
    for place, row in enumerate(rows):
        if str(row.get("id", place)) in asked:
            row[key] = f"1{row[key]}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ProbeError, match=r"^question \S+ of tiny-math has changed since .* was begun, and 11 more;"
    ):
        run()


def test_a_list_of_questions_that_was_changed_is_refused(again):
    top, run = again
    file = top / "run" / "questions.json"
    rewritten(file, lambda table: {"tiny-math": {}, "_digest": table["_digest"]})
    with pytest.raises(ProbeError, match="nobody can tell whether questions have changed"):
        run()
    file.unlink()
    run()
    assert file.exists()


def test_other_versions_are_said_and_kept(again):
    top, run = again
    folder = RunFolder(top / "run")
    record = folder.read_record()
    here = record["versions"]["torch"]
    assert "earlier_versions" not in record
    folder.write_json(
        "run.json", record | {"versions": record["versions"] | {"torch": "1.0", "python": "3.0"}}
    )
    line = f"omputed in part with torch 1.0, in part with {here}: numbers may differ in the last"
    for _ in range(2):
        _, said = run()
        assert said.count(line) == 1
        report = build_report(top / "run")
        assert len(report.versions) == 1
        for style in ("markdown", "html", "latex", "json"):
            assert line in " ".join(render(report, style).split())
    assert folder.read_record()["earlier_versions"][0]["torch"] == "1.0"
    assert len(folder.read_record()["earlier_versions"]) == 1
