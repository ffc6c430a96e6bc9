"""Edge scores: slices, arithmetic, tables, files and pictures, and what is refused."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import probe
from probe.errors import ProbeError
from probe.models import Graph
from probe.notebook import html_table
from probe.store import RunFolder

GRAPH = Graph.build(2, "qkv")


def some_edges(ids=("p", "q", "r"), seed=0, graph=GRAPH):
    """Random scores of a small graph."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(ids), *graph.mask.shape, generator=generator) * graph.mask
    losses, entropies = torch.rand(2, len(ids), generator=generator)
    return probe.EdgeScores(scores, losses, entropies, graph, seed * 1e-7, tuple(ids))


@pytest.mark.parametrize(
    ("choice", "indices"),
    [
        (1, [1]),
        (-1, [2]),
        (np.int64(2), [2]),
        ("q", [1]),
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0, 2], [2, 0, 2]),
        (["r", "p"], [2, 0]),
        ([True, False, True], [0, 2]),
        ([], []),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([False, True, False]), [1]),
        (np.array([0, 2]), [0, 2]),
    ],
)
def test_slices_hold_the_chosen_sequences(choice, indices):
    edges = some_edges()
    part = edges[choice]
    assert len(part) == len(indices)
    assert torch.equal(part.scores, edges.scores[indices])
    assert torch.equal(part.losses, edges.losses[indices])
    assert torch.equal(part.entropies, edges.entropies[indices])
    assert part.ids == tuple("pqr"[index] for index in indices)
    assert part.graph == edges.graph


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (3, "no sequence 3; there are 3"),
        (-4, "no sequence -4"),
        ("z", "no sequence has the id 'z'"),
        ([True, False], "2 bools do not fit 3 sequences"),
        (True, "True is neither"),
        (1.0, "1.0 chooses no sequences"),
        ([0, 1.5], "1.5 is neither"),
        (None, "None chooses no"),
        ((0, 1, 2, 3), "no sequence 3"),
    ],
)
def test_no_such_sequence(choice, message):
    with pytest.raises(ProbeError, match=message):
        some_edges()[choice]


def test_an_id_of_several_sequences_is_refused():
    edges = some_edges(ids=("p", "q", "p"))
    assert len(edges["q"]) == 1
    with pytest.raises(ProbeError, match="2 sequences have the id 'p'; give the place"):
        edges["p"]


def test_iterating_and_membership():
    edges = some_edges()
    assert [part.ids for part in edges] == [("p",), ("q",), ("r",)]
    assert "q" in edges
    assert "z" not in edges


def test_arithmetic_means_what_it_says():
    first, second = some_edges(seed=1), some_edges(seed=2)
    assert torch.equal((first - second).scores, first.scores - second.scores)
    assert torch.equal((first + second).losses, first.losses + second.losses)
    assert torch.equal((2 * first).entropies, first.entropies * 2)
    assert (np.float64(2) * first) == first * 2 == first + first
    assert torch.equal((first / 2).scores, first.scores / 2)
    assert -first == first * -1
    assert (first - second).residual_error == 2e-7
    assert (first - second).ids == first.ids


def test_equal_is_one_answer():
    assert some_edges() == some_edges()
    assert some_edges() != some_edges(seed=1)
    assert some_edges() != some_edges(ids=("p", "q", "z"))
    assert some_edges() != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(some_edges())


def test_what_does_not_belong_together_is_refused():
    edges = some_edges()
    with pytest.raises(ProbeError, match="different sequences"):
        edges - some_edges(ids=("p", "r", "q"))
    with pytest.raises(ProbeError, match="different graphs"):
        edges + some_edges(graph=Graph.build(2, "block"))
    for wrong in (edges.scores, 1, None):
        with pytest.raises(TypeError):
            edges + wrong
    for wrong in (edges, True, "2"):
        with pytest.raises(TypeError):
            edges * wrong
    with pytest.raises(AttributeError):
        edges.scores = None


