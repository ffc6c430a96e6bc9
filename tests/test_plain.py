"""The plain-torch reference, checked against the models and against itself."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
from plain import (
    _run,
    edge_losses,
    edge_slopes,
    edges,
    last_stream,
    loss_without,
    node_outputs,
    streams,
)
from small_models import MODELS, save_small_model, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import probe

POST_NORMED = ("gemma2", "gemma3_text", "olmo2")
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe-dense", "qwen3_moe-sparse")
USUAL = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"),
    *("gpt_neox-sequential", "phi", "cohere2", "phi3", "olmo2", "granite"),
    *MIXTURES,
)
"""Each layer has query, key, value and heads, or a norm behind them; others differ in names."""
ODD = ("deepseek_v3", "llama4_text", "gptj", "qwen3_next", "lfm2", "nemotron_h", "olmo")
SUMS_OVER_HEADS = [name for name in USUAL if name not in POST_NORMED]
every_model = pytest.mark.parametrize("name", USUAL)
odd_ones_too = pytest.mark.parametrize("name", [*USUAL, *ODD])
every_sum_over_heads = pytest.mark.parametrize("name", SUMS_OVER_HEADS)


def some_sequence(seed=0):
    generator = np.random.default_rng(seed)
    return probe.Sequence(*(generator.integers(3, 97, n).tolist() for n in (6, 5)))


SEQUENCE = some_sequence()


@functools.cache
def model(name, dtype=torch.float64):
    module = small_model(name).to(dtype)
    if name in (*MIXTURES, "deepseek_v3", "qwen3_next", "nemotron_h"):
        module.set_experts_implementation("eager")  # the fast kernel knows no float64
    return module


def distance(found, truth):
    return float((found - truth).norm() / truth.norm())


def blocks(names):
    return [name for name in names if "." not in name]


def fed(sequence):
    return torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])


def own_loss(module, sequence):
    """Loss by the definition, without hooks."""
    with torch.no_grad():
        logits = module(input_ids=fed(sequence), use_cache=False).logits[0].double()
    total = 0.0
    for place, token in enumerate(sequence.answer):
        total -= float(logits[len(sequence.prompt) - 1 + place].log_softmax(0)[token])
    return total / len(sequence.answer)


def final_norm(module):
    names = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm"}
    name = names.get(module.config.model_type, "norm")
    return getattr(module.base_model, name)


def branch(module, target):
    """The norm of a branch, or the identity where it has none, and the module behind it."""
    kind = module.config.model_type
    base = module.base_model
    layer = (base.h if kind == "gpt2" else base.layers)[int(target[1])]
    if kind == "gpt2":
        found = {"a": (layer.ln_1, layer.attn), "m": (layer.ln_2, layer.mlp)}
    elif kind == "gpt_neox":
        found = {
            "a": (layer.input_layernorm, layer.attention),
            "m": (layer.post_attention_layernorm, layer.mlp),
        }
    elif kind in ("phi", "cohere", "cohere2"):
        norm = layer.input_layernorm
        found = {"a": (norm, layer.self_attn), "m": (norm, layer.mlp)}
    elif kind == "olmo2":
        found = {"a": (torch.nn.Identity(), layer.self_attn), "m": (torch.nn.Identity(), layer.mlp)}
    elif kind.startswith("gemma"):
        found = {
            "a": (layer.input_layernorm, layer.self_attn),
            "m": (layer.pre_feedforward_layernorm, layer.mlp),
        }
    else:
        found = {
            "a": (layer.input_layernorm, layer.self_attn),
            "m": (layer.post_attention_layernorm, layer.mlp),
        }
    return found[target[0]]


# The models


@odd_ones_too
def test_a_saved_model_loads_as_it_is(name, tmp_path):
    folder = save_small_model(tmp_path, name)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    truth = small_model(name).state_dict()
    assert all(torch.equal(truth[k], value) for k, value in loaded.state_dict().items())
    assert loaded.config.model_type == name.partition("-")[0]
    AutoTokenizer.from_pretrained(folder)


@every_model
def test_seeds_and_changes_of_a_model(name):
    first, again, other = (small_model(name, seed) for seed in (0, 0, 1))
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    ids = fed(SEQUENCE)
    assert not torch.allclose(first(input_ids=ids).logits, other(input_ids=ids).logits, atol=0.1)
    assert small_model(name, vocab_size=100).config.vocab_size == 100


@odd_ones_too
def test_no_vector_of_weights_is_neutral(name):
    for key, value in small_model(name).named_parameters():
        assert len(value.unique()) > value.numel() / 2, key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 64}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"attention_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_what_is_special_matters(name, changes):
    """A reference that got this wrong would be seen."""
    plain, changed = small_model(name), small_model(name, **changes)
    ids = fed(SEQUENCE)
    assert distance(changed(input_ids=ids).logits, plain(input_ids=ids).logits) > 0.02


# What is written and what is read


@odd_ones_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sources_sum_to_the_final_norms_input(name, dtype):
    module = model(name, dtype)
    outputs = node_outputs(module, SEQUENCE)
    last = last_stream(module, SEQUENCE)
    assert last.dtype == dtype
    assert last.shape == (10, 32)
    total = sum(outputs[source] for source in blocks(outputs))
    assert distance(total, last) <= {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]


@every_model
def test_every_branch_reads_the_sum_of_its_sources(name):
    module = model(name)
    outputs = node_outputs(module, SEQUENCE)
    read = streams(module, SEQUENCE)
    known = edges(module)
    assert set(read) == set(known)
    for target, sources in known.items():
        total = sum(outputs[source] for source in blocks(sources))
        assert distance(total, read[target]) <= 1e-13, target


@every_model
def test_the_streams_are_the_models_own(name):
    """Transformers lists the stream before every layer; the last entry is behind the norm."""
    module = model(name)
    with torch.no_grad():
        own = module(input_ids=fed(SEQUENCE), output_hidden_states=True).hidden_states
    read = streams(module, SEQUENCE)
    assert torch.equal(own[0][0], node_outputs(module, SEQUENCE)["input"])
    assert torch.equal(own[0][0], read["a0"])
    assert torch.equal(own[1][0], read["a1"])


@every_sum_over_heads
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}])
def test_an_attention_is_the_sum_of_its_heads_and_bias(name, changes):
    module = small_model(name, **changes).double()
    outputs = node_outputs(module, SEQUENCE)
    for layer in ("a0", "a1"):
        parts = [source for source in outputs if source.startswith(f"{layer}.")]
        assert len(parts) in (4, 5)
        assert distance(sum(outputs[part] for part in parts), outputs[layer]) <= 1e-13
        if len(parts) == 5:
            bias = outputs[f"{layer}.bias"]
            assert torch.equal(bias, bias[:1].expand(10, -1))
            assert bias.abs().min() > 0


@pytest.mark.parametrize("name", [*MIXTURES, "deepseek_v3", "llama4_text", "qwen3_next"])
def test_a_mixture_is_the_sum_of_its_experts_and_what_is_shared(name):
    module = model(name)
    outputs = node_outputs(module, SEQUENCE)
    parts = [source for source in outputs if source.startswith("m1.")]
    assert set(parts) == {s for s in edges(module)["logits"] if s.startswith("m1.")}
    assert sum(bool(outputs[part].any()) for part in parts) > 1
    # Weights of routers may be in float32.
    assert distance(sum(outputs[part] for part in parts), outputs["m1"]) <= 1e-7


def test_which_models_have_a_bias_behind_their_heads():
    with_bias = {name for name in MODELS if "a0.bias" in edges(model(name))["logits"]}
    assert with_bias == {
        *("gpt2", "gpt_neox", "gpt_neox-sequential", "phi", "starcoder2", "gpt_oss"),
    }
    assert "a0.bias" in edges(small_model("llama", attention_bias=True))["logits"]


@pytest.mark.parametrize("name", POST_NORMED)
def test_a_post_norm_leaves_no_heads_to_sum(name):
    known = edges(model(name))
    assert known["logits"] == ["input", "a0", "m0", "a1", "m1"]
    assert "a1.q.h3" in known


def test_edges_of_one_model():
    known = edges(model("llama"))
    heads = [f"a0.h{head}" for head in range(4)]
    assert known["a0.q.h3"] == ["input"]
    assert "a0.k.h2" not in known  # key heads are not expanded
    assert known["m0"] == ["input", "a0", *heads]
    assert known["a1.v.h1"] == ["input", "a0", "m0", *heads]
    parallel = edges(model("gpt_neox"))
    assert parallel["m0"] == parallel["a0"] == ["input"]
    assert parallel["m1"] == parallel["a1"]


# Taking something away


@odd_ones_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_0_is_the_model_itself(name, dtype):
    module = model(name, dtype)
    truth = own_loss(module, SEQUENCE)
    for target, sources in edges(module).items():
        found = edge_losses(module, SEQUENCE, sources[-1], target)
        assert math.isclose(found, truth, abs_tol=1e-5 if dtype == torch.float32 else 1e-12)
    assert math.isclose(loss_without(module, SEQUENCE, {}), truth, abs_tol=1e-12)


@odd_ones_too
def test_every_edge_matters(name):
    """Taking an edge away changes the loss, so no hook is without effect."""
    module = model(name)
    truth = own_loss(module, SEQUENCE)
    outputs = node_outputs(module, SEQUENCE)
    for target, sources in edges(module).items():
        for source in sources:
            if ".e" in source and not outputs[source][len(SEQUENCE.prompt) - 1 :].any():
                continue  # an expert that no scored token got
            changed = edge_losses(module, SEQUENCE, source, target, strength=1.0)
            assert abs(changed - truth) > 1e-6, (source, target)


@every_model
def test_a_run_leaves_nothing_behind(name):
    module = small_model(name)
    edge_losses(module, SEQUENCE, "input", "a0.q", strength=1.0)
    with pytest.raises(ValueError, match="m1 -> a1 is no edge"):
        edge_losses(module, SEQUENCE, "m1", "a1", strength=1.0)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_in_float64(name):
    """Their fast kernel refuses it; the reference goes round it and puts it back."""
    module = small_model(name).double()
    before = module.get_experts_implementation()
    found = edge_losses(module, SEQUENCE, "a0", "m1", strength=0.5)
    assert module.get_experts_implementation() == before
    assert found == edge_losses(model(name), SEQUENCE, "a0", "m1", strength=0.5)


@every_model
def test_query_key_and_value_together_are_the_attention(name):
    """Exactly, at any strength, by parts and by heads."""
    module = model(name)
    for source in ("input", "m0"):
        whole = edge_losses(module, SEQUENCE, source, "a1", strength=0.7)
        for depth in (1, 2):
            parts = [t for t in edges(module) if t.startswith("a1.") and t.count(".") == depth]
            assert len(parts) in (3, 8, 12)
            together = loss_without(module, SEQUENCE, {part: {source: 0.7} for part in parts})
            assert math.isclose(together, whole, abs_tol=1e-6)


@every_sum_over_heads
def test_all_heads_together_are_the_attention(name):
    module = model(name)
    parts = [source for source in edges(module)["m1"] if source.startswith("a0.")]
    for target in ("m1", "a1.k", "logits"):
        whole = edge_losses(module, SEQUENCE, "a0", target, strength=0.7)
        together = loss_without(module, SEQUENCE, {target: dict.fromkeys(parts, 0.7)})
        assert math.isclose(together, whole, abs_tol=1e-6)


@every_model
def test_a_final_norm_that_reads_nothing(name):
    """Behind it only its own bias is left: without one, every token is as likely."""
    module = model(name)
    removed = {"logits": dict.fromkeys(blocks(edges(module)["logits"]), 1.0)}
    bias = getattr(final_norm(module), "bias", None)
    bias = torch.zeros(32, dtype=torch.float64) if bias is None else bias
    likely = module.lm_head(bias).log_softmax(0)
    truth = -float(likely[list(SEQUENCE.answer)].mean())
    assert math.isclose(loss_without(module, SEQUENCE, removed), truth, abs_tol=1e-9)


@every_model
@pytest.mark.parametrize("target", ["a0", "m0", "a1", "m1"])
def test_a_branch_that_reads_nothing(name, target):
    """Taking all its sources from a branch, one by one, is running it on zeros."""
    module = model(name)
    removed = {target: dict.fromkeys(blocks(edges(module)[target]), 1.0)}
    found = loss_without(module, SEQUENCE, removed)
    norm, behind = branch(module, target)
    nothing = norm(torch.zeros(1, 10, 32, dtype=torch.float64))

    def silence(_, arguments, keywords):
        if arguments:
            return (nothing, *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": nothing}

    handle = behind.register_forward_pre_hook(silence, with_kwargs=True)
    try:
        truth = own_loss(module, SEQUENCE)
    finally:
        handle.remove()
    # The sources sum to the stream but for rounding, and a norm magnifies what is left.
    assert math.isclose(found, truth, abs_tol=1e-6)


@every_model
def test_only_what_is_named_sees_the_change(name, monkeypatch):
    """What enters the attention's product itself: queries, keys and values, head by head."""
    module = small_model(name)
    module.set_attn_implementation("eager")
    home = sys.modules[type(module).__module__]
    original = home.eager_attention_forward
    calls = []

    def spy(attention, query, key, value, *arguments, **keywords):
        calls.append({"q": query[0], "k": key[0], "v": value[0]})
        return original(attention, query, key, value, *arguments, **keywords)

    monkeypatch.setattr(home, "eager_attention_forward", spy)

    def product(target):
        calls.clear()
        edge_losses(module, SEQUENCE, "a0", target, strength=1.0 if target != "logits" else 0.0)
        assert len(calls) == 2
        return calls[1]

    truth = product("logits")
    for target in edges(module):
        if not target.startswith("a1.") and target != "m1":
            continue
        found = product(target)
        _, part, head = (*target.split("."), None, None)[:3]
        for name_of_part, heads in truth.items():
            changed = (found[name_of_part] - heads).abs().amax((1, 2)) > 1e-4
            expected = torch.zeros(len(heads), dtype=torch.bool)
            if name_of_part == part:
                # OLMo-2 norms all heads of a query or key together.
                mixes = head is None or (module.config.model_type == "olmo2" and part != "v")
                expected[slice(None) if mixes else int(head[1:])] = True
            assert torch.equal(changed, expected), (target, name_of_part)


