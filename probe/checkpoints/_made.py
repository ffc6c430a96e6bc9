"""Model folders that are made of something smaller: once, and kept in the cache.

>>> made_folder(cache_folder() / "gguf" / "my-model", lambda folder: convert(file, folder))
PosixPath('~/.cache/probe/gguf/my-model')
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from probe.files import at_home

CONFIG = "config.json"
"""The file that says that a folder is whole: a folder appears at once, with all its files."""


def cache_folder() -> Path:
    """Where this package keeps what it would else have to make again."""
    root = os.environ.get("PROBE_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or at_home("~/.cache")) / "probe"
    return Path(root) if root else cache


def made_folder(place: Path, make: Callable[[Path], object]) -> Path:
    """A folder of the cache, made if it is not there yet; nothing is left where making fails.

    Args:
        place: Where it is kept; the name must say all that it depends on.
        make: Fills a new, empty folder.

    Raises:
        OSError: The cache cannot be written.
    """
    if (place / CONFIG).is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=place.parent, prefix=".making-"))
    try:
        make(made)
        try:
            made.rename(place)
        except OSError:
            if not (place / CONFIG).is_file():  # another process was not first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place
