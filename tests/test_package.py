"""How the package hangs together."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import probe

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "transformers", "nnsight", "rich", "matplotlib", "datasets")


@pytest.mark.parametrize("module", ["probe", "probe.cli", "probe.recipe", "probe.vocabulary"])
def test_the_ground_floor_is_light(module):
    """Importing it loads no engine, and takes less than 0.3 s of a processor."""
    program = (
        "import json, sys, time\nstart = time.process_time()\n"
        f"import {module}\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        seconds, modules = json.loads(done.stdout)
        assert not set(HEAVY) & set(modules)
        took.append(seconds)
    assert min(took) < 0.3


def modules():
    """The package's modules by their full names."""
    root = Path(probe.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        parts = ("probe", *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    """Which modules a module imports, anywhere in it: in functions, and for types only, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [entry if entry in known else node.module for entry in whole]
        else:
            continue
        yield from (entry for entry in found if entry in known)


def circles(edges):
    """Names from which a way of imports leads back."""

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for name in edges.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    return {name for name in edges if name in reached(name)}


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    assert len(known) > 60
    # The faces of packages name what lies below them; the names load on first use.
    faces = {name for name, path in known.items() if path.name == "__init__.py"}
    edges = {
        name: set(imports(name, path, known)) for name, path in known.items() if name not in faces
    }
    assert not circles(edges)


def test_packages_depend_on_each_other_one_way():
    """`probe.solutions` stands for all of its modules; a module beside the packages for itself."""
    known = modules()
    edges = {}
    for name, path in known.items():
        if name in ("probe", "probe.cli"):  # above all the others
            continue
        own = ".".join(name.split(".")[:2])
        found = {".".join(entry.split(".")[:2]) for entry in imports(name, path, known)}
        edges.setdefault(own, set()).update(found - {own, "probe"})
    assert len(edges) > 15
    assert not circles(edges)


def test_every_page_is_in_the_site():
    """As a strict build of it asks, which takes longer."""
    listed = re.findall(r"^ +- (.+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {"index.md", "contributing.md", "changelog.md", "api.md", "examples/index.md"}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(pages | made)


def test_the_hooks_are_the_checks_of_ci():
    """What pre-commit runs are lines of .ci/run, and it runs all that are checks of code."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert entries == [line for line in lines if line.split(" ")[0] in ("ruff", "mypy")]
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}


def test_functions_can_be_read_in_one_go():
    long = {
        f"{name}.{node.name}": length
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 80
    }
    # Its arguments take most of it.
    assert set(long) <= {"probe.solutions._selection.select"}