@every_model
def test_the_residual_stream_itself_is_not_touched(name):
    """Sources still sum to the stream, and nothing before the target has changed."""
    module = model(name)
    truth = _run(module, SEQUENCE)
    for target in ("a1", "a1.q", "m0", "m1"):
        with torch.no_grad():
            run = _run(module, SEQUENCE, {target: {"input": 1.0}})
        total = sum(run.outputs[source] for source in blocks(run.outputs))
        assert distance(total, run.streams["logits"]) <= 1e-13
        for early in edges(module)[target]:
            assert torch.equal(run.outputs[early], truth.outputs[early])
        assert torch.equal(run.streams[target.partition(".")[0]], truth.streams[target[:2]])
        assert distance(run.streams["logits"], truth.streams["logits"]) > 1e-4


@odd_ones_too
def test_slopes_are_finite_differences(name):
    module = model(name)
    known = edges(module)
    some = [(source, target) for target, sources in known.items() for source in sources]
    some = [some[i] for i in np.random.default_rng(1).permutation(len(some))[:12]]
    slopes = edge_slopes(module, SEQUENCE, some)
    every = [(s, t) for t, sources in known.items() for s in blocks(sources)]
    scale = float(edge_slopes(module, SEQUENCE, every).abs().max())
    eps = 5e-3  # the norms compute in float32 even here: smaller steps drown in that
    for edge, slope in zip(some, slopes.tolist(), strict=True):
        up, down = (edge_losses(module, SEQUENCE, *edge, strength=s) for s in (eps, -eps))
        assert abs((up - down) / (2 * eps) - slope) <= 2e-4 * scale, edge


