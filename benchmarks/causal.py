"""The causal test: how often it finds what is not there, and how many sets run in a second.

    python benchmarks/causal.py null runs/tiny-math             # some minutes on two cores
    python benchmarks/causal.py speed --shape mistral-7b --device cuda      # about a minute

`null` takes the SFT model of a run beside itself with noise in its weights. What edges do in the
model after is measured once; what a set does is taken as the sum of that over its edges. `speed`
scales random sets of edges of a random model, against its bare forward pass on as many rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attribution import SHAPES, random_model, random_sequences

import probe
from probe.attribution import attribute
from probe.models import Node
from probe.recipe import recipe_from
from probe.run._choosing import read_sides
from probe.stats import (
    Damages,
    judged_test,
    make_edge_test,
    make_set_test,
    match_edges,
    shares_of_edges,
    units_of,
)
from probe.store import RunFolder


def null(run: Path, pairs: int, questions: int, noise: float) -> None:
    """Print how many tests of a model against itself find something."""
    folder = RunFolder(run)
    recipe = recipe_from(folder.read_record()["recipe"], str(folder.record))
    sequences = read_sides(recipe, folder)[0].sequences[:questions]
    ranked, held_out = sequences[: questions * 3 // 5], sequences[questions * 3 // 5 :]
    model = probe.load_model(recipe.pairs[0].before)
    graph = model.graph("head")

    def levels() -> np.ndarray:
        scores = attribute(model, ranked, granularity="head").scores
        return shares_of_edges(scores, graph).mean(0)

    after = levels()
    edges = graph.mask.nonzero()
    alone = torch.zeros(len(edges), *graph.mask.shape, dtype=torch.bool)
    alone[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = True
    damages = {}
    for name, do, factor in (("scaled", "scale", 0.75), ("removed", "remove", None)):
        found = probe.intervene(model, held_out, alone, do, granularity="head", factor=factor)
        damages[name] = (found.loss - found.whole.loss).double().numpy()
    readers = [Node.parse(graph.targets[target]) for target in edges[:, 1]]
    kinds = [reader.branch or reader.kind for reader in readers]
    cells = [[reader.whole for reader in readers], kinds, [""] * len(readers)]
    module = model.network._module
    own = {name: value.clone() for name, value in module.state_dict().items()}
    p_values, verdicts = [], []
    for seed in range(pairs):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in module.parameters():
                value.add_(noise * value.std() * torch.randn(value.shape, generator=generator))
        change = np.sqrt(after) - np.sqrt(levels())
        module.load_state_dict(own)
        matching = match_edges(cells, after, change, 10, 500, seed)
        edge_tests, set_tests = [], []
        for name, damage in damages.items():
            every = np.arange(len(edges))
            edge_tests.append(make_edge_test(name, matching, change, damage.mean(1), every, seed))
            for label, drawn in matching.drawn.items():
                rows = np.concatenate([matching.treated[label][None], drawn])
                sums = damage[rows].sum(1)
                units = units_of(None, sums.shape[1])
                some = Damages(sums, np.zeros_like(sums))
                set_tests.append(make_set_test(label, name, matching, some, units))
        test = judged_test(edge_tests, set_tests)
        rows = (*test.edges, *test.sets)
        p_values += [row.p_value for row in rows]
        verdicts.append(any(row.verdict in ("more", "less") for row in rows))
    rate = np.mean(np.array(p_values) <= 0.05)
    print(f"{len(p_values)} tests, {rate:.1%} with p <= 0.05")
    print(f"{pairs} pairs, {np.mean(verdicts):.1%} with a verdict after Holm")


def speed(shape: str, device: str, sets: int, length: int, edges: int) -> None:
    """Print sets a second, and bare forward passes of as many rows."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model(shape, device, dtype)
    (sequence,) = random_sequences(model, [length])
    graph = model.graph("head")
    every = graph.mask.nonzero()
    generator = torch.Generator().manual_seed(0)
    chosen = [
        [tuple(every[i].tolist()) for i in torch.randint(len(every), (edges,), generator=generator)]
        for _ in range(sets)
    ]
    tokens = torch.tensor([[*sequence.prompt, *sequence.answer[:-1]]], device=model.device)
    rows = max(1, 8192 // length) if device.startswith("cuda") else max(1, 1024 // length)

    def bare() -> object:
        with torch.no_grad():
            for start in range(0, sets, rows):
                batch = tokens.expand(min(rows, sets - start), -1)
                logits = model.network._module(input_ids=batch, use_cache=False, logits_to_keep=1)
        return logits.logits.sum().item()

    def changed() -> object:
        return probe.intervene(
            model, [sequence], chosen, "scale", granularity="head", factor=0.75
        ).loss.sum()

    for name, call in (("bare forward passes", bare), ("sets", changed)):
        seconds = median_seconds(call)
        print(f"{name}: {sets / seconds:.1f} a second ({sets} of {length} tokens)")


def median_seconds(call: Callable[[], object], times: int = 3) -> float:
    """The median time of some calls behind a first one."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    of_null = what.add_parser("null")
    of_null.add_argument("run", type=Path)
    of_null.add_argument("--pairs", type=int, default=100)
    of_null.add_argument("--questions", type=int, default=100)
    of_null.add_argument("--noise", type=float, default=0.01)
    of_speed = what.add_parser("speed")
    of_speed.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    of_speed.add_argument("--device", default="cuda")
    of_speed.add_argument("--sets", type=int, default=64)
    of_speed.add_argument("--length", type=int, default=256)
    of_speed.add_argument("--edges", type=int, default=10)
    options = vars(parser.parse_args())
    {"null": null, "speed": speed}[options.pop("what")](**options)


if __name__ == "__main__":
    main()
