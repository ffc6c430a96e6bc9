"""Many answers at once: in slots of our own, or by the continuous batching of transformers.

Slots (`_slots`) are the fastest way, where they fit. Of transformers this module holds all that is
private. In public it takes requests, hands on what they write, cancels them, and lets attentions be
registered. Three things that are needed here it does not offer, and they differ from version to
version:

- Attention of one's own over its paged cache: under which name, who fills the cache, and what the
  attention is told (`paged_attention`).
- Ending an answer between two steps, so that what runs together does not depend on the clock:
  its results pass through a router, which is replaced (`_stopping_router`). The public way, to
  cancel what has been read, is a few steps late.
- Arguments that a layer should hand to the cache, and that some models forget (`_reminder`).

So `running` first tries each way on a few tokens and compares with a plain forward pass. A way that
this version does not have is named in one line, and the next best is taken, before the run.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from probe.errors import reason
from probe.models import Model
from probe.solutions import _flash as flash
from probe.solutions import _slots as slots
from probe.solutions._requests import Request, Rules, Stopped

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.continuous_api import OutputRouter
    from transformers.generation.continuous_batching.requests import GenerationOutput

BATCH_TOKENS = 2048
"""Tokens in one forward pass, prompts and answers together."""

REQUESTS = 256
"""Answers that are written at once."""

PAGE = 256
"""Tokens in a block of the cache, which is transformers' own choice."""

MEMORY = 0.8
"""The share of the device's free memory that the cache may take, until the last answer."""

PATIENCE = 120.0
"""Seconds after which a way that writes nothing has failed its trial."""

GAP = 0.5
"""How far below the largest logit the tokens of a trial may lie on average, in standard deviations
of the logits. Rounding in bfloat16 makes about 0.01; wrong attention, 3 or 4."""


class Way(NamedTuple):
    """One way to use the engine."""

    attention: str
    """Whose attention, in words."""

    name: str
    """By which name transformers knows it."""

    between_steps: bool
    """Whether answers are ended between two steps, or when they are read."""

    def __str__(self) -> str:
        """Put the way in words."""
        return f"{self.attention}, answers ended {('when read', 'in step')[self.between_steps]}"


@contextmanager
def running(
    model: Model, requests: Mapping[str, Request], rules: Rules, say: Callable[[str], object]
) -> "Iterator[Iterator[list[tuple[str, list[int]]]]]":
    """The answers to all requests, in the best way that this version of transformers has.

    Args:
        model: The model to ask.
        requests: By name; they are begun in this order.
        rules: By which they end.
        say: Is told in one line which way was not there, and which is taken instead.

    Yields:
        An iterator of what has ended since the last time, each with its name. After it, the
        engine's cache is free and the model is as before.

    Raises:
        RuntimeError: No way is there, or the engine failed.
    """
    way = find_way(model, requests, rules, say)
    with _opened(model, requests, rules, way) as batches:
        yield batches


@contextmanager
def _opened(
    model: Model,
    requests: Mapping[str, Request],
    rules: Rules,
    way: Way,
    empty: bool = False,
) -> "Iterator[Iterator[list[tuple[str, list[int]]]]]":
    """The answers to all requests in one way; see `_answers` for `empty`."""
    if way.name == slots.NAME:
        yield slots.in_slots(model, requests, rules, slots.slots_for(model, requests))
        return
    with _manager(model, requests, rules, way) as manager:
        yield _answers(manager, set(requests), rules.stopped, empty)


def find_way(
    model: Model, requests: Mapping[str, Request], rules: Rules, say: Callable[[str], object]
) -> Way:
    """Try the ways on a few tokens, best first, and return the first that is right."""
    import transformers

    reasons = []
    there = slots.slots_for(model, requests) > 0
    for way in _ways(model, stopping=rules.stopped is not None, in_slots=there):
        try:
            _try(model, list(requests.values()), rules, way)
        except Exception as error:  # whatever another version does, the next way may work
            reasons.append(f"{way}: {reason(error)}")
            del error
            gc.collect()  # an engine that was never started holds its cache in a circle
            continue
        if reasons:
            say(
                f"continuous batching of transformers {transformers.__version__} did not pass a"
                f" trial ({'; '.join(reasons)}); using it with {way}"
            )
        return way
    version = transformers.__version__
    raise RuntimeError(f"transformers {version} did not pass a trial: {'; '.join(reasons)}")


