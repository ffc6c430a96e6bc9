"""Generation: greedy answers to prompts, by one of two engines.

`continuous` is the continuous batching of transformers: an answer that ends makes room for the
next prompt at once. `static` is `generate` on batches of similar prompts: a batch lasts as long
as its longest answer. Without a choice, a GPU gets the first and a CPU the second; where the
first cannot run, the reason is said and the second goes on from there.

Both end an answer by the same rule: at the first end-of-sequence token, at the token that
completes a stop string, or at the limit of that prompt. This last token belongs to the answer.

    >>> for finished in generate(model, prompts, limits=[64] * len(prompts)):
    ...     for answer in finished:
    ...         print(answer.place, model.tokenizer.decode(answer.tokens))
"""

import logging
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from probe import flash
from probe.concurrency import in_flight
from probe.errors import ProbeError, reason
from probe.models import Model
from probe.tracing import generate_tokens
from probe.vocabulary import Engine

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.continuous_api import OutputRouter
    from transformers.generation.continuous_batching.requests import GenerationOutput

CONTINUOUS_ON = ("cuda",)
"""Kinds of device where `auto` is continuous."""

BATCH_TOKENS = 2048
"""Tokens in one forward pass of the continuous engine, prompts and answers together."""

REQUESTS = 256
"""Answers that the continuous engine writes at once."""

PAGE = 256
"""Tokens in a block of its cache, which is transformers' own choice."""

MEMORY = 0.8
"""The share of the device's free memory that its cache may take, until the last answer."""


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
        say: Is told in one line where `auto` had to leave the continuous engine, and why.

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
    continuous = engine == "continuous" or (engine == "auto" and model.device.type in CONTINUOUS_ON)
    if left and continuous:
        try:
            for finished in _continuous(model, prompts, limits, left, ending):
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
) -> Iterator[list[Answer]]:
    """Every prompt is a request to transformers, which keeps as many going as memory allows."""
    with _manager(model, prompts, limits, wanted, ending) as manager:
        left = set(wanted)
        while left:
            finished = []
            result = manager.get_result(timeout=0.5)
            while result is not None:
                if result.error is not None:
                    raise RuntimeError(result.error)
                place = int(result.request_id)
                tokens = ending.cut(list(result.generated_tokens), limits[place])
                finished.append(Answer(place, tokens))
                left.remove(place)
                waiting = not manager.output_router.output_queue.empty()
                result = manager.get_result(timeout=0.5) if waiting else None
            if finished:
                yield finished
            elif not manager.is_running():
                raise RuntimeError(f"it ended with {len(left)} answers unfinished")


@contextmanager
def _manager(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    wanted: set[int],
    ending: _Ending,
) -> "Iterator[ContinuousBatchingManager]":
    """The engine of transformers, running; after it, its cache is free and the model as before."""
    module = model.network._module
    attention = module.config._attn_implementation
    if attention == "eager":
        # Its counterpart here leaves out what a model's own may do, such as Gemma 2's soft cap.
        raise RuntimeError(f"there is none for the attention of {model.config.model_type}")
    # It logs what it raises, and more.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    sizes = sorted((len(prompts[place]) + limits[place] for place in wanted), reverse=True)
    manager = None
    try:
        with _current(model.device):
            manager = _prepare(model, sizes, ending)
            # All before the start, so that what runs together does not depend on the clock.
            for place in sorted(wanted):
                manager.add_request(
                    list(prompts[place]),
                    request_id=str(place),
                    max_new_tokens=limits[place],
                    streaming=bool(ending.stop),
                    eos_token_id=ending.ends or -1,
                )
            manager.start()
        yield manager
    finally:
        with _current(model.device):
            if manager is not None:
                manager.stop(hard_stop=True)
            module.config._attn_implementation = attention


def _prepare(model: Model, sizes: list[int], ending: _Ending) -> "ContinuousBatchingManager":
    """Make the engine and its cache, for prompts with answers of these sizes, largest first."""
    from transformers import ContinuousBatchingConfig
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    module = model.network._module
    options = ContinuousBatchingConfig(
        max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=min(REQUESTS, len(sizes)),
        max_blocks_per_request=-(-sizes[0] // PAGE) + 1,
        max_memory_percent=MEMORY,
        # Sharing pays for long common prompts; ours are short.
        allow_block_sharing=False,
    )
    half = model.dtype in (torch.bfloat16, torch.float16)
    if half and (is_flash_attn_2_available() or is_flash_attn_3_available()):
        pass  # transformers switches to that package by itself
    elif flash.usable(model.device, model.dtype, model.heads.width):
        module.config._attn_implementation = flash.register()
    else:
        module.config._attn_implementation = flash.paged(module.config._attn_implementation)
        if hasattr(options, "auto_switch_to_flash"):
            options.auto_switch_to_flash = False
    # As much as can be used at once, and a quarter that it keeps free; or else what memory allows.
    needed = sum(-(-size // PAGE) + 1 for size in sizes[:REQUESTS])
    for number in (needed + needed // 4 + 1, None):
        options.num_blocks = number
        manager: ContinuousBatchingManager = module.init_continuous_batching(
            generation_config=ending.config(max(sizes)), continuous_batching_config=options
        )
        if ending.stop:
            manager.output_router = _stopping_router(manager, ending)
        try:
            manager.warmup()
        except MemoryError:
            if number is None:
                raise
        else:
            break
    return manager


def _stopping_router(manager: "ContinuousBatchingManager", ending: _Ending) -> "OutputRouter":
    """What hands on answers, and ends those that have written a stop string.

    This happens in the engine's own thread, between the same steps each time.
    """
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Stopping(OutputRouter):
        def deliver_batch(self, outputs: "list[GenerationOutput]") -> None:
            done = []
            for output in outputs:
                if output.is_finished():
                    done.append(output)
                elif output.request_id not in ended and ending.stopped(output.generated_tokens):
                    ended.add(output.request_id)
                    manager.cancel_request(output.request_id)
                    done.append(output)
            super().deliver_batch(done)

    ended: set[str] = set()
    return Stopping()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one, whose memory the engine asks for."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
