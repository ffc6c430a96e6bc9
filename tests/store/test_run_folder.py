import pytest
import torch

from probe.attribution import EdgeScores
from probe.models import Graph, Heads
from probe.recipe import read_recipe
from probe.store import Damaged, RunFolder, model_names


def test_a_model_has_one_name_for_each_way_of_asking():
    recipe = read_recipe(
        "tiny-math",
        {"pairs.1.before": "other/place/sft", "pairs.1.after": "probe:tiny-math/grpo"}
        | {"pairs.1.prompt": "Q: {question}"},
    )
    names = list(model_names(recipe).values())
    assert names == ["tiny-math--sft", "tiny-math--grpo", "place--sft", "tiny-math--grpo-2"]


def test_halves_of_characters_come_back_as_they_were(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.write_json("run.json", {"schema": 1, "models": {"/models/\udcff": "é"}})
    assert folder.read_record()["models"] == {"/models/\udcff": "é"}


@pytest.mark.parametrize(
    "graph",
    [
        Graph.build(2, "qkv"),
        Graph.build(2, "block", parallel=True),
        Graph.build(2, "head", Heads(4, 2, 8), bias=True),
    ],
)
def test_edges_come_back_as_they_were(tmp_path, graph):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    scores = torch.randn(3, len(graph.sources), len(graph.targets)) * graph.mask
    edges = EdgeScores(scores, torch.rand(3), torch.rand(3), graph, 1.5e-7)
    path = folder.edges_file("cell", "before")
    assert folder.read_edges(path) is None
    folder.write_edges(path, edges, ["a", "b", "c"], "key")
    found = folder.read_edges(path, "key")
    assert torch.equal(found.scores, scores)
    assert torch.equal(found.losses, edges.losses)
    assert found.graph == graph
    assert found.residual_error == 1.5e-7
    with pytest.raises(Damaged, match="other solutions or settings"):
        folder.read_edges(path, "another key")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="damaged"):
        folder.read_edges(path, "key")
