"""Graphs for the viewers of circuit-tracer and Neuronpedia: a folder of files in their JSON.

Each has a model's blocks as nodes, and the sum of the scores of all edges between two blocks as the
weight of a link. Scores are sums over positions, so the prompt has two places: the question, where
the input stands, and the answer, where all else does.

    >>> write_graphs(build_report("runs/tiny-math"), Path("graphs"))
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.files import write_where_asked
from probe.models import Graph, Node
from probe.report._problems import QuestionEdges, compared_problems, question_edges
from probe.report._report import Report
from probe.report._strength import add_up

QUESTIONS = 20
"""Of so many questions, those whose edges changed most, there are graphs of their own."""

LINKS = 500
"""So many links a graph has at most, the strongest."""

PINNED = 10
"""The ends of so many of the strongest links are pinned: viewers draw these as a circuit."""

INDEX = "graph-metadata.json"
"""The file by which viewers know what graphs there are."""

Table = dict[str, object]


class Blocks(NamedTuple):
    """Scores of a few sequences between whole blocks."""

    names: tuple[str, ...]
    """`input`, `a0`, `m0`, ..., `logits`, in the order of computation."""

    scores: torch.Tensor
    """float64 [sequence, source, target], in nats."""


class Drawn(NamedTuple):
    """One graph to be written."""

    slug: str
    """Its name in files and addresses."""

    scan: str
    """What the viewer calls the model."""

    question: str
    """What stands where the prompt does."""

    answer: str
    """What stands behind it."""

    weights: torch.Tensor
    """[source, target] between blocks."""

    loss: float
    """Mean loss of the answer's tokens, in nats."""


def write_graphs(report: Report, folder: Path) -> None:
    """Write graphs of each pair on each benchmark, at the longest scored length, and an index.

    There are three of each: the model before, the one after, and the change. The first are means
    over all questions, the others of `QUESTIONS` single ones.

    Args:
        report: The report of a run.
        folder: Where to; made where it is not there. Other graphs in its index stay.

    Raises:
        ProbeError: It is a file, or its index is none.
    """
    if folder.exists() and not folder.is_dir():
        raise ProbeError(f"{folder} is a file; graphs go into a folder, or give .parquet or .dot")
    entries = {str(entry["slug"]): entry for entry in _known(folder / INDEX) if entry.get("slug")}
    folder.mkdir(parents=True, exist_ok=True)
    texts = {(one.pair, one.benchmark, one.id): one.question for one in compared_problems(report)}
    for pair in report.recipe.pairs:
        for benchmark in report.recipe.benchmarks:
            edges = question_edges(report, pair, benchmark.name)
            if edges is None:
                continue
            start = (pair.name, benchmark.name)
            questions = {name: texts.get((*start, name), "") for name in edges.before.ids}
            for names, drawn in _drawn(start, edges, questions):
                table = graph_table(names, drawn)
                write_where_asked(folder / f"{drawn.slug}.json", json.dumps(table, indent=1))
                entries[drawn.slug] = _metadata(drawn)
    index = {"graphs": list(entries.values())}
    write_where_asked(folder / INDEX, json.dumps(index, indent=1))


def block_scores(edges: EdgeScores) -> Blocks:
    """The scores of all edges between two blocks, added up."""
    graph: Graph = edges.graph
    nodes = {Node.parse(name).block: Node.parse(name) for name in graph.sources}
    names = (*sorted(nodes, key=lambda name: nodes[name].time), "logits")
    rows, columns = (
        torch.tensor([names.index(Node.parse(name).block) for name in side])
        for side in (graph.sources, graph.targets)
    )
    found = torch.zeros(len(edges), len(names), len(names), dtype=torch.float64)
    for place, scores in enumerate(edges.scores):  # one by one: those of heads are large
        found[place] = add_up(scores.double(), rows, columns, found[place].shape)
    return Blocks(names, found)


def graph_table(names: Sequence[str], drawn: Drawn) -> Table:
    """One graph as its file has it.

    A link above 0 makes the answer likelier, as in circuit-tracer. `influence` is there the share
    of all that is written which nodes as strong as this one hold together.
    """
    top = _top(names)
    ids = [_node_id(name, top) for name in names]
    order = drawn.weights.abs().flatten().argsort(descending=True, stable=True)[:LINKS]
    links = [
        (*divmod(place, len(names)), float(drawn.weights.flatten()[place]))
        for place in order.tolist()
    ]
    links = [link for link in links if link[2]]
    pinned = {end for source, target, _ in links[:PINNED] for end in (source, target)}
    pinned.add(len(names) - 1)
    return {
        "metadata": _metadata(drawn),
        "qParams": {
            "pinnedIds": [ids[place] for place in sorted(pinned)],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": _nodes(names, ids, drawn),
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in links
        ],
    }


