r"""Escaping: foreign text, made harmless for the format that it goes into.

Names in recipes, texts of models and words of servers are data. No character of them may be a
command to a terminal, to LaTeX or to a browser. Each format has one function here, and every text
that it shows goes through it.

    >>> printable("red\x1b[31m"), markdown("<b>*x*")
    ('red[31m', '&lt;b&gt;\\*x\\*')
"""

import re
from collections.abc import Iterable
from html import escape
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_COMMANDS = re.compile(
    # Controls but the line's end, and what turns the direction of writing around.
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$]")
_MARK = re.compile(r"(?<= )(\*~?|~)$")  # that of a number, which opens and closes nothing
_BLOCK = re.compile(r"^(\d*)(#|[-+=](?=\s|$)|(?<=\d)[.)](?=\s|$)|={2,}|-{2,})")
_ADDRESS = re.compile(r"(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[*"},  # at a row's start, not its end's
    "\\": r"\textbackslash{}",
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↗": r"$\nearrow$",
    "→": r"$\to$",
    "↘": r"$\searrow$",
    "✓": r"$=$",
    "✗": r"$\neq$",
    "·": r"$\cdot$",
    "≤": r"$\le$",
    "α": r"$\alpha$",
}
_NEGATIVE = re.compile(r"(?<![\w)])-(?=[\d.])|(?<=\de)-(?=\d)")


def printable(text: str) -> str:
    """Any text without what a terminal would obey, and without halves of characters.

    A tab and other ends of a line become a space, so that words stay apart.
    """
    if text.isascii() and text.isprintable():
        return text  # as most are: a report prints some ten thousand
    spaced = re.sub("\r\n?|[\t\v\f\u2028\u2029]", " ", text)
    return _SURROGATES.sub("\ufffd", _COMMANDS.sub("", spaced))


def one_line(text: str) -> str:
    """Any text as one line that can be printed."""
    return " ".join(printable(text).split())


def markdown(text: str, cell: bool = False) -> str:
    """Any text as one line that Markdown shows letter by letter, addresses too.

    Args:
        text: The text.
        cell: Whether it is for a table's cell, where no list or heading can begin.
    """
    line = escape(one_line(text), quote=False)
    end = _MARK.search(line)
    start = end.start() if end else len(line)
    found = _MARKDOWN.sub(r"\\\g<0>", line[:start]) + line[start:]
    found = _ADDRESS.sub(r"\\\g<0>", found)
    return found if cell else _BLOCK.sub(r"\1\\\2", found)


def latex(text: str) -> str:
    """Any text as one line that LaTeX prints; the same in a comment."""
    signed = _NEGATIVE.sub("−", one_line(text))
    found = "".join(_LATEX.get(character, character) for character in signed)
    return found.replace("−", "$-$")


def html(text: str) -> str:
    """Any text between or inside tags."""
    return escape(printable(text))


def figure(text: str) -> str:
    """Any text as one line that matplotlib draws; between dollars it would set a formula."""
    return one_line(text).replace("$", r"\$")


class PlainConsole(Console):
    """A console to which every text is text.

    Square brackets are no markup, colons no emoji, and control characters are left out, whatever
    is printed: texts, tables or a progress bar.
    """

    def __init__(
        self,
        *,
        stderr: bool = False,
        file: IO[str] | None = None,
        width: int | None = None,
        record: bool = False,
    ) -> None:
        """Make one for standard output, standard error or a file."""
        super().__init__(
            stderr=stderr,
            file=file,
            width=width,
            record=record,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Turn anything into segments, each without control characters."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else segment._replace(text=text)
