"""The loss of a model with edges weakened, in plain torch: the truth behind every score.

Knows every architecture by itself, from the models' own code, through forward hooks; shares
nothing with the package's tracing. It favours clarity over speed: one sequence at a time.

What writes to the residual stream (sources):

- `input`: what enters layer 0, embeddings scaled and positions added.
- `a0`, `m0`: what attention and FFN of layer 0 add to the stream, after a post-norm and after
  Granite's multiplier.
- `m0.e1`, `m0.shared`: of a mixture the parts of `m0`, one for each expert and one for the expert
  that every token has. A mixture with a post-norm is no sum over experts and has none.
- `a0.h1`, `a0.bias`: the parts of `a0`, one for each head and one for the bias of the output
  projection. An attention with a post-norm is no sum over heads and has none.

What reads it (targets):

- `a0`, `m0`, `logits`: an attention, an FFN (of a mixture of experts: router and experts), the
  final norm.
- `a0.q`, `a0.k`, `a0.v`: the attention, but only this projection sees the change.
- `a0.q.h1`: only this head's slice of that projection; key and value heads as they are.
"""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are, for the modules of one architecture."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    mixer: str | None = None
    """What some layers have instead: no query, key and value, and no heads."""
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    ffn: str = "mlp"
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_post_norm: str | None = None
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Of an attention; one where query, key and value are fused."""
    interleaved: bool = False
    """Whether a fused projection goes head by head: q, k, v of head 0, then of head 1, ..."""
    output_projection: str = "o_proj"
    one_norm: bool = False
    """Whether the FFN reads what the attention's norm gives, and has none of its own."""
    gated: bool = False
    """Whether a head's query is followed by its gate."""
    latent: bool = False
    """Whether keys and values come from one narrow vector (MLA); a head then has no key."""
    one_block: bool = False
    """Whether a layer is an attention or an FFN."""
    shared: str = "shared_expert"
    """Of a mixture the expert that every token has, if there is one."""


_LLAMA = Anatomy()
_GEMMA = Anatomy(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)
_POST_NORMED = Anatomy(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    ffn_norm=None,
    ffn_post_norm="post_feedforward_layernorm",
)

ANATOMIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "mixtral": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "cohere": Anatomy(one_norm=True),
    "cohere2": Anatomy(one_norm=True),
    "phi": Anatomy(final_norm="model.final_layernorm", output_projection="dense", one_norm=True),
    "phi3": Anatomy(projections=("qkv_proj",)),
    "olmo2": _POST_NORMED,
    "gpt2": Anatomy(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        projections=("c_attn",),
        output_projection="c_proj",
    ),
    **dict.fromkeys(
        (
            *("smollm3", "seed_oss", "cwm", "helium", "arcee", "ernie4_5", "gemma", "ministral"),
            *("ministral3", "nemotron", "starcoder2", "stablelm", "olmo", "olmoe", "qwen2_moe"),
            *("phimoe", "gpt_oss", "minimax_m2", "hunyuan_v1_dense"),
            "glm",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("dots1", "ernie4_5_moe", "glm4_moe"), Anatomy(shared="shared_experts")),
    "hunyuan_v1_moe": Anatomy(shared="shared_mlp"),
    "apertus": Anatomy(attention_norm="attention_layernorm", ffn_norm="feedforward_layernorm"),
    "glm4": Anatomy(
        attention_post_norm="post_self_attn_layernorm", ffn_post_norm="post_mlp_layernorm"
    ),
    **dict.fromkeys(("olmo3", "exaone4", "flex_olmo"), _POST_NORMED),
    "granitemoe": Anatomy(ffn="block_sparse_moe"),
    "llama4_text": Anatomy(ffn="feed_forward"),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        Anatomy(latent=True, shared="shared_experts"),
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        Anatomy(mixer="linear_attn", gated=True),
    ),
    "lfm2": Anatomy(
        final_norm="model.embedding_norm",
        mixer="conv",
        attention_norm="operator_norm",
        ffn="feed_forward",
        ffn_norm="ffn_norm",
        output_projection="out_proj",
    ),
    "nemotron_h": Anatomy(
        final_norm="model.norm_f",
        attention="mixer",
        attention_norm="norm",
        ffn="mixer",
        ffn_norm="norm",
        one_block=True,
        shared="shared_experts",
    ),
    "gptj": Anatomy(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        output_projection="out_proj",
        one_norm=True,
    ),
    "gpt_neox": Anatomy(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        projections=("query_key_value",),
        interleaved=True,
        output_projection="dense",
    ),
}


