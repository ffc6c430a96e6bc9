r"""Grading: is the final answer of a solution the benchmark's answer?

The final answer is found by its mark (`_marks`), and `_equality` and `math-verify` decide
whether it means the same as the gold answer. Both come from outside, and an expression can be made
to run for ever inside sympy, or to fill the memory; so grading happens in a process of its own that
has little memory, and is ended and started anew when one comparison outlasts its time. Nothing is
ever evaluated as Python.

    >>> extract_answer("50-7=43;43-67=-24#-24")
    '-24'
    >>> with Grader() as grader:
    ...     grader.grade("1/2", r"\frac{1}{2}")
    True
"""

import sys
from types import TracebackType
from typing import cast

from probe.grading._equality import same_answer
from probe.grading._marks import exact_answer, extract_answer, last_boxed
from probe.limits import NoAnswerError, Worker, serve

__all__ = ["Grader", "exact_answer", "extract_answer", "last_boxed", "same_answer"]

SECONDS = 10.0
MEMORY = 2 * 1024**3
"""Most bytes that the grading process may have; math-verify and sympy take a fifth of a GB."""


class Grader:
    """A grading process with a time limit for each comparison; use it in a `with` block."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """Prepare a grader; its process starts with the first answer.

        Args:
            seconds: How long one comparison may take. One that takes longer counts as wrong.
        """
        self._worker = Worker(__name__, seconds)

    def __enter__(self) -> "Grader":
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End the process."""
        self._worker.end()

    def grade(self, gold: str, answer: str | None) -> bool:
        """Whether an answer means the same as the gold answer.

        No answer is wrong, and so is one whose comparison outlasts the time limit or ends the
        process.

        Raises:
            RuntimeError: The grading process does not start.
        """
        if answer is None:
            return False
        try:
            return bool(self._worker.ask([gold, answer]))
        except NoAnswerError:
            return False


def _compared(question: object) -> bool:
    """Whether an answer is the same as a gold one."""
    gold, answer = cast(tuple[str, str], question)
    try:
        return same_answer(gold, answer)
    except Exception:  # math-verify and sympy fail in every way on what is no formula
        return False


def _serve() -> None:
    """Grade what comes in."""
    import logging

    sys.set_int_max_str_digits(0)  # an answer may be longer than 4300 digits, up to LONGEST
    # What it cannot parse is an answer that is wrong, not an event.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    _compared(["1", "1.0"])  # imports and builds its grammar
    serve(_compared, MEMORY)


if __name__ == "__main__":
    _serve()
