"""Batching: which sequences run together, and what a batch does where memory is short.

The larger a batch, the better a GPU is used, up to some thousands of tokens; what a batch needs
grows with its tokens. So a batch gets as many tokens as fit by an estimate that is corrected after
each batch by what it really took. Where memory runs out all the same, the batch is halved; and one
sequence that does not fit alone drops its activations and computes them again, and then lets its
sources wait in the host's memory. Nothing of this changes a score beyond rounding.

    >>> batches = Batching(model, graph, "auto", steps=1, recompute=True)
    >>> [places for places, result in batches.run([400, 100, 380], score)]
    [[0, 2], [1]]
"""

import gc
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar

import torch

from probe.concurrency import in_flight
from probe.errors import ProbeError, check_count
from probe.models import Graph, Model, cpu_threads
from probe.remote import Host
from probe.tracing import FASTEST, GRADIENT_GROUPS, MemoryMode, recordable, room_for

BatchSize = int | Literal["auto"]
Result = TypeVar("Result")

# More tokens than these make no batch faster: the processor is busy already.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 8192}

# A batch more takes as long as so many tokens more, times d_model squared (what a token takes goes
# by that): so much may filling up cost. Measured on two cores, 1 to 55 M parameters, and at 7 B.
ONE_MORE = {"cpu": 6e6, "cuda": 8e9}

# A server sends results up to 8 MiB as it has them; for larger ones it needs a store.
RESPONSE_BYTES = 4 * 2**20

# Of what is free a recorded pass may take so much, and keep it.
RECORDED = 0.25

# What is left free for the allocator's own waste, and for what others take meanwhile.
MARGIN = 0.9


