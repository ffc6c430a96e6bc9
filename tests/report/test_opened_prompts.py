"""A prompt is left open, and a chat template that fails is one line."""

import json
import shutil

import pytest
from test_fitting import SFT, configure

import probe
from probe.models import encode_prompt, encode_text, read_tokenizer

QUESTION = "50-7-67-53=?"
PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SFT, tmp_path / "model")


def around(folder, before, after):
    """Let a tokenizer put end tokens before and behind every text."""
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text())
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*[end] * before, text, *[end] * after],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    file.write_text(json.dumps(table))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (0, 2), (1, 0)])
def test_what_a_tokenizer_puts_behind_is_left_out(folder, before, after):
    plain = encode_text(read_tokenizer(str(SFT)), QUESTION, chat=False)
    around(folder, before, after)
    tokenizer = read_tokenizer(str(folder))
    assert encode_text(tokenizer, QUESTION, chat=False) == [1] * before + plain
    if not before:  # what the text itself spells out stays
        assert encode_text(tokenizer, f"{QUESTION}<eos>", chat=False) == [*plain, 1]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}",
        "{{ messages[-1]['content'] }}<eos>",
        "{{ messages[-1]['content'] | trim }}",
        PARTS,
    ],
)
def test_templates_that_ask_the_question(folder, template):
    configure(folder, "tokenizer_config.json", chat_template=template)
    plain = encode_text(read_tokenizer(str(SFT)), QUESTION, chat=False)
    assert encode_prompt(read_tokenizer(str(folder)), "chat: {question}", QUESTION) == plain


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor",
        "{{ raise_exception('A system turn comes first') }}",
        "{{ nothing.at.all }}",
        "{{ messages[-1]['content'] + 1 }}",
        "{{ messages[7]['content'] }}",
        "1+1=?",
        "{{ 1 // 0 }}",
        {"rag": "{{ messages[-1]['content'] }}", "tool_use": "{{ messages }}"},
    ],
)
def test_templates_that_fail_are_one_line(folder, template):
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    configure(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(probe.ProbeError, match="the chat template refuses: ") as caught:
        encode_prompt(read_tokenizer(str(folder)), "chat: {question}", QUESTION)
    assert "\n" not in str(caught.value)
