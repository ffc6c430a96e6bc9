import json
import shutil

import pytest
import scipy.stats
import torch
from conftest import run_recorded, save_dull_model
from safetensors.torch import load_file, save_file

import probe
from probe.attribution import TokenSequence, compare_states
from probe.checkpoints import by_kind, weight_changes, weight_files
from probe.report import build_report
from probe.run import run_faithfulness
from probe.store import RunFolder

SMALL = {
    "solutions.questions": 60,
    "solutions.batch_size": 16,
    "selection.samples": 5,
    "selection.alpha": "[0.1, 0.5]",
    "report.extra": '["token-kl", "residual", "weights", "tokens"]',
    "attribution.control": "none",
}


def run(folder, overrides=None):
    """Run the small recipe; the report and what was said."""
    return run_recorded(SMALL | (overrides or {}), folder)


def texts(folder, model, alpha):
    """The answers of one model of the first pair, cut as that alpha cuts them."""
    folder = RunFolder(folder)
    selection = folder.read_selection(f"sft-grpo.tiny-math.alpha-{alpha}")
    path = folder.solutions_file(f"tiny-math--{model}", "tiny-math")
    solutions = {s.id: s for s in folder.read_solutions(path)[0]}
    return [
        TokenSequence(solutions[i].prompt, solutions[i].answer[: selection.cut_length], i)
        for i in selection.ids
    ]


def table(report, title):
    found = next(extra for extra in report.extras if title in extra.title)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def test_the_tables_are_what_the_models_do(finished):
    report = build_report(finished)
    models = [probe.load_model(f"probe:tiny-math/{name}") for name in ("sft", "grpo")]
    rows = {(r["pair"], r["alpha"]): r for r in table(report, "Divergence")}
    assert len(rows) == 4
    for alpha in (0.1, 0.5):
        for text, name in (("before", "sft"), ("after", "grpo")):
            found = compare_states(*models, texts(finished, name, alpha))
            means = [sum(line) / len(line) for line in found.divergences]
            row = rows["sft-grpo", alpha]
            assert row[f"on {text}"] == pytest.approx(sum(means) / 5, rel=1e-3)
            ends = scipy.stats.t.interval(0.95, 4, sum(means) / 5, scipy.stats.sem(means))
            found_ends = [row[f"on {text} {end}"] for end in ("low", "high")]
            assert found_ends == pytest.approx(ends, rel=1e-3)
    residual = [row for row in table(report, "residual") if row["pair"] == "sft-grpo"]
    assert [row["before"] for row in residual] == [*(f"layer {n}" for n in range(4)), "logits"]
    assert [r["cosine on after"] for r in residual] == pytest.approx(found.cosines, abs=1e-5)
    assert [r["CKA on after"] for r in residual] == pytest.approx(found.cka, abs=1e-4)
    weights = [row for row in table(report, "weights") if row["pair"] == "sft-dpo"]
    kinds = by_kind(weight_changes("probe:tiny-math/sft", "probe:tiny-math/dpo"))
    assert [row["moved"] for row in weights] == [kind.relative for kind in kinds]
    record = json.loads((finished / "run.json").read_text())
    assert {"states", "weights", "tokens"} < record["seconds"].keys()


def test_tokens_sum_to_the_edges_of_the_run(finished):
    """Two computations: position by position, and the scores that a run keeps."""
    folder = RunFolder(finished)
    rows = {(r["pair"], r["at"]): r for r in table(build_report(finished), "Scores by token")}
    for pair, model in (("sft-grpo", "grpo"), ("sft-dpo", "dpo")):
        shares = {}
        for side, name in (("before", "sft"), ("after", model)):
            edges = folder.read_edges(folder.edges_file(f"{pair}.tiny-math.alpha-0.5", side))
            found = folder.read_json(f"extras/{pair}.tiny-math.tokens-{side}.json")["questions"]
            assert tuple(row["id"] for row in found) == edges.ids
            sums = torch.tensor([sum(row["scores"]) for row in found])
            assert torch.allclose(sums, edges.scores.sum((1, 2)), atol=1e-5)
            path = folder.solutions_file(f"tiny-math--{name}", "tiny-math")
            solved = {s.id: s for s in folder.read_solutions(path)[0]}
            for row in found:
                read = "".join(row["tokens"][row["prompt"] :])
                assert solved[row["id"]].text.startswith(read)
                assert sum(row["shares"]) == pytest.approx(1, abs=1e-3)
            parts = [sum(row["shares"][: row["prompt"]]) for row in found]
            shares[side] = sum(parts) / len(parts)
        row = rows[pair, "question"]
        assert [row["before"], row["after"]] == pytest.approx(list(shares.values()))
        assert rows[pair, "answer"]["before"] == pytest.approx(1 - row["before"])


