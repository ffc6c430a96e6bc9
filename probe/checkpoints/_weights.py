"""Weights: how far each matrix moved from one checkpoint to the other.

The files are read slice by slice, so that no model is ever loaded. `relative` is how far a matrix
moved beside its size, `unchanged` the share of entries with exactly the same value: training in
bfloat16 with a small step leaves many as they were, and what was frozen is 1.

    >>> weight_changes("probe:tiny-math/sft", "probe:tiny-math/grpo")[0].name
    'model.embed_tokens.weight'
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from probe.checkpoints._references import find_checkpoint, weight_files
from probe.errors import ProbeError, reason

# Entries of both checkpoints that are in memory at once, times 2 x 4 bytes and a copy.
_ENTRIES = 2**24


@dataclass(frozen=True)
class WeightChange:
    """How far one matrix moved."""

    name: str
    """Its name in the checkpoint."""

    entries: int
    """How many numbers it holds."""

    size: float
    """Its Frobenius norm before."""

    moved: float
    """The Frobenius norm of after - before."""

    equal: int
    """How many entries have the same value before and after."""


@dataclass(frozen=True)
class KindChange:
    """The same matrix in all layers."""

    name: str
    """Its name, with * for the layer."""

    matrices: int
    """How many there are."""

    relative: float | None
    """Frobenius norm of after - before beside that of before, all layers as one; None if before
    is 0."""

    smallest: float | None
    """That of the layer that moved least."""

    largest: float | None
    """That of the layer that moved most."""

    unchanged: float
    """Share of entries with the same value."""


def weight_changes(before: str, after: str) -> list[WeightChange]:
    """Compare every matrix (a tensor of two or more dimensions) of two checkpoints.

    Args:
        before: The model before, as in a recipe.
        after: The model after.

    Raises:
        ProbeError: The weights are not here as safetensors, are damaged, or do not have the same
            matrices.
    """
    places = [_places(reference) for reference in (before, after)]
    names = [name for name in places[0] if name in places[1]]
    if len(names) < max(map(len, places)):
        alone = sorted(places[0].keys() ^ places[1].keys())
        raise ProbeError(
            f"{before} and {after} do not have the same matrices ({alone[0]!r} is in one of them "
            "only), so their weights cannot be compared"
        )
    return [_change(name, places[0][name], places[1][name]) for name in names]


def by_kind(changes: Sequence[WeightChange]) -> list[KindChange]:
    """Take the same matrix of all layers together, in the order in which they come first."""
    kinds: dict[str, list[WeightChange]] = {}
    for change in changes:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", change.name).removesuffix(".weight")
        kinds.setdefault(name, []).append(change)
    found = []
    for name, parts in kinds.items():
        each = [part.moved / part.size for part in parts if part.size]
        size = sum(part.size**2 for part in parts) ** 0.5
        moved = sum(part.moved**2 for part in parts) ** 0.5
        found.append(
            KindChange(
                name=name,
                matrices=len(parts),
                relative=moved / size if size else None,
                smallest=min(each, default=None),
                largest=max(each, default=None),
                unchanged=sum(part.equal for part in parts) / sum(part.entries for part in parts),
            )
        )
    return found


def _places(reference: str) -> dict[str, Path]:
    """In which file each matrix of a checkpoint is."""
    found, files = find_checkpoint(reference), weight_files(reference)
    if found and found.adapter:
        raise ProbeError(
            f"{reference!r} is an adapter, whose matrices are those of its base plus others; merge "
            "it into a folder of its own to compare weights"
        )
    if not files or any(path.suffix != ".safetensors" for path in files):
        raise ProbeError(f"the weights of {reference!r} are not on this machine as safetensors")
    places = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if len(file.get_slice(name).get_shape()) > 1:
                        places[name] = path
        except (SafetensorError, OSError) as error:
            raise ProbeError(f"{path}: damaged ({reason(error)})") from error
    return dict(sorted(places.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layers as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _change(name: str, before: Path, after: Path) -> WeightChange:
    entries, equal, size, moved = 0, 0, 0.0, 0.0
    for old, new in _slices(name, before, after):
        entries += old.numel()
        equal += int((old == new).sum())
        size += float(old.double().square().sum())
        moved += float((new.double() - old.double()).square().sum())
    return WeightChange(name, entries, size**0.5, moved**0.5, equal)


def _slices(name: str, before: Path, after: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with safe_open(before, framework="pt") as old, safe_open(after, framework="pt") as new:
        sides = old.get_slice(name), new.get_slice(name)
        shapes = [list(side.get_shape()) for side in sides]
        if shapes[0] != shapes[1]:
            raise ProbeError(
                f"{name} has shape {shapes[0]} in {before} and {shapes[1]} in {after}, so the "
                "weights cannot be compared"
            )
        rows, *rest = shapes[0]
        step = max(1, _ENTRIES // max(1, torch.Size(rest).numel()))
        for start in range(0, rows, step):
            yield sides[0][start : start + step].float(), sides[1][start : start + step].float()
