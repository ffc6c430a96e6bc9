"""Templates: a chat template is a stranger's program, and is tried where it can do no harm.

It may loop for ever or make texts of gigabytes, which jinja's sandbox lets it do. So each is run
once, on short messages, in a process of its own with little memory and time.

    >>> check_template("{{ messages[0]['content'] }}", (("eos_token", "</s>"),), "mine")
"""

import json
import subprocess
import sys
from functools import lru_cache

from probe.errors import ProbeError
from probe.limits import end_after, limit_memory

SECONDS = 10
"""How long it may take for a short question."""

MEMORY = 2**30
"""How many bytes the process may have."""

LETTERS = 100_000
"""How long the text of a short question may be; the longest preambles known have some 20,000."""

_STARTUP = 30
_QUESTION = "What is 1+1?"


@lru_cache(maxsize=16)
def check_template(template: str, tokens: tuple[tuple[str, str], ...], name: str) -> None:
    """Check that a template ends, and with a text of a sensible length.

    A template that fails is none of its business: whoever uses it hears why.

    Args:
        template: The template.
        tokens: Names and texts of special tokens that it may write.
        name: Whose it is, for the complaint.

    Raises:
        ProbeError: It takes too long, needs too much memory or writes too much.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "probe.models._templates"],
            input=json.dumps([template, dict(tokens)]).encode(),
            capture_output=True,
            timeout=SECONDS + _STARTUP,
        )
    except subprocess.TimeoutExpired:
        fault = f"takes more than {SECONDS} s"
    else:
        said = done.stdout.decode(errors="replace").strip()
        fault = said if done.returncode == 0 else f"takes more than {SECONDS} s"
    if fault:
        raise ProbeError(
            f"{name}: the chat template {fault} for a short question; mend it, or give a prompt as "
            "text"
        )


def _try() -> None:
    """Run the template that comes in, and say whether it takes too much."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that transformers adds to the language; here it is what is in it."""

        tags = {"generation"}  # noqa: RUF012 - jinja's way

        def parse(self, parser: "jinja2.parser.Parser") -> "list[jinja2.nodes.Node]":
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    template, tokens = json.load(sys.stdin.buffer)
    end_after(SECONDS)
    limit_memory(MEMORY)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda style: style}
    parts = [{"type": "text", "text": _QUESTION}]
    for content in (_QUESTION, parts):
        messages = [{"role": "user", "content": content}]
        try:
            size = 0
            compiled = environment.from_string(template)
            for piece in compiled.generate(messages=messages, add_generation_prompt=True, **tokens):
                size += len(piece)
                if size > LETTERS:
                    print(f"writes more than {LETTERS:,} letters")
                    return
        except MemoryError:
            print(f"needs more than {MEMORY / 2**30:.0f} GiB of memory")
            return
        except Exception:  # a program of a stranger: any exception may come out of it
            continue


if __name__ == "__main__":
    _try()
