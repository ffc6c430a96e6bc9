"""Answer files: what programs write that let models answer questions.

A file is recognised by its columns, in any capitals; `FORMATS` says which, and has a reader for
each, all of one shape: a row in, a `GivenAnswer` out. What holds the answer is unwrapped to its one
text (`probe.problems`); a row without one is an error.

    >>> given = read_given(Path("samples_gsm8k.jsonl"))
    >>> given.format, len(given.answers)
    ('lm-evaluation-harness', 1319)
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from probe.errors import ProbeError
from probe.problems import ID, Row, last_question, one_text, read_rows

QUESTION = ("question", "problem", "query")
PROMPT = ("prompt", "input")
TEXT = (
    *("text", "output", "response", "completion", "generation", "generated_text", "predict"),
    *("prediction", "model_output", "responses", "completions", "generations", "predictions"),
)
MESSAGES = ("messages", "conversations", "conversation")
TOKENS = ("token_ids", "output_token_ids", "output_ids", "answer")
PROMPT_TOKENS = ("prompt_token_ids", "prompt_ids", "prompt")
"""Names of columns in the wild, each list in order of preference; capitals do not matter."""


class GivenAnswer(NamedTuple):
    """An answer from a file."""

    where: str
    """Where it stands, as complaints name it."""

    question: str | None
    """The question that it answers, where it says so."""

    id: str | None
    """The question's id, where it says so."""

    prompt: str | None
    """The text that the model was given, where it says so."""

    prompt_tokens: tuple[int, ...] | None
    """The same as tokens."""

    text: str | None
    """The answer as text."""

    tokens: tuple[int, ...] | None
    """The answer as tokens."""

    asked: str | None = None
    """A text with the question in it that is not the prompt, such as a message to a chat model."""


class Given(NamedTuple):
    """A file of answers."""

    path: Path
    """The file or folder."""

    format: str
    """Whose format it is, a name in `FORMATS`."""

    answers: tuple[GivenAnswer, ...]
    """What it holds."""

    @property
    def table(self) -> dict[str, str | int]:
        """What a record says about it."""
        digest = hashlib.sha256(repr(self.answers).encode()).hexdigest()
        tokens = all(answer.tokens is not None for answer in self.answers)
        prompts = all(answer.prompt or answer.prompt_tokens for answer in self.answers)
        return {
            "file": str(self.path),
            "format": self.format,
            "answers": len(self.answers),
            "token_ids": "the file's" if tokens else "derived again from the text",
            "prompts": "the file's" if prompts else "the recipe's",
            "sha256": digest[:16],
        }

    @property
    def account(self) -> str:
        """The same for a reader, as one line."""
        table = self.table
        return (
            f"{table['answers']} answers from {table['file']} ({table['format']}), graded again; "
            f"prompts are {table['prompts']}, token ids are {table['token_ids']}"
        )


class Format(NamedTuple):
    """How to recognise and read the files of one program."""

    needs: tuple[tuple[str, ...], ...]
    """Of each of these, a row has one column."""

    read: Callable[[Row], GivenAnswer]
    """The answer in a row."""


def read_given(path: Path) -> Given:
    """Read a file of answers, or all files of a folder.

    Raises:
        ProbeError: It cannot be read, is of no known format, mixes formats, or holds several
            answers in a row.
    """
    rows = read_rows(path)
    if not rows:
        raise ProbeError(f"{path} holds no solution")
    names = [_format(row) for row in rows]
    for row, name in zip(rows, names, strict=True):
        if name != names[0]:
            raise ProbeError(f"{row.where}: of format {name}, but the rows before of {names[0]}")
    return Given(path, names[0], tuple(FORMATS[names[0]].read(row) for row in rows))


def _format(row: Row) -> str:
    names = {column.strip().casefold() for column in row.columns}
    for name, format in FORMATS.items():
        if all(names.intersection(columns) for columns in format.needs):
            return name
    needed = "; ".join(
        f"{' and '.join('|'.join(columns) for columns in format.needs)} ({name})"
        for name, format in FORMATS.items()
    )
    raise ProbeError(
        f"{row.where}: not recognised as solutions; found: {', '.join(row.columns)}; "
        f"needed: {needed}"
    )


def _harness(row: Row) -> GivenAnswer:
    document, request = row.find("doc"), row.find("arguments")
    question = _inside(row, document).find(*QUESTION)
    for key in ("gen_args_0", "arg_0"):  # older versions write lists in place of these objects
        if isinstance(request, Mapping):
            request = request.get(key)
        elif isinstance(request, Sequence) and not isinstance(request, str):
            request = request[0] if request else None
    # What was sent to a chat server is no text that the model saw.
    seen = isinstance(request, str) and not request.lstrip().startswith('[{"role"')
    return _answer(
        row,
        question=question,
        prompt=request if seen else None,
        asked=last_question(request),
        text=row.find("resps"),
    )


def _qwen(row: Row) -> GivenAnswer:
    return _answer(row, question=row.find("question"), text=row.find("code"))


def _vllm(row: Row) -> GivenAnswer:
    outputs = row.find("outputs")
    part = _inside(row, _only(outputs))
    tokens = part.find(*TOKENS)
    return _answer(
        row,
        question=row.find(*QUESTION),
        prompt=row.find("prompt"),
        prompt_tokens=row.find(*PROMPT_TOKENS),
        text=outputs if _numbers(tokens) is None or part.find(*TEXT) else None,
        tokens=tokens,
    )


