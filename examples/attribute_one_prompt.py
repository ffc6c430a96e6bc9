"""Which edges does a model need for one answer, and what does each of them really do?

    python examples/attribute_one_prompt.py
    python examples/attribute_one_prompt.py Qwen/Qwen2.5-0.5B "The capital of France is" " Paris"

The strongest edges by edge attribution patching (eap), beside what the loss gains when each of
them is removed for real. The two need not agree; docs/faithfulness.md says why.
"""

import argparse

import probe

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("model", nargs="?", default="probe:tiny-math/sft")
parser.add_argument("prompt", nargs="?", default="50-7-67-53=?")
parser.add_argument("answer", nargs="?", default="50-7=43;")
parser.add_argument("--edges", type=int, default=10, help="how many to show")
arguments = parser.parse_args()

model = probe.load_model(arguments.model)
text = (arguments.prompt, arguments.answer)
found = probe.attribute(model, text)
strongest, graph = found.top(arguments.edges), found.graph
edges = [
    probe.Edge(0, graph.sources.index(edge.source), graph.targets.index(edge.target))
    for edge in strongest
]
exact = probe.exact_effects(model, text, edges)

print(f"{arguments.prompt} → {arguments.answer}   loss {found.losses[0]:.4f} nats a token")
print(f"the {len(edges)} strongest of {graph.mask.sum()} edges:\n")
print(f"{'edge':<18} {'eap':>10} {'removed':>10}")
for edge, effect in zip(strongest, exact.tolist(), strict=True):
    print(f"{f'{edge.source} → {edge.target}':<18} {edge.score:>+10.4f} {effect:>+10.4f}")
