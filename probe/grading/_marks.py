r"""Marks: where a solution says its final answer.

Models mark an answer in many ways: `\boxed{X}`, `The answer is X`, `Final answer: X`, `#### X`,
`<answer>X</answer>`. The last mark counts, whatever its kind. What a model thinks before it answers
is no answer, nor is what follows the token that ends its turn. Markdown around an answer, and what
some models write behind it, are left out.

Solutions can be degenerate (a million spaces), so every scan here is linear: patterns repeat what
cannot match in two ways, or repeat a bounded number of times.

    >>> extract_answer("**The final answer is:** $29$.<|im_end|>")
    '$29$'
    >>> extract_answer("<think>Is it \\boxed{7}?</think> No: 50-7=43#43")
    '43'
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

_THINKING = (
    "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis|"
    "inner_monologue|internal_monologue|seed:think|longcat_think"
)
_THOUGHT = re.compile(
    # None begins with two of these; a run of them is passed over quickly.
    rf"(?!<<)(?:<\|?(?P<end1>/?)(?P<kind1>{_THINKING})\|?>"
    r"|<\|(?P<bound2>begin|end|start)_?(?:of_?)?(?P<kind2>think|thinking|thought|reasoning)\|>"
    r"|◁(?P<end3>/?)(?P<kind3>think|thinking)▷|\[(?P<end4>/?)(?P<kind4>THINK)\]"
    r"|<\|channel\|>(?P<kind5>analysis|commentary|final)|<unused9(?P<kind6>[45])>)",
    re.IGNORECASE,
)
_SPECIAL = re.compile(
    r"<(?!<)(?:[|｜](?=[^<>]{0,20}[A-Za-z]{3})[\w▁ -]{3,40}[|｜]|/s"
    r"|/?(?:eos|bos|pad|eot|eod|eop|unk)|(?:end|start)_of_(?:turn|text|utterance)|\|?turn\|?|_?end_?|/assistant|extra_id_\d)>"
    r"|\[(?:/?INST|EOS|BOS|PAD)\]",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>)(?:assistant|model)\b"
    r"|<[|｜]assistant[|｜]>",
    re.IGNORECASE,
)
_BRACES = re.compile(
    r"[{}]|\\(?:(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>-?\d+(?:[.,/]\d+)*))|[\\{}])"
)
_ANSWER = re.compile(r"\banswers?\b", re.IGNORECASE)
_STATES = re.compile(
    r"[*_`\"”)]{0,4}(?:[ \t](?:to|of|for|in)\b[^.\n:?!]{0,80}?)?"
    r"[*_` \t]{0,4}(?:(?:is|are|was|would be|must be|equals)\b|[:：=])",
    re.IGNORECASE,
)
_TITLE = re.compile(r"[>#*_ \t]{0,12}(?:the )?(?:final )?answer[*_` \t]{0,6}", re.IGNORECASE)
_HASHES = re.compile(r"(?<![\\#])(#+)")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_BLOCK = re.compile(r"\n|\\begin\{|\$\$|\\\[")
_BLOCK_ENDS = {"\\begin{": "\\end{", "$$": "$$", "\\[": "\\]"}
_BLOCK_LENGTH = 1000
_BLOCKS = 100
_MARKS = 1000
"""How many marks of each kind are looked at, from the end; a degenerate solution has more."""

_DOLLAR = re.compile(r"(?<!\\)\$")
_HTML = re.compile(r"</?(?:b|strong|i|em|u|span|p|br|code|mark|div|center|font)\b[^<>]{0,100}>")
_LAYOUT = re.compile(r"(?:[*_`~:：=≈>\s]|-(?=[ \t]))*")
_BEFORE = re.compile(
    r"(?:(?:therefore|thus|then|hence|simply|just|indeed|exactly|approximately|about|around|roughly"
    r"|equal to|equals|now|clearly|obviously|also|still|definitely)\b"
    r"[*_:,]{0,5}\s{1,9}[*_]{0,3}){1,4}",
    re.IGNORECASE,
)
_BRACKETS = 10
_BEHIND = (
    ", as required",
    ", as desired",
    ", as expected",
    "I hope it is correct",
    "ки",
    "</b>",
    "</strong>",
    "</answer>",
)
_PROSE = re.compile(
    r"(?:an?|not|no longer|indeed|correct|right|wrong|incorrect|reasonable|consistent|valid|clear"
    r"|unique|as|given|found|obtained|expected|required|in|of|between|less|more|greater|at|that"
    r"|this|supposed|known|verified|confirmed|plausible|always|also|asked|written|expressed"
    r"|the same|the correct|the final|the one|what|we|it|now|so|because|based)\b",
    re.IGNORECASE,
)
_HEADING_WORDS = re.compile(r"[*_$\s]{0,9}[A-Za-z]{2}|\d+[.):]\s")
_NUMBER_START = re.compile(r"[*_$\\(\[{+\-.]{0,4}\s?[\d\\]|\$")
_SHORT_NUMBER = re.compile(r"[*_`]{0,3}\$?[+-]?[\d.,/]+\$?[.*_`]{0,4}\s*\Z")


class _Mark(NamedTuple):
    """A place where a solution says its answer."""

    start: int
    """Where the mark begins."""

    text: str
    """What it marks, as it stands there."""

    strong: bool = True
    """Whether it marks an answer for sure, and is no heading or remark."""

    boxed: bool = False
    """Whether its end is marked too, so that all of it belongs to the answer."""


def extract_answer(text: str) -> str | None:
    r"""Find the final answer of a solution, or None.

    The last of these counts: `\boxed{X}` (closed and not empty), `The answer is X` and
    `Final answer: X` up to the end of the line, `#### X` (or `#X`), `<answer>X</answer>`. Headings,
    and sentences about an answer (`the answer is an integer`), count where there is nothing else.
    A solution whose thought does not end has no answer.
    """
    spoken = spoken_part(text)
    if spoken is None:
        return None
    weak = None
    for mark in _marks(spoken):
        final = mark.text if mark.boxed else _clean(mark.text)
        if final and (mark.boxed or (mark.strong and not _PROSE.match(final))):
            return final
        weak = weak or final or None
    return weak


def exact_answer(text: str, gold: str) -> tuple[str, bool]:
    """Find the final answer of a solution as a text, and whether it is the gold one.

    The final answer is what a mark points at, as in `extract_answer`, or else the whole solution.
    A solution that is the gold answer as a whole is right whatever marks it holds. White space
    between words does not count; capitals do.
    """
    words = gold.split()
    spoken = spoken_part(text) or ""
    marked = extract_answer(text)
    for final in (text, spoken, marked):
        if final is not None and final.split() == words:
            return final.strip(), True
    return (marked or spoken).strip(), False


def last_boxed(text: str) -> str | None:
    r"""Give what stands in the last `\boxed{...}` that is closed and not empty."""
    box = _last_box(text)
    return box[2] if box else None


def spoken_part(text: str) -> str | None:
    """Leave out what a solution thinks, and what follows the token that ends its turn.

    A thought may lack its beginning, which some prompts end with. None where one lacks its end.
    """
    opened, start = "", 0
    parts: list[str] = []
    for tag in _THOUGHT.finditer(text):
        kind, ends = _thought(tag)
        if not opened and ends:
            parts = []
            start = tag.end()
        elif not opened:
            opened = kind
            parts.append(text[start : tag.start()])
        elif ends and kind == opened:
            opened, start = "", tag.end()
    if opened:
        return None
    return _one_turn("".join((*parts, text[start:])))


def _thought(tag: re.Match[str]) -> tuple[str, bool]:
    """The kind of a thought that a tag bounds, and whether it ends there."""
    if tag["kind1"]:
        return f"1{tag['kind1'].casefold()}", tag["end1"] == "/"
    part = tag.groupdict()
    if part["kind5"]:
        return "channel", part["kind5"].casefold() == "final"
    if part["kind6"]:
        return "unused", part["kind6"] == "5"
    if part["bound2"]:
        return part["kind2"].casefold(), part["bound2"].casefold() == "end"
    number = next(n for n in "34" if part[f"kind{n}"])
    return f"{number}{part[f'kind{number}'].casefold()}", part[f"end{number}"] == "/"


def _one_turn(text: str) -> str:
    """The turn of the model: without special tokens before it, and up to the first one behind."""
    text = text.strip()
    if _SPECIAL.match(text) or text.startswith("<s>"):
        turns = list(_TURN.finditer(text))
        text = text[turns[-1].end() :] if turns else text.removeprefix("<s>")
    start = 0
    for token in _SPECIAL.finditer(text):
        if text[start : token.start()].strip():
            return text[start : token.start()]
        start = token.end()
    return text[start:]


def _marks(text: str) -> Iterator[_Mark]:
    """The marks of a solution, the last one first."""
    box = _last_box(text)
    found: list[tuple[int, int, str]] = []  # where a mark begins, where it ends, and its kind
    for word in deque(_ANSWER.finditer(text), _MARKS):
        if end := _stated(text, word):
            found.append((word.start(), end, "stated"))
    for kind, pattern in (("tag", _TAG), ("hash", _HASHES)):
        found += [(m.start(), m.end(), kind) for m in deque(pattern.finditer(text), _MARKS)]
    found = [mark for mark in found if not box or not box[0] <= mark[0] < box[1]]
    if box:
        found.append((box[0], box[1], "box"))
    found.sort()
    end = len(text)
    for start, inner, kind in reversed(found):
        if kind == "box" and box:
            yield _Mark(start, box[2], boxed=True)
        elif kind == "hash":
            yield _hash_mark(text, start, inner, end)
        else:
            part = text[inner:end]
            if kind == "tag":
                part = part.partition("</")[0]
            yield _Mark(start, part if kind == "tag" else _line(part))
        end = start


def _stated(text: str, word: re.Match[str]) -> int | None:
    """Where the statement ends that begins with this word "answer", or None if it is none."""
    if states := _STATES.match(text, word.end()):
        return states.end()
    line = text.rfind("\n", max(0, word.start() - 30), word.start()) + 1
    if line == 0 and word.start() > 30:
        return None
    end = text.find("\n", word.end(), word.end() + 8)
    title = _TITLE.fullmatch(text, line, end) if end >= 0 else None
    return title.end() if title else None


def _hash_mark(text: str, start: int, inner: int, end: int) -> _Mark:
    """What follows hashes. A heading of Markdown is weak, and so is a number sign in a sentence."""
    line = text[inner:end].split("\n", 1)
    content = line[0]
    if not content.strip() and inner - start == 4 and len(line) > 1:
        line = line[1].lstrip().split("\n", 1)
        content = line[0]
    body = content.strip()
    more = (len(line) > 1 and bool(line[1].strip())) or end < len(text)
    at_line = not text[max(0, start - 1) : start].strip()
    if inner - start == 4:
        strong = not (more and at_line and _HEADING_WORDS.match(body))
    elif at_line and content.startswith((" ", "\t")):
        strong = bool(_NUMBER_START.match(body)) and not _HEADING_WORDS.match(body)
    else:
        glued = start > 0 and not text[start - 1].isspace() and not more
        strong = glued or bool(_SHORT_NUMBER.match(_SPECIAL.split(body)[0]))
    return _Mark(start, content, strong)


def _last_box(text: str) -> tuple[int, int, str] | None:
    r"""Where the last `\boxed` that is not empty begins and ends, and what it holds."""
    last: tuple[int, int, str] | None = None
    last_start = -1
    if "box" not in text:
        return None
    opened: list[tuple[int, int] | None] = []  # of each open brace: its box, and its content
    for brace in _BRACES.finditer(text):
        if brace["bare"]:
            last, last_start = (brace.start(), brace.end(), brace["bare"]), brace.start()
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append((brace.start(), brace.end()) if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and opened:
            box = opened.pop()
            if box and box[1] > last_start and (inner := text[box[1] : brace.start()].strip()):
                last, last_start = (box[0], brace.end(), inner), box[1]
    return last


def _line(text: str) -> str:
    r"""The first line that is not blank; a block (`\begin...\end`, `$$`, `\[`) counts as in it."""
    begin = 0
    while begin < len(text) and (text[begin].isspace() or text[begin] in "*_`:"):
        begin += 1
    place = begin
    for _ in range(_BLOCKS):
        if (found := _BLOCK.search(text, place)) is None:
            return text[begin:]
        if found[0] == "\n":
            return text[begin : found.start()]
        closer = _BLOCK_ENDS[found[0]]
        end = text.find(closer, found.end(), found.end() + _BLOCK_LENGTH)
        place = found.end() if end < 0 else end + len(closer)
    return text[begin:].partition("\n")[0]


def _clean(text: str) -> str:
    """An answer without Markdown, end tokens, remarks behind it and punctuation around it."""
    if token := _SPECIAL.search(text):
        text = text[: token.start()]
    text = _HTML.sub("", text).strip()
    text = text[_LAYOUT.match(text).end() :]  # type: ignore[union-attr]  # it may match nothing
    if (before := _BEFORE.match(text)) and _NUMBER_START.match(text, before.end()):
        text = text[before.end() :]
    text = _trimmed(text)
    for _ in range(_BRACKETS):
        shorter = _unopened(text)
        if shorter == text:
            break
        text = _trimmed(shorter)
    for quotes in ('""', "''", "“”", "‘’", "«»"):
        if len(text) > 2 and text[0] == quotes[0] and text[-1] == quotes[1]:
            text = text[1:-1].strip()
    return text


def _trimmed(text: str) -> str:
    """A text without white space, punctuation, emphasis and usual remarks at its end."""
    end = len(text)
    while end:
        last = text[end - 1]
        if last.isspace() or last in ".,;*`~" or (last == "_" and text[end - 2 : end] != r"\_"):
            end -= 1
        elif tail := next((tail for tail in _BEHIND if text.endswith(tail, 0, end)), None):
            end -= len(tail)
        else:
            break
    return text[:end]


def _unopened(text: str) -> str:
    """A text without a bracket or dollar at its end that nothing in it opens."""
    for opener, closer in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.endswith(closer) and text.count(opener) < text.count(closer):
            return text.removesuffix(closer)
    if text.endswith("$") and not text.startswith("$") and len(_DOLLAR.findall(text)) % 2:
        return text.removesuffix("$")
    for opener, closer in (("([", ")"), ("{", "}")):
        if text.endswith(closer) and not text.endswith("\\" + closer):
            opened = sum(map(text.count, opener))
            closed = text.count(closer) + (text.count("]") if closer == ")" else 0)
            if opened < closed:
                return text.removesuffix(closer)
    return text
