"""Trajectories: the checkpoints of one training, as pairs with the model that it began from.

>>> made = Trajectory(name="grpo", base="a/base", checkpoints=("a/rl@step_100", "a/rl@step_200"))
>>> [pair.name for pair in pairs_of(made)]
['grpo-step-100', 'grpo-step-200']
"""

import re
from collections.abc import Iterable

from probe.checkpoints import OF_FOLDER, checkpoints_in
from probe.errors import ProbeError
from probe.recipe._sections import Asked, Comparison, Pair, Trajectory

# As trainers and hub revisions have it: checkpoint-500, global_step_40, step_100, iter_0000100.
_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)s?[-_]?(\d{1,18})", re.IGNORECASE)

# What pairs of trajectories are called, and those of a watched folder.
_NAMED = re.compile(r"(.+)-step-(\d{1,18})|(checkpoint|global_step|step)[-_](\d{1,18})(?:-.*)?")


def pairs_of(trajectory: Trajectory) -> tuple[Pair, ...]:
    """One pair a checkpoint, in the order given; those of a pattern by their numbers.

    Raises:
        ProbeError: A pattern fits nothing, or it is not clear which step a checkpoint is of.
    """
    checkpoints = trajectory.checkpoints
    if isinstance(checkpoints, str):
        named = OF_FOLDER in checkpoints
        checkpoints = tuple(checkpoints_in(checkpoints)) if named else (checkpoints,)
    if not checkpoints:
        raise ProbeError(f"trajectory {trajectory.name!r} has no checkpoints")
    steps = trajectory.steps or tuple(_step(reference) for reference in checkpoints)
    if len(steps) != len(checkpoints):
        raise ProbeError(
            f"trajectory {trajectory.name!r} has {len(checkpoints)} checkpoints and {len(steps)} "
            "steps; give each its own"
        )
    return tuple(
        Pair(
            name=f"{trajectory.name}-step-{step}",
            before=trajectory.base,
            after=reference,
            method=trajectory.method,
            prompt=trajectory.prompt,
            max_new_tokens=trajectory.max_new_tokens,
            shape=trajectory.shape,
            stop=trajectory.stop,
        )
        for step, reference in zip(steps, checkpoints, strict=True)
    )


def _step(reference: str) -> int:
    found = _STEP.findall(reference)
    if not found:
        raise ProbeError(f"{reference!r} says no step, as step_100 does; give the steps beside it")
    return int(found[-1])


def trainings_of(
    comparisons: Iterable[Comparison],
) -> dict[tuple[str, str, float], list[tuple[int, Comparison]]]:
    """Steps and comparisons of each training, in order, by its name, the benchmark and alpha.

    Pairs are of one where their names say so, `grpo-step-100` or a checkpoint's own folder,
    `checkpoint-100`, and the model before is the same.
    """
    found: dict[tuple[str, Asked, str, float], list[tuple[int, Comparison]]] = {}
    for one in comparisons:
        if named := _NAMED.fullmatch(one.pair.name):
            key = named[1] or named[3], one.pair.asked()[0], one.benchmark, one.alpha
            found.setdefault(key, []).append((int(named[2] or named[4]), one))
    return {
        (name, bench, alpha): sorted(steps, key=lambda each: each[0])
        for (name, _, bench, alpha), steps in found.items()
    }
