"""How long the checkpoints of a training take on a cluster: a simulation from measured parts.

    python benchmarks/cluster.py                       # 200 checkpoints on 64 GPUs
    python benchmarks/cluster.py --checkpoints 43 --gpus 8

Units are placed as `probe --cluster` makes them: in the order of the recipe, each on the first GPU
that is free. A unit starts, reads its weights, and works. All that read share the file system
evenly, and a node's link bounds what its units read together. What is measured, where and how, is
said below, beside each number; the file system is assumed, so several are shown.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHTS = 14.5e9
"""Bytes of a 7B model in bfloat16: 7.24e9 numbers."""

START = 13.0
"""Seconds until a process has libraries and a model on its card, without reading files: two H200,
`--only two-cards` (docs/performance.md)."""

SOLVE = 264_000 / 4716
"""Seconds of answering 1,319 questions, 264,000 tokens: one H100 (docs/generation.md)."""

SEQUENCE = 1.53 / 100
"""Seconds a sequence of 100 to 400 tokens, to edges on the disk: one H200 (docs/performance.md)."""

DIGEST, FINITE = 1.5e9, 4.4e9
"""Bytes a second that one core digests and looks through, of a file in memory: this and the next
two on a shared machine with two cores, SmolLM2-135M, torch 2.13."""

CHECK = 1.45
"""Seconds of processor time in which the command checks one more checkpoint beforehand."""

REPORT = 0.2
"""Seconds of processor time of a report for one more pair: 24 cells of 100 questions of a 7B model,
random scores."""

EDGES = 33.6e3
"""Bytes on the disk of a sequence's edges."""


@dataclass
class Task:
    """One unit that is under way."""

    gpu: int
    """Where."""

    start: float
    """Seconds until it reads."""

    read: float
    """Bytes that it has to read."""

    work: float
    """Seconds that it computes after that."""


def place(
    units: Sequence[tuple[float, float, float]],
    slots: int,
    on_a_node: int,
    disk: float,
    link: float,
) -> float:
    """Seconds until all units are done.

    Args:
        units: Of each the seconds of its start, the bytes that it reads, the seconds of its work.
        slots: How many run at once.
        on_a_node: How many of these one node has.
        disk: Bytes a second that the file system gives.
        link: Bytes a second that a node takes.
    """
    waiting, running, free, now = list(reversed(units)), [], list(range(slots)), 0.0
    while waiting or running:
        while waiting and free:
            running.append(Task(free.pop(0), *waiting.pop()))
        reading = [task for task in running if task.start <= 0 < task.read]
        nodes = [task.gpu // on_a_node for task in reading]
        rates = {
            id(task): min(disk / len(reading), link / nodes.count(node))
            for task, node in zip(reading, nodes, strict=True)
        }
        steps = [
            task.start
            if task.start > 0
            else task.read / rates[id(task)]
            if task.read > 0
            else task.work
            for task in running
        ]
        step = max(min(steps), 1e-6)
        now += step
        for task in running:
            if task.start > 0:
                task.start -= step
            elif task.read > 0:
                task.read -= step * rates[id(task)]
                task.read = 0.0 if task.read < 1 else task.read
            else:
                task.work -= step
        free += sorted(t.gpu for t in running if t.start <= 0 and t.read <= 0 and t.work <= 1e-9)
        running = [t for t in running if t.start > 0 or t.read > 0 or t.work > 1e-9]
    return now


def phases(
    checkpoints: int, gpus: int, on_a_node: int, cores: int, samples: int, disk: float, link: float
) -> dict[str, tuple[float, float]]:
    """Seconds and bytes read of each phase, controls left out."""
    models = checkpoints + 1
    own = WEIGHTS / DIGEST + WEIGHTS / FINITE
    sides = (START, WEIGHTS, samples * SEQUENCE)
    nodes = -(-gpus // on_a_node)
    edges = 2 * checkpoints * samples * EDGES
    return {
        "checks, where the command runs": (models * CHECK, 0),
        "weights read by all nodes": (
            place([(0, WEIGHTS, own)] * models, nodes * cores, cores, disk, link),
            models * WEIGHTS,
        ),
        "answers": (
            place([(START, WEIGHTS, SOLVE)] * models, gpus, on_a_node, disk, link),
            models * WEIGHTS,
        ),
        "edges": (
            place([sides] * (2 * checkpoints), gpus, on_a_node, disk, link),
            2 * checkpoints * WEIGHTS,
        ),
        "report, where the command runs": (checkpoints * REPORT, edges),
    }


def main() -> None:
    """Print a table: a row for each phase, a column for each file system."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpus-of-a-node", type=int, default=8)
    parser.add_argument("--cores-of-a-node", type=int, default=64)
    parser.add_argument("--samples", type=int, default=400, help="sequences of a side, all alphas")
    parser.add_argument("--disk", type=float, nargs="+", default=[2, 10, 40], help="GB/s")
    parser.add_argument("--link", type=float, default=12.5, help="GB/s of a node")
    options = parser.parse_args()
    columns = [
        phases(
            options.checkpoints,
            options.gpus,
            options.gpus_of_a_node,
            options.cores_of_a_node,
            options.samples,
            1e9 * disk,
            1e9 * options.link,
        )
        for disk in options.disk
    ]
    print("| |", " | ".join(f"{disk:g} GB/s" for disk in options.disk), "| read |")
    print("|---|" + "---:|" * (len(columns) + 1))
    for name in columns[0]:
        cells = " | ".join(f"{column[name][0] / 60:.1f} min" for column in columns)
        print(f"| {name} | {cells} | {columns[0][name][1] / 1e12:.2f} TB |")
    sums = " | ".join(f"{sum(s for s, _ in c.values()) / 60:.0f} min" for c in columns)
    print(f"| all | {sums} | {sum(b for _, b in columns[0].values()) / 1e12:.1f} TB |")
    one = phases(options.checkpoints, 1, 1, options.cores_of_a_node, options.samples, 1e13, 1e13)
    print(f"One GPU that never waits for a file: {sum(s for s, _ in one.values()) / 3600:.1f} h")


if __name__ == "__main__":
    main()
