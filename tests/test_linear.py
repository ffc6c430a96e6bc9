"""What reads texts of models and of strangers takes no longer than their length, whatever they are.

At these lengths a scan that looks back takes minutes.
"""

import signal
import time

import pytest

from probe.errors import ProbeError
from probe.escaping import html, latex, markdown, one_line, printable
from probe.grading import LONGEST, exact_answer, extract_answer, last_boxed, tidy
from probe.grading._equality import _based, _number, _same_time, plain
from probe.grading._notation import first_sentence, quantity
from probe.problems import Row, last_question, one_text
from probe.problems._benchmarks import _listed, _whole_answer

LENGTH = 50_000
SECONDS = 5

UNITS = [
    *(" ", "\t", "\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\u200b", "\ud800"),
    *("{", "}", "\\boxed{", "\\boxed ", "\\boxed{}", "{}", "\\{", "#", "#### ", "##### a "),
    *("0", "9", "1,", "1.", "-", "\u2212", "\\", "$", "\\$", "$$", "\\[", "\\(", "\\,", "\\!"),
    *("\\begin{", "\\text{", "\\text{a}", "\\frac", "√", "sqrt(", "^(", "²", "½", "𝟎", "ａ"),
    *("*", "**a", "_", "__a", "`", "<", "<<", "<think>", "</think>", "<|", "<|im_end|>", "</s>"),
    *("answer", "answer: ", "answer of ", "final answer\n", "the answer is not ", "<answer>"),
    *("ки", "I hope it is correct", "</b>", "<span ", "therefore ", "then* ", "(", "[", "|", "~"),
    *("'", '"', "f'{a}'", 'f"{a}"', "'',", "'\\'", "[{", "- ", "1. ", " ##### a\t", "é", "\r"),
]
STARTS = ("", "The answer is: 5 $")
AS_LONG = {
    "extract_answer": extract_answer,
    "exact_answer": lambda text: exact_answer(text, "5"),
    "last_boxed": last_boxed,
    "whole answers": lambda text: _whole_answer(Row("here", {"answer": text})),
    "listed": _listed,
    "one_text": one_text,
    "one_text of a list": lambda text: one_text(text + "]"),
    "last_question": last_question,
    **{escape.__name__: escape for escape in (one_line, markdown, latex, html, printable)},
}
FOR_GRADING = {
    "tidy": tidy,
    "quantity": quantity,
    "number": lambda text: _number(plain(text)),
    "base": _based,
    "time": lambda text: _same_time(text, "5:30"),
    "sentence": first_sentence,
}
"""What is called behind `LONGEST`, in the grading process."""


def late(number, frame):
    raise TimeoutError


@pytest.mark.parametrize("name", [*AS_LONG, *FOR_GRADING])
def test_it_is_linear(name):
    function = (AS_LONG | FOR_GRADING)[name]
    length = LENGTH if name in AS_LONG else LONGEST
    signal.signal(signal.SIGALRM, late)
    for unit in UNITS:
        for start in STARTS if name in AS_LONG else STARTS[:1]:
            text = start + unit * (length // len(unit))
            begun = time.process_time()
            signal.alarm(2 * SECONDS)
            try:
                function(text)
            except (ProbeError, ValueError):  # a number of so many digits
                pass
            except TimeoutError:
                pytest.fail(f"it hangs on {start!r} and many {unit!r}")
            finally:
                signal.alarm(0)
            assert time.process_time() - begun < SECONDS, (start, unit)
