"""Passes that are recorded on a GPU and played again.

What a GPU does for a batch is the same for every batch of its shape, and where a batch is small,
or the host slow, it waits for Python all the time. So a batch of a shape that came before is
recorded as a CUDA graph: forward, backward, edge product and logits, just as the trace has them.
Others of that shape are copied to where it read its inputs, and it is played. To make shapes few,
batches are filled up a little; the filling counts nothing. Where a plain pass was found to keep the
GPU busy, none as large is recorded or filled up.

    >>> edge_scores_again(model, batch, graph)   # first plain, then recorded, then played
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from probe.errors import reason
from probe.models import Graph, Model, recording
from probe.tracing._contexts import (
    FASTEST,
    LOSS,
    EdgeBatch,
    MemoryMode,
    edge_pass_of,
    edge_scores,
    run_edge_pass,
)
from probe.tracing._edge_inputs import Batch, EdgeInputs, Room, RowBlocks, edge_inputs
from probe.tracing._integration import HERE, Path
from probe.tracing._layers import exact_dtype, wiring_of
from probe.tracing._targets import Target

# Python is ahead of the GPU where so much of a pass is left to compute when it has issued all.
AHEAD = 0.3

# What is known of a shape once a plain pass over it was timed: the next one may be recorded.
TIMED = 1

_patching = threading.Lock()


class Shape(NamedTuple):
    """What two batches have in common that one recorded pass serves."""

    rows: int
    """How many sequences."""

    room: Room
    """How large it is."""

    graph: str
    """The granularity."""

    target: tuple[object, ...]
    """What is differentiated."""

    path: tuple[float, ...]
    """Points and weights of an integral."""

    options: tuple[bool, ...]
    """What else there is: rules, positions, corrupted texts, a baseline, a way from the mean."""


class Recording:
    """One recorded pass."""

    bytes: int
    """What it holds of the GPU's memory."""

    def __init__(
        self,
        model: Model,
        graph: Graph,
        inputs: EdgeInputs,
        blocks: RowBlocks,
        asked: tuple[Path, bool, MemoryMode, Target, bool, bool],
    ) -> None:
        """Record a pass.

        Args:
            model: The model.
            graph: Its graph.
            inputs: Those of a batch; these tensors are where every batch will be read.
            blocks: How often its sequences stand there.
            asked: What else `edge_pass_of` takes.

        Raises:
            RuntimeError: It does something that cannot be recorded, or does not fit into memory.
        """
        self._inputs, self._graph = inputs, torch.cuda.CUDAGraph()
        edge_pass = edge_pass_of(model, inputs, blocks, graph, *asked)
        self._product = edge_pass.product  # what lies in it is read each time
        self._product.place(model.device)
        beside = model.recordings.some()
        shared = beside._graph if isinstance(beside, Recording) else None
        torch.cuda.empty_cache()  # as recording does, so that what it takes can be told
        before = torch.cuda.memory_reserved(model.device)
        with _one_text_a_row(), recording(self._graph, model.device, shared):
            self._found = run_edge_pass(model, inputs, edge_pass)
        self.bytes = max(0, torch.cuda.memory_reserved(model.device) - before)

    def play(self, inputs: EdgeInputs) -> EdgeBatch:
        """Play it for the inputs of another batch of its shape."""
        for place, value in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            place.copy_(value, non_blocking=True)
        self._graph.replay()
        # The next one that is played writes over it.
        return EdgeBatch(*(part.clone() for part in self._found))


