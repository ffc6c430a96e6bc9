"""Sequences: from texts, pairs and chats to tokens, and what is refused."""

import numpy as np
import pytest
import torch

import probe
from probe.attribution import Edge, TokenSequence, as_sequences, exact_effects
from probe.errors import ProbeError
from probe.problems import Problem
from probe.solutions import solve

QUESTION, ANSWER = "50-7-67-53=?", "50-7=43;"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def chatting(model, monkeypatch):
    """The model, with a tokenizer that has a chat template."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def tokens_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_public_names():
    assert probe.Sequence is probe.TokenSequence is TokenSequence


def test_from_text(tiny):
    sequence = TokenSequence.from_text(tiny, QUESTION, ANSWER, id="q")
    assert sequence.prompt == tiny.tokenizer(QUESTION)["input_ids"]
    assert tiny.tokenizer.decode(sequence.answer) == ANSWER
    assert sequence.id == "q"
    assert TokenSequence.from_text("probe:tiny-math/sft", QUESTION, ANSWER, id="q") == sequence


def test_special_tokens_are_those_of_a_run(llama):
    """The oracle's tokenizer begins a text by itself; an answer goes on with it."""
    (solved,) = next(solve(llama, [Problem("0", "5 6", "1")], "{question}", max_new_tokens=1))
    sequence = TokenSequence.from_text(llama, "5 6", "7")
    assert sequence.prompt == solved.prompt
    assert sequence.answer == llama.tokenizer("7", add_special_tokens=False)["input_ids"]


def test_a_chat_template_is_used_where_there_is_one(llama, monkeypatch):
    chatting(llama, monkeypatch)
    bos = llama.tokenizer.bos_token
    said = tokens_of(llama, f"{bos}<u>5 6<a>")
    assert TokenSequence.from_text(llama, "5 6", "7").prompt == said
    plain = TokenSequence.from_text(llama, "5 6", "7", chat=False)
    assert plain.prompt == llama.tokenizer("5 6")["input_ids"] != said
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    chat = TokenSequence.from_text(llama, messages, "7")
    assert chat.prompt == tokens_of(llama, f"{bos}<s>1<u>2<a>")
    assert as_sequences(llama, messages, "7") == as_sequences(llama, [(messages, "7")])
    assert as_sequences(llama, messages, "7")[0].prompt == chat.prompt
    # What the assistant said last is an answer, and nothing that is answered once more.
    said = [*messages, {"role": "assistant", "content": "7"}]
    assert as_sequences(llama, said) == as_sequences(llama, [(messages, "7")])
    with pytest.raises(ProbeError, match="has an answer already"):
        as_sequences(llama, said, "8")
    with pytest.raises(ProbeError, match="is no prompt"):
        as_sequences(llama, said[-1:])
    # A text is what the user says, whatever a recipe would read into it.
    odd = TokenSequence.from_text(llama, "chat: {question}", "7")
    assert odd.prompt == tokens_of(llama, f"{bos}<u>chat: {{question}}<a>")


def test_a_chat_that_cannot_be(llama, monkeypatch):
    messages = [{"role": "tool", "content": "2"}]
    with pytest.raises(ProbeError, match="has no chat template"):
        TokenSequence.from_text(llama, messages, "7")
    with pytest.raises(ProbeError, match="has no chat template"):
        TokenSequence.from_text(llama, "2", "7", chat=True)
    chatting(llama, monkeypatch)
    with pytest.raises(ProbeError, match="the chat template refuses: no tools here"):
        TokenSequence.from_text(llama, messages, "7")
    with pytest.raises(ProbeError, match="messages need the chat template"):
        TokenSequence.from_text(llama, messages, "7", chat=False)


def test_every_way_to_say_the_same(tiny):
    (sequence,) = as_sequences(tiny, TokenSequence.from_text(tiny, QUESTION, ANSWER))
    assert as_sequences(tiny, sequence) == as_sequences(tiny, [sequence]) == [sequence]
    assert as_sequences(tiny, (QUESTION, ANSWER)) == [sequence]
    assert as_sequences(tiny, QUESTION, ANSWER) == [sequence]
    assert as_sequences(tiny, [QUESTION], [ANSWER]) == [sequence]
    assert as_sequences(tiny, iter([(QUESTION, ANSWER)])) == [sequence]
    several = as_sequences(tiny, [(QUESTION, ANSWER), sequence._replace(id="q"), sequence])
    assert [one.id for one in several] == ["0", "q", "0"]
    assert {tuple(one.prompt) for one in several} == {tuple(sequence.prompt)}
    numbers = TokenSequence(np.array(sequence.prompt).tolist(), tuple(map(np.int64, [5, 6])))
    assert as_sequences(tiny, numbers)[0].answer == [5, 6]
    assert as_sequences(tiny, []) == []