def edge_losses(module, sequence, source, target, strength=0.0):
    """Loss of one sequence when `strength` of a source's output is taken from one branch's input.

    strength 0 is the model as it is, 1 is zero ablation of the edge.
    """
    return loss_without(module, sequence, {target: {source: strength}})


def loss_without(module, sequence, removed):
    """Loss of one sequence with several edges weakened: {target: {source: strength}}.

    What is taken away is what the source writes in this very run, so a source that other
    removals have changed is removed as it then is.
    """
    return value_without(module, sequence, removed)


def value_without(module, sequence, removed, value=None, beside=None):
    """The same of a value: a function of logits [token, vocabulary] and labels.

    With `beside`, another sequence as long, what a source writes there takes the place of what is
    taken away.
    """
    with torch.no_grad():
        other = None if beside is None else _run(module, beside).outputs
        return float(_value(_run(module, sequence, removed, other), sequence, value))


def edge_slopes(module, sequence, edges, value=None, entered=None, beside=None):
    """Derivative of `edge_losses` by the strength, at 0, for each (source, target).

    No finite step, so no error of one: plain torch differentiates the loss by the strength.

    With `value` it is the derivative of that; with `entered`, a function of what enters layer 0,
    it is taken there, of what sources write when nothing is changed; `beside` as above.
    """
    strengths = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
    removed = defaultdict(dict)
    for strength, (source, target) in zip(strengths, edges, strict=True):
        removed[target][source] = strength
    with torch.no_grad():
        written = None if entered is None else _run(module, sequence).outputs
        other = None if beside is None else _run(module, beside).outputs
    with torch.enable_grad():
        run = _run(module, sequence, removed, other, entered, written)
        return torch.autograd.grad(_value(run, sequence, value), strengths)[0]


def node_outputs(module, sequence):
    """What every source writes, blocks and heads: tensors [position, d_model] by name."""
    with torch.no_grad():
        return {name: value[0] for name, value in _run(module, sequence).outputs.items()}


def streams(module, sequence):
    """The residual stream that every target reads: tensors [position, d_model] by name."""
    with torch.no_grad():
        found = _run(module, sequence).streams
    return {target: found[target.partition(".")[0]][0] for target in edges(module)}


def last_stream(module, sequence):
    """The final norm's input: [position, d_model]."""
    return streams(module, sequence)["logits"]


def edges(module):
    """Every target of a model with all that it may read: {target: [source, ...]}.

    The lists hold blocks, then the heads, biases and experts that these blocks are sums of.
    """
    sizes = _sizes(module)
    anatomy = _anatomy(module)
    blocks, parts, found = ["input"], [], {}
    for number, layer in enumerate(attrgetter(anatomy.layers)(module)):
        attention, kind = f"a{number}", _kind(anatomy, layer)
        targets = [attention] if "a" in kind else []
        if "q" in kind:
            targets += [f"{attention}.{part}" for part in "qkv"]
        if "h" in kind:
            targets += [
                f"{attention}.{part}.h{head}" for part in "qkv" for head in range(sizes[part])
            ]
        for name in targets:
            found[name] = blocks + parts
        own = []
        if "h" in kind and anatomy.attention_post_norm is None:
            own = [f"{attention}.h{head}" for head in range(sizes["q"])]
            if _output_projection(anatomy, layer).bias is not None:
                own.append(f"{attention}.bias")
        if _is_parallel(module):
            found[f"m{number}"] = blocks + parts
        blocks = [*blocks, attention] if "a" in kind else blocks
        parts = parts + own
        if "m" in kind:
            if not _is_parallel(module):
                found[f"m{number}"] = blocks + parts
            blocks = [*blocks, f"m{number}"]
            experts = _experts(anatomy, layer)
            if experts and anatomy.ffn_post_norm is None:
                parts = [*parts, *(f"m{number}.e{e}" for e in range(experts.num_experts))]
                parts += [f"m{number}.shared"] * (_shared(anatomy, layer) is not None)
    return found | {"logits": blocks + parts}