def test_shapes_must_fit():
    edges = some_edges()
    with pytest.raises(ProbeError, match=r"scores of shape \[2, 5, 9\] and \[3\] entropies do not"):
        probe.EdgeScores(edges.scores[:2], edges.losses, edges.entropies, GRAPH)
    with pytest.raises(ProbeError, match="2 ids do not fit 3 sequences"):
        probe.EdgeScores(edges.scores, edges.losses, edges.entropies, GRAPH, 0.0, ("a", "b"))


def test_names_are_places_where_none_are_given():
    edges = some_edges()
    assert probe.EdgeScores(edges.scores, edges.losses, edges.entropies, GRAPH).ids == (
        "0",
        "1",
        "2",
    )


def test_the_repr_is_one_line():
    assert repr(some_edges()[0]).startswith("EdgeScores(1 sequence, 23 edges of qkv, mean loss 0.")
    assert repr(some_edges(ids=())) == "EdgeScores(0 sequences, 23 edges of qkv)"


def test_the_strongest_edges_have_names():
    edges = some_edges()
    mean = edges.scores.double().mean(0)
    found = edges.top(3)
    sizes = mean.abs()[GRAPH.mask].sort(descending=True).values[:3]
    assert [abs(edge.score) for edge in found] == sizes.tolist()
    for edge in found:
        row, column = GRAPH.sources.index(edge.source), GRAPH.targets.index(edge.target)
        assert mean[row, column] == edge.score == edges.score(edge.source, edge.target)
    (one,) = edges["q"].top(1)
    assert abs(one.score) == edges.scores[1].abs().max()
    assert len(edges.top(1000)) == GRAPH.mask.sum()


def test_a_node_is_the_gradient_times_what_it_writes():
    """By plain autograd at the outputs of attentions and FFNs."""
    model = probe.load_model("probe:tiny-math/sft")
    text = probe.TokenSequence.from_text(model, "12+7-5=?", "12+7=19;")
    network, written = model.network._module, {}

    def keep(name, output):
        written[name] = output
        output.retain_grad()

    layers = network.model.layers
    hooks = [layers[1].mlp.register_forward_hook(lambda *of: keep("m1", of[2]))]
    hooks += [layers[2].self_attn.register_forward_hook(lambda *of: keep("a2", of[2][0]))]
    tokens = torch.tensor([[*text.prompt, *text.answer]])
    with torch.enable_grad():
        embeds = network.get_input_embeddings()(tokens[:, :-1]).detach().requires_grad_()
        logits = network(inputs_embeds=embeds).logits[0, len(text.prompt) - 1 :]
        torch.nn.functional.cross_entropy(logits, tokens[0, len(text.prompt) :]).backward()
    for hook in hooks:
        hook.remove()
    nodes = probe.attribute(model, [text]).nodes()
    assert list(nodes) == [*model.graph("qkv").sources]
    for name, output in written.items():
        assert nodes[name] == pytest.approx(-float((output.grad * output.detach()).sum()), abs=1e-5)


def test_no_edge_outranks_an_edge_of_zero():
    edges = some_edges() * 0
    assert {(e.source, e.target) for e in edges.top(1000)} == {
        (GRAPH.sources[i], GRAPH.targets[j]) for i, j in GRAPH.mask.nonzero().tolist()
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda edges: edges.score("a0", "a1"), "no target 'a1'; there are: a1.q, a1.k, a1.v$"),
        (lambda edges: edges.score("a7", "m1"), "no source 'a7'; there are: input, a0, m0"),
        (lambda edges: edges.score("m1", "a0.q"), "no edge from m1 to a0.q"),
        (lambda edges: edges.top(0), "k is 0; it must be at least 1"),
        (lambda edges: edges.top(2.5), "k is 2.5; it must be a whole number"),
        (lambda edges: edges[[]].top(), "there are no sequences"),
    ],
)
def test_wrong_questions(call, message):
    with pytest.raises(ProbeError, match=message):
        call(some_edges())


def test_to_pandas_holds_every_edge_of_every_sequence():
    edges = some_edges()
    table = edges.to_pandas()
    assert len(table) == 3 * GRAPH.mask.sum()
    for row in table.sample(20, random_state=0).itertuples():
        assert row.score == edges[row.id].score(row.source, row.target)
    wide = table.pivot_table("score", "source", "target", aggfunc="sum")
    assert wide.loc["a0", "logits"] == pytest.approx(float(edges.scores[:, 1, -1].sum()))