class Batching:
    """Batches of one model, one method and one list of sequences."""

    recording: bool = False
    """Whether the batch that is scored now should be recorded, as many of its shape may come."""

    def __init__(
        self, model: Model, graph: Graph, size: BatchSize, steps: int = 1, recompute: bool = True
    ) -> None:
        """Plan.

        Args:
            model: The model.
            graph: Its graph.
            size: How many sequences run together, or `auto` for as many as are good and fit.
            steps: How many rows each sequence has.
            recompute: Whether the method allows activations to be computed again.

        Raises:
            ProbeError: A size that is neither `auto` nor a whole number from 1 on.
        """
        if size != "auto":
            check_count("batch_size", size, ", or auto")
        self._device, self._recordings = model.device, model.recordings
        self._records = recordable(model)
        self._one_more = ONE_MORE.get(model.device.type, 0) / model.d_model**2 / steps
        self._threads = model.threads
        self._host = model.deployment.host if model.deployment else None
        self._bytes = graph.mask.numel() * torch.promote_types(model.dtype, torch.float32).itemsize
        self._size = size
        self._turning_point = model.turning_point
        self._steps = steps
        ladder = [FASTEST]
        if recompute:
            ladder.append(MemoryMode(recompute=True))
        if model.device.type == "cuda":
            ladder.append(MemoryMode(recompute, sources_on_host=True))
        self._costs = {mode: bytes_per_token(model, graph, mode) for mode in ladder}
        self._most: int | None = None
        self._least = 0

    def run(
        self,
        lengths: Sequence[int],
        score: Callable[[list[int], MemoryMode], Result],
        done: Collection[int] = (),
    ) -> Iterator[tuple[list[int], Result]]:
        """Score all sequences, the longest first.

        Args:
            lengths: How many tokens each sequence has.
            score: What scores the sequences at some places.
            done: Places to leave out.

        Yields:
            The places of a batch, and what came out.

        Raises:
            ProbeError: One sequence alone does not fit.
        """
        todo = [index for index in range(len(lengths)) if index not in done]
        todo.sort(key=lambda index: -lengths[index])
        if self._host:
            yield from self._run_there(self._host, lengths, score, todo)
            return
        with _old_objects_frozen():
            yield from self._run_here(lengths, score, todo)

    def _run_here(
        self,
        lengths: Sequence[int],
        score: Callable[[list[int], MemoryMode], Result],
        todo: list[int],
    ) -> Iterator[tuple[list[int], Result]]:
        """Score one batch after the other, as many sequences together as memory allows."""
        while todo:
            length = lengths[todo[0]] * self._steps
            mode = self._mode(length)
            indices = self._alike(lengths, todo[: self.rows(length, mode)])
            self.recording = self._may_record(len(indices) * length, mode)
            if self.recording:
                # Batches of near lengths have as many rows then, and one recorded pass.
                length = room_for(lengths[todo[0]]) * self._steps
                indices = indices[: self.rows(length, mode)]
            elif self._size == "auto":
                indices = indices[: self._worthwhile([lengths[index] for index in indices])]
            try:
                result = self._watched(len(indices) * length, mode, partial(score, indices, mode))
            except torch.OutOfMemoryError as error:
                if len(self._recordings):
                    self._recordings.clear()
                elif len(indices) > 1:
                    self._most = len(indices) * length // 2
                elif not self._save_more():
                    raise ProbeError(
                        f"a sequence of {length} tokens does not fit into the memory of "
                        f"{self._device}; use a lower selection.alpha, a smaller dtype or a larger "
                        "device"
                    ) from error
            else:
                todo = todo[len(indices) :]
                yield indices, result
                continue
            # Only out here nothing holds what the batch had.
            gc.collect()
            torch.cuda.empty_cache()

    def _run_there(
        self,
        host: Host,
        lengths: Sequence[int],
        score: Callable[[list[int], MemoryMode], Result],
        todo: list[int],
    ) -> Iterator[tuple[list[int], Result]]:
        """Score on a server, several batches at once; what its memory takes shows only there."""

        def parts(indices: list[int]) -> list[tuple[list[int], Result]]:
            length = lengths[indices[0]] * self._steps
            fitting = len(indices) if self._most is None else max(1, self._most // length)
            if len(indices) <= fitting:
                try:
                    return [(indices, score(indices, FASTEST))]
                except torch.OutOfMemoryError as error:
                    fitting = len(indices) // 2
                    if not fitting:
                        raise ProbeError(
                            f"a sequence of {length} tokens does not fit into the memory of "
                            f"{host.url}; use a lower selection.alpha or a larger server"
                        ) from error
                    self._most = fitting * length
            return parts(indices[:fitting]) + parts(indices[fitting:])

        batches = []
        while todo:
            count = self.rows(lengths[todo[0]] * self._steps)
            batches.append(self._alike(lengths, todo[:count]))
            todo = todo[len(batches[-1]) :]
        for found in in_flight((partial(parts, indices) for indices in batches), host.jobs):
            yield from found

    def _alike(self, lengths: Sequence[int], indices: list[int]) -> list[int]:
        """Those of a batch, the longest first, that a model treats as it treats the first."""
        if self._turning_point is None or lengths[indices[0]] <= self._turning_point:
            return indices
        return [index for index in indices if lengths[index] > self._turning_point]

    def _worthwhile(self, lengths: Sequence[int]) -> int:
        """How many of a batch, the longest first, should run together.

        All others are filled up to the longest: so many that a token of theirs takes least. One
        that leaves a GPU waiting for Python takes no less than one that does not.
        """
        enough = self._recordings.enough / self._steps
        useful, costs, least = 0, [], enough if enough < math.inf else 0
        for count, length in enumerate(lengths, 1):
            useful += length
            costs.append((self._one_more + max(count * lengths[0], least)) / useful)
        return len(costs) - costs[::-1].index(min(costs))

    def rows(self, length: int, mode: MemoryMode = FASTEST) -> int:
        """How many rows of so many tokens run together."""
        if self._size == "auto":
            # A server has a GPU, if it is worth the way; how much memory is left there shows late.
            tokens = ENOUGH_TOKENS.get("cuda" if self._host else self._device.type, 1024)
            free = self._free()
            if free is not None:
                tokens = min(tokens, int(MARGIN * free / self._costs[mode]))
            count = tokens // length
            if self._host:
                count = min(count, RESPONSE_BYTES // self._bytes)
        else:
            count = self._size
        if self._most is not None:
            count = min(count, self._most // length)
        return max(1, count)

    def _may_record(self, tokens: int, mode: MemoryMode) -> bool:
        """Whether a batch's pass should be recorded; its memory stays taken afterwards."""
        free = self._free()
        if free is None or mode != FASTEST or not self._records:
            return False
        if tokens >= self._recordings.enough:
            return False
        return tokens * self._costs[mode] <= RECORDED * (free + self._recordings.bytes)

    def _free(self) -> int | None:
        """What a plain pass can have; see `free_bytes`."""
        free = free_bytes(self._device)
        # What recorded passes hold looks free in between, and is not.
        return None if free is None else free - self._recordings.bytes

    def _mode(self, length: int) -> MemoryMode:
        """The least that has to be done for one row of so many tokens."""
        free = self._free()
        ladder = list(self._costs)[self._least :]
        if free is not None:
            for mode in ladder:
                if length * self._costs[mode] <= MARGIN * free:
                    return mode
            return ladder[-1]
        return ladder[0]

    def _save_more(self) -> bool:
        self._least += 1
        return self._least < len(self._costs)

    def _watched(self, tokens: int, mode: MemoryMode, score: Callable[[], Result]) -> Result:
        """Score, and remember what a token really took."""
        if self._device.type != "cuda":
            with cpu_threads(self._threads):
                return score()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        played = self._recordings.played
        result = score()
        if self._recordings.played > played:
            return result
        taken = torch.cuda.max_memory_allocated(self._device) - before
        self._costs[mode] = max(taken / tokens, 1.0)
        return result


@contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there now, for a while.

    A batch makes garbage for Python to collect. What was there before need not be looked through
    each time: with torch and transformers that takes a tenth of a batch's time. Thawing is for all
    objects or none, so where the user, or an outer call, has frozen some, nothing is done.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def layer_numbers(d_model: int, d_ffn: int) -> int:
    """How many numbers a layer keeps per token: those that its backward pass needs.

    That is attention's query, key, value and output, what two norms read, and gate, activation and
    up projection.
    """
    return 5 * d_model + 3 * d_ffn


def bytes_per_token(model: Model, graph: Graph, mode: MemoryMode) -> float:
    """Roughly what a batch holds per token.

    Measured without fused kernels at 7B Mistral shape, bfloat16, 1 x 4096 tokens: 4.6 MB a token
    where this gives 4.9, and 1.1 where it gives 1.25 with activations computed again
    (docs/performance.md).
    """
    d_model, n_layers = model.d_model, model.n_layers
    d_ffn = getattr(model.config, "intermediate_size", None) or 4 * d_model
    layer = layer_numbers(d_model, d_ffn)
    n_sources, n_targets = graph.mask.shape
    numbers = n_layers * d_model + (n_targets / GRADIENT_GROUPS + 1) * d_model
    numbers += 3 * layer if mode.recompute else n_layers * layer
    if not mode.sources_on_host:
        numbers += n_sources * d_model
    return float(numbers * model.dtype.itemsize)


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device; None where memory is not planned (on a CPU)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    number = torch.cuda.current_device() if device.index is None else device.index
    allowed = total * torch.cuda.get_per_process_memory_fraction(number)
    taken = torch.cuda.memory_stats(device)
    reserved, allocated = (taken[f"{of}_bytes.all.current"] for of in ("reserved", "allocated"))
    return min(free + reserved, int(allowed)) - allocated
