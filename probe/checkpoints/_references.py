"""Checkpoints: what a reference names, and where its files are.

A reference is a folder, one of a trainer's output folder (`runs/grpo#checkpoint-500`), a Hugging
Face id (`org/name`, perhaps with a folder inside it and a revision, `org/name/folder@revision`), a
model that ships with this package (`probe:tiny-math/sft`), or a GGUF file (`folder/file.gguf`),
which is dequantised (`_gguf`). A folder or id that holds a PEFT adapter instead of a whole model
stands for its base with the adapter merged in, and one with a delta for its base as training
changed it (`_deltas`). Files of the hub are fetched whole and once, before anything is computed;
what is on this machine is used as it is, without asking the network.

    >>> find_checkpoint("probe:tiny-math/sft").folder.name
    'sft'
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from probe.checkpoints._deltas import DELTA, delta_folder, is_delta
from probe.checkpoints._foreign import missing_shards, no_model, no_weights
from probe.checkpoints._gguf import gguf_folder, is_gguf
from probe.checkpoints._hub import HubName, cached_folder, download
from probe.errors import ProbeError, reason
from probe.files import at_home, read_file

PACKAGE_DATA = Path(__file__).parent.parent / "data"
PACKAGE_PREFIX = "probe:"

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapter_model*.bin")
"""Weight files; the second pattern only where there are no files of the first."""
OF_FOLDER = "#"
"""What parts a trainer's output folder from a checkpoint in it."""


class Checkpoint(NamedTuple):
    """The folders of a model on this machine."""

    folder: Path
    """Its config and weights; of an adapter, those of its base."""

    adapter: Path | None = None
    """The adapter to merge in."""

    around: Path | None = None
    """The folder that a checkpoint is one of several in."""

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer: the adapter's where it brings one, or that around it."""
        places = (self.adapter, self.folder, self.around)
        with_one = (place for place in places if place and _has_tokenizer(place))
        return next(with_one, self.folder)


def local_folder(reference: str) -> Path | None:
    """The folder that a reference names, or None when it is a hub id.

    Raises:
        ProbeError: It looks like a folder, but there is none, or it names several checkpoints.
    """
    if _is_inside(reference):
        reference = _one_of(reference)
    if reference.startswith(PACKAGE_PREFIX):
        folder = _own_path(reference)
        if is_delta(folder):
            return delta_folder(folder)
        if not (folder / CONFIG).is_file():
            names = ", ".join(_shipped())
            raise ProbeError(f"no model {reference!r} ships with probe; there are: {names}")
        return folder
    folder = at_home(reference)
    if is_gguf(reference):
        return gguf_folder(folder)
    if is_delta(folder):
        return delta_folder(folder)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
            raise ProbeError(no_model(folder))
        return folder
    begin, *more = reference.split("/")
    beside = len(more) > 1 and Path(begin).is_dir()
    if not more or beside or reference.startswith((".", "~", "/")):
        raise ProbeError(f"model folder {reference!r} does not exist; give a folder or a hub id")
    HubName.parse(reference)
    return None


def _own_path(reference: str) -> Path:
    """The path that a reference to a folder of this machine stands for."""
    if reference.startswith(PACKAGE_PREFIX):
        return PACKAGE_DATA / reference.removeprefix(PACKAGE_PREFIX)
    return at_home(reference)


def _shipped() -> list[str]:
    """The models that ship with the package; checkpoints of a training as one pattern."""
    whole = {path.parent for path in PACKAGE_DATA.glob(f"*/*/{CONFIG}")}
    names = {PACKAGE_PREFIX + path.relative_to(PACKAGE_DATA).as_posix() for path in whole}
    for path in PACKAGE_DATA.glob(f"*/*/*/{DELTA}"):
        outside = path.parent.parent.relative_to(PACKAGE_DATA).as_posix()
        names.add(f"{PACKAGE_PREFIX}{outside}{OF_FOLDER}checkpoint-*")
    return sorted(names)


