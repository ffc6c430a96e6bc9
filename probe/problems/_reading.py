"""Reading: the rows of a local file or folder, whatever its format.

The suffix says the format: JSON lines, JSON, CSV, parquet or a log of inspect_ai. A row remembers
where it stands, so that every complaint about it can say so; a folder gives the rows of all its
files, or only those of its test split if it has one.

    >>> rows = read_rows(Path("problems.csv"))
    >>> rows[0].where, rows[0].columns["answer"]
    ('problems.csv, row 1', '18')
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from probe.errors import ProbeError, reason

if TYPE_CHECKING:
    import pyarrow

MOST_VALUES, MOST_BYTES = 50_000_000, 2**29
"""Most values, and bytes as arrow holds them, of a parquet file; as Python's they are more."""

_BATCH = 100


class Row(NamedTuple):
    """One row of a file or data set."""

    where: str
    """Where it stands, as complaints name it."""

    columns: Mapping[str, object]
    """Its values by the names of their columns."""

    def find(self, *names: str) -> object:
        """Give the first of these columns that is there and not empty, or None.

        Capitals do not matter.
        """
        known = {column.strip().casefold(): value for column, value in self.columns.items()}
        values = (known.get(name.casefold()) for name in names)
        return next((value for value in values if value not in (None, "", [])), None)

    def need(self, what: str, *names: str) -> object:
        """Give the first of these columns, or complain.

        Raises:
            ProbeError: There is none; the message names what was found and what is needed.
        """
        value = self.find(*names)
        if value is None:
            found = ", ".join(map(str, self.columns)) or "none"
            raise ProbeError(
                f"{self.where}: no column with the {what}; found: {found}; "
                f"needed: {' or '.join(names)}"
            )
        return value


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, or of all files of a folder in the order of their names.

    Raises:
        ProbeError: It is missing, of no known format, or broken; the message says where.
    """
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in FORMATS and not _is_description(file.relative_to(path))
        ]
        tests = [file for file in files if "test" in str(file.relative_to(path)).casefold()]
        if not files:
            raise ProbeError(f"the folder {path} holds no file of a known format: {_KNOWN}")
        return [row for file in tests or files for row in read_rows(file)]
    reader = FORMATS.get(path.suffix.lower())
    if path.exists() and reader is None:
        raise ProbeError(f"{path}: the format {path.suffix or 'is'} is not known; known: {_KNOWN}")
    return list((reader or _json_lines)(path))


def _is_description(file: Path) -> bool:
    """Whether it describes a data set instead of holding it."""
    return file.name.startswith("dataset_info") or any(part[0] == "." for part in file.parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProbeError(f"cannot read the benchmark file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def _parsed(text: str | bytes, where: str, hint: str) -> object:
    """The value that JSON spells.

    Raises:
        json.JSONDecodeError: It is none.
        ProbeError: It is one that Python or UTF-8 cannot hold.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ProbeError(f"{where}: nested too deeply; {hint}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise ProbeError(f"{where}: not JSON that can be read ({error}); {hint}") from error
    escaped = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if escaped in text.lower():  # type: ignore[operator]  # of the same kind as the text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ProbeError(f"{where}: holds half of a surrogate pair; {hint}") from error
    return value


def _json_lines(path: Path) -> Iterator[Row]:
    # Not splitlines: a text may hold other line ends, such as U+2028, as they are.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _parsed(line, where, "mend or remove this line")
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"{where}: not JSON ({error.msg}); mend or remove this line"
            ) from error
        if not isinstance(row, dict):
            raise ProbeError(f"{where}: not a JSON object; each line needs {{...}}")
        yield Row(where, row)


def _json(path: Path) -> Iterator[Row]:
    """Read a list of objects, an object that holds such a list, one object, or JSON lines."""
    text = _text(path)
    try:
        rows = _parsed(text, str(path), "mend this file")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise ProbeError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); mend this line"
        ) from error
    if isinstance(rows, dict):
        rows = _held(rows)
    if not isinstance(rows, list):
        raise ProbeError(f"{path}: not a list of JSON objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ProbeError(f"{path}, row {number}: not a JSON object; each row needs {{...}}")
        yield Row(f"{path}, row {number}", row)


def _held(whole: Mapping[str, object]) -> list[object]:
    """The one list of rows in an object, which has a usual name if there are several; or itself.

    A list of messages is part of a row.
    """
    held = {
        name: part
        for name, part in whole.items()
        if isinstance(part, list) and part and isinstance(part[0], dict)
        if not {"role", "from"} & set(part[0])
    }
    if len(held) > 1:
        held = {name: part for name, part in held.items() if name in _ROWS}
    return next(iter(held.values())) if len(held) == 1 else [whole]


_ROWS = ("samples", "data", "rows", "examples", "problems", "results")


def _inspect_log(path: Path) -> Iterator[Row]:
    from probe.problems._logs import read_samples

    for name, text in read_samples(path):
        where = f"{path}, {name}"
        try:
            row = _parsed(text, where, "export the log again")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ProbeError(f"{where}: not JSON; export the log again") from error
        if not isinstance(row, dict):
            raise ProbeError(f"{where}: not a JSON object")
        yield Row(where, row)


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            for number, values in enumerate(lines, start=1):
                if not values:
                    continue
                if len(values) != len(header):
                    raise ProbeError(
                        f"{path}, row {number}: {len(values)} values for {len(header)} columns; "
                        'a value that holds the separator needs "..." around it'
                    )
                yield Row(f"{path}, row {number}", dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise ProbeError(
                f"{path}:{lines.line_num}: not CSV ({error}); mend this line"
            ) from error

    return read


def _parquet(path: Path) -> Iterator[Row]:
    """A file of some bytes may say that it is a table of any size, so it is read part by part."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number, size = 0, 0
    try:
        with ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            values = sum(g.column(n).num_values for g in groups for n in range(g.num_columns))
            for batch in file.iter_batches(batch_size=_BATCH) if values <= MOST_VALUES else ():
                size += sum(map(_plain_bytes, batch.columns))
                if size > MOST_BYTES:
                    break
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", row)
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise ProbeError(f"{path}: not a parquet file ({reason(error)})") from error
    if values > MOST_VALUES or size > MOST_BYTES:
        raise ProbeError(
            f"{path}: more than {MOST_VALUES:,} values or {MOST_BYTES / 2**20:.0f} MiB; "
            "keep the columns that are needed"
        )


def _plain_bytes(column: "pyarrow.Array") -> int:
    """The bytes of a column where each value stands by itself."""
    decode = getattr(column, "dictionary_decode", None)
    return int((decode() if decode else column).nbytes)


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".eval": _inspect_log,
}
"""How to read a file, by its suffix; the one place to add a format."""

_KNOWN = ", ".join(FORMATS)
