"""Graphs in the JSON of circuit-tracer and Neuronpedia: what viewers rely on, and the sums."""

import json
import math
import shutil

import pytest
import torch

from probe.errors import ProbeError
from probe.models import Node
from probe.report import export_run, open_run

PAIR = "sft-grpo.tiny-math"
NODE = {
    **{"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str},
    **{"token_prob": float, "is_target_logit": bool, "jsNodeId": str, "clerp": str},
}


@pytest.fixture
def graphs(half_run, tmp_path):
    """Every graph of a run by its slug."""
    folder = tmp_path / "graphs" / "of"
    export_run(half_run.path, folder)
    index = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    found = {one["slug"]: json.loads((folder / f"{one['slug']}.json").read_text()) for one in index}
    assert len(found) == len(index) == len(list(folder.iterdir())) - 1
    assert [table["metadata"] for table in found.values()] == index
    return found


def test_what_a_viewer_reads(graphs):
    for slug, table in graphs.items():
        assert set(table) == {"metadata", "qParams", "nodes", "links"}
        metadata, nodes = table["metadata"], {node["node_id"]: node for node in table["nodes"]}
        assert metadata["slug"] == slug
        assert metadata["schema_version"] == 1
        assert isinstance(metadata["transcoder_list"], list)
        assert len(nodes) == len(table["nodes"])
        # A viewer drops a node that stands at more than two thirds of the tokens.
        assert len(metadata["prompt_tokens"]) == 2
        for node in nodes.values():
            assert all(isinstance(node[key], kind) for key, kind in NODE.items())
            assert node["layer"] == node["node_id"].split("_")[0]
            assert 0 <= node["ctx_idx"] < 2
            assert 0 < node["influence"] <= 1
        (target,) = (node for node in nodes.values() if node["is_target_logit"])
        assert target["feature_type"] == "logit"
        chance = float(target["clerp"].split("(p=")[1].split(")")[0])  # as the viewer does
        assert chance == pytest.approx(target["token_prob"], abs=1e-3)
        for link in table["links"]:
            assert link["source"] in nodes
            assert link["target"] in nodes
            assert math.isfinite(link["weight"])
        parameters = table["qParams"]
        assert set(parameters["pinnedIds"]) <= set(nodes)
        assert target["node_id"] in parameters["pinnedIds"]
        assert set(parameters) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}


def test_the_models_of_circuit_tracer_take_them(graphs):
    models = pytest.importorskip("circuit_tracer.frontend.graph_models", reason="not installed")
    for table in graphs.values():
        models.Model(**table)


def weights_of(table):
    names = {
        node["node_id"]: "logits" if node["is_target_logit"] else node["clerp"]
        for node in table["nodes"]
    }
    return {
        (names[link["source"]], names[link["target"]]): link["weight"] for link in table["links"]
    }


def test_links_are_sums_of_edges(graphs, half_run):
    run = open_run(half_run.path)
    alpha = max(cell.alpha for cell in run.report.cells)
    before, after = (run.edges(side, alpha, pair="sft-grpo") for side in ("before", "after"))
    change = (after.scores - before.scores).double()
    moved = change.abs().sum((1, 2))
    cases = {"mean.before": before.scores.double().mean(0), "mean.change": change.mean(0)}
    for slug, expected in cases.items():
        table = graphs[f"{PAIR}.{slug}"]
        found = weights_of(table)
        sums = {}
        for source, target in before.graph.mask.nonzero().tolist():
            ends = before.graph.sources[source], Node.parse(before.graph.targets[target]).block
            sums[ends] = sums.get(ends, 0.0) + float(expected[source, target])
        assert set(found) == {ends for ends, total in sums.items() if total}
        for ends, weight in found.items():
            assert weight == pytest.approx(sums[ends], abs=1e-6)
    first = graphs[f"{PAIR}.01.change"]
    assert sum(abs(weight) for weight in weights_of(first).values()) <= float(moved.max()) + 1e-6
    place = int(moved.argmax())
    loss = float(after.losses[place])
    (target,) = (node for node in first["nodes"] if node["is_target_logit"])
    assert target["token_prob"] == pytest.approx(math.exp(-loss))
    assert torch.isfinite(change).all()


def test_other_graphs_of_a_folder_stay(half_run, tmp_path):
    other = {"slug": "somebody-elses", "scan": "gemma", "prompt": "x"}
    (tmp_path / "graph-metadata.json").write_text(json.dumps({"graphs": [other]}))
    for _ in range(2):
        export_run(half_run.path, tmp_path)
    index = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert index[0] == other
    assert len({one["slug"] for one in index}) == len(index)


@pytest.mark.parametrize("content", ["[]", "{", '{"graphs": 3}'])
def test_what_is_no_folder_of_graphs_is_refused(half_run, tmp_path, content):
    (tmp_path / "graph-metadata.json").write_text(content)
    with pytest.raises(ProbeError, match="no index of graphs.*another folder"):
        export_run(half_run.path, tmp_path)
    shutil.copy(tmp_path / "graph-metadata.json", tmp_path / "file")
    with pytest.raises(ProbeError, match="is a file; graphs go into a folder"):
        export_run(half_run.path, tmp_path / "file")