def checkpoints_in(reference: str) -> list[str]:
    """The checkpoints that a pattern in a trainer's output folder stands for, by their numbers.

    Args:
        reference: `runs/grpo#checkpoint-*`, `runs/verl#global_step_*/actor/huggingface`.

    Returns:
        References, `runs/grpo#checkpoint-100`, which keep the folder around a checkpoint.

    Raises:
        ProbeError: There is no such folder, or none in it that the pattern fits.
    """
    outside, _, pattern = reference.partition(OF_FOLDER)
    folder = _own_path(outside)
    if not folder.is_dir():
        raise ProbeError(f"folder {outside!r} does not exist, so it holds no {pattern!r}")
    found = folders_in(folder, pattern)
    if not found:
        inside = sorted((path.name for path in folder.iterdir() if path.is_dir()), key=_by_number)
        listed = f"it holds {', '.join(inside[:5])}" if inside else "it holds no folder"
        raise ProbeError(f"{outside} holds no {pattern}; {listed}{' ...' * (len(inside) > 5)}")
    return [f"{outside}{OF_FOLDER}{path.relative_to(folder).as_posix()}" for path in found]


def folders_in(folder: Path, pattern: str) -> list[Path]:
    """The folders in a folder that a pattern fits now, by the numbers in them; perhaps none.

    Raises:
        ProbeError: The pattern leads out of the folder.
    """
    if not pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
        raise ProbeError(
            f"'{folder}{OF_FOLDER}{pattern}': behind {OF_FOLDER} stands a folder in it, "
            "checkpoint-500"
        )
    return sorted((p for p in folder.glob(pattern) if p.is_dir()), key=lambda p: _by_number(str(p)))


def _is_inside(reference: str) -> bool:
    """Whether a reference names a checkpoint in a folder; a folder's own name may hold a #."""
    return OF_FOLDER in reference and not Path(reference).expanduser().is_dir()


def _one_of(reference: str) -> str:
    """The one folder that a reference with a pattern names.

    Raises:
        ProbeError: It names none, or several.
    """
    found = checkpoints_in(reference)
    if len(found) > 1:
        raise ProbeError(
            f"{reference!r} names {len(found)} checkpoints; name one of them, as {found[-1]}"
        )
    outside, _, inside = found[0].partition(OF_FOLDER)
    return str(_own_path(outside) / inside)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort step 100 behind step 20."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def find_checkpoint(reference: str) -> Checkpoint | None:
    """Find a model's files on this machine, perhaps without its weights; None where there are none.

    Raises:
        ProbeError: It looks like a folder, but there is none, or an adapter does not say its base.
    """
    folder = local_folder(reference) or _cached_folder(reference)
    if folder is None:
        return None
    around = _around(reference, folder)
    if not is_adapter(folder):
        return Checkpoint(folder, None, around)
    base = find_checkpoint(adapter_base(folder))
    return base and Checkpoint(base.folder, folder, around)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, by its weights where its configs leave that open.

    Trainers leave a whole model's config beside an adapter, and an adapter's files beside a model
    that they were merged into: where there are weights of a whole model, it is one.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if not (folder / CONFIG).is_file():
        return True
    return not weights_in(folder, WEIGHTS) and bool(weights_in(folder, ADAPTER_WEIGHTS))


