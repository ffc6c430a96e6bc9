"""What the pages say can be done: links lead somewhere, commands parse, Python runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from probe.cli import main
from probe.errors import install

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_ON_THE_SITE = ("probe", "tests", "recipes", "pairs", ".ci")
"""Folders whose files are no pages of the site: a strict build stops at a link there."""


def name_of(page):
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        place, _, heading = link.partition("#")
        if place.startswith("http"):
            continue
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link} in {page.name}"
        assert target.relative_to(ROOT).parts[0] not in NOT_ON_THE_SITE, f"{link} in {page.name}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{link} in {page.name}"


def commands(page):
    """The `probe` commands in a page's code, without comments and redirections."""
    for line in page.read_text(encoding="utf-8").splitlines():
        for part in line.split("&&") if line.startswith("    ") else ():
            if re.match(r"\s*probe [a-z]", part):
                words = shlex.split(part, comments=True)
                yield words[1 : words.index(">")] if ">" in words else words[1:]


def blocks(page, language):
    """The code blocks of a language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(folder, *arguments):
    """Run Python in a folder."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    for words in commands(page):
        words = ["NAME" if word == "..." else word for word in words]
        with main.make_context("probe", list(words)) as context:
            name, command, rest = main.resolve_command(context, list(words))
            command.make_context(name, rest, parent=context).close()


def test_there_are_commands():
    assert sum(1 for page in PAGES for _ in commands(page)) > 20


@pytest.mark.parametrize("page", ["../README.md", "quickstart.md"])
def test_python_runs(page, tmp_path):
    assert blocks(page, "python")
    run(tmp_path, "-c", "\n".join(blocks(page, "python")))


def test_the_own_benchmark(tmp_path):
    """The task that is not mathematics, from its page alone, with the numbers that stand there."""
    (code,) = blocks("own-benchmark.md", "python")
    _, recipe = blocks("own-benchmark.md", "toml")
    (tmp_path / "copying.toml").write_text(recipe)
    run(tmp_path, "-c", code)
    printed = run(tmp_path, "-m", "probe.cli", "recipe", "copying.toml")
    printed = " ".join(printed.split())
    assert "sft → grpo (GRPO) on 200 questions of copying Accuracy no measurable change" in printed
    assert "moved beyond chance: intensity (2 down) and token entropy (2 down)" in printed
    report = json.loads((tmp_path / "runs" / "copying" / "report.json").read_text())
    (accuracy,) = report["accuracy"]
    assert accuracy["before"] == accuracy["after"] == 1
    assert {cell["samples"] for cell in report["cells"]} == {50}
    significant = {cell["metric"] for cell in report["cells"] if cell["significant"]}
    assert significant == {"activation_intensity", "token_entropy"}
    solutions = tmp_path / "runs" / "copying" / "solutions" / "tiny-math--sft.copying.jsonl"
    for line in solutions.read_text().splitlines():
        solution = json.loads(line)
        assert solution["text"] == solution["gold"]


def test_nothing_is_installed_by_a_name_that_is_on_no_index():
    """Whoever takes the name would be installed; a checkout or a wheel works."""
    folders = ("probe", "docs", "examples", "recipes", "benchmarks", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    texts = [path for path in files if path.suffix in {".md", ".py", ".toml", ".html", ".js", ""}]
    assert len(texts) > 80
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(pip|uv|pipx) [^\n]*circuit-probe(?!\S*\.whl)", text), path
    assert install() == "pip install -e ."
    assert install("peft") == 'pip install -e ".[peft]"'
