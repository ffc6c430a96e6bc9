import random
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from probe.grading import LONGEST, MEMORY, Grader, extract_answer
from probe.problems import load_problems


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("-24", "-24", True),
        ("-24", "24", False),
        ("18", "18.0", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("(1,2)", "(2,1)", False),
        ("0.5", "1/2", True),
        ("1024", "1,024", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"50\%", "50", True),
        (r"12 \mathrm{~cm}", "12 cm", True),
        ("(0,1]", "(0,1)", False),
        ("3.2e4", r"3.2 \times 10^{4}", True),
        (r"3.2 \times 10^{4}", "32000", True),
        (r"\text{even}", "even", True),
        (r"90^\circ", "90", True),
        (r"\$18", "18", True),
        ("2.88e-19", "1.325e-27", False),
        ("4.5e33", r"4.5 \times 10^{33}", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        (r"\frac{1}{3}", "0.3333333", True),
        ("1{,}024", "1024", True),
        ("1,024", "1.024", False),
        (r"-\frac{1}{2}", "-0.5", True),
        (r"3\frac{1}{2}", "3.5", True),
        (r"\{3,1,2\}", "1, 2, 3", True),
        (r"\{1,2\}", r"\{1,2,3\}", False),
        (r"\left[0,\tfrac{1}{2}\right)", "[0,1/2)", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("x=5", "5", True),
        ("y=2x+1", "2x+1", True),
        ("y=2x+1", "y=2x+2", False),
        (r"\sqrt{50}", r"5\sqrt{2}", True),
        (r"\frac{\sqrt{2}}{2}", "0.7071068", True),
        ("Solution is: $[k=4]$", "Solution is: $[x=1-2 t, z=1, y=t]$", False),
        (
            r"\left|\begin{array}{rr}1 & 2\\2 & 3\end{array}\right|=-1",
            r"\left|\begin{array}{rr}1 & 2\\4 & 3\end{array}\right|=-5",
            False,
        ),
        (
            r"\mathbf{y}=e^{2 t}\left[\begin{array}{c}1\\ 2\end{array}\right]",
            r"\mathbf{y}=e^{2 t}\left[\begin{array}{c}1\\ 3\end{array}\right]",
            False,
        ),
        (r"y=c_{1} e^{x}+c_{2} \cos 4 x+c_{3} \sin 4 x", r"y=x^{3} e^{x}+c_{1}", False),
        ("7", None, False),
        ("7", "", False),
        ("7", "__import__('os').system('false')", False),
        ("7", "seven\n8", False),
    ],
)
def test_grade(grader, gold, answer, right):
    assert grader.grade(gold, answer) is right


REAL = Path(__file__).parents[3] / "shared" / "benchmarks"
FILES = {
    "gsm8k": "gsm8k.jsonl",
    "math": "math500.jsonl",
    "minerva_math": "minerva_math.jsonl",
    "olympiadbench": "olympiadbench.jsonl",
    "aime24": "aime24.jsonl",
    "amc23": "amc23.jsonl",
    "college_math": "college_math.jsonl",
}
needs_real_files = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)

ALIKE = {("5", "x=5")}
"""Golds of neighbours that mean the same."""


def without_layout(gold):
    """A gold without the dollars and the sizes of brackets, and with other fractions."""
    gold = re.sub(r"(?<!\\)\$|\\(left|right)(?![a-z])", "", gold)
    return re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold)


WAYS = {
    "boxed": lambda gold: rf"So it is \boxed{{{gold}}}.",
    # This style ends with the line, so it is not for golds of several paragraphs.
    "stated": lambda gold: f"Step 3: The answer is: {gold} ки" if "\n" not in gold else None,
    "otherwise": lambda gold: rf"\boxed{{ {without_layout(gold)} }}",
}


@needs_real_files
@pytest.mark.parametrize("name", FILES)
def test_every_real_gold_is_right_against_itself(grader, name):
    problems = load_problems(name, REAL / FILES[name])
    wrong = {
        way: [
            problem.id
            for problem in problems
            if (text := write(problem.answer))
            and not grader.grade(problem.answer, extract_answer(text))
        ]
        for way, write in WAYS.items()
    }
    assert wrong == {way: [] for way in WAYS}


@needs_real_files
@pytest.mark.parametrize("name", FILES)
def test_the_next_problems_gold_is_wrong(grader, name):
    """Of a part of each file, drawn by a seed; docs/benchmarks.md has the whole."""
    pairs = list(pairwise(load_problems(name, REAL / FILES[name])))
    alike = {
        (problem.answer, following.answer)
        for problem, following in random.Random(0).sample(pairs, min(len(pairs), 150))
        if problem.answer != following.answer and grader.grade(problem.answer, following.answer)
    }
    assert alike <= ALIKE


def test_an_endless_comparison_is_wrong_and_the_next_one_is_graded():
    with Grader(seconds=2) as grader:
        assert grader.grade("1", "1")
        start = time.monotonic()
        assert not grader.grade("7", "9^{9^{9^{9^{9}}}}+0.5")
        assert time.monotonic() - start < 20
        assert grader.grade("-24", "-24")


def test_a_dead_process_is_replaced():
    with Grader() as grader:
        assert grader.grade("1", "1")
        grader._worker._process.kill()
        grader._worker._process.wait()
        assert grader.grade("2", "2")


@pytest.mark.parametrize(
    "answer",
    [r"(10^{9})!!", r"\binom{10^9}{5*10^8}", "(" * 5000 + "7", r"10^{10^{10}}", r"2^{2^{40}}"],
)
def test_what_fills_the_memory_is_wrong_and_the_next_one_is_graded(answer):
    with Grader(seconds=1.5) as grader:
        assert not grader.grade("7", answer)
        assert grader.grade("1/2", "0.5")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need not limit memory")
def test_the_grading_process_has_little_memory(grader):
    import resource

    grader.grade("1", "1")
    limits = resource.prlimit(grader._worker._process.pid, resource.RLIMIT_AS)
    assert limits == (MEMORY, MEMORY)


def test_a_long_answer_is_compared_as_text(grader):
    digits = "9" * 10 * LONGEST
    assert grader.grade(digits, f"${digits}$")
    assert not grader.grade(digits, digits[1:])
    assert grader.grade("9" * 5000, "9" * 4999 + "9.0")
