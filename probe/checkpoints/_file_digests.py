"""Digests of whole files, each read once.

They are kept in the user's cache (`PROBE_CACHE`, by default `probe` in the cache folder), and taken
from there as long as a file has the same size, times and inode. What lies in the hub's cache is not
read at all: its name there is a digest of its content.

    >>> file_digests([Path("model.safetensors")])
    {PosixPath('model.safetensors'): '0b9f...'}
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from probe.checkpoints._made import cache_folder
from probe.errors import ProbeError
from probe.files import write_whole

SMALL = 2**20
"""Files of fewer bytes are read each time."""


def file_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """A digest of all bytes of each file.

    Raises:
        ProbeError: A file cannot be read.
    """
    return _digests(paths)[0]


def digest_entries(paths: Iterable[Path]) -> dict[str, list[object]]:
    """What is kept of each file, once it is read, for a machine with the same file system.

    Raises:
        ProbeError: A file cannot be read.
    """
    paths = list(paths)
    entries = _digests(paths)[1]
    names = {str(path.resolve()) for path in paths}
    return {name: entry for name, entry in entries.items() if name in names}


def keep_entries(entries: Mapping[str, list[object]]) -> None:
    """Keep what another machine has read; where a file is another one here, that is noticed."""
    _keep(_known(), entries)


def _digests(paths: Iterable[Path]) -> tuple[dict[Path, str], dict[str, list[object]]]:
    """The digests, and all that is kept."""
    known = _known()
    found, unread = _sorted_out(paths, known)
    # Before they are read: what changes meanwhile is another file the next time.
    began, stamps = time.time_ns(), {path: stamp_of(path) for path in unread}
    with ThreadPoolExecutor(4) as pool:
        found |= zip(unread, pool.map(_read, unread), strict=True)
    new: dict[str, list[object]] = {
        str(path.resolve()): [stamp, found[path]]
        for path, stamp in stamps.items()
        # Within a tick of the clock a file can change without new times.
        if stamp[0] >= SMALL and max(stamp[1:3]) < began - 2 * 10**9
    }
    _keep(known, new)
    return found, known | new


def unread_bytes(paths: Iterable[Path]) -> int:
    """How many bytes `file_digests` would read."""
    return sum(path.stat().st_size for path in _sorted_out(paths, _known())[1])


def _sorted_out(
    paths: Iterable[Path], known: dict[str, list[object]]
) -> tuple[dict[Path, str], list[Path]]:
    """The digests that are known, and the files that must be read."""
    found: dict[Path, str] = {}
    unread: list[Path] = []
    for path in paths:
        target = path.resolve()
        if path.is_symlink() and target.parent.name == "blobs" and "snapshots" in path.parts:
            found[path] = f"blob {target.name} {target.stat().st_size}"
            continue
        kept = known.get(str(target))
        if isinstance(kept, list) and len(kept) == 2 and kept[0] == stamp_of(target):
            found[path] = str(kept[1])
        else:
            unread.append(path)
    return found, unread


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror}") from error


def stamp_of(path: Path) -> list[int]:
    """What changes with a file; the time of its inode's change cannot be set by hand."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _known() -> dict[str, list[object]]:
    try:
        table = json.loads((cache_folder() / "digests.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # then files are read again
    return table if isinstance(table, dict) else {}


def _keep(known: dict[str, list[object]], new: Mapping[str, list[object]]) -> None:
    """Keep what was read, and forget what is gone."""
    if not new:
        return
    table = {path: entry for path, entry in {**known, **new}.items() if Path(path).is_file()}
    with suppress(OSError):  # a home that cannot be written to: files are read again
        cache_folder().mkdir(parents=True, exist_ok=True)
        text = json.dumps(table, indent=1)
        write_whole(cache_folder() / "digests.json", lambda place: place.write_text(text))
