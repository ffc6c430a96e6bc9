"""Registries: what ships, what a script adds, and what an installed package adds."""

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import probe
from probe.errors import ProbeError
from probe.registry import Registry

METRIC = probe.METRICS["activation_intensity"]

PLUGIN = '''
import probe

assert "eap" in probe.METHODS  # what ships can be looked up


@probe.METRICS.register("strongest", label="Strongest")
def strongest(edges):
    """Each question's strongest score."""
    return edges.strengths.max(1)


@probe.METHODS.register("half-eap")
def half_eap(model, sequences, graph, options):
    found = probe.METHODS["eap"].score(model, sequences, graph, options)
    return found._replace(scores=found.scores / 2)


@probe.BENCHMARKS.register("sums", source=None)
def sums(path=None):
    return [probe.Problem("0", "1+1=?", "2")]


probe.ARCHITECTURES.register("llama-of-mine", probe.ARCHITECTURES["llama"])


@probe.TARGETS.register("half-loss")
def half_loss(logits, labels, reference):
    value, slope = probe.TARGETS["loss"].slope(logits, labels, reference)
    return value / 2, slope / 2


probe.EXTRAS.register("empty", probe.Extra("Empty", "", ("value",), lambda case: []))
'''

USE = """
import torch, probe
from probe.problems import load_problems
from probe.models import architecture_of
from probe.recipe import read_recipe
from probe.report import check_extras

recipe = read_recipe("tiny-math", {"attribution.method": "half-eap", "report.extra": '["empty"]'})
check_extras(recipe)
edges = probe.attribute("probe:tiny-math/sft", "50-7-67-53=?", answer="50-7=43;")
half = probe.attribute("probe:tiny-math/sft", "50-7-67-53=?", "half-eap", answer="50-7=43;")
assert torch.equal(half.scores, edges.scores / 2)
half = probe.attribute("probe:tiny-math/sft", "50-7-67-53=?", answer="50-7=43;", target="half-loss")
assert torch.equal(half.scores, edges.scores / 2)
value = probe.metrics.compute_metric("strongest", edges.scores)
assert value == edges.scores.abs().max()
assert [problem.question for problem in load_problems("sums")] == ["1+1=?"]
assert architecture_of("llama-of-mine") == architecture_of("llama")
print(list(probe.METRICS)[-1])
"""


def install(folder, name, text):
    """Put a package there as an installer does: its module, and metadata that names it."""
    (folder / f"{name}.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[probe.plugins]\n{name} = {name}\n")


def python(folder, code):
    """Run code where this folder is installed."""
    program = f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_an_installed_package_adds_to_every_registry(tmp_path):
    install(tmp_path, "mine", PLUGIN)
    done = python(tmp_path, USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "strongest\n"


def test_what_the_page_shows_works(tmp_path):
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## From a package of your own")[2]
    code, toml = re.findall(r"```(?:python|toml)\n(.*?)```", section, re.DOTALL)[:2]
    assert list(tomllib.loads(toml)["project"]["entry-points"]) == ["probe.plugins"]
    install(tmp_path, "mine", code)
    done = python(tmp_path, "import probe; print(probe.METRICS['largest'].label)")
    assert done.stdout == "Largest\n"


def test_nothing_is_imported_before_a_name_is_looked_up(tmp_path):
    install(tmp_path, "mine", "print('imported')")
    done = python(tmp_path, "import probe, probe.metrics; print('here'); list(probe.METRICS)")
    assert done.stdout == "here\nimported\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (
            "import probe\nm = probe.METRICS\n"
            "m.register('activation_intensity', m['activation_intensity'])",
            "ProbeError: there is a metric 'activation_intensity' already",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, text, message):
    install(tmp_path, "mine", text)
    code = """
import probe
for _ in range(2):  # it is not half there the second time
    try:
        probe.METRICS["activation_intensity"]
    except probe.ProbeError as error:
        print(error)
"""
    done = python(tmp_path, code)
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith("plugin 'mine' (mine, of mine) cannot be imported: ")
    assert message in first
    command = "from probe.cli import main; main(['recipe', 'tiny-math', '--dry-run'])"
    done = python(tmp_path, command)
    assert done.returncode == 2
    assert "plugin 'mine'" in done.stderr
    assert "Traceback" not in done.stderr


def fresh():
    """A registry of metrics with one."""
    return Registry("metric", probe.Metric, {"one": METRIC}, takes="parts")


def test_a_registry_is_a_mapping():
    registry = fresh()
    assert registry.register("two", METRIC._replace(label="Two")).label == "Two"
    assert list(registry) == ["one", "two"]
    assert len(registry) == 2
    assert registry["two"].label == "Two"
    assert registry.get("three") is None
    assert "two" in registry
    assert list(registry | {"three": METRIC}) == ["one", "two", "three"]
    assert repr(registry) == "<metric: one, two>"


def test_a_decorator_leaves_the_function():
    registry = fresh()

    @registry.register("two", label="Two", direction="up")
    def two(edges):
        return edges.strengths.max(1)

    assert two.__name__ == "two"
    assert registry["two"] == probe.Metric("Two", two, direction="up")


def test_what_cannot_be_registered():
    registry = fresh()
    with pytest.raises(ProbeError, match="there is a metric 'one' already; give another name"):
        registry.register("one", METRIC)
    with pytest.raises(ProbeError, match="there is a metric 'one' already"):
        registry.register("one", label="Two")(len)
    with pytest.raises(ProbeError, match="metric 'two' is no Metric: 3"):
        registry.register("two", 3)
    for name in ("", " ", 3):
        with pytest.raises(ProbeError, match="a metric needs a name"):
            registry.register(name, METRIC)
    with pytest.raises(ProbeError, match="architecture 'mine' needs its record"):
        probe.ARCHITECTURES.register("mine")
    assert list(registry) == ["one"]
    assert "mine" not in probe.ARCHITECTURES
    llama = probe.ARCHITECTURES["llama"]
    with pytest.raises(ProbeError, match="'llama' already"):
        probe.ARCHITECTURES.register("llama", replace(llama, ffn="other"))


def test_whether_all_is_as_shipped_is_seen_in_what_there_is(monkeypatch):
    """So what was put back is as it was."""
    assert probe.METRICS.as_shipped()
    with monkeypatch.context() as changed:
        name = "activation_intensity"
        changed.setitem(probe.METRICS, name, probe.METRICS[name]._replace(direction="down"))
        assert not probe.EXTRAS.as_shipped()
    assert probe.METRICS.as_shipped()
    with monkeypatch.context() as changed:
        changed.delitem(probe.TARGETS, "kl")
        assert not probe.METRICS.as_shipped()
    assert probe.METRICS.as_shipped()
