import pytest

from probe.errors import ProbeError
from probe.models import CHAT_MESSAGE, chat_message, encode_prompt
from probe.problems import Problem, load_problems
from probe.solutions import solve


@pytest.fixture(scope="module")
def problems():
    return load_problems("tiny-math", questions=23)


def solutions(model, problems, **options):
    options = {"max_new_tokens": 64, "batch_size": 8} | options
    batches = solve(model, problems, "{question}", **options)
    return [solution for batch in batches for solution in batch]


def test_solutions_are_graded(tiny, problems):
    found = solutions(tiny, problems)
    assert sorted(s.id for s in found) == sorted(p.id for p in problems)
    for solution in found:
        assert solution.text == tiny.tokenizer.decode(solution.answer, skip_special_tokens=True)
        final = solution.text.rpartition("#")[2]
        assert solution.extracted == final
        assert solution.correct == (final == solution.gold)
    assert 0 < sum(s.correct for s in found) < len(found)


def test_what_is_done_is_left_out_and_moves_nothing(tiny, problems):
    everything = {s.id: s for s in solutions(tiny, problems)}
    done = {p.id for p in problems[:10]}
    rest = solutions(tiny, problems, done=done)
    assert {s.id for s in rest} == everything.keys() - done
    assert all(everything[s.id] == s for s in rest)
    assert solutions(tiny, problems, done=everything) == []


def test_an_answer_that_does_not_end(tiny, problems):
    assert {len(s.answer) for s in solutions(tiny, problems, max_new_tokens=3)} == {3}


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_the_context_bounds_an_answer(tiny, engine):
    times = (tiny.context - 10) // len(tiny.tokenizer("12+3=?")["input_ids"])
    (found,) = solutions(tiny, [Problem("7", "12+3=?" * times, "15")], engine=engine)
    assert len(found.prompt) + len(found.answer) <= tiny.context
    long = Problem("7", "1" * tiny.context, "3")
    with pytest.raises(ProbeError, match=r"question 7: its prompt has \d+ tokens"):
        solutions(tiny, [long], engine=engine)


def test_engines_give_the_same_solutions(tiny, problems):
    static, continuous = (
        {s.id: s for s in solutions(tiny, problems, engine=engine, stop=[";4"])}
        for engine in ("static", "continuous")
    )
    assert static == continuous
    assert any(s.text.endswith(";4") for s in static.values())


def test_answers_are_compared_as_the_problem_says(tiny):
    gold = "50-7=43;43-67=-24;-24-53=-77#-77"
    asked = [
        Problem("whole", "50-7-67-53=?", gold, "exact"),
        Problem("final", "50-7-67-53=?", "-77", "exact"),
        Problem("meaning", "50-7-67-53=?", "-77.0"),
        Problem("text", "50-7-67-53=?", "-77.0", "exact"),
    ]
    batches = solve(tiny, asked, "{question}", max_new_tokens=64)
    found = {s.id: (s.extracted, s.correct) for batch in batches for s in batch}
    assert found == {
        "whole": (gold, True),
        "final": ("-77", True),
        "meaning": ("-77", True),
        "text": ("-77", False),
    }


def test_the_prompt_may_hold_braces(tiny):
    problem = Problem("0", "1+2", "3")
    (batch,) = solve(tiny, [problem], "{question}=?", max_new_tokens=4, batch_size=1)
    assert tiny.tokenizer.decode(batch[0].prompt) == "1+2=?"


def test_an_empty_question(tiny):
    with pytest.raises(ProbeError, match="question 7: its prompt has no tokens"):
        list(solve(tiny, [Problem("7", "", "3")], "{question}", max_new_tokens=4, batch_size=1))


def test_a_chat_prompt_goes_through_the_tokenizers_template(llama, monkeypatch):
    tokenizer = llama.tokenizer
    with pytest.raises(ProbeError, match="has no chat template; give the prompt as text"):
        encode_prompt(tokenizer, "chat", "2+3")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{{ add_generation_prompt }}")
    shown = f"{tokenizer.bos_token}user|7 {{question}}TrueTrue"
    text = shown.replace("{question}", "2+3").removesuffix("True")
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "chat: 7 {question}", "2+3") == expected
    assert chat_message("chat") == (True, CHAT_MESSAGE)
    assert "{question}" in CHAT_MESSAGE
    assert r"\boxed{}" in CHAT_MESSAGE
    assert chat_message("chatter: {question}") == (False, "chatter: {question}")
