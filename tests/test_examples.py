"""Every example runs, and prints something worth reading."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from probe.metrics import metric_named

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder, name, *arguments):
    """Run an example as a reader does, in a folder of its own."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110
    return done.stdout


def test_few_questions(tmp_path):
    """Some metrics are not defined there."""
    printed = run(tmp_path, "compare_two_checkpoints.py", "--questions", 1)
    assert re.search(r"sample_diversity +- +- +- +- +-", printed)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The recipe of the examples, run by the command that it names."""
    folder = tmp_path_factory.mktemp("own")
    command = [sys.executable, "-m", "probe.cli", "recipe", str(EXAMPLES / "own_recipe.toml")]
    small = ["--limit", "60", "--set", "selection.samples=8", "--output", "run"]
    done = subprocess.run([*command, *small], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_attribute_one_prompt(tmp_path):
    printed = run(tmp_path, "attribute_one_prompt.py", "--edges", 4)
    assert "the 4 strongest of 77 edges" in printed
    rows = re.findall(r"^(\S+) → (\S+) +([+-][\d.]+) +([+-][\d.]+)$", printed, re.MULTILINE)
    assert len(rows) == 4
    sizes = [abs(float(row[2])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0
    printed = run(tmp_path, "attribute_one_prompt.py", "--edges", 100)
    assert len(re.findall(r"^\S+ → \S+ +[+-]", printed, re.MULTILINE)) == 77


def test_compare_two_checkpoints(tmp_path):
    printed = run(tmp_path, "compare_two_checkpoints.py", "--questions", 60)
    assert re.search(r"probe:tiny-math/grpo solves [1-9]\d* of 60 questions", printed)
    assert re.search(
        r"activation_intensity +\S+ +\S+ +[+-][\d.]+% +[+-]\d+% \.\. [+-]\d+%", printed
    )


def test_own_recipe(own_run):
    _, printed = own_run
    for title in ("Cross-text control", "Overlap of the circuits", "Change of the weights"):
        assert title in printed


def test_read_a_run(own_run, tmp_path):
    printed = run(tmp_path, "read_a_run.py", own_run[0])
    cells = json.loads((own_run[0] / "report.json").read_text())["cells"]
    cells = [cell for cell in cells if not cell["control"]]
    labels, row = printed.splitlines()[2].split()[1:], printed.splitlines()[4].split()
    assert row[:3] == ["tiny-math", "mine", "0.3"]
    assert labels == [metric_named(cell["metric"]).label for cell in cells]
    assert [float(text.rstrip("*")) for text in row[3:]] == [
        pytest.approx(100 * cell["change"], abs=0.06) for cell in cells
    ]
    assert "Cross-text control: 6 rows of benchmark, pair, alpha, metric, change %" in printed
    assert "How alike the circuits are" in printed
    assert re.search(r"tiny-math--sft +tiny-math +0\.\d+", printed)
    assert "Strongest edges of mine.tiny-math.alpha-0.3.after.safetensors" in printed
