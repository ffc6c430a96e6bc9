r"""Grading: is the final answer of a solution the benchmark's answer?

The final answer is found by its mark, and `math-verify` decides whether it means the same as the
gold answer. Both come from outside, and an expression can be made to run for ever inside sympy,
where no signal reaches it; so grading happens in a process of its own that is ended and started
anew when one comparison outlasts its time. Nothing is ever evaluated as Python.

    >>> extract_answer("50-7=43;43-67=-24#-24")
    '-24'
    >>> with Grader() as grader:
    ...     grader.grade("1/2", r"\frac{1}{2}")
    True
"""

import json
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType

from probe.equality import plain, same_formula, same_number

SECONDS = 10.0
STARTUP_SECONDS = 120.0

_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(r"[Tt]he (?:final )?answer is:?[ \t]*")
_LINE = re.compile(r"\s*((?:\\begin\{(?s:.{0,1000}?)\\end\{\w+\}|\$\$(?s:.{0,1000}?)\$\$|[^\n])+)")
_LEFTOVER = re.compile(r"\s*(?:ки\s*|\.?\s*I hope it is correct\.?\s*)+$")
_HASHES = re.compile(r"#+ *([^#\n]+)")


def extract_answer(text: str) -> str | None:
    r"""Find the final answer of a solution, or None.

    In this order, each time the last one: `\boxed{X}`, `The answer is: X`, `#### X` (or `#X`). A
    step marker of the Math-Shepherd models after X is left out.
    """
    if boxed := last_boxed(text):
        return boxed
    stated = [found.end() for found in _STATED.finditer(text)]
    found = [_LINE.match(text, stated[-1])] if stated else list(_HASHES.finditer(text))
    if not found or not found[-1]:
        return None
    return _LEFTOVER.sub("", found[-1][1]).strip().rstrip(".") or None


def exact_answer(text: str, gold: str) -> tuple[str, bool]:
    """Find the final answer of a solution as a text, and whether it is the gold one.

    The final answer is what a mark points at, as in `extract_answer`, or else the whole solution.
    A solution that is the gold answer as a whole is right whatever marks it holds. White space
    between words does not count; capitals do.
    """
    words = gold.split()
    for final in (text, extract_answer(text)):
        if final is not None and final.split() == words:
            return final.strip(), True
    return (extract_answer(text) or text).strip(), False


def last_boxed(text: str) -> str | None:
    r"""Give what stands in the last `\boxed{...}` that is closed and not empty."""
    last, last_start = None, -1
    opened: list[int | None] = []  # where the content of each open brace starts, if it is a box
    for brace in _BRACES.finditer(text):
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > last_start and text[start : brace.start()].strip():
                last, last_start = text[start : brace.start()].strip(), start
    return last


class Grader:
    """A grading process with a time limit for each comparison; use it in a `with` block."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """Prepare a grader; its process starts with the first answer.

        Args:
            seconds: How long one comparison may take. One that takes longer counts as wrong.
        """
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

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
        self._stop()

    def grade(self, gold: str, answer: str | None) -> bool:
        """Whether an answer means the same as the gold answer.

        No answer is wrong, and so is one whose comparison outlasts the time limit or ends the
        process.

        Raises:
            RuntimeError: The grading process does not start.
        """
        if answer is None:
            return False
        if self._process and self._process.poll() is not None:
            self._stop()
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=self.seconds)
        except (queue.Empty, BrokenPipeError):
            line = None
        if line is None:
            self._stop()
            return False
        return bool(json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        lines: queue.Queue[str | None] = queue.Queue()
        process = subprocess.Popen(
            [sys.executable, "-m", "probe.grading"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> None:
            assert process.stdout
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self._process, self._lines = process, lines
        try:
            ready = lines.get(timeout=STARTUP_SECONDS)
        except queue.Empty:
            ready = None
        if ready is None:
            self._stop()
            raise RuntimeError("the grading process (python -m probe.grading) does not start")
        return process

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                # What is still in the pipe to a dead process is of no use.
                with suppress(BrokenPipeError):
                    if pipe:
                        pipe.close()
        self._process = None


def same_answer(gold: str, answer: str) -> bool:
    """Whether two final answers are the same text, number or formula, or the same to math-verify.

    There is no time limit here. 3.2e4 is read as 3.2 times a power of ten.
    """
    if plain(gold) == plain(answer):
        return True
    if (same := same_number(gold, answer)) is not None:
        return same
    from math_verify import LatexExtractionConfig, parse, verify

    # Its LaTeX route is a grammar; its route for plain expressions ends in an eval inside sympy.
    route = [LatexExtractionConfig()]
    texts = [_POWER.sub(r"\1 \\times 10^{\2}", text) for text in (gold, answer)]
    # Formulas in prose have dollars of their own; between two of ours, what is left is the prose.
    texts = [text if _DOLLAR.search(text) else f"${text}$" for text in texts]
    sides = [parse(text, route, parsing_timeout=None) for text in texts]
    if all(sides) and sides[0][-1] != sides[1][-1]:
        try:
            same = same_formula(sides[0][0], sides[1][0])
        except Exception:  # sympy fails in every way on what is no formula: then it is undecided
            same = None
        if same is not None:
            return same
    return bool(verify(*sides, timeout_seconds=None))


def _serve() -> None:
    """Answer one JSON line with another until the input ends."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    # What it cannot parse is an answer that is wrong, not an event.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    same_answer("1", "1.0")  # imports and builds its grammar before the first time limit runs
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(same_answer(gold, answer)), flush=True)


if __name__ == "__main__":
    _serve()
