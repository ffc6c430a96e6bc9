"""Watching: the checkpoints of a training run, each scored as the trainer has written it.

Every checkpoint is a pair of the base and itself, and all are in one run folder, so that a watch
that was stopped goes on, and a checkpoint that the trainer has deleted since stays in the report.

    >>> for scored in watch("runs/grpo", "tiny-math"):
    ...     print(scored.line)
    checkpoint-20: tiny-math 58.5 % -> 61.0 % right, activation_intensity +4.1 % at alpha 0.5
"""

import re
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from probe.checkpoints import OF_FOLDER, files_state, folders_in, is_whole, trainer_state
from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.recipe import Recipe, read_recipe
from probe.report import Report, read_report
from probe.run._run import run_recipe
from probe.store import RunFolder

SECONDS = 5.0
"""How long a checkpoint must have been as it is, and how often is looked for new ones."""


class Scored(NamedTuple):
    """A checkpoint that was scored."""

    name: str
    """The name of its pair in the run folder."""

    step: int | None
    """The training step, by its state or its name; None where neither tells."""

    report: Report
    """The report of all checkpoints so far."""

    @property
    def scalars(self) -> dict[str, float]:
        """Its numbers by name, as a tracker takes them: accuracies and changes, as fractions.

        `tiny-math/accuracy`, and `tiny-math/alpha-0.3/activation_intensity` for a relative change
        from the base.
        """
        found = {
            f"{row.benchmark}/accuracy": row.after
            for row in self.report.accuracy
            if row.pair == self.name
        }
        for cell in self.report.cells:
            if cell.pair == self.name and cell.change is not None:
                control = f" ({cell.control})" if cell.control else ""
                found[f"{cell.benchmark}/alpha-{cell.alpha:g}/{cell.metric}{control}"] = cell.change
        return {name: value for name, value in found.items() if value is not None}

    @property
    def line(self) -> str:
        """The most important of it, in a line."""
        parts = []
        for row in self.report.accuracy:
            if row.pair != self.name or row.before is None or row.after is None:
                continue
            part = f"{row.benchmark} {100 * row.before:.1f} % -> {100 * row.after:.1f} % right"
            key = self.name, row.benchmark, "activation_intensity", ""
            changes = [
                (cell.change, cell.alpha)
                for cell in self.report.cells
                if (cell.pair, cell.benchmark, cell.metric, cell.control) == key
            ]
            for change, alpha in changes[-1:]:
                if change is not None:
                    part += f", activation_intensity {100 * change:+.1f} % at alpha {alpha:g}"
            parts.append(part)
        return f"{self.name}: {'; '.join(parts) or 'nothing could be compared'}"


def watch(
    folder: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Mapping[str, str | int | float] | None = None,
    console: Console | None = None,
) -> Iterator[Scored]:
    """Score each checkpoint of a training run as it is written, in the order of their numbers.

    Ends when the last step of the training is scored, where the trainer writes how many there are
    (`trainer_state.json`), and otherwise never. What was scored before is given first.

    Args:
        folder: The trainer's output folder, which need not be there yet, for its folders
            `checkpoint-*`; others are `runs/verl#global_step_*/actor/huggingface`.
        recipe: A recipe's name, a TOML file, or a recipe. The model before is the base; the first
            pair says how models are asked, and what stands for the model after does not count.
        output: The run folder; `FOLDER/probe` if not given.
        overrides: Values by dotted key, as in `run_recipe`; not for a `Recipe`.
        console: Where progress goes; standard error if not given.

    Yields:
        Each checkpoint when it is scored.

    Raises:
        ProbeError: The recipe has several bases, or the first checkpoint cannot be compared with
            its base. One that cannot be compared later is named and left out.
    """
    recipe = watch_recipe(recipe, overrides)
    console = console or PlainConsole(stderr=True)
    given, _, pattern = str(folder).partition(OF_FOLDER)
    outside = Path(given).expanduser()
    path = Path(output) if output else outside / "probe"
    done: set[str] = set()
    for scored in _scored_before(path):
        done.add(scored.name)
        yield scored
    failed: set[str] = set()
    for name, place in _whole_ones(outside, pattern or "checkpoint-*", done, failed, console):
        reference = f"{outside}{OF_FOLDER}{place.relative_to(outside)}"
        try:
            scored = score_checkpoint(recipe, name, reference, path, console)
        except ProbeError as error:
            if not done:
                raise
            failed.add(name)
            console.print(f"left out: {name}: {error}", soft_wrap=True)
            continue
        done.add(name)
        yield scored


