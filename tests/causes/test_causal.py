"""The causal test: what is known is found, nothing is lost by a kill, halves keep clusters."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import probe
from probe.causes import _causal, answers_under, causal_test, halves, intervene
from probe.checkpoints import PACKAGE_DATA
from probe.errors import ProbeError
from probe.report import causal_from

SFT = "probe:tiny-math/sft"


@pytest.fixture(scope="module")
def model():
    return probe.load_model(SFT)


def written(model, questions):
    """Questions with the answers that the model writes."""
    texts = [probe.TokenSequence.from_text(model, question, "0") for question in questions]
    answers = answers_under(model, texts, [[]], max_new_tokens=64)[0]
    return [
        probe.TokenSequence(text.prompt, answer, f"q{place}")
        for place, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]


@pytest.fixture(scope="module")
def sequences(model):
    numbers = zip(range(10, 20), range(30, 20, -1), strict=True)
    return written(model, [f"{a}+{71 - 2 * a}-{b}=?" for a, b in numbers])


def silenced(layer, head):
    """The same model without what one head writes."""
    model = probe.load_model(SFT)
    with torch.no_grad():
        projection = model.network._module.model.layers[layer].self_attn.o_proj
        projection.weight[:, 40 * head : 40 * (head + 1)] = 0
    return model


@pytest.fixture
def few(monkeypatch):
    """Only a few edges one by one."""
    monkeypatch.setattr(_causal, "MEASURED", 20)


@pytest.mark.parametrize(("head", "copied"), [((1, 1), False), ((2, 3), False), ((2, 3), True)])
def test_a_head_that_was_silenced_or_copied_is_found(model, sequences, monkeypatch, head, copied):
    """Its edges changed most, and only its own weights do anything."""
    swapped = {"swapped": _causal.INTERVENTIONS["swapped"]}
    monkeypatch.setattr(_causal, "INTERVENTIONS", swapped)
    pair = (silenced(*head), model) if copied else (model, silenced(*head))
    found = causal_test(*pair, sequences[:6], sets=1)
    (row,) = found.test.edges
    assert row.correlation > row.detectable
    assert row.p_holm < 0.01
    assert row.verdict == "more"
    damages = found.damages["swapped"]
    edges = found.graph.mask.nonzero().tolist()
    own = [found.graph.sources[source] == "a{}.h{}".format(*head) for source, _ in edges]
    assert not damages[~np.array(own)].any()
    assert (np.abs(damages[own]) > 1e-6).mean() > 0.9


def test_the_edges_of_a_silenced_head_act_and_no_others(model, monkeypatch):
    swapped = {"swapped": _causal.INTERVENTIONS["swapped"]}
    monkeypatch.setattr(_causal, "INTERVENTIONS", swapped)
    lines = (PACKAGE_DATA / "tiny-math" / "problems.jsonl").read_text().splitlines()[:16]
    sequences = written(model, [json.loads(line)["question"] for line in lines])
    test = causal_test(model, silenced(2, 3), sequences, sets=1).test
    # Of 8 questions the smallest p is 2 / 2^8.
    assert [(row.source, row.target) for row in test.acting] == [("a2.h3", "m2"), ("a2.h3", "m3")]
    assert all(1 / 128 <= row.p_value < 0.05 and row.damage < -1 for row in test.acting)
    assert not causal_test(model, model, sequences[:12], sets=1).test.acting
    kept = json.loads(json.dumps(asdict(test)))
    assert kept["acting"][0]["source"] == "a2.h3"
    assert causal_from(kept) == test


class InterruptedTest(Exception):
    """Somebody stopped it."""


class Memory(dict):
    """Keeps measurements, and can be stopped."""

    most, wrote = None, 0

    def read(self, name):
        return self.get(name)

    def write(self, name, values):
        if self.wrote == self.most:
            raise InterruptedTest
        self.wrote += 1
        self[name] = values


def test_a_test_that_was_stopped_goes_on(model, sequences, few):
    """And every number is that of `intervene` on the sets that the test says it used."""
    other = silenced(2, 0)
    asked = {"sets": 12, "edges": 3}
    kept = Memory()
    kept.most = 10
    with pytest.raises(InterruptedTest):
        causal_test(model, other, sequences, kept=kept, **asked)
    kept.most, kept.wrote = None, 0
    counted = []
    found = causal_test(
        model, other, sequences, kept=kept, progress=lambda *n: counted.append(n), **asked
    )
    assert kept.wrote == 4 * 5 - 10
    assert sum(count for count, _ in counted) == counted[0][1]
    again = causal_test(model, other, sequences, **asked)
    assert found.test == again.test
    assert np.array_equal(found.damages["removed"], again.damages["removed"], equal_nan=True)
    assert not set(found.ranked_on) & set(found.measured_on)

    texts = [text for text in sequences if text.id in found.measured_on]
    texts.sort(key=lambda text: found.measured_on.index(text.id))
    for name, do, more in (
        ("scaled by 0.75", "scale", {"factor": 0.75}),
        ("removed", "remove", {}),
        ("patched", "patch", {"other": model}),
        ("swapped", "swap", {"other": model}),
    ):
        sets = [found.treated[name][label] for label in ("strengthened", "weakened")]
        outcomes = intervene(other, texts, sets, do, granularity="head", **more)
        rise = (outcomes.loss - outcomes.whole.loss).mean(1)
        lost = ((outcomes.whole.accuracy == 1).double() - (outcomes.accuracy == 1).double()).mean(1)
        rows = [row for row in found.test.sets if row.intervention == name]
        assert [row.damage for row in rows] == pytest.approx(rise.tolist(), abs=1e-5)
        assert [row.lost for row in rows] == pytest.approx(lost.tolist())
        alone = np.flatnonzero(~np.isnan(found.damages[name]))
        assert 2 <= len(alone) <= 20
        places = found.graph.mask.nonzero()[alone]
        outcomes = intervene(
            other,
            texts,
            [[tuple(place)] for place in places.tolist()],
            do,
            granularity="head",
            **more,
        )
        rise = (outcomes.loss - outcomes.whole.loss).mean(1)
        assert found.damages[name][alone] == pytest.approx(rise.tolist(), abs=1e-5)


def test_halves_keep_clusters_together():
    texts = [probe.TokenSequence([1], [2], f"q{place}") for place in range(20)]
    first, second = halves(texts, 0)
    assert len(first) == len(second) == 10
    assert {text.id for text in (*first, *second)} == {text.id for text in texts}
    clusters = {f"q{place}": f"c{place // 3}" for place in range(18)}
    first, second = halves(texts, 1, clusters)
    assert 6 <= len(first) <= 10
    sides = [{clusters.get(text.id, text.id) for text in side} for side in (first, second)]
    assert not sides[0] & sides[1]
    with pytest.raises(ProbeError, match="of one cluster"):
        halves(texts[:6], 0, dict.fromkeys((f"q{place}" for place in range(6)), "c"))
    with pytest.raises(ProbeError, match="at least 4"):
        halves(texts[:3], 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"edges": 0}, "edges is 0"),
        ({"sets": True}, "sets is True"),
        ({"measure": "magic"}, "'magic' is not known"),
        ({"granularity": "atom"}, "'atom' is not known"),
    ],
)
def test_what_is_refused(model, sequences, asked, message):
    with pytest.raises(ProbeError, match=message):
        causal_test(model, model, sequences, **asked)


SMALL = {
    "solutions.questions": 60,
    "solutions.batch_size": 60,
    "selection.samples": 12,
    "selection.alpha": "[0.5]",
    "attribution.control": "none",
    "attribution.granularity": "block",
}


def test_the_causal_test_of_a_run(tmp_path, monkeypatch):
    """It stands in the folder and in every report, is not measured twice, and survives a kill."""
    from click.testing import CliRunner

    from probe.cli import main
    from probe.run import _causal as of_run
    from probe.store import RunFolder

    run = tmp_path / "run"
    probe.run_recipe("tiny-math", run, overrides=SMALL)
    asked = {"edges": 2, "sets": 5, "questions": 6, "granularity": "block"}
    write = RunFolder.write_json
    parts = []

    def stopped(folder, name, table):
        if len(parts) == 4:
            raise InterruptedTest
        counted(folder, name, table)

    def counted(folder, name, table):
        parts.extend([name] * (".part-" in name))
        write(folder, name, table)

    monkeypatch.setattr(RunFolder, "write_json", stopped)
    with pytest.raises(InterruptedTest):
        probe.causal(run, **asked)
    (run / parts[0]).write_text((run / parts[0]).read_text()[:50])
    monkeypatch.setattr(RunFolder, "write_json", counted)
    found = probe.causal(run, **asked)
    assert list(found) == ["sft-grpo.tiny-math", "sft-dpo.tiny-math"]
    assert len(parts) == 2 * 4 * 3 + 1
    assert not list(run.glob("causal/*.part-*"))
    monkeypatch.setattr(of_run, "causal_test", None)  # all is there
    assert probe.causal(run, **asked) == found
    for name, test in found.items():
        table = json.loads((run / "causal" / f"{name}.json").read_text())
        assert [row["p_holm"] for row in table["sets"]] == [row.p_holm for row in test.sets]
        assert len(table["every_edge"]) == 45
        assert not set(table["ranked_on"]) & set(table["measured_on"])
    (run / "causal" / "sft-dpo.tiny-math.json").write_text("{")
    report = probe.open_run(run).report
    single, sets, acting, through = report.extras[-4:]
    assert [table.title.removeprefix("Causal test: ") for table in (single, sets, acting)] == [
        "single edges",
        "sets of edges",
        "edges that the change acts through",
    ]
    # Of three questions no p is below 1/4.
    assert [row[2:4] for row in acting.rows] == [
        ("patched", "none of 45"),
        ("swapped", "none of 45"),
    ]
    assert "of the edges that GRPO changed" in single.note
    assert len(single.rows) == 4
    assert len(sets.rows) == 8
    for *_, edge, whole, own, share in through.rows:
        if edge.startswith("input"):  # nothing is further up
            assert whole == own
            assert share in ("-", "+0 %", "-0 %")
    assert any("sft-dpo.tiny-math.json: damaged" in line for line in report.missing)
    shown = CliRunner().invoke(main, ["report", str(run), "--format", "html"])
    assert "Causal test: sets of edges" in shown.output
    refused = CliRunner().invoke(main, ["causal", str(run), "--measure", "magic"])
    assert refused.exit_code == 2
    assert "'magic' is not known" in refused.output
