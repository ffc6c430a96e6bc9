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
prompt = model.tokenizer(arguments.prompt)["input_ids"]
answer = model.tokenizer(arguments.answer, add_special_tokens=False)["input_ids"]
sequence = probe.Sequence(prompt, answer)

found = probe.attribute(model, [sequence])
scores, graph = found.scores[0], found.graph
strongest = scores.abs().where(graph.mask, -1).flatten().argsort(descending=True)
strongest = strongest[: min(arguments.edges, int(graph.mask.sum()))].tolist()
edges = [probe.Edge(0, *divmod(place, len(graph.targets))) for place in strongest]
exact = probe.exact_effects(model, [sequence], edges)

print(f"{arguments.prompt} → {arguments.answer}   loss {found.losses[0]:.4f} nats a token")
print(f"the {len(edges)} strongest of {graph.mask.sum()} edges:\n")
print(f"{'edge':<18} {'eap':>10} {'removed':>10}")
for edge, effect in zip(edges, exact.tolist(), strict=True):
    name = f"{graph.sources[edge.source]} → {graph.targets[edge.target]}"
    print(f"{name:<18} {scores[edge.source, edge.target]:>+10.4f} {effect:>+10.4f}")
