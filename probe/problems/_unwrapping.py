r"""Unwrapping: the one text of an answer, whatever a program has put around it.

A column of answers holds a text, a list with one, a message, a list of messages with one of the
assistant, or the content parts of one. Each of these becomes its text; what holds no text, or
several, is an error, never an empty answer.

    >>> one_text([{"role": "assistant", "content": [{"type": "text", "text": "42"}]}])
    '42'
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence

from probe.errors import ProbeError

_ASSISTANT = ("assistant", "model", "gpt", "bot", "ai", "chatbot")
_ROLE = ("role", "from")
_CONTENT = (
    "content",
    "text",
    "value",
    "output_text",
    "generated_text",
    "completion",
    "response",
    "output",
    "message",
    "delta",
    "choices",
    "outputs",
)
_THOUGHTS = ("reasoning", "thinking", "redacted_thinking", "reasoning_text", "summary_text")
_DEPTH = 8
_LONGEST_LITERAL = 10**6
_QUOTED = re.compile(
    r"(?P<odd>'{3}|\"{3}|\#|(?:[fF][rR]?|[rR][fF])(?=['\"]))"
    r"|'(?:[^'\\]|\\.)*(?:'|\Z)|\"(?:[^\"\\]|\\.)*(?:\"|\Z)",
    re.DOTALL,
)


def one_text(value: object, depth: int = 0) -> str:
    """The one text in a value.

    Raises:
        ProbeError: There is none, or there are several; the message says what there is instead.
    """
    if isinstance(value, str):
        return _literal_text(value, depth)
    if depth > _DEPTH:
        raise ProbeError("the answer is wrapped too deeply")
    if isinstance(value, Mapping):
        return _of_object(value, depth)
    if isinstance(value, Sequence):
        return _of_list(value, depth)
    kind = {"NoneType": "missing", "bool": "true or false", "int": "a number", "float": "a number"}
    raise ProbeError(
        f"the answer is {kind.get(type(value).__name__, type(value).__name__)}; needed is the text "
        "that the model wrote"
    )


def last_question(value: object) -> str | None:
    """The text of the last message of a user, of a prompt that is a list of messages."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _literal(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    asked = [turn for turn in value if isinstance(turn, Mapping) and _role(turn) in _USER]
    return one_text(_content(asked[-1])) if asked else None


_USER = ("user", "human")


def _of_list(value: Sequence[object], depth: int) -> str:
    parts = [part for part in value if part is not None]
    if any(isinstance(part, Mapping) and _role(part) for part in parts):
        turns = [part for part in parts if isinstance(part, Mapping) and _role(part) in _ASSISTANT]
        if len(turns) != 1:
            raise ProbeError(f"{len(turns)} messages of the assistant in the answer; one is needed")
        return one_text(turns[0], depth + 1)
    spoken = [part for part in parts if not _is_thought(part)]
    if len(spoken) != 1:
        raise ProbeError(
            f"{len(spoken)} answers to one question; one is needed (greedy, one sample)"
        )
    return one_text(spoken[0], depth + 1)


def _of_object(value: Mapping[str, object], depth: int) -> str:
    role = _role(value)
    if role and role not in _ASSISTANT:
        raise ProbeError(f"the answer is a message of the {role}, not of the assistant")
    if _is_thought(value):
        raise ProbeError("the answer is a thought without an answer behind it")
    content = _content(value)
    if content is None:
        raise ProbeError(f"the answer is an object without text: {', '.join(map(str, value))}")
    return one_text(content, depth + 1)


def _content(value: Mapping[str, object]) -> object:
    return next((value[name] for name in _CONTENT if value.get(name) is not None), None)


def _role(value: Mapping[str, object]) -> str:
    return next((str(value[name]).casefold() for name in _ROLE if value.get(name)), "")


def _is_thought(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _THOUGHTS


def _literal_text(text: str, depth: int) -> str:
    """A text; or what it spells where it is a list in JSON or Python, as in CSV files."""
    if text.lstrip()[:2] not in ("[{", '["', "['") or not text.rstrip().endswith("]"):
        return text
    value = _literal(text)
    if isinstance(value, list) and all(map(_is_part, value)):
        return one_text(value, depth + 1)
    return text


def _is_part(value: object) -> bool:
    """Whether it is a text, a message or a content part."""
    return isinstance(value, str) or (
        isinstance(value, Mapping) and bool(_role(value) or "type" in value)
    )


def _literal(text: str) -> object:
    """What a text spells in JSON or else in Python; itself where it spells nothing."""
    if len(text) > _LONGEST_LITERAL:
        return text
    # Python takes a minute to see that a long f-string is no plain value; no repr() has one.
    odd = any(found["odd"] for found in _QUOTED.finditer(text))
    for read in (json.loads,) if odd else (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