def _drawn(
    where: tuple[str, str], edges: QuestionEdges, questions: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], Drawn]]:
    """All graphs of a pair on a benchmark, with the names of their blocks."""
    sides = {"before": edges.before, "after": edges.after}
    blocks = {side: block_scores(of_side) for side, of_side in sides.items()}
    names = blocks["before"].names
    scores = {side: found.scores for side, found in blocks.items()}
    scores["change"] = scores["after"] - scores["before"]
    losses = {side: of_side.losses.double() for side, of_side in sides.items()}
    losses["change"] = losses["after"]
    count, moved = len(questions), scores["change"].abs().sum((1, 2))
    chosen = moved.argsort(descending=True, stable=True)[:QUESTIONS].tolist()
    ids = list(questions)
    for what, weights in scores.items():
        scan = f"{where[0]} on {where[1]}, {what}"
        slug = f"{where[0]}.{where[1]}"
        mean = f"mean of {count} questions", "their answers"
        loss = float(losses[what].mean())
        yield names, Drawn(f"{slug}.mean.{what}", scan, *mean, weights.mean(0), loss)
        for rank, place in enumerate(chosen, 1):
            text = questions[ids[place]] or f"question {ids[place]}", "the answer"
            loss = float(losses[what][place])
            yield names, Drawn(f"{slug}.{rank:02}.{what}", scan, *text, weights[place], loss)


def _metadata(drawn: Drawn) -> Table:
    return {
        "slug": drawn.slug,
        "scan": drawn.scan,
        "transcoder_list": [],
        "prompt_tokens": [drawn.question, drawn.answer],
        "prompt": drawn.question,
        "node_threshold": None,
        "schema_version": 1,
    }


def _nodes(names: Sequence[str], ids: Sequence[str], drawn: Drawn) -> list[Table]:
    written = drawn.weights.sum(1)
    sizes = drawn.weights.abs().sum(1)
    total = float(sizes.sum()) or 1.0
    chance = math.exp(-drawn.loss)  # of a token: its geometric mean
    found = []
    for place, name in enumerate(names):
        node = Node.parse(name)
        last = node.kind == "logits"
        share = 1.0 if last else float(sizes[sizes >= sizes[place]].sum()) / total
        found.append(
            {
                "node_id": ids[place],
                "feature": 0 if node.layer < 0 else place - 1,
                "layer": _layer(node, _top(names)),
                "ctx_idx": _place(node),
                "feature_type": _TYPES[node.kind],
                "token_prob": chance if last else 0.0,
                "is_target_logit": last,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{ids[place].rpartition('_')[0]}-0",
                # Viewers read the chance from it.
                "clerp": f'Output "the answer" (p={chance:.3f})' if last else name,
                "influence": share,
                "activation": None if last else float(written[place]),
            }
        )
    return found


_TYPES = {
    "input": "embedding",
    "attention": "cross layer transcoder",
    "ffn": "cross layer transcoder",
    "logits": "logit",
}


def _top(names: Sequence[str]) -> int:
    """The row of the logits, one above the last layer."""
    return 2 + max(Node.parse(name).layer for name in names)


def _layer(node: Node, top: int) -> str:
    return {"input": "E", "logits": str(top)}.get(node.kind, str(node.layer))


def _node_id(name: str, top: int) -> str:
    """Row, number in the row, place: `E_0_0` of the input, `3_1_1` of `m3`."""
    node = Node.parse(name)
    return f"{_layer(node, top)}_{int(node.kind == 'ffn')}_{_place(node)}"


def _place(node: Node) -> int:
    return int(node.kind != "input")


def _known(file: Path) -> list[Table]:
    """What an index lists."""
    if not file.exists():
        return []
    try:
        table = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ProbeError(f"{file} is no index of graphs ({error}); give another folder") from error
    listed = table.get("graphs") if isinstance(table, dict) else None
    if not isinstance(listed, list):
        raise ProbeError(f"{file} is no index of graphs; give another folder")
    return [entry for entry in listed if isinstance(entry, dict)]