def watch_recipe(
    recipe: str | Path | Recipe, overrides: Mapping[str, str | int | float] | None = None
) -> Recipe:
    """Read a recipe that says how checkpoints are compared with one base.

    Raises:
        ProbeError: There is none, or it has several bases.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    bases = {pair.before for pair in recipe.pairs}
    if len(bases) > 1:
        raise ProbeError(
            f"{recipe.name} has {len(bases)} models before, {', '.join(sorted(bases))}; "
            "checkpoints are compared with one"
        )
    return recipe


def _whole_ones(
    outside: Path, pattern: str, done: Set[str], failed: Set[str], console: Console
) -> Iterator[tuple[str, Path]]:
    """The checkpoints in a folder that are neither done nor failed, each once it is whole.

    Ends when that of the last step of the training is one of these.
    """
    seen: dict[str, object] = {}
    while True:
        found = {_name(place, outside): place for place in folders_in(outside, pattern)}
        states = {name: files_state(place) for name, place in found.items()}
        through = done | failed
        left = [name for name in found if name not in through]
        still = [name for name in left if seen.get(name) == states[name]]
        ready = [name for name in still if is_whole(found[name])]
        yield from ((name, found[name]) for name in ready)
        if not ready:
            if still == left and any(_is_last(found[name]) for name in through & found.keys()):
                if left:
                    console.print(f"left out, not whole: {', '.join(left)}", soft_wrap=True)
                return
            time.sleep(SECONDS)
            seen = dict(states)


def score_checkpoint(
    recipe: Recipe, name: str, reference: str, output: Path, console: Console
) -> Scored:
    """Compare a checkpoint with the base of a recipe, in a run folder with those before it.

    Args:
        recipe: The recipe; its first pair says how models are asked.
        name: What the pair is called.
        reference: The checkpoint.
        output: The run folder.
        console: Where progress goes.

    Raises:
        ProbeError: See `run_recipe`.
    """
    pair = replace(recipe.pairs[0], name=name, after=reference)
    report = run_recipe(replace(recipe, pairs=(pair,)), output, add=True, console=console)
    return Scored(name, _step(Path(reference.replace(OF_FOLDER, "/"))), report)


def _scored_before(output: Path) -> Iterator[Scored]:
    """The checkpoints of which a run folder holds all."""
    folder = RunFolder(output)
    if not folder.record.exists():
        return
    report = read_report(output)
    compared = {row.pair for row in report.accuracy}
    for pair in report.recipe.pairs:
        if pair.name in compared and not any(f"{pair.name}." in line for line in report.missing):
            yield Scored(pair.name, _step(Path(pair.after.replace(OF_FOLDER, "/"))), report)


def _name(place: Path, outside: Path) -> str:
    """What a checkpoint's pair is called."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(place.relative_to(outside)))


def _step(place: Path) -> int | None:
    """The training step of a checkpoint."""
    state = trainer_state(place)
    numbers = re.findall(r"\d+", str(place.name)) or re.findall(r"\d+", str(place))
    return state[0] if state else int(numbers[-1]) if numbers else None


def _is_last(place: Path) -> bool:
    """Whether a training ends with a checkpoint, as far as its trainer says."""
    step, last = trainer_state(place) or (0, 0)
    return 0 < last <= step
