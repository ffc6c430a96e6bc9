"""Who writes to the residual stream and who reads it, watched while a model runs.

A branch (an attention, its query, key or value, an FFN, the final norm) reads its own view, so
that the gradient there is the gradient of this one branch, not of the stream. Norms run without a
graph: on the way back `norm_pull` takes each branch's gradient through its norm in closed form,
and the stream gets their sum. So autograd keeps nothing for a norm, and walks through none.

All of this happens in torch hooks, hung up inside a trace and taken down at its end: a layer that
is computed again runs its hooks again, and a hook costs a fraction of an access through the trace,
of which each layer would need eleven. They are functions inside a function, so that a trace can
be sent to a server that does not have this package.

    >>> watch, watch_ends, release = watchers(model, graph, False, write, receive, part, join)
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import torch

from probe.graph import Graph
from probe.layers import branch_columns_of, heads_of, norm_epsilon, output_scale
from probe.models import Model
from probe.trace_functions import Gradients, Pull, norm_pull, relevance_rules

Back = Callable[[Pull, Gradients], torch.Tensor]
"""From how a gradient gets before a norm, and those behind it, to the one before it."""

Change = Callable[..., torch.Tensor | None]
"""Sees a tensor, and gives one to take its place, or None."""

Output = torch.Tensor | tuple[torch.Tensor, ...]


class Context(Protocol):
    """What autograd keeps of a forward pass for its backward pass."""

    save_for_backward: Callable[..., None]
    saved_tensors: tuple[torch.Tensor, ...]
    weight: torch.Tensor | None
    back: Back


def watchers(
    model: Model,
    graph: Graph,
    relevance: bool,
    write: Callable[[int, torch.Tensor], None],
    receive: Callable[[int, Pull, Gradients], torch.Tensor],
    receive_part: Callable[[int, torch.Tensor], None],
    join_parts: Callable[[int, int, Pull, Gradients], torch.Tensor],
) -> tuple[
    Callable[[int, SimpleNamespace], None],
    Callable[..., dict[str, torch.Tensor]],
    Callable[[], None],
]:
    """Local functions that watch a layer, that watch both ends of the stream, and that stop.

    Args:
        model: The model.
        graph: Its graph.
        relevance: Whether gradients follow the rules of relevance patching: a norm's denominator
            is held constant, an activation f counts as the line f(x)/x, and the gradient of a
            product of gate and input is halved.
        write: Takes a source's place and its output.
        receive: Takes the first place of some branches, how a gradient gets before their norm,
            and the gradients behind it; gives the sum of those before.
        receive_part: Takes a branch's place and its gradient behind the norm.
        join_parts: Takes the first place and the number of branches whose gradients came as such
            parts, and then what `receive` takes, for all of them at once.
    """
    row, by_head = model.architecture, graph.granularity == "head"
    n_sources, n_targets = graph.mask.shape
    sources_per_layer = (n_sources - 1) // model.n_layers
    targets_per_layer = (n_targets - 1) // model.n_layers
    heads = heads_of(model)
    # Query, key and value part at the inputs of their projections where they have their own;
    # otherwise, and head by head, at columns of the projections' outputs.
    at_inputs = graph.granularity == "qkv" and row.layout == "split"
    columns = [] if at_inputs else branch_columns_of(model, graph)
    columns = [(place, chosen.nonzero()[:, 0]) for place, chosen in columns]
    scale, transposed = output_scale(model), row.transposed
    through = norm_pull(row.centred_norms, row.norm_offset, norm_epsilon(model), relevance)
    straighten, halve = relevance_rules()
    handles: list[torch.utils.hooks.RemovableHandle] = []

    class Branch(torch.autograd.Function):
        """Views of a norm's output whose gradients go back to its input together."""

        @staticmethod
        def forward(
            context: "Context",
            value: torch.Tensor,
            normed: torch.Tensor,
            count: int,
            weight: torch.Tensor | None,
            back: Back,
        ) -> tuple[torch.Tensor, ...]:
            context.save_for_backward(value)
            context.weight, context.back = weight, back
            return tuple(normed.view_as(normed) for _ in range(count))

        @staticmethod
        def backward(
            context: "Context", *gradients: torch.Tensor
        ) -> tuple[torch.Tensor | None, ...]:
            (value,) = context.saved_tensors
            pull: Pull = same
            if context.weight is not None:
                # A model may lie on several devices.
                pull = through(value.to(gradients[0].device), context.weight)
            gradient = context.back(pull, gradients).to(value.device)
            return gradient, None, None, None, None

    def same(gradient: torch.Tensor) -> torch.Tensor:
        """What a gradient is before no norm."""
        return gradient

    def pass_on(pull: Pull, gradients: Gradients) -> torch.Tensor:
        """Take a gradient through a norm that is before no branch."""
        return pull(gradients[0])

    def at_input(module: SimpleNamespace, change: Change) -> None:
        """Let a function see what a module is given."""

        def hook(
            _: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]] | None:
            changed = change(args[0] if args else next(iter(kwargs.values())))
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): changed}

        handles.append(module._module.register_forward_pre_hook(hook, with_kwargs=True))

    def at_output(module: SimpleNamespace, change: Change) -> None:
        """Let a function see a module's output, and its arguments."""

        def hook(
            _: torch.nn.Module, args: tuple[torch.Tensor, ...], output: Output
        ) -> Output | None:
            if not isinstance(output, tuple):
                return change(output, *args)
            changed = change(output[0], *args)
            return None if changed is None else (changed, *output[1:])

        handles.append(module._module.register_forward_hook(hook))

    def read(
        norm: SimpleNamespace | None,
        module: SimpleNamespace,
        projections: Sequence[SimpleNamespace],
        back: Back,
    ) -> None:
        """Let branches read a norm's output, or where there is none what a module is given."""
        kept: dict[int | str, torch.Tensor] = {}  # what waits from one hook to the next
        count = max(1, len(projections))

        def before(value: torch.Tensor) -> torch.Tensor:
            kept["value"] = value
            return value.detach()

        def after(normed: torch.Tensor, *_: object) -> torch.Tensor:
            weight = None if norm is None else norm._module.weight
            first, *others = Branch.apply(kept.pop("value"), normed, count, weight, back)
            kept.update(enumerate(others))
            return first

        if norm is None:
            at_input(module, lambda value: after(before(value)))
        else:
            at_input(norm, before)
            at_output(norm, after)
        for place, projection in enumerate(projections[1:]):
            at_input(projection, lambda _, place=place: kept.pop(place))

    def read_columns(projection: SimpleNamespace, parts: list[tuple[int, torch.Tensor]]) -> None:
        """Let branches read columns of a projection's output."""
        weight = projection._module.weight.T if transposed else projection._module.weight
        parts = [(target, chosen.to(weight.device, non_blocking=True)) for target, chosen in parts]

        def take(gradient: torch.Tensor) -> None:
            for target, chosen in parts:
                receive_part(target, gradient.index_select(-1, chosen) @ weight[chosen])

        def split(output: torch.Tensor, *_: object) -> torch.Tensor:
            output = output.view_as(output)
            output.register_hook(take)
            return output

        at_output(projection, split)

    def write_heads(attention_projection: SimpleNamespace, first: int) -> None:
        """Keep what each head writes, and the bias behind them."""
        module = attention_projection._module
        weight = module.weight if transposed else module.weight.T

        def split(beside: torch.Tensor) -> None:
            for head in range(heads.query):
                part = slice(head * heads.width, (head + 1) * heads.width)
                write(first + head, beside.detach()[..., part] @ weight[part] * scale)
            if module.bias is not None:
                whole = module.bias.expand(*beside.shape[:-1], -1)
                write(first + heads.query, whole * scale)

        at_input(attention_projection, split)

    def keep(source: int) -> Change:
        """Give what keeps an output."""
        return lambda output, *_: write(source, output if scale == 1 else output * scale)

    def watch(number: int, layer: SimpleNamespace) -> None:
        """Watch a layer, by its number."""
        source, target = 1 + number * sources_per_layer, number * targets_per_layer
        if columns:
            back = partial(join_parts, target, len(columns))
            for place, projection in enumerate(layer.projections):
                parts = [(at, cut) for at, (of, cut) in enumerate(columns, target) if of == place]
                read_columns(projection, parts)
        else:
            back = partial(receive, target)
        parting = layer.projections if at_inputs else []
        read(layer.attention_norm, layer.attention, parting, back)
        ffn_target = target + targets_per_layer - 1
        read(layer.ffn_norm, layer.ffn, [], partial(receive, ffn_target))
        for norm in layer.other_norms:
            read(norm, norm, [], pass_on)
        if relevance:
            follow_rules(layer)
        if by_head:
            write_heads(layer.attention_projection, source)
        else:
            at_output(layer.attention_output, keep(source))
        at_output(layer.ffn_output, keep(source + sources_per_layer - 1))

    def follow_rules(layer: SimpleNamespace) -> None:
        """Let gradients of an FFN follow the rules of relevance patching."""
        if layer.experts is None:
            at_output(layer.activation, straighten)
            if layer.product:
                at_input(layer.product, halve)
            return
        experts = layer.experts._module

        def mix(
            _: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor
        ) -> torch.Tensor:
            mixed = torch.zeros_like(tokens)
            for expert in range(experts.num_experts):
                at, rank = (chosen == expert).nonzero(as_tuple=True)
                both = tokens[at] @ experts.gate_up_proj[expert].T
                gate, up = both.chunk(2, dim=-1)
                opened = halve(straighten(experts.act_fn(gate), gate) * up)
                answer = opened @ experts.down_proj[expert].T
                answer = halve(answer * share[at, rank, None])
                mixed = mixed.index_add(0, at, answer.to(mixed.dtype))
            return mixed

        at_output(layer.experts, mix)

    def watch_ends(
        first: SimpleNamespace,
        begin: Callable[[torch.Tensor], torch.Tensor],
        last: SimpleNamespace,
        norm: SimpleNamespace | None,
    ) -> dict[str, torch.Tensor]:
        """Let the stream begin before the first layer; give where it and its end will be."""
        found: dict[str, torch.Tensor] = {}

        def start(value: torch.Tensor) -> torch.Tensor:
            if "stream" not in found:
                found["stream"] = begin(value)
            return found["stream"]

        at_input(first, start)
        at_input(last, lambda value: found.update(end=value))
        read(norm, last, [], partial(receive, n_targets - 1))
        at_output(last, lambda output, *_: found.update(hidden=output))
        return found

    def release() -> None:
        """Take all hooks down."""
        for handle in handles:
            handle.remove()

    return watch, watch_ends, release
