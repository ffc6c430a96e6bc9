"""No two things of a run have one file, on any file system."""

import shutil
from pathlib import Path

import pytest

from probe.errors import ProbeError
from probe.recipe import recipe_from
from probe.report import build_report
from probe.run import check_output
from probe.store import RunFolder, check_names, model_names

OLD = Path(__file__).parents[1] / "data" / "old-run"


def made(pairs, benchmarks, alpha=(0.1,), models=("m/a", "m/b")):
    """A recipe of these names."""
    return recipe_from(
        {
            "name": "r",
            "pairs": [
                {"name": name, "before": models[0], "after": models[1], "prompt": "{question}"}
                for name in pairs
            ],
            "benchmarks": [{"name": name} for name in benchmarks],
            "selection": {"alpha": list(alpha)},
        },
        "here",
    )


def test_dots_do_not_make_two_comparisons_one():
    made(["a", "a.b"], ["c", "d"])
    with pytest.raises(
        ProbeError,
        match=r"pair 'a' on benchmark 'b.c' and pair 'a.b' on benchmark 'c' would share the files "
        r"a.b.c; rename one",
    ):
        made(["a", "a.b"], ["b.c", "c"])


@pytest.mark.parametrize("alpha", [(0.3, 0.30000001), (1234567.0, 1234567.4), (0.3, 0.3)])
def test_alphas_that_print_alike(alpha):
    with pytest.raises(
        ProbeError, match=r"selection.alpha: .* and .* would share the files alpha-"
    ):
        made(["a"], ["c"], alpha)
    made(["a"], ["c"], (0.3, 0.31))


def test_dots_do_not_make_two_files_of_solutions_one():
    recipe = made(["a"], ["b.c", "c"], models=("m/a", "m/a.b"))
    for call in (model_names, check_names):
        with pytest.raises(
            ProbeError, match=r"would share the file m--a\.b\.c; rename a benchmark"
        ):
            call(recipe)
    assert len(model_names(made(["a"], ["d", "c"], models=("m/a", "m/a.b")))) == 2


@pytest.mark.parametrize(
    ("pairs", "benchmarks", "models"),
    [
        (["One", "one"], ["c"], ("m/a", "m/b")),
        (["a"], ["Mine", "mINE"], ("m/a", "m/b")),
        (["a"], ["c"], ("m/Model", "m/model")),
        (["a"], ["c"], ("./caf\u00e9", "./cafe\u0301")),
        (["a"], ["c"], ("./stra\u00dfe", "./STRASSE")),
    ],
)
def test_names_that_some_file_systems_take_for_one(tmp_path, pairs, benchmarks, models):
    recipe = made(pairs, benchmarks, models=models)
    with pytest.raises(ProbeError, match="are one to file systems that do not tell"):
        check_output(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pairs", "benchmarks", "models"),
    [
        (["p" * 400], ["c"], ("m/a", "m/b")),
        (["a"], ["b" * 400], ("m/a", "m/b")),
        (["p" * 100], ["b" * 100], ("m/a", "m/b")),
        (["a"], ["c"], ("./x/" + "é" * 100, "m/b")),
    ],
)
def test_names_that_no_file_may_have(tmp_path, pairs, benchmarks, models):
    with pytest.raises(ProbeError, match="180 are the most; give shorter names") as told:
        check_output(made(pairs, benchmarks, models=models), tmp_path / "run")
    assert len(str(told.value)) < 300


def test_the_longest_name_fits(tmp_path):
    """With the longest side, a batch's number and the ending, and what stands before a picture."""
    recipe = made(["p" * 89], ["b" * 90], (1.23456e-250,))
    check_output(recipe, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.open()
    (comparison,) = recipe.comparisons()
    path = folder.edges_file(comparison.name, "before-on-after")
    folder.write_text(path.with_suffix(".part-1000000.safetensors"), "x")
    folder.write_text(folder.figures() / f"heatmap.{comparison.name}.png", "x")
    assert len(folder.parts(path)) == 1


def test_parts_are_those_of_their_own_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    path = folder.edges_file("a.b.alpha-0.1", "before")
    mine = path.with_suffix(".part-3.safetensors")
    other = folder.edges_file("a.b.alpha-0.1.before.part-3.alpha-0.5", "before")
    for file in (mine, other):
        folder.write_text(file, "x")
    assert folder.parts(path) == [mine]


def test_an_old_run_keeps_names_that_only_capitals_tell_apart(tmp_path):
    """They were two files where it was made; one that shared its files is refused."""
    folder = RunFolder(Path(shutil.copytree(OLD, tmp_path / "run")))
    record = folder.read_record()
    record["recipe"]["pairs"][1]["name"] = "SFT-GRPO"
    folder.write_json("run.json", record)
    assert {cell.pair for cell in build_report(folder.path).cells} == {"sft-grpo"}
    record["recipe"]["selection"]["alpha"] = [0.3, 0.30000001]
    folder.write_json("run.json", record)
    with pytest.raises(ProbeError, match=r"run.json: selection.alpha: .* would share the files"):
        build_report(folder.path)
