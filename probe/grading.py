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

SECONDS = 10.0
STARTUP_SECONDS = 120.0

_STATED = re.compile(r"[Tt]he answer is:?\s*(.+)")
_HASHES = re.compile(r"#+ *([^#\n]+)")


def extract_answer(text: str) -> str | None:
    r"""Find the final answer of a solution, or None.

    In this order, each time the last one: `\boxed{X}`, `The answer is: X`, `#### X` (or `#X`).
    """
    boxed = text.rfind("\\boxed{")
    if boxed >= 0:
        start = boxed + len("\\boxed{")
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    for pattern in (_STATED, _HASHES):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).strip().rstrip(".") or None
    return None


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
    """Whether math-verify takes two final answers for the same; without any time limit."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Its LaTeX route is a grammar; its route for plain expressions ends in an eval inside sympy.
    route = [LatexExtractionConfig()]
    sides = [parse(f"${text}$", route, parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*sides, timeout_seconds=None))


def _serve() -> None:
    """Answer one JSON line with another until the input ends."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    # What it cannot parse is an answer that is wrong, not an event.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    same_answer("1", "1")  # imports and builds its grammar before the first time limit runs
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(same_answer(gold, answer)), flush=True)


if __name__ == "__main__":
    _serve()