class _Run(NamedTuple):
    logits: torch.Tensor
    outputs: dict
    streams: dict


def _run(module, sequence, removed=None, other=None, entered=None, written=None):
    """One forward pass, watched, with the input of some branches changed.

    What is taken is what sources write, here or as `written` says, less what `other` says.
    """
    removed = {} if removed is None else removed
    _check(module, removed)
    anatomy = _anatomy(module)
    multiplier = getattr(module.config, "residual_multiplier", 1.0)
    outputs, seen = {}, {}

    def taken(*targets):
        """What these targets are no longer to see."""
        return sum(
            strength * ((written or outputs)[source] - (0 if other is None else other[source]))
            for target in targets
            for source, strength in removed.get(target, {}).items()
        )

    def read(name):
        """Watch and change the stream where a branch begins: at its norm, if it has one."""

        def hook(_, arguments, keywords):
            # Transformers passes the stream either as first argument or by this name.
            stream = arguments[0] if arguments else keywords["hidden_states"]
            seen[name] = stream
            if name not in removed:
                return None
            if arguments:
                return (stream - taken(name), *arguments[1:]), keywords
            return arguments, keywords | {"hidden_states": stream - taken(name)}

        return hook

    def look(*names):
        """See the stream where several branches read it through one norm."""

        def hook(_, arguments):
            for name in names:
                seen[name] = arguments[0]

        return hook

    def read_behind(name, norm):
        """Let a block have what a norm makes of the stream that this branch is to see."""

        def hook(_, arguments, keywords):
            if name not in removed:
                return None
            given = norm.forward(seen[name] - taken(name))
            if arguments:
                return (given, *arguments[1:]), keywords
            return arguments, keywords | {"hidden_states": given}

        return hook

    def write(name):
        def hook(_, __, output):
            output = output[0] if isinstance(output, tuple) else output
            # Some mixtures give the tokens of all sequences one after the other.
            outputs[name] = multiplier * (output[None] if output.ndim == 2 else output)

        return hook

    def write_heads(name, size):
        def hook(projection, arguments):
            # Conv1D holds its weight as [in, out], Linear as [out, in].
            is_conv = type(projection).__name__ == "Conv1D"
            weight = projection.weight if is_conv else projection.weight.T
            mixed = arguments[0]
            for head, columns in enumerate(torch.arange(mixed.shape[-1]).split(size)):
                part = mixed[..., columns] @ weight[columns]
                outputs[f"{name}.h{head}"] = multiplier * part
            if projection.bias is not None:
                bias = multiplier * projection.bias
                outputs[f"{name}.bias"] = bias.expand(*mixed.shape[:-1], -1)

        return hook

    def write_experts(name, layer):
        def hook(experts, given, _):
            for number in range(experts.num_experts):
                part = _expert(getattr(layer, anatomy.ffn), experts, number, given)
                outputs[f"{name}.e{number}"] = multiplier * part[None]

        return hook

    def write_shared(name, layer):
        def hook(_, given, output):
            gate = getattr(getattr(layer, anatomy.ffn), "shared_expert_gate", None)
            share = 1.0 if gate is None else gate.forward(given[0]).sigmoid()
            part = multiplier * share * output
            outputs[f"{name}.shared"] = part[None] if part.ndim == 2 else part

        return hook

    def project(name, norm, compute, rows):
        """Compute again, from the changed stream, the slices of a projection that see it."""

        def hook(_, __, output):
            for part, heads in rows.items():
                for head, places in enumerate(heads):
                    own = [f"{name}.{part}", f"{name}.{part}.h{head}"]
                    if not any(target in removed for target in own):
                        continue
                    stream = seen[name] - taken(name, *own)
                    # .forward, since a call would run the hooks again
                    changed = compute(stream if norm is None else norm.forward(stream))
                    changed = changed.view(output.shape)
                    output = output.index_copy(-1, places, changed[..., places])
            return output

        return hook

    with ExitStack() as stack:

        def watch(handle):
            stack.callback(handle.remove)

        def enter(_, arguments):
            outputs["input"] = arguments[0]
            if entered is None:
                return None
            outputs["input"] = entered(arguments[0])
            return (outputs["input"], *arguments[1:])

        layers = attrgetter(anatomy.layers)(module)
        watch(layers[0].register_forward_pre_hook(enter))
        for number, layer in enumerate(layers):
            name, kind = f"a{number}", _kind(anatomy, layer)
            attention, norm = _attention(anatomy, layer), None
            if "a" in kind:
                norm = anatomy.attention_norm and getattr(layer, anatomy.attention_norm)
            if _one_norm(module):
                # The branches part behind the norm, where each block is given its own.
                watch(norm.register_forward_pre_hook(look(name, f"m{number}")))
                for place, block in ((name, attention), (f"m{number}", layer.mlp)):
                    hook = read_behind(place, norm)
                    watch(block.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                begins = {name: norm or attention} if "a" in kind else {}
                if "m" in kind:
                    begins[f"m{number}"] = getattr(layer, anatomy.ffn_norm or anatomy.ffn)
                for place, begin in begins.items():
                    watch(begin.register_forward_pre_hook(read(place), with_kwargs=True))
            for place, compute, rows in _rows(module, anatomy, attention) if "q" in kind else ():
                watch(place.register_forward_hook(project(name, norm, compute, rows)))
            if "a" in kind and anatomy.attention_post_norm is None:
                watch(attention.register_forward_hook(write(name)))
                if "h" in kind:
                    last = _output_projection(anatomy, layer)
                    watch(last.register_forward_pre_hook(write_heads(name, _sizes(module)["head"])))
            elif "a" in kind:
                post = getattr(layer, anatomy.attention_post_norm)
                watch(post.register_forward_hook(write(name)))
            if "m" in kind:
                end = getattr(layer, anatomy.ffn_post_norm or anatomy.ffn)
                watch(end.register_forward_hook(write(f"m{number}")))
                experts, shared = _experts(anatomy, layer), _shared(anatomy, layer)
                if experts:
                    watch(experts.register_forward_hook(write_experts(f"m{number}", layer)))
                if experts and shared:
                    watch(shared.register_forward_hook(write_shared(f"m{number}", layer)))
        final = attrgetter(anatomy.final_norm)(module)
        watch(final.register_forward_pre_hook(read("logits"), with_kwargs=True))

        if next(module.parameters()).dtype == torch.float64 and hasattr(
            module.config, "_experts_implementation"
        ):
            # The fast kernel for experts knows no float64; plain loops do.
            before = module.config._experts_implementation
            module.config._experts_implementation = "eager"
            stack.callback(setattr, module.config, "_experts_implementation", before)
        fed = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])
        logits = module(input_ids=fed, use_cache=False).logits
    return _Run(logits, outputs, seen)


