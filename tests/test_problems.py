import json
import re
from pathlib import Path

import pytest

from probe.errors import ProbeError
from probe.problems import BENCHMARKS, load_problems

REAL = Path(__file__).parents[2] / "shared" / "benchmarks"


def test_the_shipped_problems_are_right():
    problems = load_problems("tiny-math")
    assert len(problems) == 1000
    for problem in problems:
        assert re.fullmatch(r"\d+([+*-]\d+){2,4}=\?", problem.question), problem
        total, *steps = re.findall(r"^\d+|[+-]\d+", problem.question)
        assert int(total) + sum(map(int, steps)) == int(problem.answer), problem


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)
def test_gsm8k_from_its_real_file():
    problems = load_problems("gsm8k", REAL / "gsm8k.jsonl")
    assert len(problems) == 1319
    assert problems[0].answer == "18"
    assert problems[0].question.startswith("Janet")
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", problem.answer) for problem in problems)


def test_a_larger_draw_contains_the_smaller():
    small, large, other = (
        {p.id for p in load_problems("tiny-math", questions=n, seed=s)}
        for n, s in ((20, 42), (50, 42), (20, 1))
    )
    assert len(small) == 20
    assert small < large
    assert small != other
    assert len(load_problems("tiny-math", questions=10**6)) == 1000


def write(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    return path


GOOD = json.dumps({"question": "1+1=?", "answer": "2"})


def test_a_file_without_ids_counts_lines(tmp_path):
    problems = load_problems("tiny-math", write(tmp_path, GOOD, "", GOOD))
    assert [p.id for p in problems] == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", "ans', r"p\.jsonl:2: not JSON .*; mend or remove this line"),
        ("[1]", r"p\.jsonl:2: not a JSON object"),
        (
            '{"question": "x"}',
            r"p\.jsonl:2: no column 'answer'; found: question; needed: question, answer",
        ),
    ],
)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_broken_line_is_named(tmp_path, benchmark, line, message):
    with pytest.raises(ProbeError, match=message):
        load_problems(benchmark, write(tmp_path, GOOD, line))


def test_other_bad_input(tmp_path):
    with pytest.raises(ProbeError, match="'gsm' is not known; one of: tiny-math, gsm8k"):
        load_problems("gsm")
    with pytest.raises(ProbeError, match=r"cannot read the benchmark file .*No such file"):
        load_problems("tiny-math", tmp_path / "none.jsonl")
    with pytest.raises(ProbeError, match="holds no problem"):
        load_problems("tiny-math", write(tmp_path, ""))
    twice = json.dumps({"id": "a", "question": "1", "answer": "1"})
    with pytest.raises(ProbeError, match="id 'a' stands twice"):
        load_problems("tiny-math", write(tmp_path, twice, twice))
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ProbeError, match="byte 14 is not UTF-8"):
        load_problems("tiny-math", tmp_path / "latin")