def _inspect(row: Row) -> GivenAnswer:
    output = _inside(row, row.find("output"))
    if output.find("choices") is None:
        failed = _inside(row, row.find("error")).find("message")
        raise ProbeError(
            f"{row.where}: this sample has no answer" + (f" ({failed})" if failed else "")
        )
    given = row.find("input")  # what the model saw is made of it by the task
    return _answer(row, asked=last_question(given) or given, text=output.find("choices"))


def _lighteval(row: Row) -> GivenAnswer:
    document, response = (_inside(row, row.find(name)) for name in ("doc", "model_response"))
    seen = response.find("input")
    return _answer(
        row,
        name=document.find("id"),
        prompt=seen if isinstance(seen, str) else None,
        prompt_tokens=response.find("input_tokens"),
        asked=last_question(seen) or document.find("original_query", "query"),
        text=response.find("text"),
        tokens=_only(response.find("output_tokens")),
    )


def _lighteval_before(row: Row) -> GivenAnswer:
    return _answer(
        row,
        prompt=row.find("full_prompt"),
        prompt_tokens=_only(row.find("input_tokens")),
        text=row.find("predictions"),
        tokens=_only(row.find("cont_tokens")),
    )


def _verl(row: Row) -> GivenAnswer:
    # Its input lacks the special tokens that the model saw.
    return _answer(row, name="", asked=row.find("input"), text=row.find("output"))


def _openai_batch(row: Row) -> GivenAnswer:
    body = _inside(row, _inside(row, row.find("response")).find("body"))
    failed = _inside(row, row.find("error") or body.find("error")).find("message")
    held = body.find("choices", "output")
    if held is None:
        raise ProbeError(
            f"{row.where}: the request has no answer" + (f" ({failed})" if failed else "")
        )
    return _answer(row, name=row.find("custom_id"), text=held)


def _own(row: Row) -> GivenAnswer:
    prompt, messages = row.find(*PROMPT), row.find(*MESSAGES)
    asked = last_question(prompt) or last_question(messages)
    text = _text_column(row)
    return _answer(
        row,
        question=row.find(*QUESTION),
        prompt=None if last_question(prompt) else prompt,
        prompt_tokens=row.find(*PROMPT_TOKENS),
        asked=asked,
        text=messages if text is None else text,
        tokens=row.find(*TOKENS),
    )


def _text_column(row: Row) -> object:
    """The first column of texts that is there, also an empty list; an empty text is the last."""
    found = row.find(*TEXT)
    known = {column.strip().casefold(): value for column, value in row.columns.items()}
    if found is None:
        found = next((known[name] for name in TEXT if known.get(name) is not None), None)
    return found


def _inside(row: Row, value: object) -> Row:
    """The object that a column holds as a row; one without columns where it holds none."""
    return Row(row.where, value if isinstance(value, Mapping) else {})


def _answer(
    row: Row,
    *,
    name: object = None,
    question: object = None,
    prompt: object = None,
    prompt_tokens: object = None,
    asked: object = None,
    text: object = None,
    tokens: object = None,
) -> GivenAnswer:
    """An answer of these parts; what is of another kind than it should be is not there."""
    ids = _numbers(tokens)
    if text is None and ids is None:
        raise ProbeError(
            f"{row.where}: no answer; needed: text in {' or '.join(TEXT)}, or token ids in "
            f"{' or '.join(TOKENS)}"
        )
    try:
        spoken = None if text is None else one_text(text)
    except ProbeError as error:
        raise ProbeError(f"{row.where}: {error}") from error
    name = row.find(*ID) if name is None else name
    if isinstance(name, Mapping | list):
        raise ProbeError(f"{row.where}: the id is no text or number")
    return GivenAnswer(
        row.where,
        question if isinstance(question, str) else None,
        str(name) if name not in (None, "") else None,
        prompt if isinstance(prompt, str) else None,
        _numbers(prompt_tokens) or None,
        spoken,
        ids,
        asked if isinstance(asked, str) else None,
    )


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    return tuple(value) if all(type(number) is int for number in value) else None


def _only(value: object) -> object:
    """The one item of a list; anything else is itself."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        return value[0]
    return value


FORMATS: dict[str, Format] = {
    "lm-evaluation-harness": Format((("doc",), ("arguments",), ("resps",)), _harness),
    "lighteval": Format((("doc",), ("model_response",)), _lighteval),
    "lighteval, older": Format((("full_prompt",), ("predictions",)), _lighteval_before),
    "inspect_ai": Format((("input",), ("epoch",), ("output",)), _inspect),
    "Qwen2.5-Math": Format((("question",), ("code",), ("pred",)), _qwen),
    "OpenAI batch": Format((("custom_id",), ("response",)), _openai_batch),
    "vLLM": Format((("prompt", *QUESTION), ("outputs",)), _vllm),
    "verl": Format((("input",), ("output",), ("gts",)), _verl),
    "TRL": Format((("prompt",), ("completion",), ("step",)), _own),
    "question and answer": Format(
        ((*QUESTION, *PROMPT, *ID, *MESSAGES), (*TEXT, *TOKENS, *MESSAGES)), _own
    ),
}
"""The formats that are known, the most special first; the one place to add one."""
