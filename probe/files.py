"""Files that are whole or not there, and files that are no links.

>>> write_whole(Path("cells.json"), lambda path: path.write_text(text))
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".new"
"""How files end that are not whole yet; they begin with a dot."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside its place, and move it there once it is on the disk.

    A link that stands there is replaced, and what it leads to stays. Where this is broken off,
    nothing of it is left; a kill may leave the file beside.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    beside = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
    try:
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_where_asked(path: Path, text: str) -> None:
    """Write a text where the user wants it: that may be a link to another place, or a device.

    Raises:
        OSError: It cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # /dev/stdout, a pipe
        return
    write_whole(path.resolve(), lambda place: place.write_text(text, encoding="utf-8"))


def append(path: Path, text: str) -> None:
    """Add a text to a file, all of it or nothing; it is on the disk when this returns.

    Raises:
        OSError: It cannot be written, or the file is a link.
    """
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0) as file:
        size, left = os.fstat(file.fileno()).st_size, memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(size)
            raise


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing that has no other place: no link, hard link, pipe or device.

    Returns:
        Its descriptor.

    Raises:
        OSError: It is one, or cannot be opened.
    """
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o666)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise OSError(errno.ELOOP, "it is a link to another file", str(path))
    return file


def at_home(path: str | Path) -> Path:
    """A path with a user's folder in place of `~`; as it stands where there is no such user."""
    return Path(os.path.expanduser(path))


def read_file(path: Path) -> bytes:
    """All of a file; a pipe or a device, which may have no end, is none.

    Raises:
        OSError: It cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return file.read()
