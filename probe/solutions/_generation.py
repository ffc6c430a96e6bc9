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

import inspect
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from probe.concurrency import in_flight
from probe.errors import ProbeError, not_known, reason
from probe.models import Model, ModelFiles, end_tokens, greedy, over, own, own_stops
from probe.solutions import _continuous as continuous
from probe.solutions._packed import Packed
from probe.solutions._requests import Request, Rules
from probe.tracing import generate_tokens
from probe.vocabulary import Decoding, Engine

if TYPE_CHECKING:
    from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

CONTINUOUS_ON = ("cuda",)
"""Kinds of device where `auto` is continuous."""

PIECE = 32
"""After so many tokens, the rows of a static batch that have ended leave it."""


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
    decoding: Decoding = "greedy",
    seed: int = 42,
    say: Callable[[str], object] = warnings.warn,
) -> Generator[list[Answer], None, None]:
    """Answer prompts, greedily unless the model's own decoding is asked for.

    Greedily means that none of the model's own settings (a repetition penalty, beams, sampling) is
    used: the published runs decode like this, and `probe.models` has more. The
    choice of a token depends on what else is in its batch only by rounding, which decides between
    two tokens that are nearly alike. Static batches depend on the prompts alone, not on what is
    skipped; what the continuous engine runs together depends on both.

    Args:
        model: The model to ask.
        prompts: The tokens of each prompt.
        limits: The longest answer to each, in tokens.
        stop: Texts that end an answer, searched for in its text with special tokens written out.
        batch_size: How many prompts run at once in a static batch.
        skip: Places of prompts that need no answer; a static batch of such alone is skipped.
        engine: `auto`, `continuous` or `static`.
        decoding: `greedy`, or `model` for the model's own settings, in static batches here.
        seed: Where these draw: the seed of the first batch, and with its place of each other.
        say: Is told in one line where the continuous engine, or the best way to use it, had to be
            left, and why.

    Yields:
        What is finished: a static batch, or all answers that have ended since the last time.

    Raises:
        ProbeError: An unknown engine or decoding, or two that do not go together.
    """
    if engine not in get_args(Engine):
        raise ProbeError(not_known("engine", engine, get_args(Engine)))
    if decoding not in get_args(Decoding):
        raise ProbeError(not_known("decoding", decoding, get_args(Decoding)))
    if decoding == "model" and (engine == "continuous" or model.deployment):
        raise ProbeError("a model's own decoding works here and in static batches only")
    ending = Ending(model, tuple(stop), decoding)
    left = {place for place in range(len(prompts)) if place not in skip}
    if engine == "continuous" and model.deployment:
        raise ProbeError("a server generates in static batches; use engine auto or static")
    point = model.turning_point
    if point and any(len(prompts[place]) + limits[place] > point + 1 for place in left):
        if engine == "continuous":
            raise ProbeError(
                f"{model.reference} turns another way beyond {point} tokens, which continuous "
                "batching would mix; use engine auto or static"
            )
        yield from _past_the_turn(model, prompts, limits, left, ending, batch_size, seed)
        return
    on_gpu = model.device.type in CONTINUOUS_ON
    if left and (engine == "continuous" or (engine == "auto" and on_gpu and decoding == "greedy")):
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
        yield from _static(model, prompts, limits, left, ending, batch_size, seed)


