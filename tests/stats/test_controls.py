import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import recomputed
from conftest import run_recorded
from hypothesis import given
from hypothesis import strategies as st

import probe
import probe.run._attributing
from probe.attribution import TokenSequence, read_edges
from probe.checkpoints import PACKAGE_DATA
from probe.errors import ProbeError
from probe.report import build_report, summary
from probe.stats import CONTROLS, ControlSide, control_sides, texts_of
from probe.store import RunFolder
from probe.tracing import Target

CELL = "sft-grpo.tiny-math.alpha-0.5"
SOME = {
    "solutions.questions": "60",
    "selection.alpha": "[0.5]",
    "pairs": '[{name="sft-grpo", before="probe:tiny-math/sft", after="probe:tiny-math/grpo"}]',
}


def run(folder):
    """Make the run of this module: every control that there is."""
    run_recorded({**SOME, "attribution.control": ",".join(CONTROLS)}, folder)


@pytest.fixture(scope="module")
def edges(finished):
    """The edges of every side."""
    folder = RunFolder(finished)
    names = ["before", "after", *(side.name for side in control_sides(CONTROLS))]
    found = {name: folder.read_edges(folder.edges_file(CELL, name)) for name in names}
    assert None not in found.values()
    return found


def geometric(side, other):
    """Geometric mean of the questions' ratios of intensity, less 1."""
    old, new = (e.scores.double().abs().mean((1, 2)).log() for e in (side, other))
    return math.expm1(float((new - old).mean()))


def test_every_question_has_the_loss_that_it_should_have(edges):
    before, after = (edges[name].losses for name in ("before", "after"))
    assert np.allclose(edges["before-sharp"].values, after, rtol=1e-4)
    matched = [edges[f"{name}-matched"] for name in ("before", "after")]
    assert (after < before).any()
    surer_of = (before < after, after < before)
    for side, raw, surer in zip(matched, ("before", "after"), surer_of, strict=True):
        assert np.allclose(side.values, before.maximum(after), rtol=1e-4)
        # The model that is less sure of a question is left as it is.
        assert side.scores[~surer].equal(edges[raw].scores[~surer])
        assert (side.scores != edges[raw].scores).flatten(1).any(1).equal(surer)


def test_a_control_is_compared_as_the_raw_change_is(finished, edges):
    report = probe.open_run(finished).report
    cells = {(c.metric, c.control): c for c in report.cells}
    for control in CONTROLS.values():
        for label, first, second in control.compared:
            cell = cells["activation_intensity", label]
            assert cell.change == pytest.approx(geometric(edges[first], edges[second]), rel=1e-6)
            assert cell.interval[0] < cell.change < cell.interval[1]
            assert ("token_entropy", label) not in cells
    assert report.missing == ()
    # Raw cells, controls below them, metric by metric.
    order = list(dict.fromkeys(cell.metric for cell in report.cells))
    assert [c.metric for c in report.cells] == sorted(
        (c.metric for c in report.cells), key=order.index
    )


def test_a_side_is_what_the_api_gives(finished, edges):
    folder = RunFolder(finished)
    table = folder.read_json(f"extras/{CELL}.before-sharp.json")
    solutions, _ = folder.read_solutions(folder.solutions_file("tiny-math--sft", "tiny-math"))
    length = folder.read_selection(CELL).cut_length
    ids = edges["before"].ids
    texts = [
        TokenSequence(s.prompt, s.answer[:length], s.id)
        for s in sorted((s for s in solutions if s.id in ids), key=lambda s: ids.index(s.id))
    ]
    assert table["ids"] == list(ids)
    target = Target("loss", temperature=table["temperatures"])
    found = probe.attribute("probe:tiny-math/sft", texts, target=target)
    assert np.allclose(found.scores, edges["before-sharp"].scores, rtol=1e-4, atol=1e-7)


