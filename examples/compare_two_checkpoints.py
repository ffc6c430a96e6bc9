"""Two checkpoints, a handful of questions, no recipe: the steps of a run, one by one.

    python examples/compare_two_checkpoints.py
    python examples/compare_two_checkpoints.py ./before ./after --prompt "Q: {question} A:"

Solve, select, attribute, compare. `probe.run_recipe` does the same, and keeps it all in a folder.
"""

import argparse

import probe
from probe.metrics import Entries
from probe.problems import load_problems
from probe.run import cut
from probe.solutions import solve
from probe.stats import compare_sides

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("before", nargs="?", default="probe:tiny-math/sft")
parser.add_argument("after", nargs="?", default="probe:tiny-math/grpo")
parser.add_argument("--benchmark", default="tiny-math")
parser.add_argument("--prompt", default="{question}")
parser.add_argument("--questions", type=int, default=100)
arguments = parser.parse_args()

problems = load_problems(arguments.benchmark, questions=arguments.questions)
models = [probe.load_model(name) for name in (arguments.before, arguments.after)]
solutions = []
for model in models:
    batches = solve(model, problems, arguments.prompt, max_new_tokens=64, batch_size=50)
    solutions.append([solution for batch in batches for solution in batch])
    right = sum(solution.correct for solution in solutions[-1])
    print(f"{model.reference} solves {right} of {len(problems)} questions")

selection = probe.select(*solutions, alpha=0.3)
edges = [
    probe.attribute(model, cut(answers, selection))
    for model, answers in zip(models, solutions, strict=True)
]
print(f"{len(selection.ids)} questions, the first {selection.cut_length} tokens of each answer\n")

print(f"{'metric':<24} {'before':>9} {'after':>9} {'change':>8}   {'95 %':<15} p")
entries = [
    Entries(side.scores, side.graph.mask, dense=True, entropies=side.entropies) for side in edges
]
for name, found in compare_sides(*entries).items():
    # Not everything is defined for few questions: the diversity of one, for example.
    before, after = (
        f"{value:.3g}" if value is not None else "-" for value in (found.before, found.after)
    )
    change = "-" if found.change is None else f"{found.change:+.1%}"
    interval = " .. ".join(f"{end:+.0%}" for end in found.interval or ()) or "-"
    p_value = "-" if found.p_value is None else f"{found.p_value:.3g}"
    print(f"{name:<24} {before:>9} {after:>9} {change:>8}   {interval:<15} {p_value}")
