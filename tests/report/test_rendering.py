import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.console import Console

from probe.errors import ProbeError
from probe.recipe import Published, PublishedChange
from probe.report import (
    FORMATS,
    ExtraTable,
    build_report,
    print_report,
    render,
    table_view,
    view,
    write_report,
)
from probe.stats import Accuracy, Change, Influence


def test_an_empty_run_prints(half_run, capsys):
    for path in (half_run.path / "edges").iterdir():
        path.unlink()
    report = build_report(half_run.path)
    for style in ("table", *FORMATS):
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
        assert float(row["paper_after"]) == cell["paper"]["after"]
        assert float(row["interval_low"]) == cell["interval"][0]
        assert float(row["p_holm"]) == cell["p_holm"]
        assert row["significant"] == str(cell["significant"])
        assert re.search(rf"{short(cell['before'])} [↗→↘] {short(cell['after'])}", markdown)
    with pytest.raises(ProbeError, match="'excel' is not known"):
        render(report, "excel")


def short(value):
    """Three digits, and an exponent without padding."""
    return re.sub(r"e([+-])0?(\d)", lambda e: "e" + e[1].replace("+", "") + e[2], f"{value:.2e}")


def shown(report, width):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view([report]))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit(half_run, width):
    text = shown(build_report(half_run.path), width)
    assert re.search(r"intensity .*\+100.0 +\+100..\+100 +yes +\+100.0", text)
    assert "Not in this report (3)" in text
    assert text.startswith("sft → grpo (GRPO) on tiny-math\n")


def test_real_edges_can_be_what_the_table_shows(half_run):
    record = half_run.read_record()
    record["recipe"]["report"]["entries"] = "real"
    half_run.write_json("run.json", record)
    report = build_report(half_run.path)
    cell = report.cells[2]
    changed = replace(cell, real_edges=replace(cell.real_edges, change=0.25))
    assert "+25.0" in render(replace(report, cells=(changed,)), "markdown")
    assert "over real edges only" in render(report, "markdown")


def test_marks_do_not_need_colour(half_run):
    report = build_report(half_run.path)
    for significant, share, mark in (
        (True, 0.1, "+100.0 *"),
        (True, 0.21, "+100.0 *!"),
        (False, 0.2, "+100.0"),
        (False, 0.5, "+100.0 !"),
        (None, 0, "+100.0"),
    ):
        held = Influence("17", share, sign_survives=False)
        one = replace(report.cells[0], significant=significant, influence=held)
        found = replace(report, cells=(one,))
        assert f"| {mark} | +100..+100 | yes |" in render(found, "markdown").replace("\\", "")
        words = [*mark.split(), "+100..+100", "yes"]
        row = next(line for line in shown(found, 80).splitlines() if "↗" in line)
        assert row.split()[5:-1] == words
        warned = "intensity of sft-grpo on tiny-math at 0.5 (question 17)" in render(
            found, "markdown"
        )
        assert warned == (share > 0.2)
        console = Console(
            file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor"
        )
        console.print(view([found]))
        row = next(line for line in console.file.getvalue().splitlines() if "↗" in line)
        assert ("\x1b[2m" in row) == (significant is False)  # dim


def test_of_many_changes_that_are_one_questions_only_the_worst_is_named(half_run):
    report = build_report(half_run.path)
    held = [Influence(f"q{i}", share, i != 2) for i, share in enumerate((0.1, 0.3, 0.7, 0.4))]
    cells = [replace(cell, paper_influence=None, influence=None) for cell in report.cells[:5]]
    cells[:4] = [replace(c, paper_influence=h) for c, h in zip(cells, held, strict=False)]
    text = render(replace(report, cells=tuple(cells)), "markdown").replace("\\", "")
    assert (
        "of the change of the paper's number in 3 of 5 cells, and its sign in 1; most, 70 %, "
        in text
    )
    assert "(question q2). JSON and CSV name each: paper_influence." in text.replace("\\_", "_")
    assert not any(f"question q{i}" in text for i in (0, 1, 3))
    assert "our number in" not in text


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


def published(report):
    """A report of which one cell went the way that was published, and one the other way."""
    first, second, *rest = report.cells
    theirs = Change(1.1e-3, 1.31e-3, 0.191)
    cells = (
        replace(first, published=theirs, as_published=True),
        replace(second, published=theirs, as_published=False),
        *rest,
    )
    value = Published("sft-grpo", "tiny-math", "activation_intensity", 1.1e-3, 1.31e-3, 0.5)
    average = PublishedChange("sample_diversity", 0.076, experiments=41, rate=0.951)
    recipe = replace(report.recipe, published=(value,), published_changes=(average,))
    return replace(report, cells=cells, recipe=recipe)


def test_published_values_are_below_their_cells(half_run):
    plain = build_report(half_run.path)
    assert not re.search(r"\bpublished\b", shown(plain, 80))  # the folder has it in its name
    report = published(plain)
    text = shown(report, 80)
    row = r"published +1.10e-3 ↗ 1.31e-3 +[✓✗] +\+19.1"
    assert re.search(rf" intensity .*\n +{row}".replace("[✓✗]", "✓"), text)
    assert re.search(rf"eff. edges .*\n +{row}".replace("[✓✗]", "✗"), text)
    assert len(re.findall(row, text)) == 2
    assert "(published: 41 experiments, +7.6 %, 95.1 % of them improved)" in " ".join(text.split())
    assert "| | published | 1.10e-3 ↗ 1.31e-3 | | | ✓ | +19.1 |" in re.sub(
        " +", " ", render(report, "markdown")
    )
    intensity, complexity, kurtosis = (f"{short(c.paper.before)}" for c in report.cells[:3])
    table = shown(report, 100)
    assert re.search(
        rf"sft-grpo *\n +tiny-math +0.5 +{intensity} .* +{complexity} .* +{kurtosis} .*\n"
        r" +published +1.10e-3 ↗ 1.31e-3 ✓ +1.10e-3 ↗ 1.31e-3 ✗ +-",
        table,
    )


