"""Which questions the checkpoints of a training are compared on."""

import json
import shutil
from io import StringIO

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import probe
from probe.checkpoints import PACKAGE_DATA
from probe.recipe import recipe_from
from probe.store import RunFolder, model_names

TINY = PACKAGE_DATA / "tiny-math"
ROWS = [json.loads(line) for line in (TINY / "problems.jsonl").read_text().splitlines()][:12]
COMMON = {
    "benchmarks": [{"name": "tiny-math"}],
    "compute": {"dtype": "float32"},
    "solutions": {"questions": 40},
    "selection": {"alpha": [0.3], "samples": 6},
    "attribution": {"control": "none"},
    "report": {"extra": [], "resamples": 0},
}


def run(folder, **table):
    """Run a recipe; what it said, and the selection of each pair."""
    said = Console(file=StringIO(), width=300)
    recipe = recipe_from(COMMON | {"name": "x"} | table, "here")
    report = probe.run_recipe(recipe, folder, console=said)
    kept = RunFolder(folder)
    chosen = {p.name: kept.read_selection(f"{p.name}.tiny-math.alpha-0.3") for p in recipe.pairs}
    return said.file.getvalue(), chosen, report


def steps(tmp_path, *names):
    """Checkpoints in a folder; `none` solves nothing."""
    for number, name in enumerate(names):
        place = tmp_path / "steps" / f"checkpoint-{number + 1}"
        shutil.copytree(TINY / ("sft" if name == "none" else name), place)
        if name == "none":
            weights = load_file(place / "model.safetensors")
            save_file({key: -x for key, x in weights.items()}, place / "model.safetensors")
    trajectory = {
        "name": "rl",
        "base": "probe:tiny-math/sft",
        "checkpoints": f"{tmp_path}/steps#checkpoint-*",
        "max_new_tokens": 64,
    }
    return [trajectory]


def test_checkpoints_have_one_set_of_questions(tmp_path):
    said, chosen, report = run(tmp_path / "run", trajectories=steps(tmp_path, "dpo", "grpo"))
    one, other = chosen.values()
    assert one == other
    assert one.chosen_by == "training"
    kept, names = RunFolder(tmp_path / "run"), model_names(report.recipe)
    sides = [
        kept.read_whole(names[asked], "tiny-math")
        for asked in dict.fromkeys(a for pair in report.recipe.pairs for a in pair.asked())
    ]
    right = set.intersection(*({s.id for s in side if s.correct} for side in sides))
    assert one.both_correct == len(right)
    assert set(one.ids) <= right
    assert len(one.ids) == 6
    (table,) = (table for table in report.extras if table.title == "Every checkpoint")
    assert [row[table.columns.index("questions")] for row in table.rows] == [6, 6, 6]
    assert "questions of its own" not in said


def test_a_checkpoint_that_solves_nothing_takes_the_questions_of_no_other(tmp_path):
    said, chosen, _ = run(tmp_path / "run", trajectories=steps(tmp_path, "dpo", "none", "grpo"))
    assert chosen["rl-step-2"] is None
    assert "left out: pair rl-step-2" in said
    assert chosen["rl-step-1"] == chosen["rl-step-3"]
    assert chosen["rl-step-1"].chosen_by == "training"


def test_checkpoints_without_a_common_question_have_their_own(tmp_path):
    """Each solves another half of the questions; what that means is said."""

    def write(name, right):
        path = tmp_path / f"{name}.jsonl"
        answers = [row["answer"] if right(place) else "-999" for place, row in enumerate(ROWS)]
        lines = [
            json.dumps({"id": row["id"], "completion": f"1+1=2;2+3=5#{answer}"})
            for row, answer in zip(ROWS, answers, strict=True)
        ]
        path.write_text("\n".join(lines))
        return str(path)

    benchmark = tmp_path / "tiny-math.jsonl"
    benchmark.write_text("\n".join(map(json.dumps, ROWS)))
    base = write("base", lambda place: True)
    pairs = [
        {
            "name": f"rl-step-{step}",
            "before": "probe:tiny-math/sft",
            "after": f"probe:tiny-math/{name}",
            "max_new_tokens": 64,
            "solutions": {"before": base, "after": write(name, right)},
        }
        for step, name, right in (
            (1, "dpo", lambda place: place < 4),
            (2, "grpo", lambda place: place >= 4),
        )
    ]
    table = {
        "pairs": pairs,
        "benchmarks": [{"name": "tiny-math", "path": str(benchmark), "grading": "exact"}],
        "solutions": {},
    }
    said, chosen, _ = run(tmp_path / "run", **table)
    assert "training rl, benchmark tiny-math: no question that all 3 models solve" in said
    assert "(before 12, after 4, 8 of 12 right), so each checkpoint is compared on " in said
    assert [len(one.ids) for one in chosen.values()] == [4, 6]
    assert {one.chosen_by for one in chosen.values()} == {"pair"}


@pytest.mark.parametrize("names", [("rl-step-1", "other-step-1"), ("first", "second")])
def test_pairs_of_no_training_are_on_their_own(tmp_path, names):
    pairs = [
        {"name": name, "before": "probe:tiny-math/sft", "after": f"probe:tiny-math/{after}"}
        | {"max_new_tokens": 64}
        for name, after in zip(names, ("dpo", "grpo"), strict=True)
    ]
    _, chosen, report = run(tmp_path / "run", pairs=pairs)
    kept, known = RunFolder(tmp_path / "run"), model_names(report.recipe)
    for pair in report.recipe.pairs:
        sides = [kept.read_whole(known[asked], "tiny-math") for asked in pair.asked()]
        assert chosen[pair.name] == probe.select(*sides, 0.3, samples=6)
        assert chosen[pair.name].chosen_by == "pair"
