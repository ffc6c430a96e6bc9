"""Methods against what they should be: on linear models, in the limit, and rule by rule."""

import types

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel
from plain import edge_slopes
from small_models import save_small_model, small_model
from torch import nn
from transformers import AutoTokenizer

import probe
from probe.attribution import Edge, exact_effects
from probe.errors import ProbeError
from probe.models import architecture_of

SEQUENCES = [
    probe.Sequence([5, 61, 33, 7, 90, 12], [44, 8, 71, 29, 55]),
    probe.Sequence([17, 3, 25], [80, 66, 9, 42]),
]


def wrap(module, tokenizer_folder):
    """A model of the package around a module that was changed by hand."""
    module.requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    network = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    row = architecture_of(module.config.model_type)
    return probe.Model(
        "by hand", network, tokenizer, module.config, row, module.device, module.dtype
    )


def linear_module():
    """GPT-NeoX without anything that is not linear, the loss included.

    Norms and activations are the identity, attention patterns uniform (no query, no key), and one
    token that is never scored has a logit of 60, beside which the others vanish: the loss is
    60 - logit.
    """
    module = small_model("gpt_neox").double()
    with torch.no_grad():
        for layer in module.gpt_neox.layers:
            layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
            layer.mlp.act = nn.Identity()
            fused, heads = layer.attention.query_key_value, module.config.num_attention_heads
            for tensor in (fused.weight, fused.bias):
                by_head = tensor.view(heads, 3, -1)
                by_head[:, :2] = 0
        module.gpt_neox.final_layer_norm = nn.Identity()
        unembedding = nn.Linear(32, 97, bias=True, dtype=torch.float64)
        unembedding.weight.normal_(std=0.05)
        unembedding.weight[0] = unembedding.bias[:] = 0
        unembedding.bias[0] = 60
        module.lm_head = unembedding
    return module


