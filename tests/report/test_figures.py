from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import PathPatch

from probe.errors import ProbeError
from probe.models import Graph
from probe.recipe import PublishedChange
from probe.report import (
    STRONGER,
    WEAKER,
    Strength,
    build_report,
    colour_limit,
    draw_circuit,
    draw_diversity,
    draw_entropy,
    draw_heatmap,
    write_figures,
)
from probe.stats import Change


def strength(n_layers=2, granularity="qkv", parallel=False):
    """Random strengths, in which every edge changes."""
    graph = Graph.build(n_layers, granularity, parallel=parallel)
    generator = np.random.default_rng(0)
    mask = graph.mask.numpy()
    before = np.exp(generator.normal(-9, 2, mask.shape)) * mask
    after = before * np.exp(generator.normal(0.2, 0.5, mask.shape))
    return Strength("sft-grpo", "gsm8k", 0.5, graph, before, after)


def texts(figure: Figure) -> str:
    return " ".join(
        [text.get_text() for text in figure.texts]
        + [axes.get_title(loc=place) for axes in figure.axes for place in ("left", "center")]
        + [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        + [text.get_text() for axes in figure.axes for text in axes.texts]
    )


def test_all_figures_of_a_run(half_run, tmp_path):
    report = build_report(half_run.path)
    files = write_figures([report], tmp_path / "a")
    cell = "sft-grpo.tiny-math.alpha-0.5"
    names = [f"heatmap.{cell}", f"circuit.{cell}", "diversity", "output-entropy", "token-entropy"]
    assert [path.name for path in files] == [f"{n}.{e}" for n in names for e in ("png", "pdf")]
    assert sorted((tmp_path / "a").iterdir()) == sorted(files)
    for path in files:
        if path.suffix == ".png":
            assert min(imread(path).shape[:2]) > 300
        else:
            assert path.read_bytes().startswith(b"%PDF")
    again = write_figures([report], tmp_path / "b")
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_drawn(half_run, tmp_path):
    report = build_report(half_run.path)
    with pytest.raises(ProbeError, match="same cells"):
        write_figures([report, report], tmp_path)
    with pytest.raises(ProbeError, match="nothing to draw yet"):
        write_figures([replace(report, cells=())], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="cannot write figures to .*file"):
        write_figures([report], tmp_path / "file")


@pytest.mark.parametrize("n_layers", [1, 4, 32])
@pytest.mark.parametrize(
    ("granularity", "parallel"), [("qkv", False), ("block", False), ("qkv", True)]
)
def test_a_heat_map_holds_every_edge(n_layers, granularity, parallel):
    drawn = strength(n_layers, granularity, parallel)
    figure = draw_heatmap(drawn)
    figure.canvas.draw()
    image = figure.axes[0].images[0]
    shown = image.get_array().filled(np.nan)
    assert (np.isfinite(shown) == drawn.graph.mask.numpy()).all()
    found = np.isfinite(shown)
    assert 2 ** shown[found] == pytest.approx(drawn.after[found] / drawn.before[found])
    middle = (image.norm.vmin + image.norm.vmax) / 2
    assert middle == pytest.approx(np.median(np.log2(drawn.after[found] / drawn.before[found])))
    labels = figure.axes[0].get_xticklabels()
    assert labels[0].get_text() in ("a0", "a0.q")
    assert labels[-1].get_text() == "logits"
    boxes = [label.get_window_extent() for label in labels]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_where_everything_falls_colours_still_tell_edges_apart():
    drawn = strength(4, "qkv", parallel=False)
    fallen = draw_heatmap(replace(drawn, after=drawn.after / 16)).axes[0].images[0]
    plain = draw_heatmap(drawn).axes[0].images[0]
    shown = [image.norm(image.get_array()).compressed() for image in (plain, fallen)]
    assert shown[1] == pytest.approx(shown[0])
    assert np.ptp(shown[1]) > 0.5


def test_entropies_side_by_side_have_one_scale_and_their_own_title(half_run):
    report = build_report(half_run.path)
    for metric, title in (("output_entropy", "Output entropy"), ("token_entropy", "Token entropy")):
        cells = [cell for cell in report.cells if cell.metric == metric and not cell.control]
        low = [replace(cell, pair="sft-dpo", paper=Change(0.25, 0.5, 1.0)) for cell in cells]
        high = [replace(cell, paper=Change(2.0, 4.0, 1.0)) for cell in cells]
        figure = draw_entropy([replace(report, cells=(*high, *low))], metric)
        assert figure.get_suptitle().startswith(title)
        assert [axes.get_ylim() for axes in figure.axes] == [(0, pytest.approx(4.8))] * 2


def test_colours_end_at_a_round_number():
    assert colour_limit(np.array([np.nan, 0.7, -0.8])) == 1
    assert colour_limit(np.array([100.0])) == 10
    assert colour_limit(np.array([np.nan])) == 1


@pytest.mark.parametrize("n_layers", [1, 4, 32])
def test_a_circuit_shows_the_largest_changes(n_layers):
    drawn = strength(n_layers)
    figure = draw_circuit(drawn, 10)
    axes = figure.axes[0]
    arcs = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    drawn = drawn.shares if drawn.one_way(10) else drawn
    expected = drawn.largest(10)
    assert len(arcs) == len(expected)
    nodes = [*drawn.graph.sources, "logits"]
    for arc, edge in zip(reversed(arcs), expected, strict=True):
        places = arc.get_path().vertices
        stronger = edge.after > edge.before
        assert ((places[:, 0] > 0) == stronger).all()
        assert (arc.get_linestyle() == "-") == stronger  # no colour needed
        assert colors.to_hex(arc.get_edgecolor()).upper() == (STRONGER if stronger else WEAKER)
        ends = [nodes[round(places[place, 1])] for place in (0, -1)]
        assert ends == [edge.source, edge.target.partition(".")[0]]
    widths = [arc.get_linewidth() for arc in arcs]
    assert widths == sorted(widths)
    assert f"the {len(expected)} of {drawn.graph.mask.sum():,} edges" in texts(figure)


def test_where_everything_falls_a_circuit_has_shares():
    drawn = strength()
    fallen = replace(drawn, after=drawn.after / 16)
    assert not drawn.one_way(40)
    assert fallen.one_way(40)
    sums = fallen.shares.before.sum(), fallen.shares.after.sum()
    assert sums == (pytest.approx(100), pytest.approx(100))
    figure = draw_circuit(fallen)
    arcs = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]
    assert {arc.get_linestyle() for arc in arcs} > {"-"}
    assert "smaller share" in texts(figure)
    assert "(nearly all go one way)" in texts(figure)


