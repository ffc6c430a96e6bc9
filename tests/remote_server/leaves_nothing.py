"""Score and generate twice on one actor; print whether all is alike, and what is left there."""

import sys

import nnsight
import torch

import probe
from probe.hosting import load_hosted, open_host
from probe.solutions import generate
from probe.tracing._contexts import _turn

url, reference = sys.argv[1:3]
model = load_hosted(reference, open_host(url))
network = model.network


def state():
    """A sum over all weights, and all flags, as they are on the server."""
    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(input_ids=torch.zeros(1, 1, dtype=torch.int64), backend=backend):
            parameters = list(network._module.parameters())
            total = sum(p.double().abs().sum() * (n + 1) for n, p in enumerate(parameters))
            flags = [p.requires_grad for p in parameters]
            flags += [module.training for module in network._module.modules()]
            hooks = [len(m._forward_hooks) for m in network._module.modules()]
            found = nnsight.save(torch.tensor([float(total), sum(flags), sum(hooks)]).double())
    return found


def everything():
    tokens = model.tokenizer("50-7-67-53=?50-7=43;")["input_ids"]
    sequences = [probe.Sequence(tokens[:12], tokens[12:]), probe.Sequence(tokens[:9], tokens[9:15])]
    results = [
        probe.attribute(model, sequences, **options).scores
        for options in (
            {},
            {"method": "relp", "granularity": "head"},
            {"method": "eap-ig", "ablation": "mean"},
            {"method": "exact", "granularity": "block"},
        )
    ]
    (answer,) = next(generate(model, [tokens[:12]], [20], stop=["="]))
    return [*results, torch.tensor(answer.tokens)]


before = state()
first = everything()
second = everything()
print("alike" if all(map(torch.equal, first, second)) else "different")
print("unchanged" if torch.equal(before, state()) else "changed")
