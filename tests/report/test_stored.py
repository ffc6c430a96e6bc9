"""A finished run's report is read where nothing has changed since, and computed where it has."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, run_recorded

import probe
import probe.report._building
from probe.metrics import METRICS
from probe.report import build_report, keep_report, print_report, read_report
from probe.store import RunFolder

HEAVY = ("torch", "transformers", "nnsight", "scipy", "matplotlib", "datasets", "safetensors")
SMALL = {
    "solutions.questions": 40,
    "selection.samples": 4,
    "selection.alpha": "[0.3, 0.5]",
    "report.extra": '["overlap", "concentration", "mass"]',
}


def run(folder):
    run_recorded(SMALL, folder)


@pytest.fixture
def only_read(monkeypatch):
    """Let nothing be computed."""

    def refuse(path):
        raise AssertionError(f"{path} was computed")

    monkeypatch.setattr(probe.report._building, "build_report", refuse)


def kept(path, report):
    folder = RunFolder(path)
    keep_report(folder, folder.read_record(), report)


def printed(report, capsys, style="table"):
    capsys.readouterr()
    print_report(report, style)
    return capsys.readouterr().out


@pytest.mark.parametrize("style", ["table", "markdown", "latex", "json", "csv"])
def test_a_fresh_process_prints_what_the_run_printed_without_what_runs_models(
    finished, capsys, style
):
    program = (
        "import sys\nfrom probe.cli import main\n"
        f"try: main(['report', {str(finished)!r}, '--format', {style!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout == printed(build_report(finished), capsys, style)
    assert len(done.stdout) > 2000


def test_what_is_read_is_what_was_computed(finished, only_read):
    """Every record, its types too."""
    stored, computed = read_report(finished), build_report(finished)
    assert stored == computed
    assert repr(stored) == repr(computed)
    assert stored.cells
    assert stored.extras
    assert probe.open_run(finished).report == computed


def test_tables_of_every_kind(tmp_path, only_read):
    """Exact effects, states, weights: a run of an older version, reported once again."""
    old = Path(shutil.copytree(DATA / "old-run", tmp_path / "old"))
    computed = build_report(old)
    with pytest.raises(AssertionError, match="was computed"):
        read_report(old)  # it says nothing of what it was computed from
    kept(old, computed)
    stored = read_report(old)
    assert repr(stored) == repr(computed)
    assert stored == computed
    assert stored.faithfulness
    assert any(isinstance(value, int) for t in stored.extras for row in t.rows for value in row)


def test_a_run_that_was_copied_elsewhere(copy, only_read):
    assert read_report(copy).path == copy
    assert read_report(copy / "run.json").cells


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "pattern",
    [
        "edges/*.after.safetensors",
        "edges/*-matched.safetensors",
        "solutions/*.jsonl",
        "extras/*.json",
        "clusters.json",
    ],
)
@pytest.mark.parametrize("change", [flip, Path.unlink])
def test_a_file_that_changed(copy, pattern, change):
    before = read_report(copy)
    change(next(copy.glob(pattern)))
    try:
        expected = build_report(copy)
    except probe.ProbeError as error:
        with pytest.raises(probe.ProbeError) as caught:
            read_report(copy)
        assert str(caught.value) == str(error)
        return
    assert read_report(copy) == expected
    assert expected.missing != before.missing or expected.accuracy != before.accuracy


def test_a_file_that_was_added_or_changed_its_name(copy, monkeypatch):
    monkeypatch.setattr(probe.report._building, "build_report", lambda path: "computed")
    (copy / "causal" / "sft-grpo.tiny-math.json").write_text("{}")
    assert read_report(copy) == "computed"
    (copy / "causal" / "sft-grpo.tiny-math.json").unlink()
    assert read_report(copy) != "computed"
    file = next(copy.glob("selection/*.json"))
    file.rename(file.with_name("other.json"))
    assert read_report(copy) == "computed"


@pytest.mark.parametrize("spoilt", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}', None])
def test_a_stored_report_that_is_none(copy, spoilt):
    file = copy / "report.json"
    expected = build_report(copy)
    if spoilt is None:
        table = json.loads(file.read_text())
        table["cells"][0]["change"] = 3.0
        spoilt = json.dumps(table)
    file.write_text(spoilt)
    assert read_report(copy) == expected


def test_other_settings_of_the_report(copy, monkeypatch):
    folder = RunFolder(copy)
    record = folder.read_record()
    assert record["recipe"]["report"]["bins"] != 7
    record["recipe"]["report"]["bins"] = 7
    folder.write_json("run.json", record)
    monkeypatch.setattr(probe.report._building, "build_report", lambda path: "computed")
    assert read_report(copy) == "computed"


def test_other_code(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(probe.report._building, "build_report", lambda path: "computed")
    package = Path(probe.__file__).parent
    ignore = shutil.ignore_patterns("data", "__pycache__")
    shutil.copytree(package, tmp_path / "probe", ignore=ignore)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe" / "__init__.py"))
    assert read_report(finished) != "computed"  # the same code elsewhere
    with (tmp_path / "probe" / "metrics.py").open("a") as file:
        file.write("\n")
    assert read_report(finished) == "computed"


def test_a_table_of_ones_own(copy, monkeypatch):
    name = "activation_intensity"
    with monkeypatch.context() as changed:
        changed.setitem(METRICS, name, METRICS[name]._replace(direction="down"))
        report = read_report(copy)
        assert {c.paper_direction for c in report.cells if c.metric == name} == {"down"}
        kept(copy, report)
    report = read_report(copy)  # nor is what was kept read where that metric is not
    assert {c.paper_direction for c in report.cells if c.metric == name} == {"up"}


def test_what_says_where_a_run_is_cannot_be_read_elsewhere(copy):
    next(copy.glob("solutions/*.jsonl")).unlink()
    report = build_report(copy)
    assert any(str(copy) in line for line in report.missing)
    kept(copy, report)
    moved = copy.rename(copy.with_name("moved"))
    assert all(str(copy) not in line for line in read_report(moved).missing)
