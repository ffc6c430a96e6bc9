"""Answers from a server that speaks OpenAI's API: vLLM, SGLang, llama.cpp, `transformers serve`.

Prompts go there as tokens where it takes them, and as text otherwise; tokens come from it where it
gives them, and are derived again from the text otherwise, as of files. `FORMS` is what is tried.
It is asked greedily, for many answers at once, and each is handed on as soon as it is there.

    >>> served = find(server, read_files("my-model"), problems, "{question}", stop=())
    >>> served.table["token_ids"]
    "the server's"
    >>> solutions = [s for some in ask(served, problems, "{question}") for s in some]
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from probe.concurrency import as_finished
from probe.errors import ProbeError
from probe.grading import Grader
from probe.models import ModelFiles
from probe.problems import Problem
from probe.remote import Completion, CompletionServer, RefusedError
from probe.solutions._generation import Ending
from probe.solutions._imported import spelled
from probe.solutions._selection import Solution
from probe.solutions._solutions import encode_prompts, graded, limits

PROMPTS, BEGINNING = 3, 16
"""A fingerprint is the first tokens of the answers to the first prompts."""

GREEDY: dict[str, object] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Greedy decoding, in the words that every server knows."""

OWN_WORDS: dict[str, object] = {
    # vLLM: the tokens, and the text with all that they spell; its own settings are left out.
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "add_special_tokens": False,
    "repetition_penalty": 1.0,
    # SGLang, llama.cpp
    "no_stop_trim": True,
    "repeat_penalty": 1.0,
}
"""What servers know beside it; some refuse what they do not know."""

As = Literal["tokens", "text", "text without special tokens in front"]


class Form(NamedTuple):
    """A way to ask."""

    prompt: As
    """What a prompt goes as; a server may put special tokens before a text."""

    fields: Mapping[str, object]
    """What else is asked for."""


FORMS = tuple(
    Form(prompt, fields)
    for prompt in ("tokens", "text", "text without special tokens in front")
    for fields in (GREEDY | OWN_WORDS, GREEDY | OWN_WORDS | {"logprobs": 1}, GREEDY)
)
"""The ways, the best first."""


class Beginning(NamedTuple):
    """How an answer begins."""

    prompt: tuple[int, ...]
    """The tokens of the prompt."""

    answer: tuple[int, ...]
    """The first tokens of the answer."""


@dataclass(frozen=True)
class Served:
    """A model on a server, and how it is asked."""

    server: CompletionServer
    """The server."""

    name: str
    """The model's name there."""

    model: ModelFiles
    """What is known of it here."""

    form: Form
    """How it is asked."""

    ending: Ending
    """Where answers end."""

    seed: int
    """What it draws with, should it draw."""

    gives_tokens: bool
    """Whether it gives token ids."""

    beginnings: tuple[Beginning, ...] = ()
    """The model's fingerprint: how its answers to the first prompts begin."""

    @property
    def table(self) -> dict[str, object]:
        """What a record says about it."""
        return {
            "server": self.server.url,
            "model": self.name,
            "prompts": self.form.prompt,
            "token_ids": "the server's" if self.gives_tokens else "derived again from the text",
            "beginnings": [
                {"prompt": [*each.prompt], "answer": [*each.answer]} for each in self.beginnings
            ],
        }

    @property
    def account(self) -> str:
        """The same for a reader, as one line."""
        table = self.table
        return (
            f"answers of {self.model.reference} are from {table['server']} ({table['model']}); "
            f"prompts go there as {table['prompts']}, token ids are {table['token_ids']}"
        )

    def complete(self, prompt: Sequence[int], limit: int, trying: bool = False) -> Completion:
        """What it writes behind a prompt."""
        request = {"model": self.name, "prompt": self._sent(prompt), "max_tokens": limit}
        stop = {"stop": [*self.ending.stop]} if self.ending.stop else {}
        fields = {**self.form.fields, **stop, "seed": self.seed}
        return self.server.complete({**request, **fields}, trying)

    def tokens(self, prompt: Sequence[int], completion: Completion, limit: int) -> list[int]:
        """The tokens of an answer.

        Raises:
            ProbeError: The server's are none of the model's.
        """
        if completion.tokens is not None:
            size = self.model.config.vocab_size
            if not 0 <= min(completion.tokens) <= max(completion.tokens) < size:
                raise ProbeError(
                    f"{self.server.url} writes token {max(completion.tokens)}, and "
                    f"{self.model.reference} has {size}; it runs another model"
                )
        ids = completion.tokens
        found = [*ids] if ids else spelled(self.model.tokenizer, [*prompt], completion.text)
        # Some leave out the token that ended it. Where that may also have been a stop string or
        # another end token, nobody can tell which.
        if completion.ended and len(self.ending.ends) == 1 and not self.ending.stop:
            found += [token for token in self.ending.ends if found[-1:] != [token]]
        return self.ending.cut(found, limit)

    def _sent(self, prompt: Sequence[int]) -> list[int] | str:
        if self.form.prompt == "tokens":
            return [*prompt]
        tokenizer, start = self.model.tokenizer, 0
        if self.form.prompt != "text":
            special = tokenizer.all_special_ids
            start = next((n for n, token in enumerate(prompt) if token not in special), 0)
        return str(tokenizer.decode([*prompt[start:]], clean_up_tokenization_spaces=False))


