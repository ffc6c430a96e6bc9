r"""Problems: the questions of a benchmark and their answers.

A benchmark is a function from an optional file or folder to a list of problems, registered by
name. Without a file it loads its own source: a data set from the hub, or a file that ships with
the package. What benchmarks differ in is little: where they come from, and how the final answer
is got from a row. The names of columns differ between copies of one benchmark, so all take all.

    >>> load_problems("tiny-math")[0].question
    '50-7-67-53=?'
"""

import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from probe.checkpoints import PACKAGE_DATA
from probe.errors import ProbeError, not_known, reason
from probe.grading import last_boxed
from probe.problems._reading import Row, read_rows
from probe.problems._unwrapping import last_question
from probe.registry import Registry
from probe.vocabulary import Grading

QUESTION = ("question", "problem", "prompt", "query", "input")
ANSWER = ("answer", "final_answer", "expected_answer", "ground_truth", "gold", "target")
SOLUTION = ("solution", "generated_solution", "rationale", "explanation")
ID = ("id", "unique_id", "idx", "uid", "problem_id", "problem_idx", "question_number", "index")
"""Names of columns in the wild, each list in order of preference; capitals do not matter."""

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class Problem(NamedTuple):
    """One question."""

    id: str
    """Its name within the benchmark: its own if it has one, or its place."""

    question: str
    """The text that goes into the prompt."""

    answer: str
    """The final answer, as the benchmark gives it."""

    grading: Grading = "math"
    """How a model's answer is compared with it."""

    cluster: str | None = None
    """What it shares with other questions (a template, a passage); None where it stands alone."""


class Benchmark(NamedTuple):
    """A benchmark as recipes know it."""

    load: Callable[[Path | None], list[Problem]]
    """All its problems, from the file or folder where one is given."""

    source: str | None
    """The data set on the hub that it loads without a file; None if it ships with the package."""

    size: int | None = None
    """How many problems that data set has, where it is known."""


def tiny_math(path: Path | None = None) -> list[Problem]:
    """Integer arithmetic in a few steps: held-out problems of the models that ship with probe."""
    return _problems(read_rows(path or PACKAGE_DATA / "tiny-math" / "problems.jsonl"), _answer)


def gsm8k(path: Path | None = None) -> list[Problem]:
    """GSM8K, test split, 1319 questions; the answer is what follows `####`."""
    rows = read_rows(path) if path else _from_hub("openai/gsm8k", "main", "test")
    return _problems(rows, lambda row: _answer(row).rpartition("####")[2])


def math(path: Path | None = None) -> list[Problem]:
    r"""MATH, test split, 5000 questions; the answer is its column or the solution's \boxed{}."""
    if path:
        return _problems(read_rows(path), _boxed_answer)
    parts = (_from_hub("EleutherAI/hendrycks_math", name, "test") for name in MATH_SUBJECTS)
    return _problems([row for part in parts for row in part], _boxed_answer)


def college_math(path: Path | None = None) -> list[Problem]:
    """College Math (MathScale's MWPBench), test split, 2818 questions from nine textbooks."""
    rows = read_rows(path) if path else _from_hub("qq8933/College_Math_Test", None, "test")
    return _problems(rows, _answer)


def minerva_math(path: Path | None = None) -> list[Problem]:
    r"""Minerva Math (undergraduate courses), 272 questions; the answer as in MATH."""
    rows = read_rows(path) if path else _from_hub("math-ai/minervamath", None, "test")
    # Two answers are half in Python: np.arcsin(10/13).
    return _problems(rows, lambda row: re.sub(r"\bnp\.", r"\\", _boxed_answer(row)))


def olympiadbench(path: Path | None = None) -> list[Problem]:
    """OlympiadBench, open-ended mathematics in English without pictures, 675 questions.

    The answer is a list with one text, which may list several answers itself; its unit, if there
    is one, follows it.
    """
    rows = (
        read_rows(path)
        if path
        else _from_hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")
    )

    def answer(row: Row) -> str:
        texts = _listed(row.need("answer", "final_answer", *ANSWER))
        unit = str(row.find("unit") or "").replace("$", "").strip()
        if unit and not unit.startswith(("^", "%")):
            unit = rf" \text{{ {unit}}}"
        return ", ".join(text.strip().strip(".") for text in texts) + unit

    return _problems(rows, answer)


def aime24(path: Path | None = None) -> list[Problem]:
    """AIME 2024, I and II, 30 questions; each answer is a whole number from 0 to 999."""
    rows = read_rows(path) if path else _from_hub("HuggingFaceH4/aime_2024", None, "train")
    return _problems(rows, _whole_answer)


def amc23(path: Path | None = None) -> list[Problem]:
    """AMC 12 2023, A and B, 40 questions without choices; each answer is a whole number."""
    rows = read_rows(path) if path else _from_hub("math-ai/amc23", None, "test")
    return _problems(rows, _whole_answer)


_ROWS: dict[str, Benchmark] = {
    "tiny-math": Benchmark(tiny_math, None),
    "gsm8k": Benchmark(gsm8k, "openai/gsm8k", 1319),
    "math": Benchmark(math, "EleutherAI/hendrycks_math", 5000),
    "college_math": Benchmark(college_math, "qq8933/College_Math_Test", 2818),
    "minerva_math": Benchmark(minerva_math, "math-ai/minervamath", 272),
    "olympiadbench": Benchmark(olympiadbench, "Hothan/OlympiadBench", 674),
    "aime24": Benchmark(aime24, "HuggingFaceH4/aime_2024", 30),
    "amc23": Benchmark(amc23, "math-ai/amc23", 40),
}

