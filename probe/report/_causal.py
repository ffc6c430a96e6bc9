"""Causal tests of a run: their tables, and what each of them says in a sentence.

>>> tables, missing = causal_tables(RunFolder(Path("runs/tiny-math")), recipe)
>>> tables[0].title
'Causal test: single edges'
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from probe.recipe import Recipe
from probe.report._report import ExtraTable
from probe.stats import UNBALANCED, ActingEdge, CausalTest, EdgeTest, Interval, SetTest
from probe.store import Damaged, RunFolder, causal_file

_EDGES_NOTE = (
    "Do edges do more damage the more they were strengthened? Partial rank correlation of both, "
    "given the edge's level, among edges read by the same kind of branch of one layer and as "
    "strong; p: by exchanging strengthening among these, and by Holm's method for all tests of the "
    "pair. Of swapped edges the sizes of both are ranked, as a source's own change can cost at one "
    "reader and help at another. Seen: the smallest correlation that is found in 4 of 5 cases."
)

SHOWN = 10
"""So many acting edges of a pair a table shows; the test's file has all."""

_SETS_NOTE = (
    "The edges most strengthened or weakened, changed together, beside random sets of as many "
    "edges that are like them, in reader kind, layer and level; or in kind and level; or in level "
    "alone (alike: how many). Balance: how far their mean log level is from that of all other "
    "edges, and of the matched sets, in standard deviations; beyond "
    f"{UNBALANCED:g} there is no verdict. Nats: rise of the loss of right answers, of the set and "
    "of matched ones, and the difference with its 95 % interval; lost: share of right answers not "
    "written any more. Seen: the smallest difference that is found in 4 of 5 cases. Needed: so "
    "many questions for 3 points; -: sets differ by more among themselves, or lose all or nothing."
)


_ACTING_NOTE = (
    "Edges that alone change the loss of right answers when they carry what the model before "
    "writes (patched), or their source alone is that of the model before (swapped): what the "
    f"training did, does something there. The largest {SHOWN} of each; nats are above 0 where the "
    "change helps. Interval: 95 %, of this edge alone. p: by flipping the signs of questions, for "
    "all edges together. Are they more than others as strong? That is what the tests above say."
)

_THROUGH_NOTE = (
    "The treated edges that are patched, one by one. Nats: rise of the loss of right answers where "
    "the edge carries what the model before writes; own: where its source alone is that of the "
    "model before. Upstream: the rest, as a share: what comes through the source from further up."
)


@dataclass(frozen=True)
class _Edge:
    """An edge, as a test's file has it."""

    source: str
    """What writes."""

    target: str
    """What reads."""

    damage: dict[str, float | None]
    """Rise of the loss by it alone, by intervention; None where it was not changed."""


@dataclass(frozen=True)
class _Through:
    """What a test's file has of edges."""

    treated: dict[str, dict[str, list[tuple[str, str]]]]
    """The treated ones, by intervention and label."""

    every_edge: list[_Edge]
    """All of them."""


def causal_from(table: Mapping[str, object]) -> CausalTest:
    """A test as its file has it.

    Raises:
        Damaged: It is none.
    """
    parts = {name: table.get(name) for name in ("edges", "sets")}
    parts |= {name: table[name] for name in ("acting", "tried") if name in table}
    try:
        return TypeAdapter(CausalTest).validate_python(parts)
    except ValidationError as error:
        raise Damaged("damaged (not a causal test)") from error


def causal_tables(
    folder: RunFolder, recipe: Recipe
) -> tuple[tuple[ExtraTable, ...], tuple[str, ...]]:
    """The tables of all tests in a run folder; and a line for each that is damaged."""
    found: dict[tuple[str, str], CausalTest] = {}
    sentences, missing = [], []
    through: list[tuple[str | float | None, ...]] = []
    for benchmark in recipe.benchmarks:
        for pair in recipe.pairs:
            name = causal_file(pair, benchmark.name)
            try:
                table = folder.read_json(name)
                if table is None:
                    continue
                test = causal_from(table)
            except Damaged as damage:
                missing.append(f"{name}: {damage}")
                continue
            found[benchmark.name, pair.name] = test
            through += [(benchmark.name, pair.name, *row) for row in _through_rows(table)]
            sentences.append(causal_sentence(test, benchmark.name, pair.method or pair.name))
    if not found:
        return (), tuple(missing)
    return (
        ExtraTable(
            "Causal test: single edges",
            " ".join((*sentences, _EDGES_NOTE)),
            ("benchmark", "pair", "done", *_EDGE_COLUMNS),
            tuple((*where, *_edge_row(row)) for where, test in found.items() for row in test.edges),
        ),
        ExtraTable(
            "Causal test: sets of edges",
            _SETS_NOTE,
            ("benchmark", "pair", "done", *_SET_COLUMNS),
            tuple((*where, *_set_row(row)) for where, test in found.items() for row in test.sets),
        ),
        ExtraTable(
            "Causal test: edges that the change acts through",
            _ACTING_NOTE,
            ("benchmark", "pair", "done", "edge", "nats", "interval", "p"),
            tuple((*where, *row) for where, test in found.items() for row in _acting_rows(test)),
        ),
        ExtraTable(
            "Causal test: what comes through an edge",
            _THROUGH_NOTE,
            ("benchmark", "pair", "treated", "edge", "nats", "own", "upstream"),
            tuple(through),
        ),
    ), tuple(missing)