class Ending:
    """The rule by which answers end."""

    def __init__(
        self, model: Model | ModelFiles, stop: tuple[str, ...], decoding: Decoding = "greedy"
    ) -> None:
        self.ends = list(end_tokens(model.settings, model.tokenizer))
        self.own = model.settings if decoding == "model" else None
        self.stop = (*stop, *own_stops(self.own)) if self.own else stop
        self._tokenizer = model.tokenizer
        # A token writes a byte at least, so a stop string is within so many of them.
        self._tail = max((len(text.encode()) for text in self.stop), default=0) + 4

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

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these tokens is an end, or completes a stop string."""
        return bool(tokens) and (tokens[-1] in self.ends or self.stopped(tokens))

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """An answer without what an engine wrote after its end."""
        for length in range(1, len(tokens[:limit]) + 1):
            if self.ended(tokens[:length]):
                return tokens[:length]
        return tokens[:limit]

    def config(self, longest: int) -> "GenerationConfig":
        """How tokens are chosen, for either engine."""
        from transformers import GenerationConfig

        if self.own is not None:
            return GenerationConfig(**own(self.own, self.ends, self.filling, longest))
        return GenerationConfig(**greedy(self.ends, self.filling, longest))

    @property
    def filling(self) -> int:
        """A token that may stand where none is read."""
        filling = self._tokenizer.pad_token_id
        return int(filling) if filling is not None else (self.ends or [0])[0]


def _past_the_turn(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    left: set[int],
    ending: Ending,
    batch_size: int,
    seed: int,
) -> Iterator[list[Answer]]:
    """Static batches of a model that is another one beyond some length.

    A batch writes until its longest row gets there. What is unfinished goes on as a new prompt, so
    that beyond that length the keys of what was read before are turned as the model then wants.
    """
    written: dict[int, list[int]] = {place: [] for place in range(len(prompts))}
    while left:
        whole = [[*prompt, *written[place]] for place, prompt in enumerate(prompts)]
        rest = [limit - len(written[place]) for place, limit in enumerate(limits)]
        for part in _static(model, whole, rest, set(left), ending, batch_size, seed):
            finished = []
            for place, tokens in part:
                written[place] += tokens
                answer = ending.cut(written[place], limits[place])
                if len(answer) == limits[place] or ending.ended(answer):
                    finished.append(Answer(place, answer))
                    left.remove(place)
            if finished:
                yield finished


@contextmanager
def drawn_with(seed: int, device: torch.device) -> Iterator[None]:
    """Let random numbers be those of a seed for a while, and go on as before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _own_settings(model: Model, ending: Ending) -> Iterator[None]:
    """Say in one line that a model's own settings, which may be anything, cannot be used."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers finds out in the middle, by any
        if ending.own is None:
            raise
        raise ProbeError(
            f"{model.reference}: its own generation_config.json cannot be used "
            f"({reason(error)}); mend it, or set solutions.decoding to greedy"
        ) from error


def _static(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    wanted: set[int],
    ending: Ending,
    batch_size: int,
    seed: int,
) -> Iterator[list[Answer]]:
    """Prompts of similar length run together, filled up on the left."""
    from transformers import StoppingCriteriaList

    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    point = model.turning_point
    turn = sum(len(prompt) <= point for prompt in prompts) if point else len(order)
    batches = [
        side[start : start + batch_size]
        for side in (order[:turn], order[turn:])
        for start in range(0, len(side), batch_size)
    ]
    batches = [places for places in batches if wanted.intersection(places)]
    packed = None if model.deployment else Packed(model)

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
        if point and width <= point:
            longest = min(longest, point - width + 1)
        criteria = StoppingCriteriaList([ending.criterion(width)] if ending.stop else [])
        if packed is None:
            config = ending.config(longest)
            beside = over(model.settings, vars(config))
            generated = generate_tokens(model, input_ids, attention_mask, config, criteria, beside)
            rows: list[list[int]] = generated[:, width:].tolist()
            return rows
        batch = _Batch(input_ids.to(model.device), attention_mask.to(model.device), criteria)
        drawn = drawn_with(seed + places[0], model.device)
        with torch.inference_mode(), drawn, packed.used(), _own_settings(model, ending):
            return _written(model, batch, ending, longest, [limits[place] for place in places])

    calls = (partial(write, places) for places in batches)
    for places, rows in zip(batches, in_flight(calls, model.jobs), strict=True):
        yield [
            Answer(place, ending.cut(row, limits[place]))
            for place, row in zip(places, rows, strict=True)
            if place in wanted
        ]


class _Batch(NamedTuple):
    """Prompts that run together, filled up on the left."""

    tokens: torch.Tensor
    """[row, token]."""

    mask: torch.Tensor
    """What of that is a prompt's; the same shape."""

    criteria: "StoppingCriteriaList"
    """What ends a row beside an end token."""


def _written(
    model: Model, batch: _Batch, ending: Ending, longest: int, limits: Sequence[int]
) -> list[list[int]]:
    """What a batch writes, row by row; a row may go on behind its end.

    A batch lasts as long as its longest answer, and each row costs. So it is written in pieces, and
    between two of them the rows that have ended leave it.
    """
    network, tokens, mask = model.network._module, batch.tokens, batch.mask
    width = tokens.shape[1]
    cache = _cache_of(model) if ending.own is None else None
    rows = list(range(len(tokens)))
    found: list[list[int]] = [[] for _ in rows]
    while True:
        done = tokens.shape[1] - width
        piece = longest - done if cache is None else min(PIECE, longest - done)
        tokens = network.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=ending.config(piece),
            stopping_criteria=batch.criteria,
            **({} if cache is None else {_cache_name(network): cache}),
        )
        for row, written in zip(rows, tokens[:, width:].tolist(), strict=True):
            found[row] = written
        left = [
            place
            for place, row in enumerate(rows)
            if len(found[row]) < limits[row] and not _has_ended(found[row], done, ending)
        ]
        if cache is None or not left or tokens.shape[1] - width >= longest:
            return found
        new = tokens.shape[1] - mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        if len(left) < len(rows):
            chosen = torch.tensor(left, device=tokens.device)
            tokens, mask = tokens[chosen], mask[chosen]
            cache.batch_select_indices(chosen)
            rows = [rows[place] for place in left]


def _has_ended(written: Sequence[int], done: int, ending: Ending) -> bool:
    """Whether an answer ends behind so many of its tokens."""
    return any(ending.ended(written[:length]) for length in range(done + 1, len(written) + 1))


def _cache_of(model: Model) -> "DynamicCache | None":
    """An empty cache from which rows can be taken; None where a model keeps more than keys."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    network = model.network._module
    if not (_cache_name(network) and network._supports_default_dynamic_cache()):
        return None
    cache = DynamicCache(config=network.config.get_text_config(decoder=True))
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return cache if all(type(layer) in plain for layer in cache.layers) else None


def _cache_name(network: torch.nn.Module) -> str:
    """What a model calls its cache, which some versions of transformers do in another way."""
    known = inspect.signature(network.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), "")


def _continuous(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    wanted: set[int],
    ending: Ending,
    say: Callable[[str], object],
) -> Iterator[list[Answer]]:
    """Every prompt is a request to transformers, which keeps as many going as memory allows."""
    requests = {
        str(place): Request(list(prompts[place]), limits[place]) for place in sorted(wanted)
    }
    stopped = ending.stopped if ending.stop else None
    rules = Rules(ending.ends, stopped, ending.config)
    with continuous.running(model, requests, rules, say) as batches:
        for finished in batches:
            yield [
                Answer(int(name), ending.cut(tokens, limits[int(name)]))
                for name, tokens in finished
            ]
