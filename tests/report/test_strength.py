import numpy as np
import pytest
import torch
from small_models import save_small_model

import probe
from probe.report import build_report, draw_circuit, read_strengths


def test_strengths_of_a_run(half_run):
    (strength,) = read_strengths(build_report(half_run.path))  # one cell is there
    assert strength.name == "sft-grpo.tiny-math.alpha-0.5"
    edges = half_run.read_edges(half_run.edges_file(strength.name, "before"))
    mask = edges.graph.mask.numpy()
    assert strength.before == pytest.approx(edges.scores.abs().mean(0).numpy())
    assert strength.after == pytest.approx(2 * strength.before)
    assert strength.change[mask] == pytest.approx(1)
    assert np.isnan(strength.change[~mask]).all()


def test_the_largest_changes_come_first(half_run):
    (strength,) = read_strengths(build_report(half_run.path))
    found = strength.largest(1000)
    assert len(found) == strength.graph.mask.sum()
    sizes = [edge.after - edge.before for edge in found]
    assert sizes == sorted(sizes, reverse=True)
    row, column = np.unravel_index(strength.before.argmax(), strength.before.shape)
    assert found[0].source == strength.graph.sources[row]
    assert found[0].target == strength.graph.targets[column]
    assert found[0].before == strength.before.max()
    assert strength.largest(3) == found[:3]


@pytest.mark.parametrize(("name", "fine"), [("llama", "head"), ("qwen3_moe-dense", "expert")])
def test_parts_are_added_up(half_run, tmp_path, name, fine):
    """The scores of heads, or of experts, add up to those of the whole, computed on its own."""
    model = probe.load_model(str(save_small_model(tmp_path / "m", name)))
    sequences = [probe.Sequence([5, 16, 4], [5, 16, 4, 17]), probe.Sequence([7, 3], [9, 8])]
    found = {}
    for granularity in (fine, "qkv"):
        edges = probe.attribute(model, sequences, granularity=granularity)
        for side in ("before", "after"):
            path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
            half_run.write_edges(path, edges, ["a", "b"], "key")
        (found[granularity],) = read_strengths(build_report(half_run.path))
    assert found[fine].graph == found["qkv"].graph
    torch.testing.assert_close(
        torch.tensor(found[fine].before), torch.tensor(found["qkv"].before), rtol=1e-4, atol=1e-6
    )
    assert draw_circuit(found[fine]).axes
    axes = probe.attribute(model, sequences, granularity=fine).plot()
    assert axes.get_ylabel()
