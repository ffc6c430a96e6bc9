"""Whole checkpoints: whether a trainer is through with writing one.

>>> is_whole(PACKAGE_DATA / "tiny-math" / "sft")
True
"""

import json
from contextlib import suppress
from pathlib import Path

from probe.checkpoints._references import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    is_adapter,
    weights_in,
)
from probe.checkpoints._tensor_files import read_headers
from probe.errors import ProbeError

TRAINER_STATE = "trainer_state.json"
"""What transformers' trainer, and TRL's, leave in a checkpoint, last of all."""


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a config and all weights, none of them cut off.

    Also a trainer's state must be whole, where there is one.
    """
    try:
        adapter = is_adapter(folder)
        json.loads((folder / (ADAPTER_CONFIG if adapter else CONFIG)).read_text(encoding="utf-8"))
        if (folder / TRAINER_STATE).exists():
            trainer_state(folder)
        files = weights_in(folder, ADAPTER_WEIGHTS if adapter else WEIGHTS)
        return bool(files and read_headers(files))
    except (ProbeError, OSError, ValueError, RecursionError):
        return False


def files_state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time, in nanoseconds, of each file in a folder: equal if nothing was written."""
    state = {}
    with suppress(FileNotFoundError):  # it is just being deleted
        for path in folder.iterdir():
            found = path.stat()
            state[path.name] = found.st_size, found.st_mtime_ns
    return state


def trainer_state(folder: Path) -> tuple[int, int] | None:
    """The step of a checkpoint and the last one of its training; None where it does not say.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    path = folder / TRAINER_STATE
    if not path.exists():
        return None
    table = json.loads(path.read_text(encoding="utf-8"))
    numbers = [table.get(key) for key in ("global_step", "max_steps")]
    step, last = (number if isinstance(number, int) else 0 for number in numbers)
    return step, last
