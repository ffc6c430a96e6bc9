"""Logs: the samples in a log of inspect_ai, which is a zip archive of JSON files.

Its newer versions compress with Zstandard, which Python's zipfile knows from 3.14 on; `zstandard`
comes with nnsight.
"""

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from probe.errors import ProbeError, reason

MOST_BYTES = 1024**3
"""Most bytes that the samples of a log may have unpacked."""

USUAL_BYTES, DENSEST = 64 * 1024**2, 100
"""From how many bytes on they must be no more than so many times as many as packed; what people
write becomes a tenth."""

_ZSTANDARD = 93
_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field end a local header


def read_samples(path: Path) -> Iterator[tuple[str, bytes]]:
    """Give the name and the JSON of each sample of a log, in the order of their numbers.

    Raises:
        ProbeError: It cannot be read, is no such log, or unpacks to more than `MOST_BYTES`.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = [
                member
                for member in archive.infolist()
                if member.filename.startswith("samples/") and member.filename.endswith(".json")
            ]
            size = sum(member.file_size for member in members)
            packed = sum(member.compress_size for member in members)
            if size > MOST_BYTES or size > max(USUAL_BYTES, DENSEST * packed):
                raise ProbeError(
                    f"{path}: its samples of {packed / 2**20:.1f} MiB unpack to "
                    f"{size / 2**20:.0f} MiB, which is too much; export fewer at once"
                )
            for member in sorted(members, key=_order):
                yield member.filename, _unpacked(archive, file, member)
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror or error}") from error
    except ProbeError:
        raise
    except Exception as error:  # damaged archives raise nearly anything
        raise ProbeError(f"{path}: not a log of inspect_ai ({reason(error)})") from error


def _order(member: zipfile.ZipInfo) -> tuple[int, str]:
    """Where a sample stands: `samples/10_epoch_1.json` comes behind `samples/9_epoch_1.json`."""
    number = member.filename.removeprefix("samples/").partition("_")[0]
    return (int(number) if number.isascii() and number.isdigit() else 0, member.filename)


def _unpacked(archive: zipfile.ZipFile, file: io.BufferedReader, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type != _ZSTANDARD:
        return archive.read(member)
    import zstandard

    file.seek(member.header_offset)
    name, extra = _HEADER.unpack(file.read(_HEADER.size))
    file.seek(name + extra, io.SEEK_CUR)
    packed = file.read(member.compress_size)
    try:
        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            unpacked = reader.read(member.file_size + 1)
    except zstandard.ZstdError as error:
        raise zipfile.BadZipFile(f"{member.filename} is damaged") from error
    if len(unpacked) != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename} is damaged")
    return unpacked