def adapter_base(folder: Path) -> str:
    """The reference of the model that an adapter was trained on.

    Raises:
        ProbeError: The adapter does not say, or its base is an adapter too.
    """
    config = folder / ADAPTER_CONFIG
    try:
        table = json.loads(read_file(config).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProbeError(
            f"cannot read the config of the adapter {folder}: {reason(error)}"
        ) from error
    base = table.get("base_model_name_or_path") if isinstance(table, dict) else None
    if not isinstance(base, str) or not base:
        raise ProbeError(f"{config} names no base model; set base_model_name_or_path in it")
    # A path that is not absolute may be meant from where the adapter lies.
    beside = [place / base for place in (folder, folder.parent)]
    if not at_home(base).is_dir():
        base = next((str(path.resolve()) for path in beside if path.is_dir()), base)
    try:
        inner = local_folder(base)
    except ProbeError as error:
        if Path(base).is_dir():
            raise ProbeError(f"the base of the adapter {folder}: {error}") from error
        raise ProbeError(
            f"the adapter {folder} is for the base {base!r}, which does not exist; correct "
            f"base_model_name_or_path in {config}: the folder of the base, or its hub id"
        ) from error
    if inner and is_adapter(inner):
        raise ProbeError(f"the base of the adapter {folder}, {base}, is an adapter too; merge it")
    return base


def fetch_checkpoint(reference: str, weights: bool = True) -> Checkpoint:
    """Find a model's files, and download what is missing.

    Args:
        reference: A folder, hub id or `probe:` name, of a model or an adapter.
        weights: Whether the weights are needed, or only config and tokenizer.

    Raises:
        ProbeError: It is not here and cannot be downloaded.
    """
    folder = local_folder(reference)
    if folder is None:
        folder = _cached_folder(reference)
        if folder is None or (weights and not _own_weights(folder)):
            folder = download(
                HubName.parse(reference), (WEIGHTS, ADAPTER_WEIGHTS) if weights else ()
            )
    if weights and not _own_weights(folder):
        raise ProbeError(no_weights(folder, is_adapter(folder)))
    around = _around(reference, folder)
    if not is_adapter(folder):
        return Checkpoint(folder, None, around)
    base = adapter_base(folder)
    try:
        return Checkpoint(fetch_checkpoint(base, weights).folder, folder, around)
    except ProbeError as error:
        raise ProbeError(f"the base of the adapter {folder}: {error}") from error


def check_folder(reference: str) -> None:
    """Check that a reference which names a folder names weights.

    Raises:
        ProbeError: It is a folder without weights, or an adapter whose base is one.
    """
    folder = local_folder(reference)
    while folder is not None:
        if not _own_weights(folder):
            raise ProbeError(no_weights(folder, is_adapter(folder)))
        folder = local_folder(adapter_base(folder)) if is_adapter(folder) else None


def weight_files(reference: str) -> list[Path]:
    """The weight files of a model that are on this machine, without asking the network.

    Those of an adapter come after those of its base. None where any of them is missing.
    """
    found = find_checkpoint(reference)
    if found is None:
        return []
    parts = [base_files(found)]
    if found.adapter:
        parts.append(weights_in(found.adapter, ADAPTER_WEIGHTS))
    return [path for part in parts for path in part] if all(parts) else []


def base_files(checkpoint: Checkpoint) -> list[Path]:
    """The weight files of a model, without those of its adapter."""
    return weights_in(checkpoint.folder, WEIGHTS)


def weights_in(folder: Path, patterns: tuple[str, str]) -> list[Path]:
    """The weight files of a folder, in the first format that is there whole.

    As in transformers, a single file goes before an index, whatever else lies beside it.
    """
    for pattern in patterns:
        single = folder / pattern.replace("*", "")
        if single.is_file():
            return [single]
        index = next(iter(folder.glob(f"{single.name}.index.json")), None)
        if index:
            files = _shards(index)  # which may have any names
        else:
            files = [] if missing_shards(folder) else sorted(folder.glob(pattern))
        # A device has no end, and a pipe no beginning.
        if files and all(path.is_file() for path in files):
            return files
    return []


def fingerprint(reference: str) -> str:
    """A short name for the weights themselves, so that a retrained folder is not taken for the old.

    Of each weight file its name, its size and its last MiB are hashed: enough to notice any
    training step, and quick for a model of many gigabytes. `model_inputs` takes all of them, and
    whole.
    """
    digest = hashlib.sha256()
    for path in weight_files(reference):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size}".encode() + file.read())
    return digest.hexdigest()[:16]


def hub_commits(reference: str) -> dict[str, str]:
    """The commit of the hub that a model's files here are of; an adapter's base has one, too.

    Returns:
        Commits by reference; none for folders.
    """
    folder = local_folder(reference)
    commits = {}
    if folder is None:
        folder = _cached_folder(reference)
        if folder is None:
            return {}
        commits[reference] = (_around(reference, folder) or folder).name
    return commits | (hub_commits(adapter_base(folder)) if is_adapter(folder) else {})


def _cached_folder(reference: str) -> Path | None:
    """The folder of the hub's cache that holds a model's config."""
    return cached_folder(HubName.parse(reference), (CONFIG, ADAPTER_CONFIG))


def _around(reference: str, folder: Path) -> Path | None:
    """The folder that a checkpoint's folder is one of several in, if it is."""
    if _is_inside(reference):
        return _own_path(reference.partition(OF_FOLDER)[0])
    if local_folder(reference) is not None:
        return None
    inside = HubName.parse(reference).folder
    return folder.parents[inside.count("/")] if inside else None


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _own_weights(folder: Path) -> list[Path]:
    """The weight files of a model's or an adapter's folder, without those of the adapter's base."""
    return weights_in(folder, ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)


def _shards(index: Path) -> list[Path]:
    """The weight files that an index lists, if all are there."""
    try:
        names = set(json.loads(read_file(index).decode("utf-8"))["weight_map"].values())
        shards = sorted(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProbeError(f"{index}: not an index of weight files; fetch it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ProbeError(f"{index} names a file that is not beside it: {outside[0]!r}")
    return shards if all(shard.is_file() for shard in shards) else []
