"""Web page: a report as one HTML file that needs nothing else, to send to a colleague.

It holds the tables, the figures, and a heat map and a circuit in which one can point at an edge
(`webpage.js`, beside this file with `webpage.css`). Nothing is loaded from anywhere, and a content
security policy in the file forbids it. Everything that comes from a recipe is escaped here; the
script writes it as text only.

    >>> text = page([build_report(Path("runs/tiny-math"))])
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from probe.errors import install
from probe.escaping import html as escape
from probe.metrics import Array
from probe.recipe import recipe_text
from probe.report._figures import ENTROPIES, draw_diversity, draw_entropy
from probe.report._glossary import Term, glossary, legend
from probe.report._heatmap import COLOURS, LIMITS
from probe.report._layout import (
    CELL_TITLES,
    cell_rows,
    extra_texts,
    further_tables,
    numeric,
    shared_tables,
)
from probe.report._opening import opening
from probe.report._problem_panel import panel, panel_data
from probe.report._report import ExtraTable, Report
from probe.report._strength import Strength, read_strengths
from probe.report._training import training_figures
from probe.report._trajectory import TABLES as ALONG
from probe.report._trajectory import trainings
from probe.report._wording import compared, groups, heading, notes, run_names
from probe.store import RunFolder

_CLASSES = {"yes": " good", "✓": " good", "no": " bad", "✗": " bad"}
MARKS = ("change %", "*", "interval", "paper", "paper %", "!")
"""What of the legend stands again beside the first table."""

LONG, WIDE, SHORT = 25, 10, 16
"""From how many rows on a table may go over to the next page in print, from how many columns on it
is set smaller there, and how many letters are not broken."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(reports: Sequence[Report]) -> str:
    """Write a report as one HTML document, or several side by side.

    Of several runs there is no list of questions: that is on the page of each.
    """
    here = Path(__file__).with_name("webpage")
    strengths = list(_strengths(reports))
    body = [_head(reports), *_tables(shared_tables(reports)), *_along(reports)]
    problems: Mapping[str, object] = {}
    if len(reports) == 1:
        problems = panel_data(reports[0])
        body += [*_cell_tables(reports[0]), *panel(bool(problems["pairs"]))]
    body += [*_explorer(bool(strengths)), *_figures(reports)]
    for name, report in zip(run_names(reports), reports, strict=True):
        tables = [table for table in further_tables(report) if table.title not in ALONG]
        body += [f"<h2>{escape(name)}</h2>"] if tables and len(reports) > 1 else []
        body += _tables(tables)
    body += [*_reading(reports), *_making(reports)]
    if strengths:
        runs = _trainings(reports[0], strengths) if len(reports) == 1 else []
        more = {"trainings": runs} if runs else {}
        body += _script("data", {**explorer_data(strengths), **more}, here)
    if problems.get("pairs"):
        body += _script("problem-data", problems, here.with_name("problems"))
    style = here.with_suffix(".css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(_title(reports))}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
        ]
    )


def _title(reports: Sequence[Report]) -> str:
    if compared(reports):
        return f"{', '.join(run_names(reports))}: side by side"
    return f"{', '.join(dict.fromkeys(r.recipe.name for r in reports))}: before and after"


def _strengths(reports: Sequence[Report]) -> Iterator[Strength]:
    """The strengths of all cells; of several runs, each pair with its run's name."""
    for name, report in zip(run_names(reports), reports, strict=True):
        for strength in read_strengths(report):
            named = f"{name}: {strength.pair}" if len(reports) > 1 else strength.pair
            yield replace(strength, pair=named)


def _script(name: str, data: Mapping[str, object], path: Path) -> list[str]:
    """What a script draws, and the script."""
    # "<" could end the element that holds it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = path.with_suffix(".js").read_text(encoding="utf-8")
    held = f'<script type="application/json" id="{name}">{text}</script>'
    return [held, f"<script>\n{script}</script>"]