def _value(run, sequence, value=None):
    """The mean of a value over the answer; of the loss if not given."""
    answer = torch.tensor(list(sequence.answer))
    scored = run.logits[0, len(sequence.prompt) - 1 :].double()
    return (value or torch.nn.functional.cross_entropy)(scored, answer).mean()


def _rows(module, anatomy, attention):
    """Which rows of which projection make each head.

    A list of (projection, how it is computed from what the attention is given, {part: [rows of a
    head]}).
    """
    sizes = _sizes(module)
    size = sizes["head"]
    if anatomy.latent:
        return _latent_rows(attention, sizes["q"])
    places = [getattr(attention, name) for name in anatomy.projections]
    if anatomy.interleaved:
        blocks = torch.arange(3 * sizes["q"] * size).view(sizes["q"], 3, size)
        rows = {part: blocks[:, i] for i, part in enumerate("qkv")}
        return [(places[0], places[0].forward, rows)]
    widths = [sizes[part] * size for part in "qkv"]
    if len(places) == 1:
        spans = torch.arange(sum(widths)).split(widths)
        rows = {part: span.split(size) for part, span in zip("qkv", spans, strict=True)}
        return [(places[0], places[0].forward, rows)]
    found = []
    for place, part, width in zip(places, "qkv", widths, strict=True):
        wide = 2 if anatomy.gated and part == "q" else 1
        rows = {part: torch.arange(wide * width).split(wide * size)}
        found.append((place, place.forward, rows))
    return found


