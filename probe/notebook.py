"""What notebooks show and go on with: tables as escaped HTML, and as pandas.

>>> html_table("two edges", ("source", "target"), [("a0", "m3"), ("m0", "logits")])
'<table>...</table>'
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from probe.errors import ProbeError

if TYPE_CHECKING:
    import pandas


LONGEST = 80
"""How many characters of a value a table shows."""


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a caption; texts in it are escaped and cut, floats have four digits."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = (
        "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return (
        f'<table><caption style="text-align: left">{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _text(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def data_frame(columns: Mapping[str, Sequence[object]]) -> "pandas.DataFrame":
    """Make a table of pandas, which need not be there for anything else.

    Raises:
        ProbeError: There is no pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ProbeError("to_pandas needs pandas: pip install pandas") from error
    return pandas.DataFrame(dict(columns))


def records_frame(
    rows: Iterable[Mapping[str, object]], names: Sequence[str] = ()
) -> "pandas.DataFrame":
    """Make a table of pandas from rows; what is a table in a row becomes columns of its own.

    Args:
        rows: The rows, of one shape: `{"real_edges": {"change": 1}}` is `real_edges.change`.
        names: The columns where there are no rows.

    Raises:
        ProbeError: There is no pandas.
    """
    flat = [dict(_flat(row)) for row in rows]
    known = list(dict.fromkeys(name for row in flat for name in row)) or list(names)
    return data_frame({name: [row.get(name) for row in flat] for name in known})


def _flat(row: Mapping[str, object], start: str = "") -> Iterable[tuple[str, object]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value
