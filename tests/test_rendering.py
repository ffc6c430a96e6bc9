import csv
import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from probe.errors import ProbeError
from probe.rendering import print_report, render, summary, tables
from probe.report import ExtraTable, build_report


def test_an_empty_run_prints(half_run, capsys):
    for path in (half_run.path / "edges").iterdir():
        path.unlink()
    report = build_report(half_run.path)
    for style in ("table", "markdown", "json", "csv"):
        print_report(report, style)
    assert "not computed yet" in capsys.readouterr().out


def test_formats_hold_the_same_numbers(half_run):
    report = build_report(half_run.path)
    from_json = json.loads(render(report, "json"))["cells"]
    from_csv = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    markdown = render(report, "markdown")
    for cell, row in zip(from_json, from_csv, strict=True):
        assert float(row["before"]) == cell["before"]
        assert float(row["real_edges_after"]) == cell["real_edges"]["after"]
        assert float(row["interval_low"]) == cell["interval"][0]
        assert float(row["p_holm"]) == cell["p_holm"]
        assert row["significant"] == str(cell["significant"])
        assert f"{short(cell['before'])} → {short(cell['after'])}" in markdown
    with pytest.raises(ProbeError, match="'html' is not known"):
        render(report, "html")


def short(value):
    """Three digits, and an exponent without padding."""
    return re.sub(r"e([+-])0?(\d)", lambda e: "e" + e[1].replace("+", "") + e[2], f"{value:.2e}")


def shown(report, width):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(tables(report))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit(half_run, width):
    text = shown(build_report(half_run.path), width)
    assert "+100.0     +100..+100" in text
    assert "Not in this report (3)" in text
    assert summary(build_report(half_run.path)).startswith("On tiny-math, GRPO moved ")


def test_real_edges_can_be_what_the_table_shows(half_run):
    record = half_run.read_record()
    record["recipe"]["report"]["entries"] = "real"
    half_run.write_json("run.json", record)
    report = build_report(half_run.path)
    before = report.cells[0].real_edges.before
    assert f"{short(before)} →" in render(report, "markdown")
    assert before > report.cells[0].before
    # The statistics are of the dense matrix, and stand beside its change.
    assert re.search(r"real % +dense % +interval +as paper", shown(report, 80))
    assert "| +100.0 | +100.0 | +100..+100 | yes |" in render(report, "markdown")


def test_marks_do_not_need_colour(half_run):
    report = build_report(half_run.path)
    cell = replace(report.cells[0], significant=True, above_noise=True)
    for significant, above_noise, mark in (
        (True, True, "+100.0 *"),
        (True, False, "+100.0 *~"),
        (False, True, "+100.0"),
        (False, False, "+100.0 ~"),
        (None, None, "+100.0"),
    ):
        one = replace(cell, significant=significant, above_noise=above_noise)
        found = replace(report, cells=(one,))
        assert f"| {mark} | +100..+100 | yes |" in render(found, "markdown")
        words = [*mark.split(), "+100..+100", "yes"]
        row = next(line for line in shown(found, 80).splitlines() if "Act.Intens." in line)
        assert row.split()[5:-1] == words
        console = Console(
            file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor"
        )
        console.print(tables(found))
        row = next(line for line in console.file.getvalue().splitlines() if "Act.Intens." in line)
        assert ("\x1b[2m" in row) == (significant is False)  # dim


@pytest.mark.parametrize("entries", ["dense", "real"])
def test_changes_from_nearly_nothing_fit(half_run, entries):
    report = build_report(half_run.path)
    options = replace(report.recipe.report, entries=entries)
    recipe = replace(report.recipe, report=options)
    for change, text in ((1234.5, "+123450"), (-0.999, "-99.9"), (12.3, "+1230")):
        cells = tuple(
            replace(
                cell,
                change=change,
                interval=(-change, change),
                real_edges=replace(cell.real_edges, change=change),
                before=-1.23e-10,
                after=-1.23e-10,
            )
            for cell in report.cells
        )
        assert text in shown(replace(report, recipe=recipe, cells=cells), 80)


def test_extra_tables_are_in_every_format(half_run):
    extra = ExtraTable(
        "Mass by distance",
        "Shares of the sum of |W|.",
        ("side | model", "share", "edges", "size"),
        (("before", 0.25, 3, 1.5e-7), ("after", None, 40, 2.0)),
    )
    report = replace(build_report(half_run.path), extras=(extra,))
    text = shown(report, 80)
    assert re.search(r"Mass by distance\n\nside \| model +share +edges +size *\n", text)
    assert re.search(r"before +0.250 +3 +1.50e-7 *\nafter +- +40 +2.00e0", text)
    markdown = render(report, "markdown")
    assert "| side \\| model | share | edges | size |\n| --- | ---: | ---: | ---: |" in markdown
    assert "| after | - | 40 | 2.00e0 |\n\nShares of the sum" in markdown
    assert json.loads(render(report, "json"))["extras"] == [
        {**vars(extra), "columns": list(extra.columns), "rows": [list(row) for row in extra.rows]}
    ]