def _latent_rows(attention, heads):
    """The same where keys and values are made of one narrow vector; a part is one head."""
    rank, rotated = attention.kv_lora_rank, attention.qk_rope_head_dim
    key, value = attention.qk_nope_head_dim, attention.v_head_dim
    narrow, wide = attention.kv_a_proj_with_mqa, attention.kv_b_proj

    def query(given):
        if attention.q_lora_rank is None:
            return attention.q_proj.forward(given)
        return attention.q_b_proj.forward(
            attention.q_a_layernorm.forward(attention.q_a_proj.forward(given))
        )

    def expand(given):
        return wide.forward(attention.kv_a_layernorm.forward(narrow.forward(given)[..., :rank]))

    last = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    columns = torch.arange(heads * (key + value)).view(heads, key + value)
    both = {"k": [columns[:, :key].flatten()], "v": [columns[:, key:].flatten()]}
    return [
        (last, query, {"q": [torch.arange(last.out_features)]}),
        (narrow, narrow.forward, {"k": [torch.arange(rank, rank + rotated)]}),
        (wide, expand, both),
    ]


def _sizes(module):
    """How many heads query, key and value have, and how wide one is."""
    config = module.config
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"q": heads, "k": grouped, "v": grouped, "head": size}


def _anatomy(module):
    return ANATOMIES[module.config.model_type]


def _kind(anatomy, layer):
    """What a layer has: `a` attention or what stands there, `q` its parts, `h` heads, `m` FFN."""
    if anatomy.one_block:
        name = type(layer.mixer).__name__
        return "aqh" if name.endswith("Attention") else "a" if "Mamba" in name else "m"
    if anatomy.mixer and hasattr(layer, anatomy.mixer):
        return "am"
    return "aqm" if anatomy.latent else "aqhm"


def _attention(anatomy, layer):
    instead = anatomy.mixer and getattr(layer, anatomy.mixer, None)
    return instead or getattr(layer, anatomy.attention)


def _one_norm(module):
    kind, config = module.config.model_type, module.config
    return _anatomy(module).one_norm or (kind == "stablelm" and config.use_parallel_residual)


def _is_parallel(module):
    return _one_norm(module) or getattr(module.config, "use_parallel_residual", False)


def _experts(anatomy, layer):
    """The experts of a layer's mixture; None where it is dense."""
    return getattr(getattr(layer, anatomy.ffn), "experts", None)


def _shared(anatomy, layer):
    return getattr(getattr(layer, anatomy.ffn), anatomy.shared, None)


def _expert(block, experts, number, given):
    """What one expert adds: [token, d_model]; of tokens that are not its own, zeros."""
    name = type(experts).__name__
    if name == "Llama4TextExperts":
        # Every expert is given all tokens, which the router has weighted, by 0 if need be.
        tokens = given[0].unflatten(0, (experts.num_experts, -1))[number]
        gate, up = (tokens @ experts.gate_up_proj[number]).chunk(2, -1)
        return (up * experts.act_fn(gate)) @ experts.down_proj[number]
    tokens, chosen, weights = given  # some routers' weights are in float32
    share = (weights * (chosen == number)).sum(-1, keepdim=True).to(tokens.dtype)
    if name == "GptOssExperts":
        both = tokens @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
        gate = both[:, 0::2].clamp(max=experts.limit)
        up = both[:, 1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * (gate * experts.alpha).sigmoid()
        return share * (inner @ experts.down_proj[number] + experts.down_proj_bias[number])
    if name == "NemotronHExperts":
        inner = experts.act_fn(tokens @ experts.up_proj[number].T)
        return block.fc2_latent_proj.forward(share * (inner @ experts.down_proj[number].T))
    gate, up = (tokens @ experts.gate_up_proj[number].T).chunk(2, -1)
    return share * ((experts.act_fn(gate) * up) @ experts.down_proj[number].T)


def _output_projection(anatomy, layer):
    return getattr(getattr(layer, anatomy.attention), anatomy.output_projection)


def _check(module, removed):
    """Refuse what is no edge; a source that runs after its target cannot be taken from it."""
    if removed:
        known = edges(module)
        for target, sources in removed.items():
            for source in sources:
                if source not in known.get(target, ()):
                    raise ValueError(f"{source} -> {target} is no edge of this model")