def edge_scores_again(
    model: Model,
    batch: Batch,
    graph: Graph,
    path: Path = HERE,
    relp: bool = False,
    baseline: torch.Tensor | None = None,
    target: Target = LOSS,
    check: bool = True,
    positions: bool = False,
) -> EdgeBatch:
    """What `edge_scores` gives, from a recorded pass where there is one of the batch's shape.

    The first batch of a shape runs as usual, and is timed, unless libraries prepare themselves in
    it; the next one is recorded, where the GPU had to wait.

    Raises:
        torch.OutOfMemoryError: Recording it does not fit into memory.
    """
    recordings, room = model.recordings, room_of(batch)
    blocks = RowBlocks(len(path.points), batch.corrupted is not None)
    shape = _shape(batch, room, graph, path, relp, baseline, target, positions)
    known = recordings.get(shape)
    asked = (path, relp, baseline, FASTEST, target, check, positions)
    plain = partial(edge_scores, model, batch, graph, *asked)
    checked = not check or graph.granularity in model.readings_known
    free = int(batch.positions[0, 0]) > 0  # the first position, at which the filling stands
    again = isinstance(known, Recording) or (checked and _may_be(model, graph, target))
    if not (free and again):
        return plain()
    if known == 0:
        found, busy = _timed(plain, model.device)
        if busy:
            recordings.enough = min(recordings.enough, batch.input_ids.numel() * blocks.number)
        recordings.put(shape, TIMED)
        return found
    inputs = edge_inputs(batch, blocks, exact_dtype(model), room)
    if baseline is not None:
        inputs = inputs._replace(baseline=baseline.to(model.dtype))
    if isinstance(known, int):
        unchecked = (path, relp, FASTEST, target, False, positions)
        try:
            known = Recording(model, graph, _placed(inputs, model.device), blocks, unchecked)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            recordings.refused = True
            warnings.warn(
                f"{model.reference}: its passes cannot be recorded, so the GPU waits for Python "
                f"({reason(error)})",
                stacklevel=2,
            )
            return plain()
        recordings.put(shape, known)
    assert isinstance(known, Recording)
    recordings.played += 1
    return known.play(inputs)


def _timed(plain: Callable[[], EdgeBatch], device: torch.device) -> tuple[EdgeBatch, bool]:
    """What a plain pass gives, and whether it kept the GPU busy from beginning to end."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = plain()
    issued = time.perf_counter()
    torch.cuda.synchronize(device)
    done = time.perf_counter()
    return found, done - issued > AHEAD * (done - start)


@contextmanager
def _one_text_a_row() -> Iterator[None]:
    """Let transformers know, while a pass is recorded, that no row holds several texts.

    It reads that off the positions, for which it would have to wait for the GPU; where it cannot,
    it makes a mask, with which attention is half as fast.
    """
    from transformers import masking_utils

    def known(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if torch.cuda.is_current_stream_capturing() else read(position_ids)

    with _patching:
        read = masking_utils.find_packed_sequence_indices
        masking_utils.find_packed_sequence_indices = known
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = read


def room_of(batch: Batch) -> Room:
    """What a batch is filled up to."""
    scored = int((batch.labels != -100).sum())
    return Room(room_for(batch.input_ids.shape[1]), room_for(scored + 1))


def room_for(count: int) -> int:
    """The next of few sizes: steps of an eighth of a power of two, and of 16 at least."""
    step = max(16, 2 ** ((count - 1).bit_length() - 3))
    return -(-count // step) * step


def recordable(model: Model) -> bool:
    """Whether passes of a model can be recorded: those of one that lies here, on one GPU."""
    places = set((getattr(model.network._module, "hf_device_map", None) or {}).values())
    return model.deployment is None and model.device.type == "cuda" and len(places) < 2


def _may_be(model: Model, graph: Graph, target: Target) -> bool:
    """Whether passes can be recorded.

    Not where large things are compared; and where branches part at columns of a projection's
    output, which come from the host.
    """
    parts = graph.attention != "block"
    at_columns = parts and not wiring_of(model, graph).at_inputs
    large = target.compares or at_columns
    return not large and not model.recordings.refused and recordable(model)


def _shape(
    batch: Batch,
    room: Room,
    graph: Graph,
    path: Path,
    relp: bool,
    baseline: torch.Tensor | None,
    target: Target,
    positions: bool,
) -> Shape:
    """What one recorded pass can serve."""
    what = (target.what, target.shared_temperature, target.temperatures is None)
    points = (*path.points.tolist(), *path.weights.tolist())
    options = (relp, positions, batch.corrupted is None, baseline is None, path.from_mean)
    return Shape(len(batch.input_ids), room, graph.granularity, what, points, options)


def _placed(inputs: EdgeInputs, device: torch.device) -> EdgeInputs:
    """Inputs with all their tensors on a device."""
    placed = inputs.to(device)
    kept, reference, baseline = inputs.kept, inputs.reference, inputs.baseline
    return placed._replace(
        kept=kept if isinstance(kept, int) else kept.to(device),
        reference=None if reference is None else reference.to(device),
        baseline=None if baseline is None else baseline.to(device),
    )


def _tensors(inputs: EdgeInputs) -> list[torch.Tensor]:
    """The tensors in which batches of one shape differ."""
    parts = (inputs.input_ids, *inputs.scored, inputs.checked, inputs.lengths)
    return [*parts, *(p for p in (inputs.reference, inputs.baseline) if p is not None)]