def test_runs_of_the_same_cells_are_side_by_side(half_run):
    report = build_report(half_run.path)
    first, *rest = report.cells
    other = replace(
        report,
        cells=(replace(first, before=2.0, after=1.0, change=-0.5), *rest[:-1]),
        path=half_run.path.with_name("other"),
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(view([report, other]))
    text = console.file.getvalue()
    assert "of 5 cells moved in the same direction in all runs" in text
    assert re.search(r"intensity .*\+100.0.* 2.00e0 ↘ 1.00e0 +-50.0", text)
    assert re.search(r"token entropy.* -\s*\n", text)  # of the one run only
    rows = list(csv.DictReader(io.StringIO(render([report, other], "csv"))))
    assert [row["run"] for row in rows] == ["run"] * 6 + ["other"] * 5
    assert [len(run["cells"]) for run in json.loads(render([report, other], "json"))] == [6, 5]
    assert "other" in render([report, other], "markdown")


def test_runs_of_different_cells_make_one_table(half_run):
    report = build_report(half_run.path)
    other = replace(
        report,
        recipe=replace(report.recipe, name="other", pairs=(report.recipe.pairs[1],)),
        cells=tuple(replace(cell, pair="sft-dpo") for cell in report.cells),
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(view([report, other]))
    text = console.file.getvalue()
    assert re.search(r"Table 1(.*\n)*sft-grpo *\n +tiny-math(.*\n)*sft-dpo *\n +tiny-math", text)
    assert "over 2 experiments" in text


def test_latex_compiles(half_run, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("there is no pdflatex here")
    report = published(build_report(half_run.path))
    odd = ExtraTable(
        r"50 % & more_{}^~\#$", "<|x|> ≤ α · -1", ("a_b", "-1"), (("[x]", -0.5), ("*", None))
    )
    wide = ExtraTable("Wide", "", ("a wide column",) * 16, (("some words", *(1.5,) * 15),) * 90)
    write_report([replace(report, extras=(odd, wide))], "latex", tmp_path / "tables.tex")
    (tmp_path / "main.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}"
        r"\begin{document}\input{tables}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert r"Overfull \hbox" not in done.stdout
    assert "Float too large" not in done.stdout
    assert (tmp_path / "tables.tex").read_text().count("caption{Wide, continued}") == 2


def test_a_report_can_be_written_to_a_file(half_run, tmp_path):
    report = build_report(half_run.path)
    write_report([report], "table", tmp_path / "report.txt")
    text = (tmp_path / "report.txt").read_text()
    assert text.startswith("sft → grpo (GRPO) on tiny-math\n")
    assert "\x1b" not in text
    with pytest.raises(ProbeError, match="cannot write to .*: No such file"):
        write_report([report], "csv", tmp_path / "no" / "report.csv")


def test_a_report_of_accuracy_alone(half_run):
    report = build_report(half_run.path)
    rows = (
        Accuracy(
            "sft-grpo", "gsm8k", 0.5, 0.6, 200, published=Change(0.4, 0.5, 0.25), as_published=True
        ),
        Accuracy("sft-grpo", "aime24", 0.1, 0.1, 30),
    )
    value = Published("sft-grpo", "gsm8k", "accuracy", 0.4, 0.5)
    recipe = replace(report.recipe, published=(value,))
    report = replace(report, cells=(), accuracy=rows, missing=(), recipe=recipe)
    text = shown(report, 100)
    assert [line.strip() for line in text.splitlines()[:2]] == [
        "sft → grpo (GRPO)",
        "Accuracy  rose on 1 of 2 benchmarks, by +5.0 points on average.",
    ]
    assert re.search(r"gsm8k +sft-grpo +200 +50.0 ↗ 60.0 +\+10.0 +- +- +40.0 ↗ 50.0 ✓", text)
    assert re.search(r"aime24 +sft-grpo +30 +10.0 → 10.0 +\+0.0 +-", text)
    assert "published: what was printed elsewhere" in text
    assert "Table 1" not in text
    for style in FORMATS:
        assert "Metrics over" not in render(report, style)


LONG = "Qwen2.5-0.5B-Instruct-vs-my-grpo-checkpoint"


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", ["sft-grpo", LONG])
def test_narrow_terminals_break_no_word(width, name):
    """Numbers and headings stay whole; a long name is folded, but not into single letters."""
    columns = ("benchmark", "pair", "alpha", *(f"value{n}" for n in range(9)))
    rows = tuple(
        ("olympiadbench", pair, 0.03, *(n + 0.125 for n in range(9))) for pair in (name, "b")
    )
    text = shown_table(ExtraTable("Title", "Some note.", columns, rows), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for word in ("benchmark", "alpha", *columns[3:], *(f"{n + 0.125:.3f}" for n in range(9))):
        assert word in text.split()
    # Each part of the table says what its rows are of.
    parts = [line for line in lines if line.startswith("benchmark")]
    assert len(parts) > 1
    assert sum(line.split()[0] == "olympiadbench" for line in lines if line.strip()) == 2 * len(
        parts
    )
    assert all(len(word) > 1 for line in lines for word in line.split() if word != "b"), text


@pytest.mark.parametrize("width", [60, 80])
def test_cells_of_a_narrow_terminal(half_run, width):
    text = shown(build_report(half_run.path), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for word in ("Act.Intens.", "+100..+100", "interval", "paper"):
        assert word in text.split()


def shown_table(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table_view(table))
    return console.file.getvalue()
