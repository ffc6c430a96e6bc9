"""Targets against plain autograd, finite differences and what an integral must sum to."""

import types

import pytest
import torch
from plain import edge_slopes, value_without
from small_models import save_small_model
from test_methods import hold_denominators

import probe
from probe.attribution import (
    LossCurves,
    exact_effects,
    matched_temperature,
    matched_temperatures,
    mean_losses,
)
from probe.tracing import (
    AUTO_STEPS,
    ENOUGH,
    MANY,
    TARGETS,
    Target,
    even,
    from_zero,
    radau,
    rule_of,
)
from probe.tracing._readout import losses_at

SEQUENCES = [
    probe.TokenSequence([5, 61, 33, 7, 90, 12], [44, 8, 71]),
    probe.TokenSequence([17, 3, 25], [80, 66, 9, 42]),
]
CORRUPTED = [
    probe.TokenSequence([5, 60, 33, 7, 91, 12], []),
    probe.TokenSequence([18, 3, 26], []),
]
EACH = (0.6, 2.5)
ARCHITECTURES = ["llama", "gpt2", "gemma2", "granite"]


def references():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(len(s.answer), 97, generator=generator, dtype=torch.float64).log_softmax(1)
        for s in SEQUENCES
    ]


def squared(logits, labels):
    """A target of one's own."""
    return logits.gather(1, labels[:, None])[:, 0] ** 2 / 7


def plain_value(name, number):
    """The same targets, written otherwise: functions of logits [token, 97] and labels."""

    def value(logits, labels):
        rows = torch.arange(len(labels))
        if name == "hot":
            logits = logits / 1.7
        if name == "each":
            logits = logits / EACH[number]
        if name in ("loss", "hot", "each"):
            return logits.logsumexp(1) - logits[rows, labels]
        if name == "margin":
            other = torch.ones_like(logits, dtype=torch.bool)
            other[rows, labels] = False
            rivals = logits[other].view(len(labels), -1)
            return logits[rows, labels] - rivals.amax(1)
        if name == "logit":
            return (logits - logits.mean(1, keepdim=True))[rows, labels]
        if name == "kl":
            reference = references()[number]
            own = torch.log(logits.softmax(1))
            return torch.nn.functional.kl_div(own, reference.exp(), reduction="none").sum(1)
        return logits[rows, labels].square() / 7

    return value


def target_named(name):
    return {
        "hot": lambda: Target("loss", temperature=1.7),
        "each": lambda: Target("loss", temperature=EACH),
        "kl": lambda: Target("kl", reference=references()),
        "squared": lambda: squared,
    }.get(name, lambda: name)()