def test_to_networkx_holds_the_graph():
    networkx = pytest.importorskip("networkx")
    edges = some_edges()
    graph = edges.to_networkx()
    assert graph.number_of_edges() == GRAPH.mask.sum()
    assert set(graph) == {*GRAPH.sources, *GRAPH.targets}
    for source, target, values in graph.edges(data=True):
        assert values["score"] == edges.score(source, target)
        assert values["weight"] == abs(values["score"])
    assert graph.nodes["a1.q"]["block"] == graph.nodes["a1"]["block"] == "a1"
    assert networkx.is_directed_acyclic_graph(graph)


@pytest.mark.parametrize("package", ["pandas", "networkx"])
def test_what_is_not_installed_is_said(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ProbeError, match=f"^to_{package} needs {package}: pip install {package}$"):
        getattr(some_edges(), f"to_{package}")()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(tmp_path, dtype):
    edges = some_edges(ids=("p", "ü\n", "r"))
    numbers = (edges.scores.to(dtype), edges.losses.to(dtype), edges.entropies.to(dtype))
    edges = probe.EdgeScores(*numbers, GRAPH, 1.5e-7, edges.ids)
    edges.save(tmp_path / "edges.safetensors")
    found = probe.EdgeScores.load(str(tmp_path / "edges.safetensors"))
    assert found == edges
    assert found.scores.dtype == dtype
    part = edges[[2, 0]] - edges[[2, 0]]
    part.save(tmp_path / "part")
    assert probe.EdgeScores.load(tmp_path / "part") == part


def test_a_run_folder_writes_the_same_file(tmp_path):
    edges = some_edges()
    RunFolder(tmp_path).write_edges(tmp_path / "run.safetensors", edges, edges.ids, "")
    edges.save(tmp_path / "user.safetensors")
    assert RunFolder(tmp_path).read_edges(tmp_path / "user.safetensors") == edges
    assert probe.EdgeScores.load(tmp_path / "run.safetensors") == edges


def test_files_that_cannot_be(tmp_path):
    edges = some_edges()
    with pytest.raises(ProbeError, match="cannot write .*nowhere"):
        edges.save(tmp_path / "nowhere" / "edges")
    with pytest.raises(ProbeError, match="cannot read .*nothing"):
        probe.EdgeScores.load(tmp_path / "nothing")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ProbeError, match="cannot read .*torn"):
        probe.EdgeScores.load(tmp_path / "torn")
    save_file({"scores": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ProbeError, match="cannot read .*other"):
        probe.EdgeScores.load(tmp_path / "other")
    with pytest.raises(ProbeError, match="cannot read"):
        probe.EdgeScores.load(tmp_path)


def test_plot_draws_the_mean_where_edges_are():
    matplotlib.use("agg")
    edges = some_edges()
    axes = edges.plot()
    (image,) = axes.images
    drawn = image.get_array().filled(np.nan)
    assert np.array_equal(np.isnan(drawn), ~GRAPH.mask.numpy())
    assert np.allclose(drawn[GRAPH.mask], edges.scores.mean(0)[GRAPH.mask])
    assert image.get_clim() == (-np.nanmax(abs(drawn)), np.nanmax(abs(drawn)))
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GRAPH.sources)
    assert edges.plot(axes) is axes


def test_a_notebook_shows_escaped_names():
    edges = some_edges(ids=("<b>", "q"))
    text = edges._repr_html_()
    assert text.count("<tr>") == 11
    assert "EdgeScores(2 sequences" in text
    foreign = html_table("<i>", ("&",), [("<script>",), (1.23456,), (None,)])
    for part in ("&lt;i&gt;", "<th>&amp;</th>", "&lt;script&gt;", "<td>1.235</td>", "<td>-</td>"):
        assert part in foreign
    assert f"<td>{'x' * 79}…</td>" in html_table("", ("long",), [("x" * 81,)])
    assert "<tbody></tbody>" in edges[[]]._repr_html_()