def test_without_an_answer_the_model_writes_its_own(tiny):
    problems = [Problem("0", QUESTION, "1"), Problem("1", "9-4=?", "1")]
    batch = next(solve(tiny, problems, "{question}", max_new_tokens=64))
    solved = sorted(batch, key=lambda solution: solution.id)
    found = as_sequences(tiny, [QUESTION, ("1+1=?", "2"), "9-4=?"])
    assert [found[0].answer, found[2].answer] == [solution.answer for solution in solved]
    assert found[1].answer == tokens_of(tiny, "2")
    short = as_sequences(tiny, [QUESTION], max_new_tokens=3)
    assert short[0].answer == list(found[0].answer[:3])


def test_attribute_from_text(tiny):
    one = probe.attribute("probe:tiny-math/sft", QUESTION, answer=ANSWER)
    same = probe.attribute(tiny, [TokenSequence.from_text(tiny, QUESTION, ANSWER)])
    assert one == same
    effects = exact_effects("probe:tiny-math/sft", (QUESTION, ANSWER), [Edge(0, 0, 16)])
    assert effects.shape == (1,)
    assert effects != 0


@pytest.mark.parametrize(
    ("given", "answer", "message"),
    [
        (torch.tensor([1, 2]), None, "a Tensor cannot be scored; give a text, a pair"),
        (np.array([1, 2]), None, "a ndarray cannot be scored"),
        (None, None, "None cannot be scored"),
        (7, None, "an int cannot be scored"),
        (b"12", None, "a bytes cannot be scored"),
        ({"prompt": "1"}, "2", "a dict cannot be scored"),
        ([[1, 2], [3]], None, "sequence 0: a list cannot be scored"),
        ([("1", 2)], None, "sequence 0: a tuple cannot be scored"),
        (["1", None], None, "sequence 1: None cannot be scored"),
        ("", "2", "sequence 0: the prompt is empty"),
        ("1", "", "sequence 0: the answer is empty"),
        (["1+1=?", ""], None, "sequence 1: the prompt is empty"),
        ("1", 2, "answer is an int; give a text"),
        ("1", ["2", "3"], "2 answers do not fit 1 prompts"),
        (["1", "2"], "3", "1 answers do not fit 2 prompts"),
        (("1", "2"), "3", "sequence 0 has an answer already; leave answer out"),
        (TokenSequence([1], [2], "q"), "3", "sequence q has an answer already"),
        (TokenSequence("12", [2]), None, "sequence 0: the prompt is text, not token ids"),
        (TokenSequence([1], "2", "q"), None, "sequence q: the answer is text, not token ids"),
        (TokenSequence(torch.tensor([1]), [2]), None, "0: the prompt is a Tensor; give a list"),
        (TokenSequence([1], np.array([2])), None, "0: the answer is a ndarray; give a list"),
        (TokenSequence(b"12", [2]), None, "0: the prompt is a bytes; give a list"),
        (TokenSequence([1, 2.0], [2]), None, "0: the prompt holds 2.0, which is no token id"),
        (TokenSequence([1], [True]), None, "0: the answer holds True, which is no token id"),
        (TokenSequence([1], [None]), None, "0: the answer holds None"),
        (TokenSequence([1, -1], [2]), None, "token -1 is outside"),
        ("1" * 5000, None, "leaves no room for an answer in the model's context of"),
    ],
)
def test_what_cannot_be_scored(tiny, given, answer, message):
    with pytest.raises(ProbeError, match=message) as caught:
        probe.attribute(tiny, given, answer=answer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (n, v)
        for n in ("ig_steps", "max_new_tokens", "batch_size")
        for v in (2.5, True, 0, "3", None)
    ],
)
def test_counts_are_whole_numbers(tiny, name, value):
    with pytest.raises(ProbeError, match=f"{name} is {value!r}; it must be a"):
        probe.attribute(tiny, "1+1=?", answer="2", **{name: value})


@pytest.mark.parametrize(
    "edge",
    [
        Edge(0, 0, -1),
        Edge(0, -1, 3),
        Edge(-1, 0, 3),
        Edge(1, 0, 3),
        Edge(0, 9, 16),
        Edge(0, 0, 17),
        Edge(0, 8, 0),
        Edge(0, True, 16),
        Edge(0, 0.0, 16),
        Edge(0, "input", "logits"),
        (0, 0),
        None,
    ],
)
def test_edges_that_are_none(tiny, edge):
    with pytest.raises(ProbeError, match="is no edge of these 1 sequences and this graph"):
        exact_effects(tiny, ("1+1=?", "2"), [edge])


def test_a_model_is_a_reference_or_a_model(tiny):
    with pytest.raises(ProbeError, match="model is a LlamaForCausalLM; give a reference, or what"):
        probe.attribute(tiny.network._module, "1+1=?")
    with pytest.raises(ProbeError, match="nowhere"):
        probe.attribute("./nowhere", "1+1=?")


def test_from_text_needs_tokens(tiny):
    with pytest.raises(ProbeError, match="the answer is empty"):
        TokenSequence.from_text(tiny, "1", "")
    with pytest.raises(ProbeError, match="the prompt is empty"):
        TokenSequence.from_text(tiny, "", "1")
    with pytest.raises(ProbeError, match="a list is no answer"):
        TokenSequence.from_text(tiny, "1", [2])
    with pytest.raises(ProbeError, match="a list is no prompt"):
        TokenSequence.from_text(tiny, [2], "1")
