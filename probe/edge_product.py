"""The edge product: outputs times gradients, as both come, inside a trace.

Outputs are kept from the forward pass. A gradient is kept only until the few layers around it have
theirs, and is then multiplied with all outputs at once: one thin matrix product for many edges,
and no gradient waits for the end. All of it is functions inside a function, so that a trace can be
sent to a server that does not have this package.

    >>> open_product, write, *receivers, check_sum, close_product = edge_product(
    ...     graph, n_layers=32, n_sequences=8, steps=1, left=None, on_host=False
    ... )
"""

from collections.abc import Callable

import torch

from probe.graph import Graph
from probe.trace_functions import Gradients, Pull

# Float32 copies, where a product needs them, stay small beside the activations.
SLICE_BYTES = 64 * 2**20

# Gradients of so many groups of layers are multiplied one after the other: the more groups, the
# less memory, and the more often the outputs are read.
GRADIENT_GROUPS = 16


def edge_product(
    graph: Graph,
    n_layers: int,
    n_sequences: int,
    steps: int,
    left: torch.Tensor | None,
    on_host: bool,
) -> tuple[
    Callable[[torch.Tensor], torch.Tensor],
    Callable[[int, torch.Tensor], None],
    Callable[[int, Pull, Gradients], torch.Tensor],
    Callable[[int, torch.Tensor], None],
    Callable[[int, int, Pull, Gradients], torch.Tensor],
    Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    Callable[[], torch.Tensor],
]:
    """What multiplies outputs with gradients as they come, as local functions.

    Args:
        graph: The graph.
        n_layers: How many layers it is of.
        n_sequences: How many of the rows hold sequences as they are: the last ones.
        steps: How many rows each sequence has.
        left: What an ablation leaves of each source, [source, d_model].
        on_host: Whether outputs wait in the host's memory.
    """
    mask = graph.mask
    n_sources, n_targets = mask.shape
    # Sources are in the order in which they write: a target reads so many of them.
    reaches = mask.sum(0).tolist()
    per_layer = (n_targets - 1) // n_layers
    # Gradients of a group of layers are multiplied at once, from the last group to the first.
    group = per_layer * -(-n_layers // GRADIENT_GROUPS)
    slice_bytes = SLICE_BYTES
    held: dict[str, torch.Tensor] = {}
    state = {"start": n_targets, "stop": n_targets, "piece": 1}
    rooms: dict[int, torch.Tensor] = {}
    waiting: dict[int, torch.Tensor] = {}
    parts: dict[int, torch.Tensor] = {}

    def open_product(embedded: torch.Tensor) -> torch.Tensor:
        """Give the stream as it begins, on the way of an integral; make room, keep the input."""
        stream = embedded.detach()
        exact = torch.promote_types(stream.dtype, torch.float32)
        if steps > 1:
            points = torch.arange(1, steps + 1, device=stream.device).to(exact) / steps
            points = points.repeat_interleave(n_sequences)[:, None, None].to(stream.dtype)
            base = 0 if left is None else left[0].to(stream.device)
            stream = base + points * (stream - base)
        _, length, width = stream.shape
        # The sum over positions falls into equal pieces, about enough of them for a whole GPU.
        wanted = max(1, n_sequences * length // 1024)
        divisors = (p for p in range(1, length + 1) if length % p == 0)
        piece = min(divisors, key=lambda p: max(p / wanted, wanted / p))
        state["piece"] = (length if stream.device.type == "cpu" else piece) * width
        shape = (n_sources, n_sequences, length, width)
        place = "cpu" if on_host else stream.device
        held["outputs"] = torch.empty(shape, dtype=stream.dtype, device=place, pin_memory=on_host)
        rooms.update(enumerate(held["outputs"].unbind()))
        held["scores"] = stream.new_zeros(n_sequences, n_sources, n_targets, dtype=exact)
        write(0, stream)
        # The one line that switches the graph on: parameters are frozen.
        return stream.requires_grad_(True)

    def write(source: int, output: torch.Tensor) -> None:
        """Keep the output of a source, when it comes for the first time."""
        room = rooms.pop(source, None)
        if room is not None:
            output = output.detach()
            room.copy_(output if steps == 1 else output[-n_sequences:], non_blocking=True)

    def take(target: int, gradient: torch.Tensor) -> None:
        """Take the gradient of a branch."""
        while target < state["start"]:
            multiply()
        waiting[target] = gradient.to(held["scores"].device)
        if len(waiting) == state["stop"] - state["start"]:
            multiply()

    def receive(first: int, pull: Pull, gradients: Gradients) -> torch.Tensor:
        """Take gradients of some branches to before their norm; give the sum of them there."""
        total = None
        for target, gradient in enumerate(gradients, first):
            gradient = pull(gradient)
            total = gradient if total is None else total + gradient
            take(target, gradient)
        assert total is not None
        return total

    def receive_part(target: int, gradient: torch.Tensor) -> None:
        """Take the gradient of a branch behind its norm, until the whole one is there."""
        parts[target] = gradient

    def join_parts(first: int, count: int, pull: Pull, gradients: Gradients) -> torch.Tensor:
        """Take gradients that came as parts to before their norm, and the whole one too."""
        for target in range(first, first + count):
            if target in parts:
                take(target, pull(parts.pop(target)))
        return pull(gradients[0])

    def multiply() -> None:
        """Multiply the gradients that are there with the outputs that they can have an edge to.

        Then those of the next group are awaited.
        """
        start, stop = state["start"], state["stop"]
        size = 1 if start == n_targets else group  # the final norm comes alone
        state.update(start=max(0, start - size), stop=start)
        if not waiting:
            return
        targets = range(start, stop)
        gradients = gathered(targets)
        reach = reaches[targets[-1]]
        outputs = held["outputs"][:reach].flatten(1).unflatten(1, (-1, state["piece"]))
        scores = held["scores"][:, :reach, start : start + len(targets)]
        for step in range(steps):
            read = gradients[:, step].flatten(1).unflatten(1, (-1, state["piece"]))
            found = product(outputs, read.permute(1, 2, 0))
            found = found.unflatten(0, (n_sequences, -1)).sum(1)[..., : len(targets)]
            scores -= found if steps == 1 else found / steps
        if left is not None:
            total = gradients[: len(targets)].sum((1, 3), dtype=scores.dtype) / steps
            scores += torch.einsum("sd,tnd->nst", left[:reach].to(total.dtype), total)

    def gathered(targets: range) -> torch.Tensor:
        """Gradients of these targets side by side: [target, step, sequence, position, d_model]."""
        shape = (-1, steps, *held["outputs"].shape[1:])
        some = next(iter(waiting.values()))
        # A branch without influence has sent none.
        none = some if len(waiting) == len(targets) else torch.zeros_like(some)
        found = [waiting.pop(target, none) for target in targets]
        if len(found) == 1:
            return some.reshape(shape)
        if "gradients" not in held:
            # A multiple of 8, for which matrix products have their fast kernels.
            held["gradients"] = some.new_zeros(-(-len(found) // 8) * 8, *some.shape)
        torch.stack(found, out=held["gradients"][: len(found)])
        return held["gradients"].view(shape)

    def product(outputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """[source, piece, ...] times [piece, ..., target], summed in float32 or better."""
        exact = held["scores"].dtype
        if gradients.device != outputs.device:
            here = (row.to(gradients.device, non_blocking=True) for row in outputs.split(1))
            return torch.cat([product(row, gradients) for row in here], 1)
        outputs = outputs.transpose(0, 1)
        if gradients.dtype == exact:
            return torch.bmm(outputs, gradients)
        if gradients.device.type == "cuda":
            # Products of 16-bit numbers are exact in float32, and are summed there.
            return torch.bmm(outputs, gradients, out_dtype=exact)
        shape = len(outputs), outputs.shape[1], gradients.shape[2]
        found = gradients.new_empty(shape, dtype=exact)
        width = exact.itemsize * outputs.shape[2] * (shape[1] + shape[2])
        step = max(1, slice_bytes // width)
        for start in range(0, len(outputs), step):
            part = slice(start, start + step)
            torch.bmm(outputs[part].to(exact), gradients[part].to(exact), out=found[part])
        return found

    def check_sum(end: torch.Tensor, checked: torch.Tensor) -> torch.Tensor:
        """Tell how far the outputs' sum is from the end of the stream, at a few positions."""
        outputs, checked = held["outputs"], checked.to(held["outputs"].device)
        rows = torch.arange(n_sequences, device=checked.device)[:, None]
        total = outputs[:, rows, checked].sum(0, dtype=held["scores"].dtype).to(end.device)
        truth = end[-n_sequences:][rows.to(end.device), checked.to(end.device)].to(total.dtype)
        return (total - truth).norm() / truth.norm()

    def close_product() -> torch.Tensor:
        """Give the scores."""
        multiply()
        scores = held["scores"].masked_fill(~mask.to(held["scores"].device, non_blocking=True), 0)
        held.clear()
        return scores

    return open_product, write, receive, receive_part, join_parts, check_sum, close_product
