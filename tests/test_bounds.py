"""What may be installed: the bounds, the versions of the last green run, and what a run says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEV = PROJECT["optional-dependencies"]["dev"]


def script(name, *arguments):
    """What a script of `.ci` prints, and how it ends."""
    command = [sys.executable, ROOT / ".ci" / name, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return ended.stdout, ended.returncode


def test_the_last_green_run_is_within_the_bounds():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    versions = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for line in [*PROJECT["dependencies"], *DEV]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[wanted.name]), line


def test_every_requirement_has_a_lower_bound_that_is_installed():
    printed, code = script("lower_bounds.py")
    assert code == 0
    lines = printed.splitlines()
    assert [Requirement(line).name for line in lines] == [
        Requirement(line).name for line in [*PROJECT["dependencies"], *DEV]
    ]
    for line, bounds in zip(lines, [*PROJECT["dependencies"], *DEV], strict=True):
        name, _, version = line.partition("==")
        assert Requirement(bounds).specifier.contains(version), name
    assert "transformers==5.22" in lines


def test_a_run_ends_with_what_was_skipped(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0\n"
        "@pytest.mark.parametrize('x', (1, 2))\n"
        "def test_c(x): pytest.skip('no redis')\n"
        "@pytest.mark.skipif(True, reason='needs a GPU')\n"
        "def test_d(): pass\n"
    )
    found = tmp_path / "found.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    subprocess.run([*pytest, f"--junitxml={found}"], capture_output=True, check=False, cwd=tmp_path)
    printed, code = script("skipped.py", found, found)
    assert printed.splitlines() == [
        "skipped    4: no redis",
        "skipped    2: needs a GPU",
        "2 passed, 2 failed, 6 skipped",
    ]
    assert code == 0
    found.write_text("<testsuites><testsuite></testsuite></testsuites>")
    assert script("skipped.py", found) == ("0 passed, 0 failed, 0 skipped\n", 1)
