"""The loss of a model with one edge weakened, in plain torch: the truth behind every score.

Knows the Llama family's modules by itself and shares nothing with the package's tracing.
"""

from contextlib import ExitStack

import torch


def edge_losses(module, sequence, source, target, strength=0.0):
    """Loss of one sequence when `strength` of a source's output is taken from one branch's input.

    strength 0 is the model as it is, 1 is zero ablation of the edge.
    """
    layers = module.model.layers
    outputs = {}

    def keep(name):
        def hook(_, __, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def weaken(norm):
        def hook(_, arguments):
            return (norm(streams[-1] - strength * outputs[source]), *arguments[1:])

        return hook

    streams = []

    def watch(_, arguments):
        streams.append(arguments[0])

    with ExitStack() as stack:

        def add(handle):
            stack.callback(handle.remove)

        add(module.model.embed_tokens.register_forward_hook(keep("input")))
        for number, layer in enumerate(layers):
            add(layer.self_attn.register_forward_hook(keep(f"a{number}")))
            add(layer.mlp.register_forward_hook(keep(f"m{number}")))
        node, _, branch = target.partition(".")
        if node == "logits":
            norm, at = module.model.norm, [module.lm_head]
        else:
            layer = layers[int(node[1:])]
            if node[0] == "m":
                norm, at = layer.post_attention_layernorm, [layer.mlp]
            else:
                norm = layer.input_layernorm
                at = [getattr(layer.self_attn, f"{b}_proj") for b in branch or "qkv"]
        add(norm.register_forward_pre_hook(watch))
        original = norm.forward
        for place in at:
            # norm(...) inside would watch again; call its forward alone
            add(place.register_forward_pre_hook(weaken(original)))
        fed = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]])
        with torch.no_grad():
            logits = module(fed, use_cache=False).logits[0, len(sequence.prompt) - 1 :]
    logits = logits.double()
    answer = torch.tensor(list(sequence.answer))
    return float(torch.nn.functional.cross_entropy(logits, answer))