def test_other_code_finds_the_same_in_the_files_of_a_run(finished):
    report = json.loads((finished / "report.json").read_text())
    checked = 0
    for cell in report["cells"]:
        if cell["control"] not in recomputed.ROWS:
            continue
        sides = recomputed.read_sides(finished, CELL, cell["control"])
        change, interval, parts = recomputed.recompute(cell["metric"], *sides)
        assert cell["samples"] == len(parts)
        assert cell["change"] == pytest.approx(change, rel=1e-5, abs=1e-9)
        assert cell["interval"] == pytest.approx(interval.tolist(), rel=1e-5, abs=1e-9)
        # Two random estimates of one p-value: five standard errors of their difference.
        p_value = recomputed.sign_flips(parts)
        apart = 5 * math.sqrt(2 * max(p_value * (1 - p_value), 1e-4) / 20_000)
        assert cell["p_value"] == pytest.approx(p_value, abs=apart)
        checked += 1
    assert checked == 6 + 3 * 5
    adjusted = recomputed.holm([cell["p_value"] for cell in report["cells"]])
    assert [cell["p_holm"] for cell in report["cells"]] == pytest.approx(adjusted)
    assert [cell["significant"] for cell in report["cells"]] == [
        p < 0.05 and abs(cell["change"]) >= 0.01
        for p, cell in zip(adjusted, report["cells"], strict=True)
    ]


def test_the_controls_tell_a_sharpened_model_from_another_circuit(tmp_path):
    """The model after is the one before with its logits doubled: nothing else changed."""
    from safetensors.torch import load_file, save_file

    sharp = tmp_path / "sharp"
    shutil.copytree(PACKAGE_DATA / "tiny-math/sft", sharp)
    weights = load_file(sharp / "model.safetensors")
    norm = "model.norm.weight"
    weights[norm] = (2 * weights[norm].float()).to(weights[norm].dtype)
    save_file(weights, sharp / "model.safetensors", {"format": "pt"})
    pair = f'[{{name="p", before="probe:tiny-math/sft", after="{sharp}"}}]'
    report, _ = run_recorded({**SOME, "pairs": pair}, tmp_path / "run")
    cells = {c.control: c for c in report.cells if c.metric == "activation_intensity"}
    assert cells[""].significant
    assert cells["sharpness"].change == pytest.approx(cells[""].change, abs=0.01)
    assert abs(cells["equal loss"].change) < 0.01


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=2, max_size=8))
def test_texts_of_other_questions(answers):
    texts = [TokenSequence([1], answer, str(i)) for i, answer in enumerate(answers)]
    own = [replace_answer(text) for text in texts]
    side = ControlSide("x", "before", "before", "other")
    found = texts_of(side, own, texts)
    assert sorted(map(list, (t.answer for t in found))) == sorted(answers)
    assert [t.prompt for t in found] == [t.prompt for t in own]
    assert texts_of(side, own, texts) == found
    marked = [TokenSequence([1], [i], str(i)) for i in range(len(texts))]
    assert all(list(t.answer) != [i] for i, t in enumerate(texts_of(side, own, marked)))
    shuffled = texts_of(side._replace(answers="shuffled"), own, texts)
    assert [sorted(t.answer) for t in shuffled] == [sorted(a) for a in answers]


def replace_answer(text):
    return text._replace(answer=[0])


def test_unknown_controls_are_refused():
    with pytest.raises(ProbeError, match="'sharp' is not known"):
        control_sides(["sharp"])
    with pytest.raises(ProbeError, match="attribution.control is 'sharp'"):
        probe.run_recipe("tiny-math", overrides={"attribution.control": "sharp"})


def test_a_loss_that_cannot_be_had_leaves_a_control_out_and_nothing_else(finished, tmp_path):
    """With tokens in another order, the model before is sure of few: it cannot be as sure."""
    folder = RunFolder(shutil.copytree(finished, tmp_path / "copy"))
    path = folder.solutions_file("tiny-math--sft", "tiny-math")
    solutions, _ = folder.read_solutions(path)
    turned = [replace(s, answer=[*s.answer[1:], s.answer[0]]) for s in solutions]
    folder.write_solutions(path, turned)
    report, said = run_recorded(SOME, folder.path)
    assert f"left out: {CELL}, before-sharp: no temperature" in said
    assert not folder.edges_file(CELL, "before-sharp").exists()  # that of the other answers is gone
    assert any(line.startswith(f"sharpness of {CELL}") for line in report.missing)
    assert any(cell.control == "equal loss" for cell in report.cells)