def _trainings(report: Report, strengths: Sequence[Strength]) -> list[dict[str, list[int]]]:
    """Of each training its steps, and which of the cells each is, in their order."""
    cells = {(s.pair, s.benchmark, s.alpha): place for place, s in enumerate(strengths)}
    found = []
    for checkpoints in trainings(report.recipe).values():
        here = [(cells[one.key], step) for step, one in checkpoints if one.key in cells]
        if len(here) > 1:
            places, steps = map(list, zip(*here, strict=True))
            found.append({"cells": places, "steps": steps})
    return found


def explorer_data(strengths: Sequence[Strength]) -> dict[str, object]:
    """What the script draws.

    Strengths are float32, little-endian, in base64, of edges only: 45 kB for a cell of 32 layers.
    """
    graphs: list[dict[str, object]] = []
    cells = []
    for strength in strengths:
        mask = strength.graph.mask.numpy()
        graph: dict[str, object] = {
            "layers": strength.graph.n_layers,
            "sources": list(strength.graph.sources),
            "targets": list(strength.graph.targets),
            "reads": mask.sum(0).tolist(),
        }
        if graph not in graphs:
            graphs.append(graph)
        cells.append(
            {
                "title": strength.title,
                "graph": graphs.index(graph),
                # Target by target: each one reads the first so many sources.
                "before": _packed(strength.before.T[mask.T]),
                "after": _packed(strength.after.T[mask.T]),
            }
        )
    longest = max(range(len(strengths)), key=lambda place: strengths[place].alpha)
    stops = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 17))[:, :3]
    return {
        "graphs": graphs,
        "cells": cells,
        "first": longest,
        "colours": np.round(255 * stops).astype(int).tolist(),
        "limits": list(LIMITS),
    }


def _packed(values: Array) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _head(reports: Sequence[Report]) -> str:
    terms = glossary(reports)
    known = _known(terms)
    findings = "".join(
        f"<section><h2>{escape(one.subject)}</h2><dl>"
        + "".join(
            f"<dt>{escape(label)}</dt><dd>{_explained(text, known)}</dd>"
            for label, text in one.lines
        )
        + "</dl></section>"
        for one in opening(reports)
    )
    words = "".join(f"<dt>{escape(t)}</dt><dd>{escape(meaning)}</dd>" for t, meaning in terms)
    key = f'<details class="words" open><summary>Words and marks</summary><dl>{words}</dl>'
    key = f"{key}</details>" if words else ""
    names = run_names(reports) if len(reports) > 1 else [""]
    told = "".join(_told(*one) for one in zip(names, reports, strict=True))
    return (
        f"<header><h1>{escape(_title(reports))}</h1>{told}</header>"
        f'<div class="start"><div class="findings">{findings}</div>{key}</div>'
    )


def _told(name: str, report: Report) -> str:
    """What a run is, and from when."""
    record = RunFolder(report.path).read_record()
    when = str(record.get("finished") or record.get("started") or "")[:10]
    state = f"{len(report.missing)} parts are missing" if report.missing else "complete"
    facts = " · ".join(filter(None, (name, when, state)))
    return f'<p>{escape(report.recipe.description)}</p><p class="faint">{escape(facts)}</p>'


def _known(terms: Iterable[Term]) -> dict[str, str]:
    """The meaning of each single word of a glossary, as tables and sentences have it."""
    return {word: meaning for names, meaning in terms for word in re.split("[,/] ?", names)}


