import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from conftest import DATA

import probe
from probe.cli import main
from probe.store import RunFolder

EXAMPLES = Path(__file__).parent.parent / "examples"

HEAVY = (
    "torch",
    "transformers",
    "nnsight",
    "datasets",
    "rich",
    "pydantic",
    "numpy",
    "scipy",
    "matplotlib",
)


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipe", "--help"], ["faithfulness", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom probe.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_what_recipes_there_are_is_said_without_what_runs_models():
    code = (
        "import sys\nfrom probe.cli import main\n"
        "try: main(['recipes'])\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'nnsight', 'datasets', 'scipy', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "mistral-math" in done.stdout


@pytest.mark.parametrize(
    "command", ["recipe", "compare", "recipes", "report", "plot", "faithfulness"]
)
def test_every_command_shows_an_example(command):
    text = call(command, "--help").output
    assert "Example" in text
    assert f"probe {command}" in text


PROGRAM = "from probe.cli import main; main(prog_name='probe')"


def completed(shell, *words):
    """What a shell is told to offer for the last of these words."""
    variables = {
        "_PROBE_COMPLETE": f"{shell}_complete",
        # fish names the word itself, the others its place.
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{CHECK.format(PROGRAM)}"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"  # nothing heavy, as a person waits
    return done.stdout


CHECK = (
    "try: exec({0!r})\nexcept SystemExit: pass\n"
    f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell):
    assert "faithfulness" in completed(shell, "probe", "fa")
    assert "--dry-run" in completed(shell, "probe", "recipe", "--dr")
    assert "tiny-math" in completed(shell, "probe", "recipe", "ti")
    assert "file" in completed(shell, "probe", "recipe", "my-")
    assert "markdown" in completed(shell, "probe", "report", "--format", "mark")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script(shell):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"_PROBE_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_PROBE_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_takes_the_line_of_the_documentation(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "quickstart.md"
    (line,) = (text for text in page.read_text().splitlines() if "bash_source" in text)
    command = tmp_path / "probe"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{PROGRAM}" "$@"\n')
    command.chmod(0o755)
    words = "COMP_WORDS=(probe recipe ti); COMP_CWORD=2; _probe_completion probe"
    done = subprocess.run(
        ["bash", "-c", f"{line}\n{words}; echo ${{COMPREPLY[@]}}"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["tiny-math", "tiny-math-trajectory"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("probe compare a b --benchmark tiny", ["tiny-math"]),
        ("probe compare a b --control cross-text,mar", ["cross-text,margin"]),
        ("probe recipe tiny-math --method eap", ["eap", "eap-ig"]),
        ("probe faithfulness run --methods eap,rel", ["eap,relp"]),
        ("probe circuit run --methods ex", ["exact"]),
        ("probe compare probe:tiny-math/s", ["probe:tiny-math/sft"]),
        (
            "probe compare Qwen/Qwen2.5-Math-1.5B sail/Qwen2.5-Math-7",
            ["sail/Qwen2.5-Math-7B-Oat-Zero"],
        ),
        ("probe doctor peiyi9979/mistral-7b-s", ["peiyi9979/mistral-7b-sft"]),
    ],
)
def test_shells_complete_names_of_tables(words, offered):
    *before, last = words.split()
    found = ShellComplete(main, {}, "probe", "_PROBE_COMPLETE").get_completions(before[1:], last)
    assert [item.value for item in found] == offered


@pytest.mark.parametrize(
    "words", ["causal", "check", "circuit", "compare", "faithfulness", "watch"]
)
def test_shells_complete_folders(words):
    """Of runs and models, which may be anywhere."""
    found = ShellComplete(main, {}, "probe", "_PROBE_COMPLETE").get_completions([words], "./r")
    assert [item.type for item in found] == ["file"]


def test_the_help_says_each_command_in_full():
    text = call("--help").output.partition("Commands:")[2]
    assert "..." not in text
    for command in main.commands:
        assert f"\n  {command} " in text


def test_the_public_names():
    for name in probe.__all__:
        assert getattr(probe, name) is not None
    assert set(dir(probe)) == set(probe.__all__)
    with pytest.raises(AttributeError):
        _ = probe.nothing


def test_recipes_lists_what_is_here():
    output = call("recipes").output
    assert "tiny-math" in output
    assert "GRPO" in output
    assert re.search("tiny-math .* nothing: all is here", output)


def test_a_warning_is_its_text(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    call("doctor", "nobody/model")
    assert warnings.formatwarning("5 steps", UserWarning, "file.py", 1) == "5 steps\n"


def test_dry_run_does_nothing(tmp_path):
    result = call("recipe", "tiny-math", "--dry-run", "--limit", 70, "--output", tmp_path / "run")
    assert result.exit_code == 0
    assert "Downloads: nothing" in result.output
    assert "H100" not in result.output
    assert re.search(
        r"machine \(c\w+\), from a batch of each: solving about \d+ (s|min), scoring (about )?\d",
        " ".join(result.output.split()),
    )
    assert re.search(r"yes +70$", result.output, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_recipe_whose_models_are_not_here(tmp_path):
    result = call(
        *("recipe", "tiny-math", "--dry-run", "--set", "pairs.0.before=nobody/model"),
        *("--set", "benchmarks.0.name=gsm8k", "--output", tmp_path / "run"),
    )
    assert result.exit_code == 0
    assert "Downloads: nobody/model, openai/gsm8k" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--device", "gpu"], "device 'gpu' is not known"),
        (["--device", "cuda:7"], "is not on this machine"),
        (["--set", 'report.extra=["overlp"]'], "did you mean 'overlap'?"),
        (["--method", "eapp"], "attribution.method is 'eapp'; known: eap"),
        (["--set", 'faithfulness.methods=["exct"]'], "faithfulness.methods is 'exct'"),
        (["--control", "cross-txt"], "attribution.control is 'cross-txt'"),
        (["--control", "cross-txt", "--control", "margin"], "control is 'cross-txt'; known"),
        (["--kernels", "liger"], "kernels liger need"),
        (["--benchmark-path", "/no/file.jsonl"], "cannot read the benchmark"),
        (["--set", "pairs.0.prompt=chat"], "has no chat template"),
        (["--set", f"pairs.1.after={DATA}/oracle/llama/model"], "differ in"),
        (["--solutions", "before=/no/answers.jsonl"], "/no/answers.jsonl"),
        (["--output", "pyproject.toml"], "is a file; give a folder"),
        (["--output", "pyproject.toml/run"], "cannot write to the run folder"),
        (["--output", "docs"], "holds files but no run.json"),
        (
            [
                "--set",
                'published=[{pair="sft-grpo",benchmark="tiny-math",metric="kurt",before=1,'
                "after=2}]",
            ],
            "published.metric is 'kurt'",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, setting, message):
    name = "tiny-math"
    if setting[0] == "--solutions":  # which is for one pair
        name = str(EXAMPLES / "own_recipe.toml")
    output = [] if setting[0] == "--output" else ["--output", tmp_path / "run"]
    results = [call("recipe", name, *output, *setting, *more) for more in (["--dry-run"], [])]
    assert [result.exit_code for result in results] == [2, 2]
    assert message in results[0].stderr
    assert results[0].stderr.splitlines()[-1] == results[1].stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_folder_of_another_recipe(half_run):
    for more in (["--dry-run"], []):
        result = call("recipe", "tiny-math", "--output", half_run.path, "--method", "relp", *more)
        assert result.exit_code == 2
        assert "holds a run of another recipe" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe", "tiny-mth"], "did you mean tiny-math?"),
        (["recipe", "tiny-math", "--set", "selection.sample=5"], "did you mean 'samples'?"),
        (["recipe", "tiny-math", "--set", "selection.samples"], "write KEY=VALUE"),
        (["recipe", "tiny-math", "--device", "tpu"], "device 'tpu' is not known"),
        (["recipe", "tiny-math", "--dtype", "int8"], "compute.dtype is 'int8'"),
        (
            ["recipe", "tiny-math", "--set", "pairs.0.before=/no/model"],
            "'/no/model' does not exist",
        ),
        (["recipe", "tiny-math", "--set", "benchmarks.0.name=gsm9k"], "benchmark 'gsm9k' is not"),
        (
            ["recipe", "tiny-math", "--set", "benchmarks.0.path=/no/file"],
            "cannot read the benchmark",
        ),
        (["recipe", "tiny-math", "--set", "attribution.method=acdc"], "known: eap"),
        (["recipe", "tiny-math", "--benchmark-path", "math=x"], "has no benchmark 'math'"),
        (["recipe", "tiny-math", "--benchmark-path", "/no/file"], "cannot read the benchmark"),
        (
            ["recipe", "mistral-math"],
            "(HF_HUB_OFFLINE is set), and this machine lacks the models",
        ),
        (["report", "/no/such/run"], "is not a run folder"),
        (["plot", "/no/such/run"], "is not a run folder"),
        (["plot", "/no/such/run", "/no/other"], "give --output FOLDER"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    output = tmp_path / "run"
    if arguments[0] == "recipe":
        arguments = [*arguments, "--output", output]
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("probe: ")
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("probe.recipe.read_recipe", broken)
    assert isinstance(call("recipe", "tiny-math").exception, ZeroDivisionError)


def test_recipe_and_report(tmp_path):
    folder = tmp_path / "run"
    small = ["--limit", 40, "--set", "selection.samples=3", "--set", "selection.alpha=[0.5]"]
    result = call("recipe", "tiny-math", "--output", folder, *small)
    assert result.exit_code == 0, result.output
    assert "none of 6 (6 metrics at 1 alpha) moved beyond chance" in " ".join(result.stdout.split())
    assert "attribution" in result.stderr  # progress goes there, the report to standard output
    assert call("report", folder).stdout == result.stdout
    printed = json.loads(call("report", folder, "--format", "json").stdout)
    assert printed == RunFolder(folder).read_json("report.json")


def test_plot_writes_beside_the_run_or_elsewhere(half_run, tmp_path):
    result = call("plot", half_run.path)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"10 files in {half_run.path / 'figures'}\n"
    assert "figures" in result.stderr  # the bar
    assert call("plot", half_run.path, "--output", tmp_path / "pictures").exit_code == 0
    names = [
        sorted(p.name for p in f.iterdir())
        for f in (half_run.path / "figures", tmp_path / "pictures")
    ]
    assert names[0] == names[1]
    same = call("plot", half_run.path, half_run.path, "--output", tmp_path / "pictures")
    assert same.exit_code == 2
    assert "same cells" in same.stderr


def test_reports_of_two_runs_and_to_a_file(half_run, tmp_path):
    both = call("report", half_run.path, half_run.path)
    assert both.exit_code == 0, both.output
    assert "6 of 6 cells moved in the same direction in all runs" in both.stdout
    page = tmp_path / "report.html"
    assert call("report", half_run.path, "--format", "html", "--output", page).stdout == ""
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


LONG = "a" * 400


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", LONG, "probe:tiny-math/sft", "--dry-run"),
        ("compare", "a%b/c", "probe:tiny-math/sft", "--dry-run"),
        ("compare", "probe:tiny-math/sft", "probe:tiny-math/grpo", "--benchmark", LONG),
        ("recipe", "tiny-math", "--output", LONG, "--dry-run"),
        ("recipe", "tiny-math", "--output", LONG),
        ("recipe", "tiny-math", "--benchmark-path", LONG, "--dry-run"),
        ("report", LONG),
        ("faithfulness", LONG),
        ("plot", LONG),
        ("doctor", LONG),
    ],
)
def test_names_that_no_system_takes(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    said = (result.stderr or result.stdout).strip().splitlines()
    assert "Traceback" not in result.stderr
    assert re.search("too long|neither a folder here nor a hub id", said[-1])


def test_a_question_that_a_tokenizer_cannot_take(tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "what is ж?", "answer": "5"}\n')
    result = call(
        *("compare", "probe:tiny-math/sft", "probe:tiny-math/grpo", "--benchmark", questions),
        *("--grading", "exact", "--prompt", "{question}", "--output", tmp_path / "run"),
    )
    assert result.exit_code == 2
    assert "the tokenizer cannot take the text 'what is ж?'" in result.stderr