def test_a_question_without_a_temperature_does_not_count(copy, edges):
    folder = RunFolder(copy)
    table = folder.read_json(f"extras/{CELL}.before-sharp.json")
    table["temperatures"][3] = None
    folder.write_json(f"extras/{CELL}.before-sharp.json", table)
    cells = {(c.metric, c.control): c for c in build_report(copy).cells}
    rest = [row for row in range(len(edges["before"])) if row != 3]
    sides = [edges[name][rest] for name in ("before", "before-sharp")]
    for metric, cell in ((m, c) for (m, control), c in cells.items() if control == "sharpness"):
        assert (cell.samples, cell.left_out) == (len(rest), 1)
        if metric == "activation_intensity":
            assert cell.change == pytest.approx(geometric(*sides), rel=1e-6)
    assert cells["activation_intensity", "equal loss"].left_out == 0


def test_a_run_of_one_temperature_for_all_still_opens_and_is_mended(copy):
    folder = RunFolder(copy)
    whole = build_report(copy)
    for side in ("before-sharp", "after-matched"):
        folder.write_json(f"extras/{CELL}.{side}.json", {"temperature": 0.5, "loss": 0.1})
    report = build_report(copy)
    cells = {(c.metric, c.control): c for c in report.cells}
    for label in ("sharpness", "equal loss"):
        cell = cells["activation_intensity", label]
        assert cell.change is not None
        assert cell.interval is cell.p_value is cell.significant is None
        assert any(line.startswith(f"statistics of {label} of {CELL}: ") for line in report.missing)
    assert cells["activation_intensity", "margin"].interval
    assert "sharpness split of" in " ".join(report.missing)
    run_recorded({**SOME, "attribution.control": ",".join(CONTROLS)}, copy)
    assert build_report(copy).cells == whole.cells


def test_a_model_is_scored_once_on_what_pairs_and_controls_share(tmp_path, monkeypatch):
    names = ("grpo", "dpo")
    pair = '{{name="{0}", before="probe:tiny-math/sft", after="probe:tiny-math/{0}"}}'
    table = {
        "solutions.questions": "40",
        "selection.alpha": "[0.5]",
        "attribution.control": "sharpness,loss-matched",
    }
    for name in names:
        run_recorded({**table, "pairs": f"[{pair.format(name)}]"}, tmp_path / name)
    passed, sides, attribute = [], [], probe.run._attributing.attribute

    def counted(model, sequences, *given, done, target, **named):
        sides.append(len(sequences))
        temperatures = target.temperatures or [1.0] * len(sequences)
        passed.extend(
            (model.reference, tuple(text.prompt), tuple(text.answer), temperature)
            for place, (text, temperature) in enumerate(zip(sequences, temperatures, strict=True))
            if place not in done
        )
        return attribute(model, sequences, *given, done=done, target=target, **named)

    monkeypatch.setattr("probe.run._attributing.attribute", counted)
    both = tmp_path / "both"
    run_recorded({**table, "pairs": f"[{', '.join(map(pair.format, names))}]"}, both)
    assert len(passed) == len(set(passed)) < sum(sides)
    lost = [f"dpo.tiny-math.alpha-0.5.{side}.safetensors" for side in ("before", "before-matched")]
    for rounds in range(2):
        for name in names:
            for file in (tmp_path / name / "edges").iterdir():
                alone, shared = (read_edges(path)[0] for path in (file, both / "edges" / file.name))
                worst = (shared.scores - alone.scores).flatten(1).norm(dim=1)
                assert (worst <= 1e-4 * alone.scores.flatten(1).norm(dim=1)).all()
        if not rounds:  # what was lost is taken from where it still is
            for file in lost:
                (both / "edges" / file).unlink()
            passed.clear()
            run_recorded({**table, "pairs": f"[{', '.join(map(pair.format, names))}]"}, both)
            assert len(passed) < 10


def test_another_fault_while_looking_for_a_temperature_stops_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise ProbeError("the server is gone")

    monkeypatch.setattr("probe.run._attributing.LossCurves.temperatures", broken)
    with pytest.raises(ProbeError, match="the server is gone"):
        run_recorded({**SOME, "solutions.questions": "30"}, tmp_path / "run")


def test_nothing_is_said_of_chance_where_nothing_was_tested(finished):
    report = probe.open_run(finished).report
    assert "which is not significant" not in summary(untested(report))[0]
    assert "At equal loss the change is" in summary(untested(report))[0]


def untested(report):
    """The report as if its recipe left statistics out."""
    cells = tuple(replace(c, interval=None, p_value=None, significant=None) for c in report.cells)
    return replace(report, cells=cells)
