"""Templates: a chat template is a stranger's program, and is filled in where it can do no harm.

It may loop for ever or make texts of gigabytes, which jinja's sandbox lets it do, and for some
questions only. So each question goes through it in a process of its own with little memory and
time, which fills it in as transformers does.

    >>> fill("{{ messages[0]['content'] }}", [{"role": "user", "content": "1+1=?"}], {})
    '1+1=?'
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from probe.limits import NoAnswerError, Worker, serve

SECONDS = 10.0
"""How long a template may take for one question."""

MEMORY = 2**30
"""How many bytes the process may have; what it needs to start takes a seventh of them."""

LETTERS = 100_000
"""How much longer than the messages a text may be; the longest preambles known have some 20,000."""


_Question = tuple[str, list[dict[str, object]], dict[str, str]]


class TooMuchError(Exception):
    """A template takes more time or memory than it may, or writes more; the message says which."""


class RefusalError(Exception):
    """A template fails, or refuses these messages; the message says why."""


def fill(
    template: str, messages: Sequence[Mapping[str, object]], tokens: Mapping[str, object]
) -> str:
    """The text of a chat, up to where the model is to go on.

    Args:
        template: The template.
        messages: The messages, each a role and a content.
        tokens: Names and texts of special tokens that it may write.

    Raises:
        TooMuchError: It does not end well.
        RefusalError: It ends in an error of its own.
    """
    question = [template, [*map(dict, messages)], dict(tokens)]
    try:
        kind, text = cast(tuple[str, str], _worker(os.getpid()).ask(question))
    except NoAnswerError as error:
        raise TooMuchError(str(error)) from None
    if kind == "filled":
        return text
    raise (TooMuchError if kind == "too much" else RefusalError)(text)


@lru_cache(maxsize=1)
def _worker(process: int) -> Worker:
    """The process that fills in; a fork has one of its own."""
    del process
    return Worker(__name__, SECONDS)


def _filled(question: object) -> tuple[str, str]:
    """What came of a template: `filled`, `too much` or `refused`, and the text or the reason."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from probe.errors import reason

    template, messages, tokens = cast(_Question, question)
    try:
        options: dict[str, Any] = {**tokens, "add_generation_prompt": True}
        found = render_jinja_template([messages], chat_template=template, **options)
        text = cast(tuple[list[str], object], found)[0][0]  # not what its annotation says
        most = LETTERS + sum(len(str(message)) for message in messages)
        if len(text) > most:
            return "too much", f"writes more than {LETTERS:,} letters"
    except MemoryError:
        return "too much", f"needs more than {MEMORY / 2**30:.0f} GiB of memory"
    except Exception as error:  # a program of a stranger: any exception may come out of it
        return "refused", reason(error)
    return "filled", text


if __name__ == "__main__":
    _filled(["", [], {}])  # imports what it takes
    serve(_filled, MEMORY)
