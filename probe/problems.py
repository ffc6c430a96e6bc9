"""Problems: the questions of a benchmark and their answers.

A benchmark is a function from an optional file to a list of problems, registered by name. Without
a file it loads its own source: a data set from the hub, or a file that ships with the package.

    >>> load_problems("tiny-math")[0]
    Problem(id='0', question='50-7-67-53=?', answer='-77')
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from probe.errors import ProbeError
from probe.models import PACKAGE_DATA


class Problem(NamedTuple):
    """One question."""

    id: str
    """Its name within the benchmark: its own, or its place in the file."""

    question: str
    """The text that goes into the prompt."""

    answer: str
    """The final answer, as the benchmark gives it."""


class Benchmark(NamedTuple):
    """A benchmark as recipes know it."""

    load: Callable[[Path | None], list[Problem]]
    """All its problems, from the file where one is given."""

    source: str | None
    """The data set on the hub that it loads without a file; None if it ships with the package."""


def tiny_math(path: Path | None = None) -> list[Problem]:
    """Integer arithmetic in a few steps: held-out problems of the models that ship with probe."""
    rows = _read_jsonl(path or PACKAGE_DATA / "tiny-math" / "problems.jsonl", "question", "answer")
    return [
        Problem(str(row.get("id", place)), str(row["question"]), str(row["answer"]))
        for place, row in enumerate(rows)
    ]


def gsm8k(path: Path | None = None) -> list[Problem]:
    """GSM8K, test split, 1319 questions (openai/gsm8k); the answer is what follows `####`."""
    rows: Iterator[Mapping[str, object]]
    if path is None:
        rows = iter(_from_hub("openai/gsm8k", "main", "test"))
    else:
        rows = _read_jsonl(path, "question", "answer")
    return [
        Problem(str(place), str(row["question"]), str(row["answer"]).rpartition("####")[2].strip())
        for place, row in enumerate(rows)
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "tiny-math": Benchmark(tiny_math, None),
    "gsm8k": Benchmark(gsm8k, "openai/gsm8k"),
}
"""Every benchmark by its name; the one place to add one."""


def load_problems(
    benchmark: str, path: Path | None = None, questions: int | None = None, seed: int = 42
) -> list[Problem]:
    """Load a benchmark, or a random part of it.

    Args:
        benchmark: A name in `BENCHMARKS`.
        path: A local file with its problems, instead of the benchmark's own source.
        questions: How many to draw, or None for all. A larger draw contains the smaller ones.
        seed: Seed of the draw.

    Raises:
        ProbeError: An unknown benchmark, a file that is missing or has a broken line, or a data
            set that cannot be reached.
    """
    if benchmark not in BENCHMARKS:
        raise ProbeError(f"benchmark {benchmark!r} is not known; one of: {', '.join(BENCHMARKS)}")
    problems = BENCHMARKS[benchmark].load(path)
    if not problems:
        raise ProbeError(f"{path or benchmark} holds no problem")
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise ProbeError(f"{path or benchmark}: the id {double!r} stands twice; make ids unique")
    if questions is None or questions >= len(problems):
        return problems
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[place] for place in sorted(order[:questions])]


def _read_jsonl(path: Path, *columns: str) -> Iterator[Mapping[str, object]]:
    """Read a JSON-lines file, naming the line in every complaint."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ProbeError(f"cannot read the benchmark file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"{path}:{number}: not JSON ({error.msg}); mend or remove this line"
            ) from error
        if not isinstance(row, dict):
            raise ProbeError(f"{path}:{number}: not a JSON object; each line needs {{...}}")
        missing = [column for column in columns if column not in row]
        if missing:
            raise ProbeError(
                f"{path}:{number}: no column {missing[0]!r}; found: {', '.join(row) or 'none'}; "
                f"needed: {', '.join(columns)}"
            )
        yield row


def _from_hub(dataset: str, config: str, split: str) -> Iterator[Mapping[str, object]]:
    import datasets

    try:
        yield from datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ProbeError(
            f"cannot load the data set {dataset!r} ({reason}); connect to the hub once, or give a "
            "local file with --set benchmarks.0.path=FILE"
        ) from error