def find(
    server: CompletionServer,
    model: ModelFiles,
    problems: Sequence[Problem],
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    seed: int = 42,
    shared: bool = False,
) -> Served:
    """Find a model on a server, and how to ask it; a few tokens are written for that.

    Args:
        server: The server.
        model: The model, as its files here say it is.
        problems: The questions.
        prompt: The prompt, with `{question}` in it.
        max_new_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        seed: What it draws with, should it draw.
        shared: Whether the server is asked for other models, too.

    Raises:
        ProbeError: It does not have the model, takes no request for a completion, or reads other
            prompts than this model does.
    """
    first = encode_prompts(model, problems[:PROMPTS], prompt)
    most = [min(BEGINNING, limit) for limit in limits(model, first, max_new_tokens)]
    ending = Ending(model, tuple(stop))
    name = server.model_named(model.reference, shared)
    served, why = None, "it takes no prompt"
    for form in FORMS:
        tried = Served(server, name, model, form, ending, seed, gives_tokens=False)
        try:
            found = tried.complete(first[0], most[0], trying=True)
        except RefusedError as error:
            why = str(error)
            continue
        if found.prompt_tokens not in (None, len(first[0])):
            why = (
                f"{server.url} ({name}) reads {found.prompt_tokens} tokens in the prompt of "
                f"question {problems[0].id}, which has {len(first[0])} for {model.reference}; its "
                "tokenizer is another one"
            )
            continue
        served = served or tried
        if found.tokens is not None:
            served = Served(server, name, model, form, ending, seed, gives_tokens=True)
            break
        if served.form.prompt != form.prompt or form == FORMS[-1]:
            break
    if served is None:
        raise ProbeError(why)
    begun = (
        Beginning(tuple(p), tuple(served.tokens(p, served.complete(p, limit), limit)))
        for p, limit in zip(first, most, strict=True)
    )
    return Served(server, name, model, served.form, ending, seed, served.gives_tokens, tuple(begun))


def ask(
    served: Served,
    problems: Sequence[Problem],
    prompt: str,
    *,
    max_new_tokens: int,
    at_once: int = 32,
    done: Collection[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> Generator[list[Solution], None, None]:
    """Let a server answer problems, and grade what it writes.

    Args:
        served: The model there, from `find`.
        problems: The questions.
        prompt: The prompt, with `{question}` in it.
        max_new_tokens: Longest answer, in tokens; less where the context ends before.
        at_once: How many requests are under way.
        done: Ids that need no solution.
        say: Is told in one line of answers whose tokens may be others than the server's.

    Yields:
        The solutions that are new since the last time.

    Raises:
        ProbeError: The server refuses a request, or faults do not pass.
    """
    prompts = encode_prompts(served.model, problems, prompt)
    room = limits(served.model, prompts, max_new_tokens)
    left = [place for place, problem in enumerate(problems) if problem.id not in done]

    def answer(place: int) -> tuple[int, Completion]:
        return place, served.complete(prompts[place], room[place])

    others = asked = 0
    batches = as_finished((partial(answer, place) for place in left), at_once)
    with Grader() as grader, closing(batches):
        for finished in batches:
            solutions = []
            for place, found in finished:
                before = prompts[place]
                tokens = served.tokens(before, found, room[place])
                # A server may count the token that ended an answer, or not.
                counts = (None, len(tokens), len(tokens) - 1)
                others += found.tokens is None and found.written not in counts
                asked += found.prompt_tokens not in (None, len(before))
                text = str(served.model.tokenizer.decode(tokens, skip_special_tokens=True))
                solutions.append(graded(grader, problems[place], before, tokens, text))
            yield solutions
    if others:
        say(
            f"{others} of {len(left)} answers are spelled with another number of tokens here than "
            f"{served.server.url} wrote; what is scored there is the text as the tokenizer reads it"
        )
    if asked:
        say(f"{served.server.url} read other prompts in {asked} of {len(left)} questions")
