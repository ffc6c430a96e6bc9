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

import json
import math
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType

from probe.grading._equality import same_answer
from probe.grading._marks import exact_answer, extract_answer, last_boxed
from probe.limits import end_after, limit_memory

__all__ = ["Grader", "exact_answer", "extract_answer", "last_boxed", "same_answer"]

SECONDS = 10.0
MEMORY = 2 * 1024**3
"""Most bytes that the grading process may have; math-verify and sympy take a fifth of a GB."""

STARTUP_SECONDS = 120.0


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
            [sys.executable, "-m", "probe.grading._grading", str(self.seconds)],
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
            raise RuntimeError(
                "the grading process does not start: python -m probe.grading._grading"
            )
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


def _serve(seconds: float) -> None:
    """Answer one JSON line with another until the input ends."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    sys.set_int_max_str_digits(0)  # an answer may be longer than 4300 digits, up to LONGEST
    # What it cannot parse is an answer that is wrong, not an event.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    same_answer("1", "1.0")  # imports and builds its grammar before the first time limit runs
    limit_memory(MEMORY)
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # Where the main process was killed, nobody else would end a comparison that hangs.
        end_after(math.ceil(2 * seconds) + 10)
        try:
            same = same_answer(gold, answer)
        except Exception:  # math-verify and sympy fail in every way on what is no formula
            same = False
        end_after(0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
