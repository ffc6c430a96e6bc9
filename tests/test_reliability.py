"""The limits that the page on reliability names are those of the code."""

from pathlib import Path

import probe
from probe import errors
from probe.grading import LONGEST, MEMORY, _grading
from probe.models import _templates
from probe.problems import _logs, _reading
from probe.remote import _host, _limits

PAGE = Path(probe.__file__).parents[1] / "docs" / "reliability.md"
MIB, GIB = 2**20, 2**30


def test_limits():
    size = f"{_templates.MEMORY // GIB} GiB, {_templates.LETTERS:,} letters"
    template = f"{_templates.SECONDS:.0f} s, {size}"
    log = (
        f"{_logs.MOST_BYTES // MIB:,} MiB unpacked; beyond {_logs.USUAL_BYTES // MIB} MiB, "
        f"{_logs.DENSEST} times as many as packed"
    )
    page = PAGE.read_text(encoding="utf-8")
    for what, limit in {
        "one comparison of two answers": f"{_grading.SECONDS:.0f} s, {MEMORY // GIB} GiB",
        "a text that is read as mathematics": f"{LONGEST:,} letters",
        "a chat template, for each question": template,
        "an answer of a server": f"{_limits.ANSWER_BYTES // MIB} MiB, {_host._ANSWER:.0f} s",
        "what a job sends home": f"{_limits.RESULT_BYTES // MIB} MiB, {_host._MESSAGES:,} messages",
        "a parquet file": f"{_reading.MOST_VALUES:,} values, {_reading.MOST_BYTES // MIB} MiB",
        "the samples of a log": log,
        "a complaint": f"{errors.LONGEST:,} letters",
    }.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {what}")]
        assert limit in line