def _explained(text: str, known: Mapping[str, str]) -> str:
    """A sentence in which words that the glossary has say what they mean where one points."""
    words = sorted((word for word in known if word.isalpha() and len(word) > 1), key=len)
    if not words:
        return escape(text)
    parts = re.split(rf"\b({'|'.join(reversed(words))})\b", text)
    return "".join(
        f'<abbr title="{escape(known[part])}">{part}</abbr>' if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


def _tables(tables: Iterable[ExtraTable]) -> list[str]:
    return ['<div class="tables">', *map(_table, tables), "</div>"]


def _cell_tables(report: Report) -> list[str]:
    terms = legend([report])
    known = _known(terms)
    key = "".join(
        f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>"
        for word, meaning in terms
        if word in MARKS
    )
    parts = ["<h2>Every cell</h2>", f'<dl class="marks">{key}</dl>', '<div class="tables">']
    for benchmark, pair, cells in groups(report):
        rows, classes = [], []
        for place, cell in enumerate(cells):
            first = place > 0 and cells[place - 1].alpha != cell.alpha
            for number, row in enumerate(cell_rows(cell, report)):
                rows.append(row)
                faint = "faint" if cell.significant is False else ""
                kind = "published" if number else " ".join(filter(None, (faint, "first" * first)))
                classes.append(kind)
        title = heading(benchmark, pair, cells)
        parts.append(_table(ExtraTable(title, "", CELL_TITLES, tuple(rows)), classes, known))
    return [*parts, "</div>"] if report.cells else []


def _table(
    table: ExtraTable, classes: Sequence[str] = (), known: Mapping[str, str] = MappingProxyType({})
) -> str:
    right = numeric(table)
    kinds = ("part", "long" * (len(table.rows) > LONG), "wide" * (len(table.columns) > WIDE))
    start = f'<section class="{" ".join(filter(None, kinds))}"><h3>{escape(table.title)}</h3>'
    lines = [f'{start}<div class="scroll"><table>']
    lines.append("<thead><tr>" + _cells("th", table.columns, right, known) + "</tr></thead><tbody>")
    texts = extra_texts(table)
    for row, kind in zip(texts, classes or [""] * len(texts), strict=True):
        lines.append(f'<tr class="{kind}">{_cells("td", row, right, known)}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return "\n".join([*lines, f"</tbody></table></div>{note}</section>"])


def _cells(tag: str, texts: Iterable[str], right: Sequence[bool], known: Mapping[str, str]) -> str:
    return "".join(
        f'<{tag} class="{"number" if number else "text"}{_short(text)}{_CLASSES.get(text, "")}">'
        f"{_word(text, known)}</{tag}>"
        for text, number in zip(texts, right, strict=True)
    )


def _short(text: str) -> str:
    """Names stay on one line, whatever hyphens and spaces they have."""
    return " short" if len(text) <= SHORT else ""


def _word(text: str, known: Mapping[str, str]) -> str:
    """A table's word, with its meaning where one points at it."""
    meaning = known.get(text.strip())
    if meaning is None:
        return escape(text)
    indent = text[: len(text) - len(text.lstrip())]
    return f'{indent}<abbr title="{escape(meaning)}">{escape(text.strip())}</abbr>'


def _explorer(there: bool) -> list[str]:
    if not there:
        return []
    fields = ("source", "target", "before", "after", "change", "rank")
    values = "".join(f'<dt>{name}</dt><dd data-value="{name}">-</dd>' for name in fields)
    return [
        "<h2>Which edges changed</h2>",
        '<p class="note">The strength of an edge is the mean of |W| over questions. '
        '<span class="hint">Point at an edge; in the heat map, arrow keys move too.</span></p>',
        "<noscript><p>The heat map and the circuit need JavaScript; "
        "<code>probe plot</code> draws them as files.</p></noscript>",
        '<div class="controls">',
        '<label>cell <select id="cell"></select></label>',
        '<label id="along" hidden>step <input id="step" type="range" min="0" step="1"> '
        '<output id="stepped"></output></label>',
        '<label>colour <select id="colour"><option value="change">change of strength</option>'
        '<option value="rank">change of rank</option>'
        '<option value="before">strength before</option>'
        '<option value="after">strength after</option></select></label>',
        '<label>edges of the circuit <input id="count" type="range" min="5" max="200" step="5" '
        'value="40"> <output id="counted"></output></label></div>',
        '<h3 id="which"></h3>',
        '<p class="note" id="shares" hidden>Nearly all edges that changed most went one way: the '
        "circuit has the edges whose share of the sum of all |W| changed most.</p>",
        '<div class="explorer"><div>',
        '<svg id="heatmap" role="img" tabindex="0" aria-label="Heat map of all edges"></svg>',
        f'<dl id="edge" aria-live="polite">{values}</dl></div>',
        '<svg id="circuit" role="img" aria-label="The edges that changed most"></svg></div>',
    ]


def _figures(reports: Sequence[Report]) -> list[str]:
    metrics = {cell.metric for report in reports for cell in report.cells}
    if not metrics:
        return []
    figures = [("Inter-sample diversity in every experiment", draw_diversity(reports))]
    for metric, name in ENTROPIES.items():
        if metric in metrics:
            figures.append((name, draw_entropy(reports, metric)))
    return ["<h2>Diversity and entropy</h2>", *_images(figures)]


def _along(reports: Sequence[Report]) -> list[str]:
    """Figures and tables of trainings, which say at once what many pairs' cells say one by one."""
    body = []
    for report in reports:
        tables = [table for table in report.extras if table.title in ALONG]
        body += _images(training_figures(report, longest=True))
        body += _tables(tables) if tables else []
    return ["<h2>Along the training</h2>", *body] if body else []


def _images(figures: Iterable[tuple[str, Figure]]) -> list[str]:
    images = [
        f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{_svg(figure)}">'
        for name, figure in figures
    ]
    return ['<div class="figures">', *images, "</div>"] if images else []


def _svg(figure: Figure) -> str:
    text = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "probe"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return base64.b64encode(text.getvalue()).decode()


def _reading(reports: Sequence[Report]) -> list[str]:
    lines = (f'<p class="note">{escape(line)}</p>' for line in notes(reports))
    return ["<h2>How to read the tables</h2>", *lines]


def _making(reports: Sequence[Report]) -> list[str]:
    """The plan, the versions, and how to run it again."""
    found = ["<h2>How it was made</h2>"]
    for name, report in zip(run_names(reports), reports, strict=True):
        if len(reports) > 1:
            found.append(f"<details><summary>{escape(name)}</summary>")
        found += _made(report)
        found += ["</details>"] * (len(reports) > 1)
    return found


def _made(report: Report) -> list[str]:
    """Of one run."""
    record = RunFolder(report.path).read_record()
    recipe = report.recipe
    pairs = ExtraTable(
        "Pairs",
        "",
        ("pair", "method", "before", "after", "longest answer", "prompt"),
        tuple(
            (p.name, p.method, p.before, p.after, p.max_new_tokens, p.prompt) for p in recipe.pairs
        ),
    )
    options, along = recipe.selection, bool(trainings(recipe))
    steps = (
        f"Each model answers {recipe.solutions.questions} questions of "
        f"{', '.join(choice.name for choice in recipe.benchmarks)}. Of the questions that "
        f"both models of a pair{' (of a training, all)' * along} solve at a usual length (beta "
        f"{options.beta:g}, gamma "
        f"{options.gamma:g}, delta {options.delta:g}), at most {options.samples} are scored by "
        f"{recipe.attribution.method} ({recipe.attribution.granularity}, "
        f"{recipe.attribution.ablation} ablation), each model on its own answer, cut to alpha "
        f"{', '.join(f'{alpha:g}' for alpha in options.alpha)} of the usual length."
    )
    facts = [("device", ", ".join(map(str, _listed(record.get("devices")))))]
    facts += [(name, str(value)) for name, value in _items(record.get("versions"))]
    facts += [(f"seconds of {name}", str(value)) for name, value in _items(record.get("seconds"))]
    facts += [(f"weights of {name}", str(value)) for name, value in _items(record.get("models"))]
    facts += [(name, str(record.get(name) or "-")) for name in ("started", "finished")]
    table = ExtraTable("Where, with what, for how long", "", ("", ""), tuple(facts))
    versions = dict(_items(record.get("versions")))
    version = versions.get("probe", "")
    command = f"{install()}  # in a checkout of probe {version}\nprobe recipe recipe.toml"
    return [
        f"<p>{escape(steps)}</p>",
        _table(pairs),
        _table(table),
        "<h3>To run it again</h3>",
        f"<pre>{escape(command)}</pre>",
        "<details><summary>recipe.toml</summary>",
        f"<pre>{escape(recipe_text(recipe))}</pre>",
        "</details>",
    ]


def _items(table: object) -> list[tuple[str, object]]:
    return list(table.items()) if isinstance(table, dict) else []


def _listed(values: object) -> list[object]:
    return values if isinstance(values, list) else []
