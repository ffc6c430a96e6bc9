"""Generation: greedy answers to prompts, by one of two engines.

`continuous` is the continuous batching of transformers: an answer that ends makes room for the
next prompt at once. The module of that name tries first what this version of transformers has.
`static` is `generate` on batches of similar prompts: a batch lasts as long as its longest answer.
Without a choice, a GPU gets the first and a CPU the second; where the first cannot run, the reason
is said and the second goes on from there.

Both end an answer by the same rule: at the first end-of-sequence token, at the token that
completes a stop string, or at the limit of that prompt. This last token belongs to the answer.

    >>> for finished in generate(model, prompts, limits=[64] * len(prompts)):
    ...     for answer in finished:
    ...         print(answer.place, model.tokenizer.decode(answer.tokens))
"""

import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from probe import continuous
from probe.concurrency import in_flight
from probe.errors import ProbeError, reason
from probe.models import Model
from probe.tracing import generate_tokens
from probe.vocabulary import Engine

if TYPE_CHECKING:
    from transformers import GenerationConfig

CONTINUOUS_ON = ("cuda",)
"""Kinds of device where `auto` is continuous."""


class Answer(NamedTuple):
    """A finished answer."""

    place: int
    """Which prompt it answers."""

    tokens: list[int]
    """Its tokens, the one that ended it included."""


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    skip: Collection[int] = (),
    engine: Engine = "auto",
    say: Callable[[str], object] = warnings.warn,
) -> Generator[list[Answer], None, None]:
    """Answer prompts greedily.

    The model's own sampling settings (temperature, repetition penalty) are left out: the
    published runs decode greedily and nothing else. The choice of a token depends on what else
    is in its batch only by rounding, which decides between two tokens that are nearly alike.
    Static batches depend on the prompts alone, not on what is skipped; what the continuous
    engine runs together depends on both.

    Args:
        model: The model to ask.
        prompts: The tokens of each prompt.
        limits: The longest answer to each, in tokens.
        stop: Texts that end an answer, searched for in its text with special tokens written out.
        batch_size: How many prompts run at once in a static batch.
        skip: Places of prompts that need no answer; a static batch of such alone is skipped.
        engine: `auto`, `continuous` or `static`.
        say: Is told in one line where the continuous engine, or the best way to use it, had to be
            left, and why.

    Yields:
        What is finished: a static batch, or all answers that have ended since the last time.

    Raises:
        ProbeError: An unknown engine.
    """
    if engine not in get_args(Engine):
        raise ProbeError(f"engine {engine!r} is not known; one of: {', '.join(get_args(Engine))}")
    ending = _Ending(model, tuple(stop))
    left = {place for place in range(len(prompts)) if place not in skip}
    if engine == "continuous" and model.deployment:
        raise ProbeError("a server generates in static batches; use engine auto or static")
    on_gpu = model.device.type in CONTINUOUS_ON
    if left and (engine == "continuous" or (engine == "auto" and on_gpu)):
        try:
            for finished in _continuous(model, prompts, limits, left, ending, say):
                left.difference_update(answer.place for answer in finished)
                yield finished
        except Exception as error:
            # What can go wrong in there is the library's, the driver's or the memory's business;
            # the slower engine still gives the same answers.
            if engine == "continuous":
                raise
            say(f"continuous batching failed ({reason(error)}); going on with static batches")
    if left:
        yield from _static(model, prompts, limits, left, ending, batch_size)


class _Ending:
    """The rule by which answers end."""

    def __init__(self, model: Model, stop: tuple[str, ...]) -> None:
        ends = model.network._module.generation_config.eos_token_id
        if ends is None:
            ends = model.tokenizer.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends: list[int] = [end for end in ends if end is not None]
        self.stop = stop
        self._tokenizer = model.tokenizer
        # A token writes a byte at least, so a stop string is within so many of them.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 4

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these tokens completes a stop string."""
        if not self.stop:
            return False
        text = self._tokenizer.decode(list(tokens[-self._tail :]))
        return any(stop in text for stop in self.stop)

    def criterion(self, width: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The same for rows of tokens behind prompts of this width, as `generate` asks for it.

        A local function of plain values, which a server can unpack.
        """
        tokenizer, texts, tail = self._tokenizer, self.stop, self._tail

        def stopped(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            written = [tokenizer.decode(row[-tail:]) for row in rows[:, width:].tolist()]
            found = [any(text in end for text in texts) for end in written]
            return torch.tensor(found, device=rows.device)

        return stopped

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """An answer without what an engine wrote after its end."""
        for length, token in enumerate(tokens[:limit], start=1):
            if token in self.ends or self.stopped(tokens[:length]):
                return tokens[:length]
        return tokens[:limit]

    def config(self, longest: int) -> "GenerationConfig":
        """Greedy decoding, for either engine."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=self.ends or None,
            pad_token_id=self.filling,
        )

    @property
    def filling(self) -> int:
        """A token that may stand where none is read."""
        filling = self._tokenizer.pad_token_id
        return int(filling) if filling is not None else (self.ends or [0])[0]


def _static(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    wanted: set[int],
    ending: _Ending,
    batch_size: int,
) -> Iterator[list[Answer]]:
    """Prompts of similar length run together, filled up on the left."""
    from transformers import StoppingCriteriaList

    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [places for places in batches if wanted.intersection(places)]

    def write(places: list[int]) -> list[list[int]]:
        width = max(len(prompts[place]) for place in places)
        input_ids = torch.full((len(places), width), ending.filling)
        attention_mask = torch.zeros(len(places), width, dtype=torch.int64)
        for row, place in enumerate(places):
            prompt = torch.tensor(list(prompts[place]))
            input_ids[row, width - len(prompt) :] = prompt
            attention_mask[row, width - len(prompt) :] = 1
        longest = max(limits[place] for place in places)
        if model.context:
            longest = min(longest, model.context - width)
        criteria = StoppingCriteriaList([ending.criterion(width)] if ending.stop else [])
        config = ending.config(longest)
        if model.deployment:
            generated = generate_tokens(model, input_ids, attention_mask, config, criteria)
        else:
            with torch.inference_mode():
                generated = model.network._module.generate(
                    input_ids=input_ids.to(model.device),
                    attention_mask=attention_mask.to(model.device),
                    generation_config=config,
                    stopping_criteria=criteria,
                )
        rows: list[list[int]] = generated[:, width:].tolist()
        return rows

    calls = (partial(write, places) for places in batches)
    for places, rows in zip(batches, in_flight(calls, model.jobs), strict=True):
        yield [
            Answer(place, ending.cut(row, limits[place]))
            for place, row in zip(places, rows, strict=True)
            if place in wanted
        ]


def _continuous(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    wanted: set[int],
    ending: _Ending,
    say: Callable[[str], object],
) -> Iterator[list[Answer]]:
    """Every prompt is a request to transformers, which keeps as many going as memory allows."""
    requests = {
        str(place): continuous.Request(list(prompts[place]), limits[place])
        for place in sorted(wanted)
    }
    stopped = ending.stopped if ending.stop else None
    rules = continuous.Rules(ending.ends, stopped, ending.config)
    with continuous.running(model, requests, rules, say) as batches:
        for finished in batches:
            yield [
                Answer(int(name), ending.cut(tokens, limits[int(name)]))
                for name, tokens in finished
            ]