@pytest.mark.parametrize("granularity", ["qkv", "block", "head"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_methods_agree_on_a_linear_model(tmp_path, granularity, ablation):
    folder = save_small_model(tmp_path / "m", "gpt_neox")
    model = wrap(linear_module(), folder)
    options = {"granularity": granularity, "ablation": ablation, "batch_size": 50}
    found = {
        method: probe.attribute(model, SEQUENCES, method=method, ig_steps=5, **options).scores
        for method in ("eap", "eap-ig", "exact")
    }
    # By default the input leaves a sequence's own mean, and all else what the ablation says.
    auto = probe.attribute(model, SEQUENCES, method="eap-ig", **options).scores
    rows = slice(None) if ablation == "mean" else slice(1, None)
    assert (auto - found["exact"])[:, rows].abs().max() <= 1e-11
    for number, sequence in enumerate(SEQUENCES):
        given = SEQUENCES if ablation == "mean" else [sequence]
        by_mean = probe.attribute(model, given, method="exact", **options | {"ablation": "mean"})
        row = number if ablation == "mean" else 0
        assert (auto[number] - by_mean.scores[row])[0].abs().max() <= 1e-11
    size = found["exact"].abs().max()
    assert size > 1e-3
    for method in ("eap", "eap-ig"):
        assert (found[method] - found["exact"]).abs().max() <= 1e-11 * max(1, size)


def test_one_step_of_integrated_gradients_is_eap(llama):
    one = probe.attribute(llama, SEQUENCES, method="eap-ig", ig_steps=1)
    assert torch.equal(one.scores, probe.attribute(llama, SEQUENCES).scores)


def test_integrated_gradients_are_complete(tmp_path):
    """The edges out of `input` sum to L(no embedding) - L, the closer the more steps."""
    # A large epsilon: with a small one nearly all of the path lies in the first step.
    folder = save_small_model(tmp_path / "m", "llama", rms_norm_eps=0.3)
    model = probe.load_model(str(folder), dtype="float64")
    module = model.network._module
    errors = []
    for steps in (2, 3, 4):  # after which rounding is all that is left
        edges = probe.attribute(model, SEQUENCES[:1], method="eap-ig", ig_steps=steps)
        found = float(edges.scores[0, 0].sum())
        fed = torch.tensor([[*SEQUENCES[0].prompt, *SEQUENCES[0].answer[:-1]]])
        answer = torch.tensor(SEQUENCES[0].answer)
        losses = []
        for factor in (0.0, 1.0):
            with torch.no_grad():
                embedded = module.model.embed_tokens(fed) * factor
                logits = module(inputs_embeds=embedded, use_cache=False).logits[0, 5:]
            losses.append(float(nn.functional.cross_entropy(logits, answer)))
        errors.append(abs(found - (losses[0] - losses[1])) / abs(losses[0] - losses[1]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.001


def hold_denominators(module):
    """The rules of relevance patching, by other forwards of the modules."""

    def rms(offset):
        def forward(self, x):
            eps = getattr(self, "variance_epsilon", None) or self.eps
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).detach()
            return (self.weight + offset) * (wide * root).to(x.dtype)

        return forward

    def centred(self, x):
        wide = x - x.mean(-1, keepdim=True)
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps).detach()
        return wide * root * self.weight + self.bias

    class Line(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.activation = activation

        def forward(self, x):
            return x * (self.activation(x) / x).detach()

    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient / 2

    def experts(self, tokens, chosen, shares):
        total = torch.zeros_like(tokens)
        for token in range(len(tokens)):
            for expert, share in zip(chosen[token], shares[token], strict=True):
                gate, up = (self.gate_up_proj[expert] @ tokens[token]).chunk(2)
                inner = HalfGradient.apply(gate * (self.act_fn(gate) / gate).detach() * up)
                outer = HalfGradient.apply((self.down_proj[expert] @ inner) * share)
                total = total.index_add(0, torch.tensor([token]), outer[None])
        return total

    for child in list(module.modules()):
        kind = type(child).__name__
        if kind.endswith("RMSNorm"):
            offset = 1 if kind.startswith("Gemma") else 0
            child.forward = types.MethodType(rms(offset), child)
        elif isinstance(child, nn.LayerNorm):
            child.forward = types.MethodType(centred, child)
        elif kind.endswith("Experts"):
            child.forward = types.MethodType(experts, child)
        elif kind.endswith("MLP"):
            name = next(n for n in ("act_fn", "act", "activation_fn") if hasattr(child, n))
            setattr(child, name, Line(getattr(child, name)))
            if hasattr(child, "gate_proj") or hasattr(child, "gate_up_proj"):
                child.down_proj.register_forward_pre_hook(lambda _, x: HalfGradient.apply(x[0]))
    return module


@pytest.mark.parametrize(
    "name",
    [
        *(
            "llama",
            "qwen3",
            "gemma2",
            "gemma3_text",
            "gpt2",
            "gpt_neox",
            "phi3",
            "olmo2",
            "mixtral",
        ),
        *("phi", "arcee", "apertus", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "deepseek_v3"),
        *("olmoe", "granitemoe", "minimax_m2", "stablelm-parallel"),
    ],
)
def test_relevance_patching_is_autograd_by_its_rules(tmp_path, name):
    folder = save_small_model(tmp_path / "m", name)
    model = probe.load_model(str(folder))
    plain = probe.load_model(str(folder)).network._module
    if model.architecture.experts:
        plain.set_experts_implementation("eager")
    hold_denominators(plain)
    edges = probe.attribute(model, SEQUENCES, method="relp")
    every = edges.graph.mask.nonzero().tolist()
    names = [(edges.graph.sources[row], edges.graph.targets[column]) for row, column in every]
    for number, sequence in enumerate(SEQUENCES):
        slopes = edge_slopes(plain, sequence, names)
        found = edges.scores[number][edges.graph.mask].double()
        assert (found - slopes).abs().max() <= 2e-5 * slopes.abs().max()
    ordinary = probe.attribute(model, SEQUENCES)
    assert torch.allclose(edges.losses, ordinary.losses, atol=1e-5)
    assert not torch.allclose(edges.scores, ordinary.scores, rtol=0.1)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "relp", "exact"])
def test_mean_ablation_does_not_depend_on_the_batches(llama, method):
    options = {"method": method, "ablation": "mean", "granularity": "block"}
    small = probe.attribute(llama, SEQUENCES, batch_size=1, **options).scores
    large = probe.attribute(llama, SEQUENCES, batch_size=9, **options).scores
    assert (small - large).abs().max() <= 1e-5 * large.abs().max()


def test_mean_ablation_of_a_constant_source_changes_nothing(tmp_path):
    """A head's bias is the same at all positions: its mean is itself."""
    model = probe.load_model(str(save_small_model(tmp_path / "m", "gpt2")))
    edges = probe.attribute(model, SEQUENCES, granularity="head", ablation="mean", method="exact")
    row = edges.graph.sources.index("a0.bias")
    assert edges.scores[:, row].abs().max() < 1e-6
    assert edges.scores.abs().max() > 1e-2


def test_exact_effects_of_some_edges(llama):
    everything = probe.attribute(llama, SEQUENCES, method="exact", batch_size=40)
    edges = [Edge(1, 0, 12), Edge(0, 3, 10), Edge(1, 0, 12), Edge(0, 0, 0)]
    seen = []
    found = exact_effects(llama, SEQUENCES, edges, batch_size=2, progress=seen.append)
    expected = torch.stack([everything.scores[edge] for edge in edges])
    assert torch.allclose(found, expected, atol=2e-6)
    assert sum(seen) == 3  # one of the four stands twice
    assert exact_effects(llama, SEQUENCES, []).shape == (0,)
    for edge in (Edge(2, 0, 0), Edge(0, 6, 0), Edge(0, 0, 99)):
        with pytest.raises(ProbeError, match="is no edge"):
            exact_effects(llama, SEQUENCES, [edge])


def test_bad_options(llama):
    with pytest.raises(ProbeError, match="ig_steps is 0"):
        probe.attribute(llama, SEQUENCES, method="eap-ig", ig_steps=0)
    with pytest.raises(ProbeError, match="'noise' is not known; use zero or mean"):
        probe.attribute(llama, SEQUENCES, ablation="noise")
