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
