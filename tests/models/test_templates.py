"""Chat templates that would hang or fill the memory, and those that people really have."""

import shutil
import time
from pathlib import Path

import pytest
from test_cli import call

import probe
from probe.errors import ProbeError
from probe.models import encode_prompt, read_tokenizer
from probe.models._templates import check_template

SFT = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAULTS = [
    (LOOP, "takes more than 10 s"),
    ("{{ 'a' * 6000000000 }}", "needs more than 1 GiB"),
    ("{% set n = messages | length %}{{ ('a' * (6000000000 * n)) | length }}", "needs more than 1"),
    ("{% for a in range(99999) %}aaaaaaaaaa{% endfor %}", "writes more than 100,000 letters"),
    ("{{ 9 ** 99999999 ** 9 }}", "takes more than 10 s"),
]


@pytest.mark.parametrize(("template", "fault"), FAULTS)
def test_a_template_that_does_not_end_well(template, fault):
    start = time.monotonic()
    message = f"^mine: the chat template {fault}.* for a short question; mend it"
    with pytest.raises(ProbeError, match=message):
        check_template(template, (), "mine")
    assert time.monotonic() - start < 25


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% break %}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if",
        "{{ nothing.of.this }}",
        "",
        "{{ 'x' * 50000 }}",
    ],
)
def test_what_fails_otherwise_is_not_its_business(template):
    check_template(template, (("bos_token", "<s>"),), "mine")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SFT, tmp_path / "model"))


@pytest.mark.slow
def test_a_run_says_it_in_one_line(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(LOOP)
    run = ("compare", folder, folder, "--benchmark", "tiny-math", "--prompt", "chat")
    result = call(*run, "--limit", "5", "--output", tmp_path / "run")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"probe: {folder}: the chat template takes more than 10 s")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("template", "fault"), FAULTS[1:3])
def test_before_it_is_used(folder, template, fault):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ProbeError, match=fault):
        encode_prompt(read_tokenizer(str(folder)), "chat", "1+1=?")


def test_a_sandbox_is_not_left(folder):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ProbeError, match="the chat template refuses: .*unsafe"):
        encode_prompt(read_tokenizer(str(folder)), "chat", "1+1=?")
