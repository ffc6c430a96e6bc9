"""Models that are another one beyond some length: no sequence is scored or written by the other."""

import pytest
import torch
from small_models import MODELS, finest, save_small_model

import probe
from probe.models import end_tokens
from probe.solutions import generate

POINT = 32
SHORT = probe.TokenSequence([5, 6, 7, 8], [9, 10, 11])
LONG = probe.TokenSequence([3 + i % 90 for i in range(60)], [4, 5, 6])
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": POINT,
}
PHI3 = {
    "original_max_position_embeddings": POINT,
    "rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0},
    "sliding_window": None,
}
ROPES = {
    "longrope": LONGROPE,
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": POINT,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": POINT,
    },
}
CASES = [("phi3", PHI3)]
CASES += [("llama", {"rope_parameters": table}) for table in ROPES.values()]
CASES += [(name, {}) for name in MODELS if name not in ("phi3",)]


def loaded(folder, name, changes):
    return probe.load_model(str(save_small_model(folder, name, **changes)))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_short_sequence_scores_alike_beside_a_long_one(tmp_path, name, changes):
    model = loaded(tmp_path / "m", name, changes)
    for method in ("eap", "eap-ig"):
        both = probe.attribute(model, [SHORT, LONG], method, finest(name))
        for index, sequence in enumerate((SHORT, LONG)):
            alone = probe.attribute(model, [sequence], method, finest(name))
            error = (both.scores[index] - alone.scores[0]).abs().max()
            assert error <= 1e-4 * alone.scores.abs().max()
            assert both.losses[index] == pytest.approx(float(alone.losses[0]), rel=1e-5)


def test_effects_and_means_too(tmp_path):
    model = loaded(tmp_path / "m", "phi3", PHI3)
    edges = [probe.Edge(s, 0, 1) for s in (0, 1)]
    both = probe.exact_effects(model, [SHORT, LONG], edges)
    for index, sequence in enumerate((SHORT, LONG)):
        alone = probe.exact_effects(model, [sequence], [probe.Edge(0, 0, 1)])
        assert float(both[index]) == pytest.approx(float(alone[0]), rel=1e-3, abs=1e-6)


def plainly(model, prompt, limit):
    """Greedy decoding without a cache: each token from the whole text before it."""
    tokens = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            logits = model.network._module(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in end_tokens(model.settings, model.tokenizer):
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("name", "changes"), CASES[:3])
def test_answers_that_pass_the_turning_point(tmp_path, name, changes):
    model = loaded(tmp_path / "m", name, changes)
    prompts = [SHORT.prompt, LONG.prompt, LONG.prompt[:31], LONG.prompt[:33], LONG.prompt[:20]]
    limits = [50, 20, 20, 20, 9]
    found = {
        answer.place: answer.tokens
        for finished in generate(model, prompts, limits)
        for answer in finished
    }
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        assert found[index] == plainly(model, prompt, limit)
    assert any(len(prompts[n]) <= POINT < len(prompts[n]) + len(found[n]) for n in found)
    if model.turning_point:
        with pytest.raises(probe.ProbeError, match="beyond 32 tokens"):
            list(generate(model, prompts, limits, engine="continuous"))