@every_model
def test_slopes_add_up(name):
    """To first order a block is the sum of its parts, among targets as among sources."""
    module = model(name)
    known = edges(module)
    pairs = [(source, target) for target, sources in known.items() for source in sources]
    slopes = dict(zip(pairs, edge_slopes(module, SEQUENCE, pairs).tolist(), strict=True))
    scale = max(map(abs, slopes.values()))
    for source, target in pairs:
        for inner in (
            [(source, t) for t in known if t.rpartition(".")[0] == target],
            [(s, target) for s in known[target] if s.startswith(f"{source}.")],
        ):
            if inner:
                total = sum(slopes[edge] for edge in inner)
                assert abs(total - slopes[source, target]) <= 1e-6 * scale, (source, target)


@every_model
def test_slopes_one_by_one_or_together(name):
    module = model(name)
    some = [("input", "m0"), ("input", "a1"), ("m0", "a1.k"), ("a0", "a1.k.h1"), ("m1", "logits")]
    together = edge_slopes(module, SEQUENCE, some)
    alone = torch.cat([edge_slopes(module, SEQUENCE, [edge]) for edge in some])
    assert (together - alone).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("llama", "a0", "a0"),
        ("llama", "m0", "a0.q"),
        ("llama", "a0.bias", "logits"),
        ("llama", "input", "a2"),
        ("llama", "input", "a0.k.h2"),
        ("gpt_neox", "a0", "m0"),
        ("gpt_neox", "a1.h0", "m1"),
        ("gemma2", "a0.h0", "logits"),
    ],
)
def test_what_is_no_edge(name, source, target):
    with pytest.raises(ValueError, match=f"{source} -> {target} is no edge"):
        edge_losses(model(name), SEQUENCE, source, target)


def test_every_model_has_another_architecture():
    """A hyphen in a name stands for another setting of the same architecture."""
    for name, settings in MODELS.items():
        assert settings["model_type"] == name.partition("-")[0]
        AutoConfig.for_model(**settings)
