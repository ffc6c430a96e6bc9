"""The lock of a run folder: one process at a time writes there.

It is the system's lock on the file `.lock`, so a process that is killed leaves none. The file
stays, and says who holds it or held it last.

    >>> with locked(RunFolder(Path("runs/tiny-math")), print) as folder:
    ...     folder.write_json("run.json", record)
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import IO

from probe.errors import ProbeError
from probe.files import open_own
from probe.store._record import now
from probe.store._run_folder import LOCK, RunFolder

_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(folder: RunFolder, say: Callable[[str], object]) -> Iterator[RunFolder]:
    """Make a run folder, and keep other processes from writing there for as long as this goes on.

    Args:
        folder: The folder.
        say: Is told in one line where the file system has no locks; then there is none.

    Yields:
        The folder, which writes only where this lock lies: not to one that has taken its place.

    Raises:
        ProbeError: Another process holds it, or the folder cannot be written to.
    """
    folder.check()
    with _opened(folder, say) as file:
        found = os.fstat(file.fileno())
        yield replace(folder, lock=(found.st_dev, found.st_ino))


def _opened(folder: RunFolder, say: Callable[[str], object]) -> IO[bytes]:
    """The file of a folder's lock, which this process then holds until it is closed."""
    path = folder.path / LOCK
    with ExitStack() as stack:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(os.fdopen(open_own(path, os.O_RDWR), "r+b", buffering=0))
            try:
                free = _take(file.fileno(), patience=1)
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                free = True
                say(
                    f"{folder.path} is on a file system without locks: see to it that no other "
                    "process writes there"
                )
            if not free:
                raise in_use(folder.path)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {gethostname()} since {now()}\n".encode())
        except OSError as error:
            raise folder.unwritable(path, error) from error
        stack.pop_all()
        return file


def check_free(folder: RunFolder) -> None:
    """Check that no other process writes to a folder now.

    Raises:
        ProbeError: One does.
    """
    try:
        file = os.open(folder.path / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return  # there is none yet, or `locked` says what is wrong with it
    try:
        free = _take(file, patience=0)
    except OSError:
        return
    finally:
        os.close(file)
    if not free:
        raise in_use(folder.path)


def _take(file: int, patience: float) -> bool:
    """Take a lock; whether that went. Who only looks whether it is free holds it for a moment."""
    last = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if patience else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= last:
                return False
            time.sleep(0.05)


def in_use(path: Path) -> ProbeError:
    """Say who holds a folder."""
    try:
        who = (path / LOCK).read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:
        who = ""
    return ProbeError(
        f"{path} is in use by {who or 'another process'}; wait for its end, or give another "
        "--output"
    )
