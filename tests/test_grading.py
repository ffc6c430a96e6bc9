import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.grading import Grader, extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("50-7=43;43-67=-24#-24", "-24"),
        ("So it is 3.\n#### 18", "18"),
        ("#### 1,024", "1,024"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{never closed", None),
        ("Step 2. The answer is: 42", "42"),
        ("The answer is 42.", "42"),
        ("The answer is: 1\nNo. The answer is: 7.5.", "7.5"),
        (r"The answer is: 3, so \boxed{4}", "4"),
        ("#1#2", "2"),
        ("", None),
        ("#", None),
        ("no answer at all", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@given(st.text(alphabet="#\\boxed{}The answer is: 12\n", max_size=60))
def test_extracting_never_fails(text):
    answer = extract_answer(text)
    assert answer is None or answer in text


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
        ("1024", "1,024", True),
        ("7", None, False),
        ("7", "", False),
        ("7", "__import__('os').system('false')", False),
        ("7", "seven\n8", False),
    ],
)
def test_grade(grader, gold, answer, right):
    assert grader.grade(gold, answer) is right


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
