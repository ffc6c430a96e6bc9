"""Weights: how far each matrix moved from one checkpoint to the other.

The files are read slice by slice, so that no model is ever loaded. `relative` is how far a matrix
moved beside its size, `unchanged` the share of entries with exactly the same value: training in
bfloat16 with a small step leaves many as they were, and what was frozen is 1.

    >>> weight_changes("probe:tiny-math/sft", "probe:tiny-math/grpo")[0].name
    'model.embed_tokens.weight'
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
    names = _common(places[0], places[1], f"{before} and {after}")
    return [_change(name, _slices(name, places[0][name], places[1][name])) for name in names]


def tensor_changes(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> list[WeightChange]:
    """Compare every matrix of two models that are in memory, as `weight_changes` does of files.

    Args:
        before: The tensors of the model before, by their names.
        after: Those of the model after.

    Raises:
        ProbeError: They do not have the same matrices.
    """
    sides = [{name: x for name, x in side.items() if x.ndim > 1} for side in (before, after)]
    names = _common(sides[0], sides[1], "the two models")
    found = []
    for name in names:
        old, new = sides[0][name], sides[1][name]
        _check_shapes(name, list(old.shape), list(new.shape), "before", "after")
        step = _rows_at_once(old.shape)
        pairs = zip(old.split(step), new.split(step), strict=True)
        found.append(_change(name, ((a.float(), b.float()) for a, b in pairs)))
    return found


def has_plain_weights(reference: str) -> bool:
    """Whether a model's weights are safetensors files here, and all of it: no adapter."""
    found, files = find_checkpoint(reference), weight_files(reference)
    whole = bool(files) and all(path.suffix == ".safetensors" for path in files)
    return whole and not (found and found.adapter)


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


def total_change(changes: Sequence[WeightChange]) -> float | None:
    """Frobenius norm of after - before beside that of before, all matrices as one."""
    size = sum(change.size**2 for change in changes) ** 0.5
    moved: float = sum(change.moved**2 for change in changes) ** 0.5
    return moved / size if size else None


def _places(reference: str) -> dict[str, Path]:
    """In which file each matrix of a checkpoint is."""
    if not has_plain_weights(reference):
        raise ProbeError(
            f"the weights of {reference!r} are not on this machine as safetensors files of their "
            "own; load the models and use tensor_changes"
        )
    places = {}
    for path in weight_files(reference):
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


def _common(before: Mapping[str, object], after: Mapping[str, object], what: str) -> list[str]:
    """The names that both sides have: all of them.

    Raises:
        ProbeError: One has a name that the other has not.
    """
    alone = sorted(before.keys() ^ after.keys())
    if alone:
        raise ProbeError(
            f"{what} do not have the same matrices ({alone[0]!r} is in one of them only), so their "
            "weights cannot be compared"
        )
    return list(before)


def _change(name: str, slices: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> WeightChange:
    entries, equal, size, moved = 0, 0, 0.0, 0.0
    for old, new in slices:
        entries += old.numel()
        equal += int((old == new).sum())
        size += float(old.double().square().sum())
        moved += float((new.double() - old.double()).square().sum())
    return WeightChange(name, entries, size**0.5, moved**0.5, equal)


def _slices(name: str, before: Path, after: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with safe_open(before, framework="pt") as old, safe_open(after, framework="pt") as new:
        sides = old.get_slice(name), new.get_slice(name)
        shapes = [list(side.get_shape()) for side in sides]
        _check_shapes(name, shapes[0], shapes[1], str(before), str(after))
        step = _rows_at_once(shapes[0])
        for start in range(0, shapes[0][0], step):
            yield sides[0][start : start + step].float(), sides[1][start : start + step].float()


def _rows_at_once(shape: Sequence[int]) -> int:
    return max(1, _ENTRIES // max(1, torch.Size(shape[1:]).numel()))


def _check_shapes(name: str, old: list[int], new: list[int], before: str, after: str) -> None:
    if old != new:
        raise ProbeError(
            f"{name} has shape {old} in {before} and {new} in {after}, so the weights cannot be "
            "compared"
        )