BENCHMARKS = Registry("benchmark", Benchmark, _ROWS, takes="load")
"""Every benchmark by its name; the one place to add one."""


def load_problems(
    benchmark: str,
    path: Path | None = None,
    questions: int | None = None,
    seed: int = 42,
    grading: Grading | None = None,
) -> list[Problem]:
    """Load a benchmark, or a random part of it.

    Args:
        benchmark: A name in `BENCHMARKS`; any name where a file and a grading are given.
        path: A local file or folder with its problems, instead of the benchmark's own source.
        questions: How many to draw, or None for all. A larger draw contains the smaller ones.
        seed: Seed of the draw.
        grading: How answers are compared; as mathematics where not given.

    Raises:
        ProbeError: An unknown benchmark, a file that is missing or broken or lacks a column, or
            a data set that cannot be reached.
    """
    if benchmark in BENCHMARKS:
        problems = BENCHMARKS[benchmark].load(path)
    elif path and grading:
        problems = _problems(read_rows(path), _answer)
    else:
        hint = (
            '; for questions of your own, say grading = "exact" or "math" (--grading)'
            if path
            else ""
        )
        raise ProbeError(not_known("benchmark", benchmark, BENCHMARKS) + hint)
    if grading:
        problems = [problem._replace(grading=grading) for problem in problems]
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


def _problems(rows: Sequence[Row], answer: Callable[[Row], str]) -> list[Problem]:
    """Make a problem of each row, given how to get its final answer."""
    problems = []
    for row, name in zip(rows, _ids(rows), strict=True):
        question = _question(row)
        if context := row.find("context"):
            question = f"{context}\n{question}"
        final = answer(row).strip()
        if not final:
            raise ProbeError(f"{row.where}: the answer is empty; mend or remove this row")
        cluster = row.find("cluster")
        shared = None if cluster is None else str(cluster)
        problems.append(Problem(name, question, final, cluster=shared))
    return problems


def _ids(rows: Sequence[Row]) -> list[str]:
    """Give each row the id of the first column that tells all rows apart, or else its place."""
    for column in ID:
        ids = [row.find(column) for row in rows]
        if None not in ids and len(set(map(str, ids))) == len(ids):
            return [str(name) for name in ids]
    return [str(place) for place in range(len(rows))]


def _question(row: Row) -> str:
    """The text of the question, which may be the last message of a user."""
    value = row.need("question", *QUESTION)
    try:
        asked = last_question(value)
    except ProbeError as error:
        raise ProbeError(f"{row.where}: no text in the question's message") from error
    if asked or isinstance(value, str | int | float):
        return asked or str(value)
    raise ProbeError(f"{row.where}: the question is no text, nor messages with one of a user")


def _answer(row: Row) -> str:
    value = row.need("answer", *ANSWER)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict | list):
        raise ProbeError(f"{row.where}: the answer is no text or number, nor a list with one")
    return str(value)


def _boxed_answer(row: Row) -> str:
    r"""Take the column of the answer, or else what the solution puts into its last \boxed{}."""
    marked = row.find(*ANSWER) is None
    text = str(row.need("answer", *ANSWER, *SOLUTION)) if marked else _answer(row)
    boxed = last_boxed(text)
    if boxed is None and marked:
        raise ProbeError(f"{row.where}: the solution has no \\boxed{{}}; mend or remove this row")
    return boxed or text


def _whole_answer(row: Row) -> str:
    """Write a whole number without leading zeros or decimals: 025 is 25 and 27.0 is 27."""
    text = _boxed_answer(row)
    found = re.fullmatch(r"\$?(-?)(\d+)(?:\.0*)?\$?", text.strip())
    if found is None:
        raise ProbeError(f"{row.where}: the answer {text!r} is no whole number")
    return found[1] + (found[2].lstrip("0") or "0")


def _listed(value: object) -> list[str]:
    """Read a list, which a CSV file holds as text: `['2']`, or as JSON."""
    if isinstance(value, str):
        if quoted := re.fullmatch(r"\s*\[\s*(['\"])(.*)\1\s*\]\s*", value, re.DOTALL):
            value = [quoted[2].replace(r"\\", "\\")]
        else:
            value = [value]
    return [str(part) for part in value] if isinstance(value, Sequence) else [str(value)]


def data_set_here(source: str) -> bool:
    """Whether a data set of the hub is in this machine's cache, without loading it."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    # The cache spells a data set's name in lower case, with underscores of its own.
    name = source.replace("/", "").replace("_", "").casefold()
    places = cache.iterdir() if cache.is_dir() else ()
    return any(place.name.replace("_", "").casefold() == name for place in places)


def _from_hub(dataset: str, config: str | None, split: str) -> list[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"cannot load the data set {dataset!r} ({reason(error)}); connect to the hub "
            "once, or give a local file with --benchmark-path NAME=FILE"
        ) from error
    return [Row(f"{dataset}, row {place}", row) for place, row in enumerate(rows, start=1)]
