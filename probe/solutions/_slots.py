"""Answers in slots: one recorded step writes a token of each of many answers.

A model's forward pass is transformers' own; what is here is the cache beside it, an attention that
reads it, and a loop. Every answer has a slot: a row of the cache as long as the longest prompt and
answer. A step is the same for every token, so on a GPU it is recorded as a CUDA graph, with the
choice of tokens and the tokens that end answers, and played a few times in a row. Meanwhile Python
reads what the steps before have written, and gives slots of answers that ended to those that wait,
several prompts in one pass.

What runs together hangs on the questions alone, not on the clock.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from probe.models import Model, recording
from probe.solutions import _flash as flash
from probe.solutions._requests import Request, Rules

NAME = "probe_slots"
"""How transformers knows the attention."""

SLOTS = 512
"""So many answers are written at once, if they fit."""

FEWEST = 64
"""With fewer slots, where more are wanted, a cache of pages holds more answers."""

STEPS = 8
"""So many tokens of each before Python looks."""

FREE = 1 / 8
"""Prompts are read once so many of the slots are free."""

PROMPT_TOKENS = 4096
"""Tokens of prompts in one pass."""

FEW = 1 / 4
"""When so few of the slots are left, and nothing waits, the others are given up."""

MEMORY = 0.8
"""The share of the device's free memory that the cache may take."""


class Written(NamedTuple):
    """What a few steps have written."""

    answers: list["Answering | None"]
    """Whose tokens each row holds."""

    tokens: torch.Tensor
    """int64 [row, step], on the CPU once `ready` has come."""

    ready: "torch.cuda.Event | None"
    """When they are there; None for at once."""


class Answering:
    """An answer on its way."""

    def __init__(self, name: str, request: Request, slot: int) -> None:
        """Begin with nothing written."""
        self.name, self.request, self.slot = name, request, slot
        self.tokens: list[int] = []
        self.done = False

    def take(self, tokens: Sequence[int], rules: Rules) -> None:
        """Take what was written, up to the answer's end."""
        for token in tokens:
            if self.done:
                return
            self.tokens.append(token)
            self.done = (
                token in rules.ends
                or len(self.tokens) >= self.request.limit
                or (rules.stopped is not None and rules.stopped(self.tokens))
            )