def _ways(model: Model, stopping: bool, in_slots: bool) -> Iterator[Way]:
    """The ways that there might be, the fastest first."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    usual = model.network._module.config._attn_implementation
    if usual == "eager":
        # Its counterpart here leaves out what a model's own may do, such as Gemma 2's soft cap.
        raise RuntimeError(f"there is none for the attention of {model.config.model_type}")
    if in_slots:
        yield Way("slots", slots.NAME, True)
    attentions = []
    half = model.dtype in (torch.bfloat16, torch.float16)
    if model.device.type == "cuda" and half:
        for number, there in ((3, is_flash_attn_3_available()), (2, is_flash_attn_2_available())):
            if there:
                attentions.append(("the package of flash attention", f"flash_attention_{number}"))
    if flash.usable(model.device, model.dtype, model.heads.width):
        attentions.append(("torch's flash attention", flash.NAME))
    attentions.append(("masks", usual))
    for words, name in attentions:
        for between_steps in (True, False) if stopping else (True,):
            yield Way(words, name, between_steps)


def _try(model: Model, requests: list[Request], rules: Rules, way: Way) -> None:
    """Answer three beginnings of prompts in this way; raise if anything is not as it should be."""
    requests = sorted(requests, key=lambda request: len(request.prompt))[-3:]
    few = {
        str(place): Request(request.prompt[: 3 + 5 * place], limit=(2, 8, 8)[place])
        for place, request in enumerate(requests)
    }
    stopped = None if rules.stopped is None else (lambda tokens: len(tokens) >= 4)
    found: dict[str, list[int]] = {}
    begun = time.monotonic()
    trial = rules._replace(ends=[], stopped=stopped)
    with _opened(model, few, trial, way, empty=True) as batches:
        for finished in batches:
            found |= dict(finished)
            if time.monotonic() - begun > PATIENCE:
                raise RuntimeError(f"nothing was written in {PATIENCE:.0f} s")
    for name, request in few.items():
        expected = min(request.limit, 4) if stopped else request.limit
        if len(found[name]) != expected:
            raise RuntimeError(f"{len(found[name])} tokens were written, not {expected}")
    gap = sum(_gap(model, request.prompt, found[name]) for name, request in few.items()) / len(few)
    if not gap <= GAP:  # not a number is wrong too
        raise RuntimeError(f"its tokens are {gap:.1f} standard deviations from greedy")


def _gap(model: Model, prompt: list[int], answer: list[int]) -> float:
    """How far an answer's logits lie below the largest, in standard deviations, on average."""
    tokens = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model.network._module(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    return float(((logits.max(1).values - chosen) / logits.std(1)).mean())


def _answers(
    manager: "ContinuousBatchingManager",
    left: set[str],
    stopped: Stopped | None,
    empty: bool = False,
) -> Iterator[list[tuple[str, list[int]]]]:
    """What has ended since the last time; with `empty` also where nothing has for half a second."""
    while left:
        finished = []
        result = manager.get_result(timeout=0.5)
        while result is not None:
            if result.error is not None:
                raise RuntimeError(result.error)
            name, tokens = result.request_id, list(result.generated_tokens)
            # One that was cancelled may still be handed on, by the step that was running.
            if name in left:
                if result.is_finished():
                    left.remove(name)
                    finished.append((name, tokens))
                elif stopped is not None and stopped(tokens):
                    left.remove(name)
                    finished.append((name, tokens))
                    manager.cancel_request(name)
            result = manager.get_result(timeout=0)
        if finished or empty:
            yield finished
        if not finished and not manager.is_running():
            raise RuntimeError(f"it ended with {len(left)} answers unfinished")


@contextmanager
def _manager(
    model: Model, requests: Mapping[str, Request], rules: Rules, way: Way
) -> "Iterator[ContinuousBatchingManager]":
    """The engine of transformers, running; after it, its cache is free and the model as before."""
    module = model.network._module
    attention = module.config._attn_implementation
    # It logs what it raises, and more.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    reminder = _reminder(module)
    manager = None
    try:
        with _current(model.device):
            manager = _prepare(model, requests, rules, way)
            # All before the start, so that what runs together does not depend on the clock.
            for name, request in requests.items():
                manager.add_request(
                    request.prompt,
                    request_id=name,
                    max_new_tokens=request.limit,
                    streaming=rules.stopped is not None,
                    eos_token_id=rules.ends or -1,
                )
            manager.start()
        yield manager
    finally:
        with _current(model.device):
            if manager is not None:
                manager.stop(hard_stop=True)
            module.config._attn_implementation = attention
            reminder.remove()


def _prepare(
    model: Model, requests: Mapping[str, Request], rules: Rules, way: Way
) -> "ContinuousBatchingManager":
    """Make the engine and its cache."""
    from transformers import ContinuousBatchingConfig

    module = model.network._module
    sizes = [len(request.prompt) + request.limit for request in requests.values()]
    sizes.sort(reverse=True)
    options = ContinuousBatchingConfig(
        max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=min(REQUESTS, len(sizes)),
        max_blocks_per_request=-(-sizes[0] // PAGE) + 1,
        max_memory_percent=MEMORY,
        # Sharing pays for long common prompts; ours are short.
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    if way.name == flash.NAME:
        _register()
    # Set by hand: what is set in public looks on the hub for every name with `flash` in it.
    module.config._attn_implementation = way.name
    # As much as can be used at once, and a quarter that it keeps free; or else what memory allows.
    needed = sum(-(-size // PAGE) + 1 for size in sizes[:REQUESTS])
    longest = max(request.limit for request in requests.values())
    for number in (needed + needed // 4 + 1, None):
        options.num_blocks = number
        manager: ContinuousBatchingManager = module.init_continuous_batching(
            generation_config=rules.config(longest), continuous_batching_config=options
        )
        if rules.stopped is not None and way.between_steps:
            manager.output_router = _stopping_router(manager, rules.stopped)
        try:
            manager.warmup()
        except MemoryError:
            if number is None:
                raise
        else:
            break
    return manager


def _stopping_router(manager: "ContinuousBatchingManager", stopped: Stopped) -> "OutputRouter":
    """What hands on answers, and ends those that have to.

    This happens in the engine's own thread, between the same steps each time.
    """
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Stopping(OutputRouter):
        def deliver_batch(self, outputs: "list[GenerationOutput]") -> None:
            done = []
            for output in outputs:
                if output.is_finished():
                    done.append(output)
                elif output.request_id not in ended and stopped(output.generated_tokens):
                    ended.add(output.request_id)
                    manager.cancel_request(output.request_id)
                    done.append(output)
            super().deliver_batch(done)

    ended: set[str] = set()
    return Stopping()


def _reminder(module: torch.nn.Module) -> "RemovableHandle":
    """Give the cache what a layer forgets to hand on, as GPT-NeoX does in transformers 5.24."""
    from transformers.generation.continuous_batching import PagedAttentionCache

    usual = PagedAttentionCache.update

    def remind(network: torch.nn.Module, args: tuple[object, ...], step: dict[str, Any]) -> None:
        cache = step.get("cache")
        if not isinstance(cache, PagedAttentionCache):
            return

        def update(
            *states: Any,  # noqa: ANN401 - in whatever way this version calls it
            kwargs: dict[str, Any] | None = None,
            **named: Any,  # noqa: ANN401
        ) -> tuple[torch.Tensor, torch.Tensor]:
            handed = dict(step) if kwargs is None else kwargs
            return usual(cache, *states, kwargs=handed, **named)

        cache.update = update

    return module.register_forward_pre_hook(remind, with_kwargs=True)


def _register() -> None:
    """Make torch's flash attention known to transformers, as one that needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(flash.NAME, paged_attention)
    AttentionMaskInterface.register(flash.NAME, flash_attention_mask)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **given: Any,  # noqa: ANN401 - what transformers hands on differs in type
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over packed requests, as transformers asks for it.

    Args:
        module: The layer's attention.
        query: Of the new tokens of all requests, `[1, heads, tokens, width]`.
        key: Likewise, with the heads of keys; where no cache is given, with those before them.
        value: Likewise.
        attention_mask: Not there.
        scaling: Of the logits.
        sliding_window: How many tokens each sees, itself included; None for all before it.
        given: The cache, and where each request begins and ends in it.

    Returns:
        `[1, tokens, heads, width]`.

    Raises:
        NotImplementedError: The model asks for something else, such as a soft cap.
    """
    for name in ("softcap", "s_aux", "position_bias", "block_table"):
        if given.get(name) is not None:
            raise NotImplementedError(f"flash attention of torch has no {name}")
    cache = given.get("cache")
    if cache is not None:  # until 5.23; says in `given` what is this layer's
        key, value = cache.update(key, value, module.layer_idx, kwargs=given)
    key, value = (states.squeeze(0).transpose(0, 1) for states in (key, value))
    kind = "sliding_attention" if sliding_window else "full_attention"
    ends_query, ends_key, longest_query, longest_key = (
        part[kind] if isinstance(part, dict) else part
        for part in (
            given["cu_seq_lens_q"],
            given["cu_seq_lens_k"],
            given["max_length_q"],
            given["max_length_k"],
        )
    )
    output = flash.varlen(
        query.squeeze(0).transpose(0, 1).contiguous(),
        key.contiguous(),
        value.contiguous(),
        ends_query.to(torch.int32),
        ends_key.to(torch.int32),
        longest_query,
        longest_key,
        scaling,
        sliding_window,
    )
    return output.unsqueeze(0), None


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one, whose memory the engine asks for."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
