"""Files that are whole or not there.

>>> write_whole(Path("cells.json"), lambda path: path.write_text(text))
"""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside its place, and move it there once it is whole."""
    beside = path.with_name(f".{path.name}.new")
    write(beside)
    os.replace(beside, path)


def name_and_end(path: Path) -> bytes:
    """A file's name, its size and its last MiB: what tells large files apart, and is quick."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2**20))
        return f"{path.name} {size}".encode() + file.read()
