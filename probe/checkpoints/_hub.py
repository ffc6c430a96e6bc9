"""Models on the Hugging Face hub: their names, and their files in its cache or over the network.

A name is a repository, perhaps a folder inside it, perhaps one revision: a branch, tag or commit.

    >>> HubName.parse("org/model/step_100@main")
    HubName(repository='org/model', folder='step_100', revision='main')
"""

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from probe.errors import ProbeError, reason

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_TOKENIZER = ("*token*", "vocab*", "merges.txt", "*.jinja")
_PATH = re.compile(r"(?!\.+(/|$))[\w.+=-]+(/(?!\.+(/|$))[\w.+=-]+)*")
"""A folder or a revision: names parted by single slashes, none of dots alone."""


class HubName(NamedTuple):
    """A model of the hub, by the parts of its reference."""

    repository: str
    """`org/model`."""

    folder: str = ""
    """The folder in it, `checkpoints/step_100`; empty for the repository itself."""

    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""

    @classmethod
    def parse(cls, reference: str) -> "HubName":
        """Read `org/model`, `org/model/folder`, or either with `@revision` behind it.

        Raises:
            ProbeError: It is none of them.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        name, at, revision = reference.partition("@")
        parts = name.split("/")
        repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
        try:
            validate_repo_id(repository)
            if len(parts) > 2 and not _PATH.fullmatch(folder):
                raise ValueError(f"{folder!r} is no folder of a repository")
            if at and not _PATH.fullmatch(revision):
                raise ValueError(f"{revision!r} is no branch, tag or commit")
        except (HFValidationError, ValueError) as error:
            raise ProbeError(
                f"{reference!r} is neither a folder here nor a hub id: {reason(error)}"
            ) from None
        return cls(repository, folder, revision or None)

    def __str__(self) -> str:
        """Its reference."""
        place = f"{self.repository}/{self.folder}".rstrip("/")
        return f"{place}@{self.revision}" if self.revision else place

    def file(self, name: str) -> str:
        """The path of one of its files in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


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


def cached_folder(name: HubName, configs: Sequence[str]) -> Path | None:
    """The folder of the hub's cache that holds a model's config; None where there is none.

    Args:
        name: The model.
        configs: Names of files, any of which tells that it is there.
    """
    from huggingface_hub import try_to_load_from_cache

    for config in configs:
        path = try_to_load_from_cache(name.repository, name.file(config), revision=name.revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def download(name: HubName, weights: Sequence[tuple[str, str]]) -> Path:
    """Fetch a model's config, tokenizer and weights; of a repository no other folder or revision.

    A folder without a tokenizer gets that of its repository, beside it in the cache.

    Args:
        name: The model.
        weights: Patterns of weight files, none for no weights; the second of each only where there
            are no files of the first.

    Raises:
        ProbeError: The hub cannot be reached, or does not have it.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not hub_reachable():
        raise ProbeError(
            f"the model {str(name)!r} is not on this machine, and {unreachable()}; give the folder "
            "of a copy instead"
        )
    try:
        there = HfApi().list_repo_files(name.repository, revision=name.revision)
        wanted = _wanted(there, name, weights)
        if name.folder and not wanted:
            raise ProbeError(_no_folder(there, name))
        snapshot = snapshot_download(name.repository, revision=name.revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise ProbeError(f"cannot download the model {str(name)!r}: {reason(error)}") from error
    return Path(snapshot) / name.folder


def _no_folder(there: Sequence[str], name: HubName) -> str:
    """Say that a repository lacks a folder, and which ones of it hold a model."""
    inside = sorted({path.rpartition("/")[0] for path in there if path.endswith("/config.json")})
    more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
    models = f"models are in {', '.join(inside[:5])}{more}" if inside else "no folder holds a model"
    return f"{name.repository} has no files in a folder {name.folder!r}; {models}"


def _wanted(there: Sequence[str], name: HubName, weights: Sequence[tuple[str, str]]) -> list[str]:
    """Which files of a repository make up a model."""
    own = [path for path in there if path.rpartition("/")[0] == name.folder]
    names = {path.rpartition("/")[2]: path for path in own}
    wanted = _matching(names, _SMALL)
    for first, second in weights:
        wanted += _matching(names, [first]) or _matching(names, [second])
    if name.folder and wanted and not _matching(names, ["tokenizer*"]):
        outside = {path: path for path in there if "/" not in path}
        wanted += _matching(outside, _TOKENIZER)
    return wanted


def _matching(names: dict[str, str], patterns: Sequence[str]) -> list[str]:
    return [
        path for name, path in names.items() if any(fnmatchcase(name, each) for each in patterns)
    ]