class Slots:
    """The cache of all answers on their way, and the steps that fill it."""

    def __init__(self, model: Model, count: int, room: int, ends: Sequence[int]) -> None:
        """Make room.

        Args:
            model: The model.
            count: How many slots.
            room: How many tokens each has.
            ends: Tokens that end an answer.
        """
        device = model.device
        self.module: Any = model.network._module  # transformers does not type its own
        self.device, self.room, self.count = device, room, count
        self.on_card = flash.usable(device, model.dtype, model.heads.width)
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ends = torch.tensor(list(ends), dtype=torch.int64, device=device)
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        # The last token of each answer, how many tokens before it are in the cache, and how many
        # may follow it.
        self._last, self._lengths, self._left = zeros, zeros.clone(), zeros.clone()
        self._out = torch.zeros(count, STEPS, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(count, device=device)
        self._prompts: Prompts | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def read(
        self, prompts: Sequence[Sequence[int]], slots: list[int], limits: list[int]
    ) -> torch.Tensor:
        """Read prompts into slots, and write the first token of each answer: int64 [prompt, 1]."""
        given = Prompts(prompts, slots, self.device)
        self._prompts = given
        logits = self.module(
            input_ids=given.tokens[None],
            position_ids=given.places[None],
            use_cache=False,
            logits_to_keep=given.ends[1:].long() - 1,
            slots=self,
        ).logits[0]
        self._prompts = None
        first = logits.argmax(-1)
        where = torch.tensor(slots, device=self.device)
        left = torch.tensor(limits, device=self.device) - 1
        self._last[where] = first
        self._lengths[where] = given.lengths
        self._left[where] = torch.where(self._ended(first), 0, left)
        return first[:, None]

    @torch.inference_mode()
    def write(self) -> torch.Tensor:
        """Write the next tokens of all answers: int64 [slot, step]."""
        self._at.zero_()
        if self.device.type == "cuda" and self._graph is None:
            self._record()
        for _ in range(STEPS):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self._out

    @torch.inference_mode()
    def keep(self, slots: list[int]) -> None:
        """Give up all slots but these, which are the first from now on."""
        self._graph = None
        where = torch.tensor(slots, device=self.device)
        self.count = len(slots)
        self._last, self._lengths, self._left, self._out = (
            part[where] for part in (self._last, self._lengths, self._left, self._out)
        )
        self._rows = self._rows[: self.count]
        for layer, (keys, values) in self._cache.items():
            self._cache[layer] = keys[where], values[where]

    def _record(self) -> None:
        """Record a step; what it does before, to prepare libraries, is undone."""
        state = (self._last, self._lengths, self._left, self._at)
        before = [part.clone() for part in state]
        self._step()
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph, self.device):
            self._step()
        for part, value in zip(state, before, strict=True):
            part.copy_(value)

    def _step(self) -> None:
        """Write a token of each answer."""
        logits = self.module(
            input_ids=self._last[:, None],
            position_ids=self._lengths[:, None],
            use_cache=False,
            slots=self,
        ).logits[:, -1]
        chosen = logits.argmax(-1)
        active = self._left > 0
        self._out.index_copy_(1, self._at, chosen[:, None])
        self._at += 1
        self._lengths += active
        self._last.copy_(torch.where(active, chosen, self._last))
        self._left.copy_(torch.where(self._ended(chosen), 0, self._left - active.long()))

    def _ended(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, None] == self._ends).any(1)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Keep keys and values, and attend to all of an answer: [row, position, heads, width].

        Args:
            layer: The layer's number.
            query: [row, heads, position, width].
            key: [row, heads of keys, position, width].
            value: Likewise.
            scaling: Of the logits.
            window: How many tokens each sees, itself included; None for all before it.
        """
        if layer not in self._cache:
            shape = (self.count, self.room, key.shape[1])
            self._cache[layer] = (
                key.new_zeros(*shape, key.shape[-1]),
                value.new_zeros(*shape, value.shape[-1]),
            )
        keys, values = self._cache[layer]
        given = self._prompts
        if given is not None:
            # Rows lie one after the other in a single one.
            query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
            keys[given.slots, given.places] = key
            values[given.slots, given.places] = value
            return given.attend(query, key, value, scaling, window, self.on_card)[None]
        keys[self._rows, self._lengths] = key[:, :, 0]
        values[self._rows, self._lengths] = value[:, :, 0]
        if self.on_card and window is not None:
            query = query.transpose(1, 2)
            return flash.among_first(query, keys, values, self._lengths + 1, scaling, window)
        # Queries that share a key's head are so many positions that see the same.
        groups = query.shape[1] // key.shape[1]
        grouped = query[:, :, 0].unflatten(1, (-1, groups))  # [slot, heads of keys, group, width]
        if self.on_card:
            found = flash.among_first(
                grouped.transpose(1, 2), keys, values, self._lengths + 1, scaling
            ).transpose(1, 2)
        else:
            places = torch.arange(self.room, device=self.device) - self._lengths[:, None]
            seen = (places <= 0) & (places > -(window or self.room))
            found = torch.nn.functional.scaled_dot_product_attention(
                grouped,
                keys.transpose(1, 2),
                values.transpose(1, 2),
                seen[:, None, None],
                scale=scaling,
            )
        return found.flatten(1, 2)[:, None]


class Prompts:
    """Prompts that are read in one pass, one after the other in a row."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], slots: list[int], device: torch.device
    ) -> None:
        """Lay them out."""
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        self.longest = int(sizes.max())
        self.lengths = sizes.to(device)
        self.tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
        self.places = torch.cat([torch.arange(size) for size in sizes.tolist()]).to(device)
        self.slots = torch.tensor(slots).repeat_interleave(sizes).to(device)
        ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self.ends = ends.to(device, torch.int32)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        on_card: bool,
    ) -> torch.Tensor:
        """Causal attention within each prompt, all [token, heads, width]."""
        if on_card:
            query, key, value = (part.contiguous() for part in (query, key, value))
            ends, longest = self.ends, self.longest
            return flash.varlen(query, key, value, ends, ends, longest, longest, scaling, window)
        own = self.slots[:, None] == self.slots
        back = self.places[:, None] - self.places
        seen = own & (back >= 0) & (back < (window or self.longest))
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, seen[None, None], scale=scaling, enable_gqa=True
        )
        return found[0].transpose(0, 1)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **given: Any,  # noqa: ANN401 - what transformers hands on differs in type
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers asks for it.

    Raises:
        NotImplementedError: The model asks for something else, such as a soft cap.
    """
    slots = given.get("slots")
    if not isinstance(slots, Slots):
        raise NotImplementedError("this model does not hand on to its attention what it is given")
    for name in ("softcap", "s_aux", "position_bias"):
        if given.get(name) is not None:
            raise NotImplementedError(f"slots have no {name}")
    if sliding_window is not None and sliding_window >= slots.room:
        sliding_window = None
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError("this model's attentions have no number")
    return slots.attend(layer, query, key, value, scaling, sliding_window), None


def room_of(requests: Mapping[str, Request]) -> int:
    """How many tokens a slot needs."""
    return max(len(request.prompt) + request.limit for request in requests.values())


def slots_for(model: Model, requests: Mapping[str, Request]) -> int:
    """How many slots there are: as many as are good, and fit; 0 where too few would."""
    count = wanted = min(SLOTS, len(requests))
    if model.device.type == "cuda":
        heads = model.heads
        token = 2 * model.n_layers * heads.key_value * heads.width * model.dtype.itemsize
        free = torch.cuda.mem_get_info(model.device)[0]
        count = min(count, int(MEMORY * free / (token * room_of(requests))))
    return count if count >= min(wanted, FEWEST) else 0


def register() -> None:
    """Make the slots' attention known to transformers, as one that needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextmanager
def attention_of_slots(module: Any) -> Iterator[None]:  # noqa: ANN401 - a transformers model
    """Let a model have the slots' attention for a while; others may run it between two steps."""
    before = module.config._attn_implementation
    module.config._attn_implementation = NAME
    try:
        yield
    finally:
        module.config._attn_implementation = before


def in_slots(
    model: Model, requests: Mapping[str, Request], rules: Rules, count: int
) -> Iterator[list[tuple[str, list[int]]]]:
    """The answers to all requests, as they end, each with its name.

    Args:
        model: The model.
        requests: By name; they are begun in this order.
        rules: By which they end.
        count: How many slots.
    """
    register()
    slots = Slots(model, count, room_of(requests), rules.ends)
    waiting, unread = deque(requests.items()), deque[Written]()
    # Who has each slot; the last free one is given first.
    going: dict[int, Answering] = {}
    free = list(range(count))[::-1]
    try:
        while waiting or going:
            if waiting and (len(free) >= FREE * count or not going):
                unread.append(_begin(slots, waiting, going, free))
            with attention_of_slots(slots.module):
                written = slots.write()
            unread.append(_on_its_way([going.get(slot) for slot in range(slots.count)], written))
            few = not waiting and 16 < slots.count >= len(going) / FEW
            ended = []
            # What was written before the last steps is read while these run.
            while len(unread) > (0 if few else 1):
                ended += _taken(unread.popleft(), rules)
            for answer in ended:
                del going[answer.slot]
                free.append(answer.slot)
            if few and going:
                slots.keep(list(going))
                going = dict(enumerate(going.values()))
                for place, answer in going.items():
                    answer.slot = place
            if ended:
                yield [(answer.name, answer.tokens) for answer in ended]
    finally:
        del slots
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _begin(
    slots: Slots,
    waiting: deque[tuple[str, Request]],
    going: dict[int, Answering],
    free: list[int],
) -> Written:
    """Begin the next answers: as many as have slots, and whose prompts fit into one pass."""
    begun: list[Answering] = []
    tokens = 0
    while waiting and free:
        name, request = waiting[0]
        tokens += len(request.prompt)
        if begun and tokens > PROMPT_TOKENS:
            break
        waiting.popleft()
        begun.append(Answering(name, request, free.pop()))
    going.update((answer.slot, answer) for answer in begun)
    requests = [answer.request for answer in begun]
    with attention_of_slots(slots.module):
        first = slots.read(
            [request.prompt for request in requests],
            [answer.slot for answer in begun],
            [request.limit for request in requests],
        )
    return _on_its_way(begun, first)


def _on_its_way(answers: "Sequence[Answering | None]", tokens: torch.Tensor) -> Written:
    """Tokens that are copied to where Python can read them, without a wait."""
    if tokens.device.type != "cuda":
        return Written(list(answers), tokens.clone(), None)
    here = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    here.copy_(tokens, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Written(list(answers), here, ready)


def _taken(written: Written, rules: Rules) -> list[Answering]:
    """Read what was written; give the answers that have ended by it."""
    if written.ready is not None:
        written.ready.synchronize()
    ended: list[Answering] = []
    for answer, tokens in zip(written.answers, written.tokens.tolist(), strict=True):
        if answer is not None and not answer.done:
            answer.take(tokens, rules)
            if answer.done:
                ended.append(answer)
    return ended