def test_a_method_without_positions_is_refused_before_the_run(tmp_path):
    with pytest.raises(probe.ProbeError, match="exact removes an edge at all positions at once"):
        run(tmp_path / "run", {"attribution.method": "exact"})
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_merged_to_see_how_far_the_weights_moved(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = weight_files("probe:tiny-math/sft")[0].parent
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(module, LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    few = {"solutions.questions": 8, "selection.samples": 2, "selection.alpha": "[0.5]"}
    run(tmp_path / "run", few | {"pairs.0.after": str(tmp_path / "adapter")})
    (found,) = [json.loads(path.read_text()) for path in tmp_path.glob("run/extras/*grpo*weights*")]
    truth = weight_changes("probe:tiny-math/sft", str(tmp_path / "merged"))
    moved = {matrix["name"]: matrix["moved"] for matrix in found["matrices"]}
    assert moved == pytest.approx({change.name: change.moved for change in truth})
    assert {name.split(".")[-2] for name, size in moved.items() if size} == {"q_proj"}


def test_running_again_measures_nothing(copy, monkeypatch):
    monkeypatch.setattr("probe.run._extra_passes.compare_states", None)
    monkeypatch.setattr("probe.run._extra_passes.weight_changes", None)
    monkeypatch.setattr("probe.run._extra_passes.each_by_position", None)
    old = (copy / "report.json").read_text()
    run(copy)
    assert (copy / "report.json").read_text() == old


def test_what_is_damaged_or_of_other_answers_is_measured_again(copy):
    old = (copy / "report.json").read_text()
    states = copy / "extras" / "sft-grpo.tiny-math.on-before.json"
    states.write_text(states.read_text()[:100])
    other = copy / "extras" / "sft-dpo.tiny-math.on-after.json"
    name = other.relative_to(copy).as_posix()
    RunFolder(copy).write_json(name, RunFolder(copy).read_json(name) | {"key": "another"})
    half = build_report(copy)
    assert [line for line in half.missing if "token-kl of sft-grpo" in line]
    _, said = run(copy)
    assert (copy / "report.json").read_text() == old
    assert "sft-grpo.tiny-math.on-before.json: damaged" in said


def test_what_is_not_measured_yet_is_missing(copy):
    shutil.rmtree(copy / "extras")
    missing = build_report(copy).missing
    assert len(missing) == 4 + 2 + 2 + 2
    assert all(line.endswith("not measured yet; run the recipe again") for line in missing)


def test_weights_that_cannot_be_compared_do_not_stop_a_run(copy, tmp_path):
    folder = shutil.copytree(weight_files("probe:tiny-math/grpo")[0].parent, tmp_path / "grpo")
    whole = load_file(folder / "model.safetensors")
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    pair = {f"pairs.{n}.after": str(folder) for n in (0, 1)}
    report, said = run(tmp_path / "run", pair)
    assert "do not have the same matrices ('lm_head.weight'" in said
    assert any("weights of sft-grpo" in line for line in report.missing)
    assert table(report, "Divergence")


def test_what_was_left_out_is_not_measured(tmp_path):
    """A pair without any question that both solve is no obstacle to the other pair."""
    dull = str(save_dull_model(tmp_path / "dull"))
    settings = {
        "pairs.0.after": dull,
        "faithfulness.edges": 3,
        "faithfulness.sequences": 1,
        "faithfulness.methods": '["eap"]',
        "attribution.control": "none",
    }
    report, said = run(tmp_path / "run", settings)
    assert {row["pair"] for row in table(report, "Divergence")} == {"sft-dpo"}
    assert {found.model for found in report.faithfulness} == {"tiny-math--sft", "tiny-math--dpo"}
    assert "dull: left out, as no question of it was chosen" in said
    again = run_faithfulness(tmp_path / "run", edges=4, methods="eap")
    assert {found.edges for found in again} == {4}
