"""The file of judged pairs: how many answers are graded as a person would."""

import json
from pathlib import Path

from probe.grading import Grader, extract_answer

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "grading.jsonl").read_text().splitlines()
]

KNOWN_FAILURES = {
    (r"60^\circ", r"\boxed{60^\circ\text{C}}"),  # degrees of an angle and of heat
    ("29", r"\boxed{29 more}"),  # a word that is no unit
}


def test_the_file_is_what_it_says():
    assert len(PAIRS) >= 400
    assert len({(pair["gold"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    assert {pair["kind"] for pair in PAIRS if not pair["right"]} >= {
        *("base", "exact", "interval", "markdown", "thought", "unit", "unicode", "end token"),
        *("gold gsm8k", "gold math", "gold college_math", "gold minerva_math"),
        *("gold olympiadbench", "gold aime24", "gold amc23"),
    }


def test_every_pair_is_judged_as_by_hand():
    with Grader() as grader:
        failures = {
            (pair["gold"], pair["answer"])
            for pair in PAIRS
            if grader.grade(pair["gold"], extract_answer(pair["answer"])) is not pair["right"]
        }
    assert failures == KNOWN_FAILURES
