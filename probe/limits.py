"""Limits: processes for what strangers wrote, with little memory and little time.

Formulas of models and chat templates of checkpoints can be made to run for ever or to fill the
memory, and Python cannot stop a call in the middle. So they are worked out in a process of its own,
which is ended, and started anew for the next question, when an answer is late.

    >>> worker = Worker("probe.grading._grading", seconds=10)
    >>> worker.ask(["1/2", "0.5"])
    True
"""

import json
import math
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

STARTUP_SECONDS = 120.0
"""How long a process may take until it is ready."""

_OVERTIME = 10


class NoAnswerError(Exception):
    """A process gave no answer; the message says why, as what it worked on does."""


class Worker:
    """A process that answers one question after the other; its module calls `serve`."""

    def __init__(self, module: str, seconds: float) -> None:
        """Prepare one; its process starts with the first question.

        Args:
            module: What to run, `probe.grading._grading`.
            seconds: How long one answer may take.
        """
        self.module, self.seconds = module, seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._asking = threading.Lock()

    def ask(self, question: object) -> object:
        """The answer to a question, both plain data.

        Raises:
            NoAnswerError: It outlasts the time limit, or ends the process.
            RuntimeError: The process does not start.
        """
        with self._asking:
            if self._process and self._process.poll() is not None:
                self._end()
            process = self._process or self._start()
            assert process.stdin
            try:
                process.stdin.write(json.dumps(question, default=str) + "\n")
                process.stdin.flush()
                line = self._lines.get(timeout=self.seconds)
            except queue.Empty:
                self._end()
                raise NoAnswerError(f"takes more than {self.seconds:g} s") from None
            except BrokenPipeError:
                line = None
            if line is None:
                self._end()
                raise NoAnswerError("ends the process that works it out")
            answer: object = json.loads(line)
            return answer

    def end(self) -> None:
        """End the process."""
        with self._asking:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        lines: queue.Queue[str | None] = queue.Queue()
        process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(self.seconds)],
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
            self._end()
            raise RuntimeError(f"the process does not start: python -m {self.module}")
        return process

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                # What is still in the pipe to a dead process is of no use.
                with suppress(BrokenPipeError):
                    if pipe:
                        pipe.close()
        self._process = None


def serve(answer: Callable[[object], object], memory: int) -> None:
    """Answer questions, one JSON line with another, until the input ends: the process's side.

    Args:
        answer: What answers one. It has been called before, so that imports are no part of the
            time limit, nor the memory that they take.
        memory: How many bytes the process may have.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    seconds = float(sys.argv[1])
    limit_memory(memory)
    print("ready", flush=True)
    for line in sys.stdin:
        # Where the main process was killed, nobody else would end an answer that hangs.
        end_after(math.ceil(2 * seconds) + _OVERTIME)
        found = json.dumps(answer(json.loads(line)))
        end_after(0)
        print(found, flush=True)


def limit_memory(most: int) -> None:
    """Let what needs more bytes fail with a MemoryError, where the system can do that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS and containers may refuse
        return


def end_after(seconds: int) -> None:
    """End this process after some seconds, wherever it is; 0 for never."""
    if hasattr(signal, "alarm"):  # Windows has none
        signal.alarm(seconds)
