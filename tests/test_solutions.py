import pytest
import torch

from probe.errors import ProbeError
from probe.problems import Problem, load_problems
from probe.solutions import CHAT_MESSAGE, chat_message, encode_prompt, generate, solve


@pytest.fixture(scope="module")
def problems():
    return load_problems("tiny-math", questions=23)


def solutions(model, problems, **options):
    options = {"max_new_tokens": 64, "batch_size": 8} | options
    batches = solve(model, problems, "{question}", **options)
    return [solution for batch in batches for solution in batch]


def test_batched_generation_is_plain_greedy_decoding(tiny, problems):
    for problem in problems[:6]:
        tokens = tiny.tokenizer(problem.question)["input_ids"]
        expected = []
        while len(expected) < 64 and tiny.tokenizer.eos_token_id not in expected:
            with torch.no_grad():
                logits = tiny.network._module(torch.tensor([tokens + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        (found,) = [s for s in solutions(tiny, problems) if s.id == problem.id]
        assert found.prompt == tokens
        assert found.answer == expected


def test_solutions_are_graded(tiny, problems):
    found = solutions(tiny, problems)
    assert sorted(s.id for s in found) == sorted(p.id for p in problems)
    for solution in found:
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
    (answer,) = generate(tiny, [tiny.tokenizer(problems[0].question)["input_ids"]], 3)
    assert len(answer) == 3


def test_the_context_bounds_an_answer(tiny):
    prompt = tiny.tokenizer("12+3=?")["input_ids"]
    assert tiny.context is not None
    (answer,) = generate(tiny, [prompt * ((tiny.context - 10) // len(prompt))], 100)
    assert len(answer) <= tiny.context
    long = Problem("7", "1" * tiny.context, "3")
    with pytest.raises(ProbeError, match=r"question 7: its prompt has \d+ tokens"):
        list(solve(tiny, [long], "{question}", max_new_tokens=4, batch_size=1))


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
        encode_prompt(llama, "chat", "2+3")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{{ add_generation_prompt }}")
    shown = f"{tokenizer.bos_token}user|7 {{question}}TrueTrue"
    text = shown.replace("{question}", "2+3").removesuffix("True")
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(llama, "chat: 7 {question}", "2+3") == expected
    assert chat_message("chat") == (True, CHAT_MESSAGE)
    assert "{question}" in CHAT_MESSAGE
    assert r"\boxed{}" in CHAT_MESSAGE
    assert chat_message("chatter: {question}") == (False, "chatter: {question}")
