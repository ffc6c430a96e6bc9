"""Who reads from the residual stream, watched while a model runs.

A branch (an attention, its query, key or value, an FFN, the final norm) reads its own view, so
that the gradient there is the gradient of this one branch, not of the stream. Norms run without a
graph: on the way back `NormVjp` takes each branch's gradient through its norm in closed form,
and the stream gets their sum. So autograd keeps nothing for a norm, and walks through none.

It travels with a trace to a server; see `_hooks`.

    >>> branches = Branches(wiring, hooks, norm_vjp, product)
    >>> branches.watch(0, layer)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from probe.tracing._branch_checks import BranchChecks
    from probe.tracing._edge_product import EdgeProduct
    from probe.tracing._hooks import Hooks
    from probe.tracing._norm_vjp import NormVjp, Vjp
    from probe.tracing._wiring import Wiring

    Gradients = tuple[torch.Tensor, ...]
    """Of some branches, each [sequence, position, d_model]."""

    Back = Callable[[Vjp, Gradients], torch.Tensor]
    """From the gradients behind a norm to the sum of those before it."""

    class Context(Protocol):
        """What autograd keeps of a forward pass for its backward pass."""

        save_for_backward: Callable[..., None]
        saved_tensors: tuple[torch.Tensor, ...]
        norm: torch.nn.Module | None
        norm_vjp: NormVjp
        back: Back


class Branch(torch.autograd.Function):
    """Views of a norm's output whose gradients go back to its input together."""

    @staticmethod
    def forward(
        context: Context,
        value: torch.Tensor,
        normed: torch.Tensor,
        count: int,
        norm: torch.nn.Module | None,
        norm_vjp: NormVjp,
        back: Back,
    ) -> tuple[torch.Tensor, ...]:
        """Give `count` views of `normed`, all [sequence, position, d_model]."""
        context.save_for_backward(value)
        context.norm, context.norm_vjp, context.back = norm, norm_vjp, back
        return tuple(normed.view_as(normed) for _ in range(count))

    @staticmethod
    def backward(context: Context, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradient at `value`, [sequence, position, d_model]."""
        (value,) = context.saved_tensors
        vjp: Vjp = same
        if context.norm is not None:
            # A model may lie on several devices.
            vjp = context.norm_vjp.through(value.to(gradients[0].device), context.norm)
        gradient = context.back(vjp, gradients).to(value.device)
        return gradient, None, None, None, None, None


def same(gradient: torch.Tensor) -> torch.Tensor:
    """What a gradient is before no norm."""
    return gradient


def first_alone(vjp: Vjp, gradients: Gradients) -> torch.Tensor:
    """Take a gradient through a norm that is before no branch."""
    return vjp(gradients[0])


class Branches:
    """The branches of one model, and the stream that they read, on one pass."""

    end: torch.Tensor
    """The final norm's input, [row, position, d_model]."""

    hidden: torch.Tensor
    """Its output."""

    def __init__(
        self,
        wiring: Wiring,
        hooks: Hooks,
        norm_vjp: NormVjp,
        product: EdgeProduct,
        checks: BranchChecks | None = None,
    ) -> None:
        """Say where they are, and who wants their gradients.

        Args:
            wiring: Where targets are.
            hooks: Where to hang hooks.
            norm_vjp: The model's norms.
            product: Takes the gradient of each branch before its norm.
            checks: Compares what they read with what the graph says.
        """
        self.wiring, self.hooks, self.norm_vjp, self.product = wiring, hooks, norm_vjp, product
        self.checks = checks
        self._parts: dict[int, torch.Tensor] = {}
        self._stream: torch.Tensor | None = None

    def watch(self, layer: int, modules: SimpleNamespace) -> None:
        """Watch the branches of a layer.

        Args:
            layer: The layer's number.
            modules: Its modules, from `_layers`.
        """
        wiring = self.wiring
        _, attention, _, ffn = wiring.layers[layer]
        if attention:
            self._watch_attention(attention.start, ffn.start, modules)
        if ffn and not modules.shared_norm:
            back = partial(self._receive, ffn.start)
            self.read(modules.ffn_norm, modules.ffn, back, [], [ffn.start])
        if self.checks:
            self._check_given(modules, attention, ffn)
        for norm in modules.other_norms:
            self.read(norm, norm, first_alone)

    def _watch_attention(self, first: int, ffn: int, modules: SimpleNamespace) -> None:
        """Watch an attention, and an FFN that reads the same norm.

        Args:
            first: The attention's first target.
            ffn: The FFN's target.
            modules: The layer's modules.
        """
        wiring, back = self.wiring, partial(self._receive, first)
        if wiring.columns and not wiring.at_inputs:
            back = partial(self._join_parts, first, len(wiring.columns))
            for number, projection in enumerate(modules.projections):
                parts = [
                    (target, columns.nonzero()[:, 0])
                    for target, columns_of in enumerate(wiring.columns, first)
                    for of, columns in columns_of
                    if of == number
                ]
                self._read_columns(projection, parts)
        parting = modules.projections if wiring.at_inputs else []
        targets = [first]
        if modules.shared_norm:
            parting, targets = [*(parting or [modules.attention]), modules.ffn], [first, ffn]
        latent = modules if modules.latent and parting else None
        self.read(modules.attention_norm, modules.attention, back, parting, targets, latent)

    def watch_ends(
        self, first: SimpleNamespace, last: SimpleNamespace, norm: SimpleNamespace | None
    ) -> None:
        """Let the stream begin before the first layer, and watch the last branch at its end.

        Args:
            first: The first layer.
            last: The final norm, or what stands in its place.
            norm: The final norm, if there is one.
        """
        self.hooks.at_input(first, self._begin)
        self.hooks.at_input(last, lambda value: setattr(self, "end", value))
        target = self.wiring.n_targets - 1
        self.read(norm, last, partial(self._receive, target), [], [target])
        self.hooks.at_output(last, lambda output, *_: setattr(self, "hidden", output))

    def backward(self, slopes: torch.Tensor) -> None:
        """Take gradients through the model; the product gets those of all branches.

        Args:
            slopes: Those at `hidden`, [row, position, d_model].
        """
        # Nobody needs the hidden states themselves any more, nor the end of the stream.
        edge = torch.autograd.graph.get_gradient_edge(self.hidden)
        stream = self._stream
        assert stream is not None
        del self.hidden, self.end
        (gradient,) = torch.autograd.grad([edge], stream, slopes)
        if self.checks:
            self.checks.see_stream(gradient)
        self._stream = None

    def _begin(self, value: torch.Tensor) -> torch.Tensor:
        """The stream as it begins; a layer that is computed again gets the same one."""
        if self._stream is None:
            self._stream = self.product.open(value)
        return self._stream

    def read(
        self,
        norm: SimpleNamespace | None,
        module: SimpleNamespace,
        back: Back,
        projections: Sequence[SimpleNamespace] = (),
        targets: Sequence[int] = (),
        latent: SimpleNamespace | None = None,
    ) -> None:
        """Let branches read a norm's output, or where there is none what a module is given.

        Args:
            norm: The norm.
            module: The module behind it.
            back: Takes the branches' gradients, and how they get before the norm.
            projections: Where the branches part; one branch where they are none.
            targets: The first target of each block that reads here; none for a norm in between.
            latent: The layer's modules, where the third projection reads what the second gives.
        """
        hooks, norm_vjp, count = self.hooks, self.norm_vjp, max(1, len(projections))
        module_of_norm = None if norm is None else norm._module
        kept: dict[int | str, torch.Tensor] = {}  # what waits from one hook to the next

        def before(value: torch.Tensor) -> torch.Tensor:
            kept["value"] = value
            return value.detach()

        def after(normed: torch.Tensor, *_: object) -> torch.Tensor:
            value = kept.pop("value")
            if self.checks:
                self._check(self.checks, targets, value, normed, norm)
            first, *others = Branch.apply(value, normed, count, module_of_norm, norm_vjp, back)
            kept.update(enumerate(others))
            return first.clone() if self.wiring.clips and not targets else first

        if norm is None:
            hooks.at_input(module, lambda value: after(before(value)))
        else:
            hooks.at_input(norm, before)
            hooks.at_output(norm, after)
        for number, projection in enumerate(projections[1:]):
            if latent and number == 1:
                self._read_latent(latent, lambda: kept.pop(1))
            else:
                hooks.at_input(projection, lambda _, number=number: kept.pop(number))

    def _read_latent(self, modules: SimpleNamespace, view: Callable[[], torch.Tensor]) -> None:
        """Let values be made of a view of their own; keys are made of the one of the projection.

        Args:
            modules: The layer's modules.
            view: Gives the values' view of what the attention is given.
        """
        ((_, values),) = self.wiring.columns[2]
        latent, last = modules.latent, modules.projections[2]

        def split(output: torch.Tensor, *_: object) -> torch.Tensor:
            narrow = modules.projections[1]._module.forward(view())[..., : latent.width]
            norm = latent.norm._module
            normed = norm.forward(narrow.detach())
            (normed,) = Branch.apply(narrow, normed, 1, norm, self.norm_vjp, first_alone)
            changed = last._module.forward(normed).view(output.shape)
            if self.checks:
                self.checks.see_same(changed, output)
            return torch.where(values.to(output.device), changed, output)

        self.hooks.at_output(last, split)

    def _check(
        self,
        checks: BranchChecks,
        targets: Sequence[int],
        value: torch.Tensor,
        normed: torch.Tensor,
        norm: SimpleNamespace | None,
    ) -> None:
        """Let what is read here be compared with what should be."""
        for target in targets:
            checks.see(target, value, self.product.removed(value))
            checks.see_norm(target, value, normed, norm, self.norm_vjp)
        if not targets:
            checks.see_norm(None, value, normed, norm, self.norm_vjp)

    def _check_given(self, modules: SimpleNamespace, attention: range, ffn: range) -> None:
        """Let what blocks and projections behind a norm are given be compared with it."""
        checks, hooks = self.checks, self.hooks
        assert checks is not None
        readers = []
        if modules.attention_norm:  # otherwise the block is the reader itself
            readers.append((attention, modules.attention))
        if modules.ffn_norm or (modules.shared_norm and modules.attention_norm):
            readers.append((ffn, modules.ffn))
        if self.wiring.columns:
            projections = modules.projections[: 2 if modules.latent else None]
            readers += [(attention, projection) for projection in projections]
        for target, module in ((part.start, module) for part, module in readers if part):
            # Hooks run in the order in which they were hung: this one would see the view that
            # takes an input's place, were it not hung before.
            hooks.at_input(module, partial(checks.see_given, target), first=True)

    def _read_columns(
        self, projection: SimpleNamespace, parts: list[tuple[int, torch.Tensor]]
    ) -> None:
        """Let branches read columns of a projection's output; `parts` are (target, columns)."""
        weight = self.wiring.weight(projection).T  # [output, input]
        parts = [(target, chosen.to(weight.device, non_blocking=True)) for target, chosen in parts]
        waiting = self._parts

        def take(gradient: torch.Tensor) -> None:
            """Part the gradient behind the projection: [sequence, position, output]."""
            for target, chosen in parts:
                waiting[target] = gradient.index_select(-1, chosen) @ weight[chosen]

        def split(output: torch.Tensor, *_: object) -> torch.Tensor:
            # What is changed in place must be no view: a view would forget the hook.
            output = output.clone() if self.wiring.clips else output.view_as(output)
            output.register_hook(take)
            return output

        self.hooks.at_output(projection, split)

    def _receive(
        self, first: int, vjp: Vjp, gradients: Gradients, total: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take the gradients of targets from `first` on to before their norm; give their sum."""
        for target, gradient in enumerate(gradients, first):
            gradient = vjp(gradient)
            total = gradient if total is None else total + gradient
            self._take(target, gradient)
        assert total is not None
        return total

    def _take(self, target: int, gradient: torch.Tensor) -> None:
        """Take the gradient of one target before its norm."""
        if self.checks:
            self.checks.see_gradient(gradient)
        self.product.take(target, gradient)

    def _join_parts(self, first: int, count: int, vjp: Vjp, gradients: Gradients) -> torch.Tensor:
        """Take gradients that came as parts to before their norm, and the whole one too."""
        for target in range(first, first + count):
            if target in self._parts:
                self._take(target, vjp(self._parts.pop(target)))
        # Behind a norm that they share the FFN's comes with it.
        return self._receive(first + count, vjp, gradients[1:], vjp(gradients[0]))
