import pytest

from probe.errors import ProbeError
from probe.models import Graph, Mixture, Node


def test_nodes_in_the_published_order():
    graph = Graph.build(2, "qkv")
    assert graph.sources == ("input", "a0", "m0", "a1", "m1")
    assert graph.targets == (
        *("a0.q", "a0.k", "a0.v", "m0"),
        *("a1.q", "a1.k", "a1.v", "m1"),
        "logits",
    )
    assert Graph.build(2, "block").targets == ("a0", "m0", "a1", "m1", "logits")


@pytest.mark.parametrize("granularity", ["qkv", "block"])
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_mask_is_what_was_written_before(n_layers, granularity):
    graph = Graph.build(n_layers, granularity)
    stream = ["input"]
    written = {}
    for layer in range(n_layers):
        for branch in "qkv":
            written[f"a{layer}.{branch}"] = set(stream)
        written[f"a{layer}"] = set(stream)
        stream.append(f"a{layer}")
        written[f"m{layer}"] = set(stream)
        stream.append(f"m{layer}")
    written["logits"] = set(stream)
    for column, target in enumerate(graph.targets):
        found = {s for row, s in enumerate(graph.sources) if graph.mask[row, column]}
        assert found == written[target]


def test_experts_write_each_by_itself():
    graph = Graph.build(2, "expert", mixtures=[Mixture(0, False), Mixture(2, True)])
    assert graph.sources == ("input", "a0", "m0", "a1", "m1.e0", "m1.e1", "m1.shared")
    assert graph.targets == Graph.build(2, "qkv").targets
    assert graph.mask.sum(0).tolist() == [1, 1, 1, 2, 3, 3, 3, 4, 7]
    assert graph.attention == "qkv"
    hybrid = Graph.build(1, "expert", mixtures=[Mixture(2, False)], splits=False)
    assert hybrid.targets == ("a0", "m0", "logits")
    assert hybrid.attention == "block"
    with pytest.raises(ProbeError, match="needs the number of experts"):
        Graph.build(1, "expert")


def test_unknown_granularity_names_the_known_ones():
    with pytest.raises(ProbeError, match="qkv, block"):
        Graph.build(1, "neuron")


@pytest.mark.parametrize(
    ("name", "parts", "block", "whole"),
    [
        ("input", ("input", -1, "", ""), "input", "input"),
        ("logits", ("logits", -1, "", ""), "logits", "logits"),
        ("a0", ("attention", 0, "", ""), "a0", "a0"),
        ("m12", ("ffn", 12, "", ""), "m12", "m12"),
        ("a3.q", ("attention", 3, "q", ""), "a3", "a3.q"),
        ("a3.k.h15", ("attention", 3, "k", "h15"), "a3", "a3.k"),
        ("a10.h2", ("attention", 10, "", "h2"), "a10", "a10"),
        ("a1.bias", ("attention", 1, "", "bias"), "a1", "a1"),
        ("m2.e11", ("ffn", 2, "", "e11"), "m2", "m2"),
        ("m2.shared", ("ffn", 2, "", "shared"), "m2", "m2"),
    ],
)
def test_names_are_read_in_one_place(name, parts, block, whole):
    node = Node.parse(name)
    assert tuple(node) == parts
    assert (node.block, node.whole) == (block, whole)


@pytest.mark.parametrize(
    "name", ["", "x3", "a", "a3.", "m3.q", "m3.e", "a3.e1", "a3.h", "a3.q.q", "inputs", "a3\n"]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ProbeError, match="is no node"):
        Node.parse(name)
