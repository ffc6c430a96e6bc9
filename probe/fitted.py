"""Fitted tables: what does not fit beside the first columns goes below, beside the same again.

rich breaks words into columns of one letter where a terminal is narrow. Here every column keeps
its width; only names in the first columns are folded, and no narrower than `NARROWEST`.

    >>> table = open_table()
    >>> Console(width=60).print(Fitted(table, keys=2))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

NARROWEST = 12
"""To how many characters a column of names may be folded."""

GAP = 2
"""Between two columns of an `open_table`: its padding, and the divider of its box."""


def open_table() -> Table:
    """An empty table as all of ours look: without a frame, with a line below the heading."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


@dataclass(frozen=True)
class Fitted:
    """A table that a narrow terminal gets in parts."""

    table: Table
    """The table, made by `open_table`."""

    keys: int
    """How many of the first columns say what a row is of; every part has them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give the table, or its parts one below the other."""
        columns = self.table.columns
        widths = [_width(column) for column in columns]
        if sum(widths) + GAP * (len(widths) - 1) <= options.max_width:
            yield self._part(range(len(columns)), widths)
            return
        keys = list(range(min(self.keys, len(columns) - 1)))
        others = list(range(len(keys), len(columns)))
        room = options.max_width - GAP * len(keys)
        # All in one table, if that takes no more than folding names a little.
        wanted = room - sum(widths[place] + GAP for place in others) + GAP
        if not _fold(widths, keys, wanted):
            least = room - max(widths[place] for place in others)
            _ = _fold(widths, keys, min(least, room // 2)) or _fold(widths, keys, least)
        room -= sum(widths[place] for place in keys)
        part: list[int] = []
        for place in others:
            if part and sum(widths[p] + GAP for p in (*part, place)) - GAP > room:
                yield self._part([*keys, *part], widths)
                yield ""
                part = []
            part.append(place)
        yield self._part([*keys, *part], widths)

    def _part(self, places: Sequence[int], widths: Sequence[int]) -> Table:
        """A table of some columns."""
        whole, part = self.table, open_table()
        headers = [str(whole.columns[place].header) for place in places]
        lines = max(header.count("\n") for header in headers)
        for place, header in zip(places, headers, strict=True):
            column = whole.columns[place]
            part.add_column(
                # Headings stand at the bottom, and rows at the top.
                "\n" * (lines - header.count("\n")) + header,
                justify=column.justify,
                width=widths[place],
                overflow="fold",
            )
        cells = zip(*(whole.columns[place].cells for place in places), strict=True)
        for row, texts in zip(whole.rows, cells, strict=True):
            part.add_row(*texts, style=row.style, end_section=row.end_section)
        return part


def _width(column: Column) -> int:
    """How wide a column is where nothing is folded."""
    texts = (str(cell) for cell in (column.header, *column.cells))
    return max((cell_len(line) for text in texts for line in text.splitlines()), default=1)


def _fold(widths: list[int], keys: Sequence[int], room: int) -> bool:
    """Fold the widest names until they fit; whether that can be. If not, nothing is changed."""
    folded = {place: widths[place] for place in keys}
    while sum(folded.values()) > room:
        widest = max(folded, key=lambda place: folded[place], default=None)
        if widest is None or folded[widest] <= NARROWEST:
            return False
        folded[widest] -= 1
    for place, width in folded.items():
        widths[place] = width
    return True
