"""Rows of the architecture table that are wrong, and must not give scores."""

from dataclasses import replace

import pytest
import torch
from small_models import save_small_model

import probe
import probe.attribution._row_checks
from probe.attribution import Edge, exact_effects
from probe.causes import answers_under, intervene
from probe.errors import ProbeError
from probe.models import ARCHITECTURES, Architecture

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25], [80, 66, 9, 42]),
]
_LLAMA = ARCHITECTURES["llama"]


def _named(*parts):
    return tuple(f"self_attn.{part}_proj" for part in parts)


WRONG = {
    "a parallel layer as a sequential one": (
        "gpt_neox",
        {"parallel": False},
        "m0 reads what is in the residual stream behind input, and not, as the row says, behind a0",
    ),
    "a sequential layer as a parallel one": (
        "llama",
        {"parallel": True},
        "m0 reads what is in the residual stream behind a0, and not, as the row says, behind input",
    ),
    "norms exchanged": (
        "gpt_neox",
        {"attention_norm": "post_attention_layernorm", "ffn_norm": "input_layernorm"},
        "a0, or a projection in it, is given something else than what the norm gives",
    ),
    "a norm that runs elsewhere": (
        "llama",
        {"attention_norm": None},
        "what a0 reads is no sum of sources before it",
    ),
    "an offset that the norms do not have": (
        "llama",
        {"norm_offset": 1.0},
        "the norm of a0 computes another formula",
    ),
    "no offset where they have one": ("gemma2", {"norm_offset": 0.0}, "computes another formula"),
    "norms that do not subtract the mean": ("llama", {"centred_norms": True}, "another formula"),
    "norms that do": ("gpt2", {"centred_norms": False}, "the norm of a0 computes another formula"),
    "an output before its norm": ("gemma2", {"ffn_output": "mlp"}, "do not sum to the residual"),
    "a wrong final norm": (
        "llama",
        {"final_norm": "model.layers.0.input_layernorm"},
        "do not sum|nothing was seen|no sum of sources",
    ),
    "a cap that is not there": ("qwen3", {"logits_divisor": "head_dim"}, "the logits are not"),
    "no multiplier": ("cohere2", {"logits_multiplier": None}, "the logits are not the model's own"),
    "no scale": ("granite", {"residual_scale": None}, "do not sum to the residual stream"),
    "an FFN that is a part of it": ("llama", {"ffn": "mlp.down_proj"}, "m0, or a projection in it"),
    "a projection that reads something else": (
        "llama",
        {"projections": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")},
        "the projection of a0.v is 32 wide, not 16",
    ),
    "a module that is not there": (
        "llama",
        {"ffn_norm": "ln_2"},
        "'ln_2', .* layer 0 does not have",
    ),
}


EXCHANGED = {
    "query and key": ("llama", {"projections": _named("k", "q", "v")}),
    "key and value": ("llama", {"projections": _named("q", "v", "k")}),
    "query and value": ("qwen3", {"projections": _named("v", "k", "q")}),
    "head by head, not behind one another": ("gpt_neox", {"layout": "concatenated"}),
    "behind one another, not head by head": ("gpt2", {"layout": "interleaved"}),
}


@pytest.mark.parametrize("case", EXCHANGED)
@pytest.mark.parametrize("granularity", ["qkv", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_branches_under_each_others_names_are_refused(load, case, granularity, dtype):
    name, changes = EXCHANGED[case]
    # As many keys as queries: otherwise their widths would tell.
    model = load(name, dtype=dtype, same_heads=name in ("llama", "qwen3"), **changes)
    with pytest.raises(ProbeError, match="no query does|as in a value|other heads than its own"):
        probe.attribute(model, SEQUENCES, granularity=granularity)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a small model under a changed row."""

    def loaded(name, row=None, dtype="float32", same_heads=False, **changes):
        settings = {"num_key_value_heads": 4} if same_heads else {}
        folder = save_small_model(tmp_path / name, name, **settings)
        kind = name.partition("-")[0]
        monkeypatch.setitem(ARCHITECTURES, kind, replace(row or ARCHITECTURES[kind], **changes))
        return probe.load_model(str(folder), dtype=dtype)

    return loaded


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_row_is_refused(load, case, dtype):
    name, changes, message = WRONG[case]
    with pytest.raises(ProbeError, match=message) as error:
        probe.attribute(load(name, dtype=dtype, **changes), SEQUENCES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("granularity", ["qkv", "block", "head"])
@pytest.mark.parametrize("method", ["eap", "eap-ig", "relp", "exact"])
def test_it_is_refused_whatever_is_asked(load, method, granularity):
    model = load("gpt_neox", parallel=False)
    with pytest.raises(ProbeError, match="m0 reads what is in the residual stream behind"):
        probe.attribute(model, SEQUENCES[1:], method=method, granularity=granularity)


REFUSED_BEFORE = {
    **{
        key: WRONG[key]
        for key in (
            "a parallel layer as a sequential one",
            "an offset that the norms do not have",
            "no scale",
        )
    },
    "query and key": ("qwen3", {"projections": _named("v", "k", "q")}, "no query|as in a value"),
}


EDGE = [("input", "logits")]
UNSCORED = {
    "effects": lambda right, wrong: exact_effects(
        wrong, SEQUENCES, [Edge(0, 0, wrong.graph("qkv").mask.shape[1] - 1)]
    ),
    "sets": lambda right, wrong: intervene(wrong, SEQUENCES, [EDGE]),
    "answers": lambda right, wrong: answers_under(wrong, SEQUENCES, [EDGE], max_new_tokens=2),
    "another model's": lambda right, wrong: intervene(
        right, SEQUENCES, [EDGE], do="patch", other=wrong
    ),
}


@pytest.mark.parametrize("case", REFUSED_BEFORE)
@pytest.mark.parametrize("what", UNSCORED)
def test_it_is_refused_where_nothing_is_scored(load, case, what):
    name, changes, message = REFUSED_BEFORE[case]
    if what == "another model's" and "parallel" in changes:
        pytest.skip("the graph is that of the first model, which is right")
    right = load(name, same_heads=name == "qwen3")
    wrong = load(name, same_heads=name == "qwen3", **changes)
    with pytest.raises(ProbeError, match=message) as error:
        UNSCORED[what](right, wrong)
    assert "\n" not in str(error.value)


def test_what_was_checked_is_not_checked_again(load, monkeypatch):
    model, calls = load("llama"), []
    counted = probe.attribution._row_checks.edge_scores
    monkeypatch.setattr(
        "probe.attribution._row_checks.edge_scores", lambda *args: calls.append(1) or counted(*args)
    )
    edge = [Edge(0, 0, model.graph("qkv").mask.shape[1] - 1)]
    found = [exact_effects(model, SEQUENCES, edge) for _ in range(2)]
    assert len(calls) == 1
    assert torch.equal(*found)
    intervene(model, SEQUENCES, [[("input", "logits")]])
    assert len(calls) == 1
    exact_effects(model, SEQUENCES, edge[:0], "head")
    assert len(calls) == 2
    probe.attribute(model, SEQUENCES, granularity="block")
    exact_effects(model, SEQUENCES, edge[:0], "block")
    assert len(calls) == 2


@pytest.mark.parametrize("ablation", ["mean", "corrupted"])
def test_and_whatever_is_left_of_an_output(load, ablation):
    options = {"ablation": "mean"}
    if ablation == "corrupted":
        options = {"corrupted": [probe.Sequence([9, 12, 54, 7, 61, 3], [44, 8, 71, 29, 55])]}
    right = load("gpt_neox")
    assert probe.attribute(right, SEQUENCES[:1], **options).scores.isfinite().all()
    with pytest.raises(ProbeError, match="m0 reads what is in the residual stream behind"):
        probe.attribute(load("gpt_neox", parallel=False), SEQUENCES[:1], **options)


@pytest.mark.parametrize("parallel", [False, True])
def test_one_norm_for_two_branches_has_to_be_said(parallel):
    with pytest.raises(ProbeError, match="one norm, input_layernorm, for attention and FFN: if"):
        replace(_LLAMA, ffn_norm="input_layernorm", parallel=parallel)


def test_phi_as_llama_is_refused_by_name(load):
    with pytest.raises(
        ProbeError, match="'phi' .* names 'self_attn.o_proj', which layer 0 does not"
    ):
        probe.attribute(load("phi", _LLAMA), SEQUENCES)


def test_a_stream_that_something_else_reads_is_noticed(load):
    """A gate that reads the stream without being a branch, as some routers do."""
    model = load("llama")
    layer = model.network._module.model.layers[1]
    given = {}
    layer.register_forward_pre_hook(lambda _, args: given.update(stream=args[0]))
    layer.mlp.register_forward_hook(lambda _, __, out: out * given["stream"].tanh())
    with pytest.raises(ProbeError, match="something beside the branches .* reads the residual"):
        probe.attribute(model, SEQUENCES)


def test_what_comes_past_the_stream_is_noticed(load):
    """A skip connection from the embeddings into a later layer."""
    model = load("llama")
    layers = model.network._module.model.layers
    given = {}
    layers[0].register_forward_pre_hook(lambda _, args: given.update(stream=args[0].detach()))
    layers[1].register_forward_pre_hook(lambda _, args: (args[0] + given["stream"], *args[1:]))
    with pytest.raises(ProbeError, match="do not sum to the residual stream"):
        probe.attribute(model, SEQUENCES)


def test_a_small_write_that_is_left_out_is_noticed_too(load):
    """Relative to the whole stream it is rounding; but another sum fits far better."""
    model = load("gpt_neox", parallel=False)
    for layer in model.network._module.gpt_neox.layers:
        for parameter in (layer.attention.dense.weight, layer.attention.dense.bias):
            with torch.no_grad():
                parameter.mul_(1e-4)
    with pytest.raises(ProbeError, match="m. reads what is in the residual stream behind"):
        probe.attribute(model, SEQUENCES)


def test_a_row_of_a_plugin_is_no_other():
    assert Architecture(shared_norm=True, ffn_norm="input_layernorm").shared_norm
