"""Chat templates that would hang or fill the memory, and those that people really have."""

import shutil
import time
from pathlib import Path

import pytest
from test_cli import call

import probe
from probe.errors import ProbeError
from probe.limits import Worker
from probe.models import _templates as templates
from probe.models import encode_prompt, read_tokenizer
from probe.models._templates import RefusalError, TooMuchError, fill

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LETTERS = "messages[0]['content']"
FAULTS = [
    (LOOP, "takes more than 2 s"),
    ("{{ 'a' * 6000000000 }}", "needs more than 1 GiB"),
    ("{% set n = messages | length %}{{ ('a' * (6000000000 * n)) | length }}", "needs more than 1"),
    ("{% for a in range(99999) %}aaaaaaaaaa{% endfor %}", "writes more than 100,000 letters"),
    ("{{ 9 ** 99999999 ** 9 }}", "takes more than 2 s"),
    ("{{ 'a' | center(10 ** 10) }}", "needs more than 1 GiB"),
    ("{{ (range(9999) | list * 99999) | length }}", "needs more than 1 GiB"),
    # One that knows by which question it is tried, or grows with it.
    ("{% if '1+1' not in " + LETTERS + " %}" + LOOP + "{% endif %}", "takes more than 2 s"),
    ("{{ " + LETTERS + " * 10 ** 9 }}", "needs more than 1 GiB"),
]


@pytest.fixture(scope="module", autouse=True)
def impatient():
    """Less time, so that the tests take less."""
    worker = Worker(templates.__name__, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "_worker", lambda process: worker)
        yield
    worker.end()


MESSAGES = [{"role": "user", "content": "7*8=?\n<b>é\u2028"}]


@pytest.mark.parametrize(("template", "fault"), FAULTS)
def test_a_template_that_does_not_end_well(template, fault):
    start = time.monotonic()
    with pytest.raises(TooMuchError, match=f"^{fault}"):
        fill(template, MESSAGES, {})
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}\n  {%- if loop.first %}\n a{% endif %}\n{% endfor %}\n",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}",
        "{% if add_generation_prompt %}go{% endif %}{% if tools %}no{% endif %}",
        "",
        "{{ 'x' * 50000 }}",
    ],
)
def test_it_is_filled_in_as_transformers_does(template):
    tokenizer = read_tokenizer(str(SFT))
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert fill(template, MESSAGES, tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if", "unexpected"),
        ("{{ nothing.of.this }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% break %}", "loop"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
    ],
)
def test_what_fails_otherwise_is_told(template, reason):
    with pytest.raises(RefusalError, match=reason) as caught:
        fill(template, MESSAGES, {})
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SFT, tmp_path / "model"))


def test_a_run_says_it_in_one_line(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(LOOP)
    run = ("compare", folder, folder, "--benchmark", "tiny-math", "--prompt", "chat")
    result = call(*run, "--limit", "5", "--output", tmp_path / "run")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"probe: {folder}: the chat template takes more than 2 s")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("template", "fault"), FAULTS[1:3])
def test_one_line_says_it(folder, template, fault):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ProbeError, match=fault):
        encode_prompt(read_tokenizer(str(folder)), "chat", "1+1=?")


def test_a_sandbox_is_not_left(folder):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ProbeError, match="the chat template refuses: .*unsafe"):
        encode_prompt(read_tokenizer(str(folder)), "chat", "1+1=?")
