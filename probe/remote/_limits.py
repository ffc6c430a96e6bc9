"""Limits: how much a server may send, and how long it may take.

A server is a stranger's program. It may send a little that unpacks to a lot, a body without an end,
or one byte a second; what is read of it here has an end in bytes and in seconds.

    >>> len(unpack(zstandard.compress(bytes(2**20))))
    1048576
"""

import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    import httpx

ANSWER_BYTES = 16 * 2**20
"""The most that an answer to a plain question may be."""

RESULT_BYTES = 512 * 2**20
"""The most that what a job saved may be, as sent and unpacked."""

_CHUNK = 2**20
_MEMBERS = 100_000
_LARGEST_WINDOW = 2**27
"""How much zstd may look back; what its own command line takes without being asked."""


class TooLargeError(Exception):
    """A server sends more than it may."""


@contextmanager
def deadline(seconds: float, end: Callable[[], object]) -> Iterator[threading.Event]:
    """Call `end` if the body of the `with` has not ended after some seconds.

    Limits of sockets are for each read, so a byte now and then would pass them for ever.

    Args:
        seconds: After how many.
        end: Ends what the body waits for, from another thread.

    Yields:
        Whether the time was up.
    """
    passed = threading.Event()

    def stop() -> None:
        passed.set()
        end()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield passed
    finally:
        timer.cancel()


def body(answer: "httpx.Response", most: int) -> bytes:
    """The body of an answer that is still being read.

    Raises:
        TooLargeError: It is larger, or packed in a way that was not asked for.
    """
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise TooLargeError("an answer that is packed")
    parts, size = [], 0
    for part in answer.iter_raw():
        size += len(part)
        if size > most:
            raise TooLargeError(f"an answer of more than {most / 2**20:.0f} MiB")
        parts.append(part)
    return b"".join(parts)


class Counted:
    """A socket that gives so many bytes, and otherwise is as the one in it."""

    def __init__(self, inner: "socket.socket", most: int) -> None:
        """Begin to count."""
        self._inner, self._most, self._left = inner, most, most

    def recv(self, size: int) -> bytes:
        """Read.

        Raises:
            TooLargeError: More came than may.
        """
        data = self._inner.recv(size)
        self._left -= len(data)
        if self._left < 0:
            raise TooLargeError(f"messages of more than {self._most / 2**20:.0f} MiB")
        return data

    def __getattr__(self, name: str) -> object:
        """All else is the inner one's."""
        return getattr(self._inner, name)


def unpack(data: bytes, most: int = RESULT_BYTES) -> bytes:
    """What zstd packed.

    Raises:
        TooLargeError: It is larger.
        zstandard.ZstdError: It is damaged.
    """
    import zstandard

    plain = bytearray()
    with zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).stream_reader(data) as reader:
        while part := reader.read(_CHUNK):
            plain += part
            if len(plain) > most:
                raise TooLargeError(f"what unpacks to more than {most / 2**20:.0f} MiB")
    return bytes(plain)


def archive(data: bytes, most: int = RESULT_BYTES) -> zipfile.ZipFile:
    """A zip archive that unpacks to no more than it may.

    Raises:
        TooLargeError: It unpacks to more, or has very many members.
        zipfile.BadZipFile: It is none.
    """
    file = zipfile.ZipFile(io.BytesIO(data))
    members = file.infolist()
    if len(members) > _MEMBERS or sum(member.file_size for member in members) > most:
        raise TooLargeError(f"what unpacks to more than {most / 2**20:.0f} MiB")
    return file


def check_tensors(saved: object, most: int = RESULT_BYTES) -> None:
    """Check that tensors, in whatever lists and tables, are no larger than they may be.

    A few numbers can say that they are a tensor of terabytes.

    Raises:
        TooLargeError: They are larger.
    """
    import torch

    size, waiting, seen = 0, [saved], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            size += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    if size > most:
        raise TooLargeError(f"tensors of more than {most / 2**20:.0f} MiB")
