import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.table import Table

from probe.escaping import PlainConsole, figure, html, latex, markdown, one_line, printable
from probe.report import FORMATS, build_report, print_report, render

ATTACKS = (
    "\\input{/etc/passwd}",
    "GRPO\n\\input{secret}\n%",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "<javascript:alert(1)>",
    "`code` **bold** # heading | cell",
    "\x1b]0;owned\x07\x1b[31mred\x1b[2J",
    "\x9b31m\x90q\x9c",
    "\u202egnp.exe",
    "a[/b] [bold]x[/bold] [link=http://evil.example]y[/link] :skull:",
    "half \ud800 of a character",
    "one\rtwo\vthree\u2028four",
)
COMMANDS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def attacked(half_run, text):
    """A report whose recipe says this wherever a recipe may say what it likes."""
    table = json.loads((half_run.path / "run.json").read_text())
    for pair in table["recipe"]["pairs"]:
        pair["method"] = text
    table["recipe"]["description"] = text
    table.pop("_digest")
    (half_run.path / "run.json").write_text(json.dumps(table))
    report = build_report(half_run.path)
    return replace(report, missing=(*report.missing, text))


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_is_a_command_in_any_format(half_run, capsys, text):
    report = attacked(half_run, text)
    for style in ("table", *FORMATS):
        print_report(report, style)
        shown = capsys.readouterr().out
        assert not COMMANDS.search(shown), style
        shown.encode()
    page = render(report, "html")
    assert page.count("<script>") == 1  # ours
    document = render(report, "markdown")
    assert "<script" not in document
    assert "](" not in document.replace("\\](", "")
    for line in render(report, "latex").splitlines():
        assert not re.search(r"(?<!\\)\\input", line)


@pytest.mark.parametrize("text", ATTACKS)
def test_a_console_shows_text_as_it_is(text):
    console = PlainConsole(file=io.StringIO(), width=200, record=True)
    table = Table(text)
    table.add_row(text)
    for shown in (text, table):
        console.print(shown)
    printed = console.export_text()
    assert not COMMANDS.search(printed.replace("\n", ""))
    letters = re.sub(r"[\s│┃┏━┓┡┩└─┘]", "", printed)
    assert letters.count("".join(printable(text).split())) == 3


@given(st.text())
def test_any_text_stays_one_line(text):
    for escape in (one_line, markdown, latex, figure):
        found = escape(text)
        assert len(found.splitlines()) <= 1
        assert not COMMANDS.search(found)
    assert "<" not in html(text)
    assert not re.search(r"(?<!\\)(\\\\)*[`*_|\[\]]", re.sub(r" \*~?$", "", markdown(text)))


PIECES = [
    *("a", "1", "1.", "1)", "-", "+", "*", "_", "#", "=", "==", "--", "~", "`", "[", "]", "(", ")"),
    *("<", ">", "&", "&amp;", "\\", "|", "!", "$", "http://e.x", "www.e.com", " ", "\n", ":", '"'),
    *("<!--", "<a href='x'>", "    x", "\t", "javascript:x", "[^1]", "\u202e", "\u061c"),
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join))
def test_markdown_shows_the_letters(text):
    """By itself, below another line and in a table, as CommonMark with tables reads it."""
    reader = MarkdownIt("commonmark").enable("table")
    line, cell, letters = markdown(text), markdown(text, cell=True), one_line(text)
    cells = f"| {cell} | b |\n| --- | --- |\n| {cell} | c |"
    for source, expected, usual in (
        (line, letters, {"p"}),
        (f"first  \n{line}", f"first {letters}", {"p", "br"}),
        (cells, f"{letters} b {letters} c", {"table", "thead", "tbody", "tr", "td", "th"}),
    ):
        page = reader.render(source)
        assert set(re.findall(r"</?([a-z0-9]+)", page)) <= usual
        assert unescape(re.sub("<[^>]+>", "", page)).split() == expected.split()


def test_an_address_is_no_link():
    shown = markdown("see http://evil.example and www.evil.example")
    assert shown == r"see http\://evil.example and www\.evil.example"


def test_a_figure_sets_no_formula(tmp_path):
    canvas = Figure()
    canvas.suptitle(figure(r"$\frac{$ \$ $x^{$"))
    canvas.savefig(tmp_path / "f.png")


def test_plain_words_stay_as_they_are():
    words = "On tiny-math, GRPO raised accuracy: 61.2 ↗ 69.7 (+8.5)."
    assert markdown(words) == one_line(words) == printable(words) == words


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_attacks_compile_to_letters(tmp_path):
    texts = (text for text in ATTACKS if text.isascii() or "\x9b" not in text)
    lines = [latex(text.encode("ascii", "ignore").decode()) for text in texts]
    body = "\n\n".join(f"% {line}\n{line}" for line in lines)
    source = "\\documentclass{article}\\begin{document}\n" + body + "\n\\end{document}\n"
    (tmp_path / "a.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
