"""Checkpoints: what a reference names, and where its files are.

A reference is a folder, a Hugging Face id (`org/name`), a model that ships with this package
(`probe:tiny-math/sft`), or a GGUF file (`folder/file.gguf`), which is dequantised (`_gguf`). A
folder or id that holds a PEFT adapter instead of a whole model stands for its base with the adapter
merged in. Files of the hub are fetched whole and once, before anything is computed; what is on this
machine is used as it is, without asking the network.

    >>> find_checkpoint("probe:tiny-math/sft").folder.name
    'sft'
"""

import hashlib
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from probe.checkpoints._foreign import missing_shards, no_model, no_weights
from probe.checkpoints._gguf import gguf_folder, is_gguf
from probe.errors import ProbeError, reason
from probe.files import at_home

PACKAGE_DATA = Path(__file__).parent.parent / "data"
PACKAGE_PREFIX = "probe:"

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = ("adapter_model*.safetensors", "adapter_model*.bin")
"""Weight files; the second pattern only where there are no files of the first."""
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")


class Checkpoint(NamedTuple):
    """The folders of a model on this machine."""

    folder: Path
    """Its config and weights; of an adapter, those of its base."""

    adapter: Path | None = None
    """The adapter to merge in."""

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer: the adapter's where it brings one."""
        if self.adapter and (self.adapter / "tokenizer_config.json").is_file():
            return self.adapter
        return self.folder


def local_folder(reference: str) -> Path | None:
    """The folder that a reference names, or None when it is a hub id.

    Raises:
        ProbeError: It looks like a folder, but there is none.
    """
    if reference.startswith(PACKAGE_PREFIX):
        folder = PACKAGE_DATA / reference.removeprefix(PACKAGE_PREFIX)
        if not folder.is_dir():
            shipped = sorted(p.parent for p in PACKAGE_DATA.glob("*/*/config.json"))
            names = ", ".join(
                PACKAGE_PREFIX + p.relative_to(PACKAGE_DATA).as_posix() for p in shipped
            )
            raise ProbeError(f"no model {reference!r} ships with probe; there are: {names}")
        return folder
    folder = at_home(reference)
    if is_gguf(reference):
        return gguf_folder(folder)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
            raise ProbeError(no_model(folder))
        return folder
    if reference.count("/") != 1 or reference.startswith((".", "~", "/")):
        raise ProbeError(f"model folder {reference!r} does not exist; give a folder or a hub id")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(reference)
    except HFValidationError as error:
        raise ProbeError(
            f"{reference!r} is neither a folder here nor a hub id: {reason(error)}"
        ) from None
    return None


def find_checkpoint(reference: str) -> Checkpoint | None:
    """Find a model's files on this machine, perhaps without its weights; None where there are none.

    Raises:
        ProbeError: It looks like a folder, but there is none, or an adapter does not say its base.
    """
    folder = local_folder(reference) or _cached_folder(reference)
    if folder is None:
        return None
    if not is_adapter(folder):
        return Checkpoint(folder)
    base = find_checkpoint(adapter_base(folder))
    return base and Checkpoint(base.folder, folder)


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
        table = json.loads(config.read_text(encoding="utf-8"))
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
            folder = _download(reference, weights)
    if weights and not _own_weights(folder):
        raise ProbeError(no_weights(folder, is_adapter(folder)))
    if not is_adapter(folder):
        return Checkpoint(folder)
    base = adapter_base(folder)
    try:
        return Checkpoint(fetch_checkpoint(base, weights).folder, folder)
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
        if files:
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


def hub_reachable(seconds: float = 5) -> bool:
    """Whether the hub answers at all, asked once: its own client would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True  # an answer all the same
    except OSError as error:
        # A certificate that Python does not know may still be known to the hub's client.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)


def unreachable() -> str:
    """Say that the hub is out of reach, and whether that is by choice."""
    from huggingface_hub import constants

    return f"the hub cannot be reached{' (HF_HUB_OFFLINE is set)' * constants.HF_HUB_OFFLINE}"


def _cached_folder(reference: str) -> Path | None:
    """The folder of the hub's cache that holds a model's config."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG, ADAPTER_CONFIG):
        path = try_to_load_from_cache(reference, name)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _own_weights(folder: Path) -> list[Path]:
    """The weight files of a model's or an adapter's folder, without those of the adapter's base."""
    return weights_in(folder, ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)


def _shards(index: Path) -> list[Path]:
    """The weight files that an index lists, if all are there."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = sorted(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProbeError(f"{index}: not an index of weight files; fetch it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ProbeError(f"{index} names a file that is not beside it: {outside[0]!r}")
    return shards if all(shard.is_file() for shard in shards) else []


def _download(reference: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    if not hub_reachable():
        raise ProbeError(
            f"the model {reference!r} is not on this machine, and {unreachable()}; give the folder "
            "of a copy instead"
        )
    wanted = [*_SMALL]
    try:
        if weights:
            names = [Path(name) for name in HfApi().list_repo_files(reference) if "/" not in name]
            for first, second in (WEIGHTS, ADAPTER_WEIGHTS):
                wanted.append(first if any(name.match(first) for name in names) else second)
        return Path(snapshot_download(reference, allow_patterns=wanted, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise ProbeError(f"cannot download the model {reference!r}: {reason(error)}") from error
