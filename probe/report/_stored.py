"""Stored reports: a finished run's report, taken from report.json as long as nothing has changed.

Computing a report needs its edges, torch and seconds; reading it needs none of them. What it was
computed from is known by a digest: the run's files and recipe, and this package's code. Where that
is another one now, or a table holds other rows than those that ship, it is computed again.

    >>> report = read_report(Path("runs/tiny-math"))
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

import probe
from probe.files import read_file
from probe.metrics import METRICS
from probe.recipe import recipe_from
from probe.report._report import REPORT_SCHEMA, ExtraTable, Report
from probe.stats import Accuracy, Agreement, Cell
from probe.store import Damaged, RunFolder, run_path

STORED, INPUTS = "report.json", "report"
"""Where it is, and the key of the run's record that says what it was computed from."""

_READ = ("selection", "edges", "solutions", "faithfulness", "extras", "causal")
_RECORDED = ("recipe", "versions", "earlier_versions", "solved", "digests")
_SUFFIXES = (".json", ".jsonl", ".safetensors")
"""The folders of a run, the keys of its record, and the kinds of files, pictures left out, that a
report is computed from."""


@dataclass(frozen=True)
class _Table:
    """What report.json holds, but for what the run's record says too."""

    cells: tuple[Cell, ...]
    """The cells."""

    accuracy: tuple[Accuracy, ...]
    """The accuracies."""

    faithfulness: tuple[Agreement, ...]
    """The agreements."""

    extras: tuple[ExtraTable, ...]
    """The further tables."""

    missing: tuple[str, ...]
    """What is not computed."""

    versions: tuple[str, ...]
    """A line for each package of several versions."""


def read_report(path: str | Path) -> Report:
    """A run's report: as it is stored, or computed where that is not what its folder holds now.

    Args:
        path: The run folder, or any file in it.

    Raises:
        ProbeError: The folder is not a run's.
    """
    folder = RunFolder(run_path(path))
    stored = _stored(folder)
    if stored is not None:
        return stored
    from probe.report._building import build_report  # computes, and so loads torch

    return build_report(path)


def keep_report(folder: RunFolder, record: dict[str, object], report: Report) -> None:
    """Leave a report in its run folder, and in the run's record what it was computed from."""
    folder.write_json(STORED, report.table)
    # What says where the folder is cannot be said again elsewhere.
    placed = any(str(folder.path) in line for line in report.missing)
    record[INPUTS] = None if placed else _inputs(folder, record)
    folder.write_json("run.json", record)


def _inputs(folder: RunFolder, record: Mapping[str, object]) -> str | None:
    """A digest of all that a run's report is computed from.

    None where that cannot be known: a file cannot be read, or a table has rows of somebody's own.
    """
    if not METRICS.as_shipped():
        return None
    found = hashlib.sha256(json.dumps([record.get(key) for key in _RECORDED]).encode())
    code = Path(probe.__file__).parent
    places = [(code, file) for file in sorted(code.rglob("*.py"))]
    files = sorted(folder.path.glob("clusters.json"))
    for part in _READ:
        files += sorted((folder.path / part).glob("[!.]*"))
    places += [(folder.path, file) for file in files if file.suffix in _SUFFIXES]
    try:
        for top, file in places:
            digest = hashlib.sha256(read_file(file)).digest()
            found.update(str(file.relative_to(top)).encode("utf-8", "surrogateescape") + digest)
    except OSError:
        return None
    return found.hexdigest()[:32]


def _stored(folder: RunFolder) -> Report | None:
    """The report that a run has left, if it says what its folder holds now."""
    record = folder.read_record()
    inputs = record.get(INPUTS)
    if inputs is None or inputs != _inputs(folder, record):
        return None
    try:
        table = folder.read_json(STORED) or {}
        if table.get("schema") != REPORT_SCHEMA:
            return None
        found = TypeAdapter(_Table).validate_python(table)
    except (Damaged, ValidationError):
        return None
    recipe = recipe_from(record["recipe"], str(folder.record))
    return Report(recipe, **vars(found), path=folder.path)