def _through_rows(table: Mapping[str, object]) -> list[tuple[str | float | None, ...]]:
    """Each treated edge with its patched effect, its own part, and the share of the rest."""
    parts = {name: table.get(name) for name in ("treated", "every_edge")}
    try:
        found = TypeAdapter(_Through).validate_python(parts)
    except ValidationError as error:
        raise Damaged("damaged (not a causal test)") from error
    damages = {(edge.source, edge.target): edge.damage for edge in found.every_edge}
    rows: list[tuple[str | float | None, ...]] = []
    for label, edges in found.treated["patched"].items():
        for source, target in edges:
            whole, own = (damages[source, target][name] for name in ("patched", "swapped"))
            if whole is None or own is None:
                continue
            share = f"{100 * (1 - own / whole):+.0f} %" if whole else "-"
            rows.append((label, f"{source} -> {target}", f"{whole:+.5f}", f"{own:+.5f}", share))
    return rows


_UNFAIR = ("unbalanced", "no comparison")
_EDGE_COLUMNS = ("edges", "correlation", "seen", "p", "p Holm", "verdict")
_SET_COLUMNS = (
    *("treated", "edges", "alike", "balance", "nats", "matched", "difference", "interval", "seen"),
    *("lost %", "matched %", "points", "interval", "seen %", "needed", "p", "p Holm", "verdict"),
)


def _edge_row(row: EdgeTest) -> tuple[str | float | None, ...]:
    numbers = (row.edges, f"{row.correlation:+.2f}", f"{row.detectable:.2f}")
    return (row.intervention, *numbers, row.p_value, row.p_holm, row.verdict)


def _set_row(row: SetTest) -> tuple[str | float | None, ...]:
    nats = (row.damage, row.matched, row.damage - row.matched)
    points = (row.lost, row.lost_matched, row.lost - row.lost_matched)
    return (
        *(row.intervention, row.treated, row.edges, "/".join(map(str, row.alike))),
        f"{row.level_before:+.2f} → {row.level_after:+.2f}",
        *(f"{value:+.4f}" for value in nats),
        _ends(row.interval, "+.4f"),
        f"{row.detectable:.4f}",
        *(f"{100 * value:+.1f}" for value in points),
        _ends(row.lost_interval, "+.1f", 100),
        f"{100 * row.lost_detectable:.1f}",
        "-" if row.questions_needed is None else str(row.questions_needed),
        *(row.p_value, row.p_holm, row.verdict),
    )


def _acting_rows(test: CausalTest) -> list[tuple[str | float | None, ...]]:
    """The largest acting edges of each intervention."""
    rows: list[tuple[str | float | None, ...]] = []
    for name in test.tried:
        acting = _acting(test, name)
        if not acting:
            rows.append((name, f"none of {test.tried[name]}", "-", "-", None))
        for row in acting[:SHOWN]:
            where = (name, f"{row.source} -> {row.target}", f"{row.damage:+.5f}")
            rows.append((*where, _ends(row.interval, "+.5f"), row.p_value))
    return rows


def _acting(test: CausalTest, intervention: str) -> list[ActingEdge]:
    return [row for row in test.acting if row.intervention == intervention]


def _ends(interval: Interval | None, form: str, times: float = 1) -> str:
    return "-" if interval is None else "..".join(f"{times * end:{form}}" for end in interval)


def causal_sentence(test: CausalTest, benchmark: str, subject: str) -> str:
    """What a test says.

    Args:
        test: The test.
        benchmark: Where.
        subject: What it was that changed the model: `GRPO`.
    """
    start = f"On {benchmark}, of the edges that {subject} changed:"
    said = [
        f"{row.intervention}, edges do {row.verdict} "
        + ("either way the more it changed" if row.sizes else "damage the more it strengthened")
        + f" them (rank correlation {row.correlation:+.2f}, p = {row.p_holm:.2g})"
        for row in test.edges
        if row.verdict in ("more", "less")
    ]
    said += [
        f"{row.intervention}, the {row.edges} most {row.treated} cost "
        f"{abs(row.damage - row.matched):.2g} nats {row.verdict} than matched ones "
        f"(p = {row.p_holm:.2g})"
        for row in test.sets
        if row.verdict in ("more", "less")
    ]
    rows: list[EdgeTest | SetTest] = [*test.edges, *test.sets]
    fair = [row for row in rows if row.verdict not in _UNFAIR]
    if not said and fair:
        least = min(row.p_holm for row in fair)
        said.append(
            f"no sign that they do more or less than others as strong ({len(fair)} tests, smallest "
            f"p {least:.2g})"
        )
    if len(fair) < len(rows):
        said.append(f"{len(rows) - len(fair)} of {len(rows)} tests have no fair comparison")
    seen = [row for row in test.sets if row.verdict not in _UNFAIR]
    power = [
        f"{row.detectable:.2g} nats"
        + (f" and {100 * row.lost_detectable:.1f} points" if row.lost_detectable else "")
        + f" {row.intervention}"
        for row in seen
        if row.treated == "strengthened"
    ]
    more = f" Found in 4 of 5 cases: {'; '.join(power)}." if power else ""
    for name, count in test.tried.items():
        acting = _acting(test, name)
        more += f" {name.capitalize()}, {len(acting) or 'none'} of {count} edges alone "
        more += f"change{'s' * (len(acting) == 1)} the loss"
        if acting:
            first = acting[0]
            more += f", most {first.source} -> {first.target} ({first.damage:+.2g} nats)"
        more += "."
    return f"{start} {'; '.join(said)}.{more}"