def test_ranks_do_not_move_where_everything_falls():
    drawn = strength(4, "qkv", parallel=False)
    mask = drawn.graph.mask.numpy()
    fallen = replace(drawn, after=drawn.before / 7)
    assert np.array_equal(np.isfinite(fallen.rank_change), mask)
    assert not fallen.rank_change[mask].any()
    first, second = np.argsort(-drawn.before[mask])[:2]
    after = drawn.before.copy()
    values = after[mask]
    values[[first, second]] = values[[second, first]]
    after[mask] = values
    change = replace(drawn, after=after).rank_change[mask]
    assert (change[first], change[second], np.abs(change).sum()) == (-1, 1, 2)
    assert len(draw_heatmap(fallen).axes) == 4  # two matrices, each with its colours


def test_a_circuit_in_which_nothing_changed():
    drawn = strength()
    figure = draw_circuit(replace(drawn, after=drawn.before))
    assert "weaker: 0 stronger: 0" in texts(figure)


def test_diversity_says_what_was_published_where_the_recipe_does(half_run):
    report = build_report(half_run.path)
    figure = draw_diversity([report])
    assert "1 experiments, average improvement +0.0 %, improvement rate 0.0 %" in texts(figure)
    assert "published" not in texts(figure)
    value = PublishedChange("sample_diversity", 0.076, experiments=41, rate=0.951)
    recipe = replace(report.recipe, published_changes=(value,))
    figure = draw_diversity([replace(report, recipe=recipe)])
    assert "published: 41 experiments, +7.6 %, 95.1 % of them improved" in texts(figure)


def test_entropy_says_what_was_published_where_the_recipe_does(half_run):
    report = build_report(half_run.path)
    value = PublishedChange("output_entropy", 1.2, pair="sft-grpo", alpha=0.5)
    recipe = replace(report.recipe, published_changes=(value,))
    for found, labels in ((report, ["0.5"]), (replace(report, recipe=recipe), ["0.5\n(+120)"])):
        axes = draw_entropy([found]).axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == labels


def test_entropy_with_a_value_that_is_not_defined(half_run):
    report = build_report(half_run.path)
    cells = [cell for cell in report.cells if cell.metric == "output_entropy"]
    empty = replace(cells[0], pair="sft-dpo", paper=Change(None, None, None))
    zero = replace(empty, benchmark="gsm8k", paper=Change(0.0, 1.0, None))
    figure = draw_entropy([replace(report, cells=(*cells, empty, zero))])
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == [
        "sft-grpo on tiny-math",
        "sft-dpo on tiny-math",
        "",  # a row per benchmark
        "sft-dpo on gsm8k",
    ]
    assert [line.get_ydata()[0] for line in figure.axes[3].get_lines()] == [0, 1]
    lines = figure.axes[0].get_lines()
    assert [line.get_ydata()[0] for line in lines] == [cells[0].paper.before, cells[0].paper.after]


def test_a_notebook_shows_figures(tmp_path):
    found = strength()
    assert repr(found) == f"Strength({found.name}, {int(found.graph.mask.sum())} edges)"
    for figure in (draw_heatmap(found), draw_circuit(found)):
        (tmp_path / "shown.png").write_bytes(figure._repr_png_())
        pixels = imread(tmp_path / "shown.png")
        assert pixels.shape[:2] == tuple(round(side) for side in figure.bbox.size[::-1])
        assert pixels[..., :3].std() > 0.05
