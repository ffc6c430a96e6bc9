"""Scores position by position: they sum to the scores, and each is what autograd says there."""

import pytest
import torch
from small_models import save_small_model

import probe
from probe.errors import ProbeError
from probe.tracing import Target

TEXTS = [probe.TokenSequence([5, 6, 7, 8, 9], [4, 5, 6], "long"), probe.TokenSequence([7, 8], [9])]


@pytest.fixture(scope="module")
def tiny():
    return probe.load_model("probe:tiny-math/sft")


@pytest.mark.parametrize("granularity", ["qkv", "block", "head"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eap", {}),
        ("eap", {"ablation": "mean"}),
        ("relp", {}),
        ("eap-ig", {"ig_steps": 5}),
        ("eap-ig", {}),
        ("eap-ig", {"ig_steps": 7, "ablation": "mean"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*steps miss")
def test_positions_sum_to_the_scores(tiny, granularity, method, options):
    whole = probe.attribute(tiny, TEXTS, method, granularity, **options)
    for one, text, scores in zip(
        probe.attribute_positions(tiny, TEXTS, method, granularity, **options),
        TEXTS,
        whole.scores,
        strict=True,
    ):
        assert one.scores.shape == (text.length, *scores.shape)
        assert torch.allclose(one.scores.sum(0), scores, atol=1e-5)
        assert not one.scores[:, ~one.graph.mask].any()
        assert one.tokens == (*text.prompt, *text.answer[:-1])
        assert float(one.shares.sum()) == pytest.approx(1)
        first = one.top(1)[0]
        assert abs(first.score) == float(one.scores.abs().max())
        row = one.graph.sources.index(first.source)
        column = one.graph.targets.index(first.target)
        assert first.score == float(one.scores[first.position, row, column])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gptj", "olmo2"])
def test_other_architectures(name, tmp_path):
    save_small_model(tmp_path, name)
    model = probe.load_model(tmp_path)
    scores = probe.attribute(model, TEXTS).scores
    found = probe.attribute_positions(model, TEXTS)
    for one, expected in zip(found, scores, strict=True):
        assert torch.allclose(one.scores.sum(0), expected, atol=1e-5)


def test_single_experts(tmp_path):
    save_small_model(tmp_path, "mixtral")
    model = probe.load_model(tmp_path)
    (scores,) = probe.attribute(model, TEXTS[:1], granularity="expert").scores
    (one,) = probe.attribute_positions(model, TEXTS[:1], granularity="expert")
    assert torch.allclose(one.scores.sum(0), scores, atol=1e-5)


@pytest.mark.parametrize("target", ["margin", Target(temperature=[2.0, 0.5])])
def test_another_target(tiny, target):
    whole = probe.attribute(tiny, TEXTS, target=target).scores
    placed = probe.attribute_positions(tiny, TEXTS, target=target)
    for one, scores in zip(placed, whole, strict=True):
        assert torch.allclose(one.scores.sum(0), scores, atol=1e-5)


def test_a_text_of_too_many_numbers_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("probe.attribution._positions.LARGEST", 7 * 9 * 17 - 1)
    with pytest.raises(ProbeError, match="sequence long: 7 tokens of 153 edges each"):
        probe.attribute_positions(tiny, TEXTS[:1])


def test_each_position_is_the_gradient_times_what_is_written_there(tiny):
    """By plain autograd: the last FFN's output and what the final norm reads."""
    text, network, kept = TEXTS[0], tiny.network._module, {}

    def read(module, given):
        stream = given[0].detach().requires_grad_()
        kept["stream"] = stream
        return (stream,)

    hooks = [network.model.norm.register_forward_pre_hook(read)]
    hooks += [
        network.model.layers[3].mlp.register_forward_hook(
            lambda module, given, output: kept.update(written=output.detach())
        )
    ]
    tokens = torch.tensor([[*text.prompt, *text.answer]])
    with torch.enable_grad():
        logits = network(input_ids=tokens[:, :-1]).logits[0, len(text.prompt) - 1 :]
        torch.nn.functional.cross_entropy(logits, tokens[0, len(text.prompt) :]).backward()
    for hook in hooks:
        hook.remove()
    expected = -(kept["stream"].grad * kept["written"])[0].sum(1)
    (one,) = probe.attribute_positions(tiny, [text])
    edge = one.scores[:, one.graph.sources.index("m3"), one.graph.targets.index("logits")]
    assert torch.allclose(edge, expected, atol=1e-6)


def test_what_is_shown(tiny):
    (one,) = probe.attribute_positions(tiny, TEXTS[:1])
    assert repr(one) == "PositionScores(7 tokens, 77 edges at each)"
    first = one.top(1)[0]
    assert f"<td>{first.position}</td><td>{first.source}</td>" in one._repr_html_()


def test_what_is_no_sum_over_positions_is_refused(tiny):
    with pytest.raises(ProbeError, match="exact removes an edge at all positions at once"):
        probe.attribute_positions(tiny, TEXTS, "exact")