NAMES = [*TARGETS, "hot", "each", "squared"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of every architecture its model in double precision."""
    return {
        name: in_double(
            probe.load_model(
                str(save_small_model(tmp_path_factory.mktemp(name), name)), dtype="float64"
            )
        )
        for name in ARCHITECTURES
    }


def edges_of(graph):
    every = graph.mask.nonzero().tolist()
    return [(graph.sources[row], graph.targets[column]) for row, column in every]


def precision(architecture):
    """Capped attention of transformers takes its softmax in float32."""
    return 1e-6 if architecture == "gemma2" else 1e-9


def close(found, expected, architecture):
    largest = precision(architecture)
    assert expected.abs().max() > 1e-6
    assert (found - expected).abs().max() <= largest * expected.abs().max()


def in_double(model):
    """A model whose norms do not go through float32, as those of transformers do."""

    def forward(self, x):
        offset = 1 if type(self).__name__.startswith("Gemma") else 0
        epsilon = getattr(self, "variance_epsilon", None) or self.eps
        return (self.weight + offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

    for part in model.network._module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = types.MethodType(forward, part)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eap_is_the_slope(models, architecture, name):
    model = models[architecture]
    edges = probe.attribute(model, SEQUENCES, target=target_named(name))
    corrupted = probe.attribute(
        model, SEQUENCES, target=target_named(name), corrupted=CORRUPTED, granularity="block"
    )
    module = model.network._module
    for number, sequence in enumerate(SEQUENCES):
        value = plain_value(name, number)
        names = edges_of(edges.graph)
        close(
            edges.scores[number][edges.graph.mask],
            edge_slopes(module, sequence, names, value),
            architecture,
        )
        whole = value_without(module, sequence, {}, value)
        assert float(edges.values[number]) == pytest.approx(whole, rel=precision(architecture))
        assert float(edges.losses[number]) == pytest.approx(
            value_without(module, sequence, {}), rel=1e-6
        )
        beside = CORRUPTED[number]._replace(answer=sequence.answer)
        names = edges_of(corrupted.graph)
        slopes = edge_slopes(module, sequence, names, value, beside=beside)
        close(corrupted.scores[number][corrupted.graph.mask], slopes, architecture)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_gradients_are_sums_of_slopes(models, architecture, name):
    model, steps = models[architecture], 3
    edges = probe.attribute(
        model, SEQUENCES, "eap-ig", "block", ig_steps=steps, target=target_named(name)
    )
    names = edges_of(edges.graph)
    path = radau(steps)
    for number, sequence in enumerate(SEQUENCES):
        value = plain_value(name, number)
        total = sum(
            weight
            * edge_slopes(
                model.network._module,
                sequence,
                names,
                value,
                entered=lambda stream, point=point: point * stream,
            )
            for point, weight in zip(path.points, path.weights, strict=True)
        )
        close(edges.scores[number][edges.graph.mask], total, architecture)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_relevance_patching_follows_its_rules(tmp_path, architecture, name):
    folder = str(save_small_model(tmp_path / "m", architecture))
    model = probe.load_model(folder, dtype="float64")
    plain = hold_denominators(probe.load_model(folder, dtype="float64").network._module)
    edges = probe.attribute(model, SEQUENCES, "relp", "block", target=target_named(name))
    names = edges_of(edges.graph)
    for number, sequence in enumerate(SEQUENCES):
        slopes = edge_slopes(plain, sequence, names, plain_value(name, number))
        found = edges.scores[number][edges.graph.mask]  # norms compute in float32
        assert (found - slopes).abs().max() <= 2e-5 * slopes.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_effects_are_differences(models, architecture, name):
    model, module = models[architecture], models[architecture].network._module
    found, other = (
        probe.attribute(
            model, SEQUENCES, "exact", "block", 7, target=target_named(name), corrupted=beside
        )
        for beside in (None, CORRUPTED)
    )
    for number, sequence in enumerate(SEQUENCES):
        value = plain_value(name, number)
        whole = value_without(module, sequence, {}, value)
        beside = CORRUPTED[number]._replace(answer=sequence.answer)
        for edges, texts in ((found, None), (other, beside)):
            effects = [
                value_without(module, sequence, {target: {source: 1.0}}, value, texts) - whole
                for source, target in edges_of(edges.graph)
            ]
            close(
                edges.scores[number][edges.graph.mask],
                torch.tensor(effects, dtype=torch.float64),
                architecture,
            )


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 97).double() * 3, torch.tensor([3, 0, 96, 50])
    target = Target.of(target_named(name))
    reference = references()[1]
    logits[1, 0] = 20  # sure of itself
    values, slopes = target.slope(logits, labels, reference)
    step = 1e-6
    for row, column in [(0, 3), (0, 4), (1, 0), (2, 95), (3, 50)]:
        for other in (column, int(logits[row].argmax())):
            more, less = logits.clone(), logits.clone()
            more[row, other] += step
            less[row, other] -= step
            up, down = (target.slope(one, labels, reference)[0] for one in (more, less))
            expected = float((up - down)[row]) / (2 * step)
            assert float(slopes[row, other]) == pytest.approx(expected, abs=1e-6)
    assert values.shape == (4,)


@pytest.mark.parametrize("name", ["loss", "margin", "logit", "kl"])
def test_an_integral_is_complete(tiny, name):
    """Toward a corrupted text the way is short, and closes in a few steps."""
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    text = probe.TokenSequence(tokens[:12], tokens[12:])
    wrong = probe.TokenSequence([*tokens[:3], tokens[0], *tokens[4:12]], tokens[12:])
    edges = probe.attribute(tiny, [text], "eap-ig", target=name, corrupted=[wrong], ig_steps=40)
    here, there = (
        probe.attribute(tiny, [one], target="loss" if name == "kl" else name).values
        for one in (text, wrong)
    )
    if name != "kl":
        wanted = float(there - here)
        assert float(edges.scores[0, 0].sum()) == pytest.approx(wanted, rel=0.01)
        assert float(edges.gaps) == pytest.approx(
            float(edges.scores[0, 0].sum()) - wanted, abs=1e-4
        )
    assert edges.completeness_gap < 0.01


def test_a_gap_is_told(tiny):
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    text = probe.TokenSequence(tokens[:12], tokens[12:])
    with pytest.warns(UserWarning, match=r"eap-ig: 2 steps miss \d+% of what the integral"):
        edges = probe.attribute(tiny, [text], "eap-ig", ig_steps=2)
    assert edges.completeness_gap > 0.05
    assert probe.attribute(tiny, [text]).gaps is None


def test_kl_to_the_model_itself(models):
    model = models["llama"]
    edges = probe.attribute(model, SEQUENCES, "exact", "block", target="kl")
    assert edges.values.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert (edges.scores[:, edges.graph.mask] > 0).all()  # every edge matters to what it says
    with pytest.raises(probe.ProbeError, match="kl to what the model itself says has no slope"):
        probe.attribute(model, SEQUENCES, target="kl")


@pytest.mark.parametrize("loss", [0.05, 0.3, 2.0])
def test_a_temperature_that_gives_a_loss(tiny, loss):
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    texts = [
        probe.TokenSequence(tokens[:12], tokens[12:]),
        probe.TokenSequence([5, 16, 4], [5, 16]),
    ]
    lowest = float(mean_losses(tiny, texts, [2.0**n for n in range(-5, 6)]).mean(1).min())
    loss += lowest
    temperature = matched_temperature(tiny, texts, loss)
    edges = probe.attribute(tiny, texts, target=Target("loss", temperature))
    assert float(edges.values.mean()) == pytest.approx(loss, rel=1e-4)
    own = mean_losses(tiny, texts, [1.0])[0]
    torch.testing.assert_close(own.float(), edges.losses)
    assert matched_temperature(tiny, texts, float(own.mean())) == pytest.approx(1, rel=1e-4)
    with pytest.raises(probe.ProbeError, match="the lowest is"):
        matched_temperature(tiny, texts, lowest / 2)
    with pytest.raises(probe.ProbeError, match="the lowest is"):
        matched_temperature(tiny, texts, 0)


def test_temperatures_that_give_each_sequence_its_loss(tiny):
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    texts = [
        probe.TokenSequence(tokens[:12], tokens[12:]),
        probe.TokenSequence(tokens[:12], tokens[12:15]),
        probe.TokenSequence([5, 16, 4], [5, 16]),
    ]
    own = mean_losses(tiny, texts, [1.0])[0]
    assert own[0] < 0.1 < own[2]  # sure of its own answer, not of any
    wanted = [1e-5, 1.5, 1e-5]
    found = matched_temperatures(tiny, texts, wanted)
    assert found[0] < 0.6
    assert found[1] > 1.5
    assert found[2] is None  # no temperature makes a wrong token likely
    edges = probe.attribute(tiny, texts[:2], target=Target("loss", found[:2]))
    assert edges.values.tolist() == pytest.approx(wanted[:2], rel=3e-3)
    assert matched_temperatures(tiny, texts, own.tolist()) == pytest.approx([1, 1, 1], rel=1e-6)
    assert matched_temperatures(tiny, texts[:1], [0]) == matched_temperatures(
        tiny, texts[:1], [1e-6]
    )
    with pytest.raises(probe.ProbeError, match="2 losses were given for 3 sequences"):
        matched_temperatures(tiny, texts, [1, 2])
    with pytest.raises(probe.ProbeError, match="2 temperatures do not fit 3 sequences"):
        probe.attribute(tiny, texts, target=Target("loss", [1, 2]))
    with pytest.raises(probe.ProbeError, match="kl takes one temperature"):
        Target("kl", [1, 2])


def test_a_loss_that_hardly_follows_the_temperature_has_none(tiny, monkeypatch):
    slopes = torch.tensor([0.05, 0.2])  # losses that are so powers of the temperature

    def powers(model, sequences, temperatures, batch_size):
        own = slopes[[text.answer[0] for text in sequences]]
        return torch.tensor(temperatures).double()[:, None] ** own

    monkeypatch.setattr("probe.attribution._temperature.mean_losses", powers)
    texts = [probe.TokenSequence([5, 16], [token]) for token in (0, 1)]
    for place in (0.5, 8):
        found = matched_temperatures(tiny, texts, (place**slopes).tolist())
        assert found == [None, pytest.approx(place, rel=1e-4)]


def test_a_sequence_that_comes_again_is_not_read_again(tiny, monkeypatch):
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    texts = [probe.TokenSequence(tokens[:12], tokens[12 : 15 + n]) for n in (0, 1)]
    first = matched_temperatures(tiny, texts, [0.5, 1e-5])
    read = []

    def counted(model, sequences, temperatures, batch_size):
        read.append((len(sequences), len(temperatures)))
        return mean_losses(model, sequences, temperatures, batch_size)

    monkeypatch.setattr("probe.attribution._temperature.mean_losses", counted)
    curves = LossCurves(tiny)
    assert curves.temperatures(texts[:1], [0.5]) == first[:1]
    assert curves.temperatures(texts, [0.5, 1e-5]) == pytest.approx(first, rel=1e-6)
    assert curves.temperatures(texts[::-1], [1e-5, 0.5]) == pytest.approx(first[::-1], rel=1e-6)
    assert read == [(1, 69), (1, 257), (1, 69)]  # 0.5 is far from the loss that is there


def test_a_model_without_any_slope_is_no_wrong_row(tiny):
    """At a temperature as low as this it is so sure that every gradient is 0."""
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    texts = [probe.TokenSequence(tokens[:12], tokens[12:])]
    assert not probe.attribute(tiny, texts, target=Target("loss", 0.01)).scores.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "los"}, "target 'los' is not known; one of: loss, margin, logit, kl"),
        ({"target": ("loss", 1)}, "is not known"),
        ({"corrupted": CORRUPTED[:1]}, "1 corrupted texts do not fit 2 sequences"),
        ({"corrupted": CORRUPTED[::-1]}, "corrupted prompt has 3 tokens, its own 6"),
        ({"corrupted": CORRUPTED, "ablation": "mean"}, "give corrupted texts or ablation mean"),
    ],
)
def test_what_is_no_target(llama, options, message):
    with pytest.raises(probe.ProbeError, match=message):
        probe.attribute(llama, SEQUENCES, **options)


@pytest.mark.parametrize(
    "temperature", [0, -1, float("nan"), float("inf"), True, "1", None, [1, -1]]
)
def test_what_is_no_temperature(temperature):
    with pytest.raises(probe.ProbeError, match="it must be above 0"):
        Target("loss", temperature)


def test_a_reference_of_another_shape(llama):
    wrong = Target("kl", reference=[part[:1] for part in references()])
    with pytest.raises(probe.ProbeError, match="a reference needs log probabilities"):
        probe.attribute(llama, SEQUENCES, target=wrong)
    with pytest.raises(probe.ProbeError, match="target loss has no reference"):
        Target("loss", reference=references())


def test_some_edges_take_what_all_take(llama):
    whole = probe.attribute(llama, SEQUENCES, "exact", target="margin", corrupted=CORRUPTED)
    edges = [probe.Edge(1, 0, 12), probe.Edge(0, 3, 10)]
    some = exact_effects(llama, SEQUENCES, edges, target="margin", corrupted=CORRUPTED)
    assert torch.allclose(some, torch.stack([whole.scores[edge] for edge in edges]), atol=1e-5)


def test_an_integral_from_zero_closes_with_many_steps(tiny):
    """The input's edges sum to the loss without an embedding, minus the loss."""
    tokens = tiny.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    text = probe.TokenSequence(tokens[:12], tokens[12:])
    network = tiny.network._module
    embedded = network.get_input_embeddings()(torch.tensor([tokens[:-1]]))
    with torch.no_grad():
        nothing, whole = (
            torch.nn.functional.cross_entropy(
                network(inputs_embeds=factor * embedded).logits[0, 11:], torch.tensor(tokens[12:])
            )
            for factor in (0.0, 1.0)
        )
    wanted = float(nothing - whole)
    assert wanted == pytest.approx(2.88, abs=0.005)
    edges = probe.attribute(tiny, [text], "eap-ig", "block", ig_steps=500)
    assert float(edges.scores[0, 0].sum()) == pytest.approx(wanted, rel=0.05)
    assert float(edges.gaps) == pytest.approx(float(edges.scores[0, 0].sum()) - wanted, abs=1e-3)


def test_few_points_of_a_way_from_zero_stay_where_the_input_has_a_size():
    few, many = from_zero(MANY - 1), from_zero(MANY)
    assert few is radau(MANY - 1)
    assert rule_of(MANY - 1, zero=True) == rule_of(ENOUGH - 1, zero=False) == "radau"
    assert rule_of(MANY, zero=True) == "radau-log"
    assert float(many.points[0]) < 1e-11
    assert float(many.points[-1]) == 1
    for power in (0, 1, 3):  # integrals of t^power
        found = (many.weights * many.points**power).sum()
        assert float(found) == pytest.approx(1 / (power + 1), rel=1e-6)


@pytest.mark.parametrize("name", ["sft", "grpo", "dpo"])
def test_an_integral_closes_by_default(name):
    """The input's edges sum to the loss with every embedding the mean one, minus the loss."""
    model = probe.load_model(f"probe:tiny-math/{name}", dtype="float32")
    tokens = model.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    text = probe.TokenSequence(tokens[:12], tokens[12:])
    network = model.network._module
    embedded = network.get_input_embeddings()(torch.tensor([tokens[:-1]]))
    means = embedded.mean(1, keepdim=True).expand_as(embedded)
    with torch.no_grad():
        mean, whole = (
            torch.nn.functional.cross_entropy(
                network(inputs_embeds=start).logits[0, 11:], torch.tensor(tokens[12:])
            )
            for start in (means, embedded)
        )
    edges = probe.attribute(model, [text], "eap-ig")
    assert float(edges.scores[0, 0].sum()) == pytest.approx(float(mean - whole), rel=0.05)
    assert edges.completeness_gap < 0.05
    # Every other output is ablated to zero.
    by_mean = probe.attribute(model, [text], "eap-ig", ablation="mean")
    assert torch.allclose(by_mean.scores[0, 0], edges.scores[0, 0], atol=1e-5)
    assert not torch.allclose(by_mean.scores[0, 1:], edges.scores[0, 1:], atol=1e-2)


def test_even_points_are_exact_for_parabolas_and_follow_what_is_rough():
    points, weights, _ = even(AUTO_STEPS)
    for power in range(3):
        assert float((weights * points**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-12)
    assert float(points[-1]) == 1
    assert even(ENOUGH - 1) is radau(ENOUGH - 1)
    rough, smooth = ([], [])
    for rule, errors in ((even, rough), (radau, smooth)):
        for place in (0.21, 0.37, 0.52, 0.66, 0.83):
            step = torch.special.expit((rule(AUTO_STEPS).points - place) / 0.008)
            slopes = step * (1 - step) / 0.008
            errors.append(abs(float((rule(AUTO_STEPS).weights * slopes).sum()) - 1))
    assert max(rough) < max(smooth)


@pytest.mark.parametrize("tokens", [3, 70_000])
def test_losses_at_temperatures_are_those_of_divided_logits(tokens):
    """With a large vocabulary most of it is left out where it cannot count; no loss knows."""
    torch.manual_seed(tokens)
    logits = 4 * torch.randn(2, 6, tokens)
    logits[0, 1, 2] += 40  # sure of it
    logits[0, 2] = logits[0, 2, 0]  # of all alike
    logits[1, 3, 1] = -torch.inf  # never
    columns = torch.tensor([[0, 1, 2, 4], [3, 5, 0, 0]])
    labels = torch.tensor([[1, 2, 0, 2], [0, 2, -100, -100]])
    temperatures = torch.tensor([1 / 64, 0.3, 1.0, 1.0001, 7.0, 64.0], dtype=torch.float64)
    found = losses_at(logits, columns, labels, temperatures)
    assert found.dtype == torch.float64
    for place, temperature in enumerate(temperatures):
        for row in range(2):
            known = labels[row] != -100
            rows = logits[row, columns[row][known]].double() / temperature
            expected = torch.nn.functional.cross_entropy(rows, labels[row][known])
            assert float(found[place, row]) == pytest.approx(float(expected), rel=1e-12)
