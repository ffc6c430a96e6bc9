import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.grading import Grader, exact_answer, extract_answer, last_boxed
from probe.problems import load_problems


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("50-7=43;43-67=-24#-24", "-24"),
        ("So it is 3.\n#### 18", "18"),
        ("#### 1,024", "1,024"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"I put it within \boxed{}. So \boxed{4}, in \boxed{}.", "4"),
        (r"\boxed{3} and then \boxed{never closed", "3"),
        (r"\boxed{never closed", None),
        ("Step 2. The answer is: 42", "42"),
        ("Step 2: 6*7=42 ки\nStep 3: The answer is: 42 ки", "42"),
        ("The answer is: 42 ки\n", "42"),
        ("The answer is 42.", "42"),
        ("The final answer is 42. I hope it is correct.", "42"),
        ("The answer is: 1\nNo. The answer is: 7.5.", "7.5"),
        ("The answer is:\n7", "7"),
        (
            "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}\nки",
            "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        ),
        (r"The answer is: 3, so \boxed{4}", "4"),
        ("The answer is: ", None),
        ("#1#2", "2"),
        ("", None),
        ("#", None),
        ("no answer at all", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@given(st.text(alphabet="#\\boxed{}The answer is: 12\nки", max_size=80))
def test_extracting_never_fails(text):
    answer = extract_answer(text)
    assert answer is None or (answer and answer in text)


@given(
    st.recursive(
        st.text(alphabet="x1+ ", min_size=1).filter(str.strip),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(
            lambda p: "{" + "}{".join(p) + "}"
        ),
    )
)
def test_a_box_ends_where_its_brace_is_closed(content):
    assert last_boxed(rf"so {{a}} \boxed{{{content}}} }} or {{") == content.strip()


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
        ("7", None, False),
        ("7", "", False),
        ("7", "__import__('os').system('false')", False),
        ("7", "seven\n8", False),
    ],
)
def test_grade(grader, gold, answer, right):
    assert grader.grade(gold, answer) is right


REAL = Path(__file__).parents[2] / "shared" / "benchmarks"
FILES = {
    "gsm8k": "gsm8k.jsonl",
    "math": "math500.jsonl",
    "minerva_math": "minerva_math.jsonl",
    "olympiadbench": "olympiadbench.jsonl",
    "aime24": "aime24.jsonl",
    "amc23": "amc23.jsonl",
    "college_math": "college_math.jsonl",
}


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)
@pytest.mark.parametrize("name", FILES)
def test_real_golds_are_right_and_their_neighbours_wrong(grader, name):
    problems = load_problems(name, REAL / FILES[name])
    alike = []
    for problem, following in pairwise(problems[:121]):
        boxed = extract_answer(rf"So it is \boxed{{{problem.answer}}}.")
        assert grader.grade(problem.answer, boxed), problem
        if problem.answer != following.answer and grader.grade(problem.answer, following.answer):
            alike.append((problem.answer, following.answer))
    assert alike == ([("5", "x=5")] if name == "math" else [])


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
        grader._process.kill()
        grader._process.wait()
        assert grader.grade("2", "2")


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Paris", "Paris", ("Paris", True)),
        ("  New\n York ", "New York", ("New\n York", True)),
        ("paris", "Paris", ("paris", False)),
        ("Paris.", "Paris", ("Paris.", False)),
        (r"It is \boxed{Paris}.", "Paris", ("Paris", True)),
        ("The answer is: Paris.", "Paris", ("Paris", True)),
        ("Let me think. #### Lyon", "Paris", ("Lyon", False)),
        ("a # b", "a # b", ("a # b", True)),  # marks mean nothing in what is right as a whole
        ("0.50", "1/2", ("0.50", False)),  # no mathematics
        ("", "Paris", ("", False)),
    ],
)
def test_exact_answers(text, gold, expected):
    assert exact_answer(text, gold) == expected
