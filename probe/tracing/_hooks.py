"""Torch hooks that hang in a model for one pass, and are taken down at its end.

A layer that is computed again runs its hooks again, and a hook costs a fraction of an access
through a trace, of which each layer would need eleven.

This module and those that `_contexts` names beside it need torch alone. A trace takes their
classes and functions along to a server by their source, so they may run on another Python than
this one. Hence three rules: no dataclass or NamedTuple (their methods have no source), no
`super()`, and no import of what a server does not have but for types.

    >>> hooks = Hooks()
    >>> hooks.at_output(layer.ffn, lambda output: 2 * output)
    >>> hooks.remove()
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Change = Callable[..., torch.Tensor | None]
    """Sees a tensor, and gives one to take its place, or None."""

    Output = torch.Tensor | tuple[torch.Tensor, ...]


class Hooks:
    """Hooks of one pass."""

    def __init__(self) -> None:
        """Start with none."""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def at_input(self, module: SimpleNamespace, change: Change, first: bool = False) -> None:
        """Let a function see what a module is given: `change(value)`.

        It goes behind those that hang there already, or before them if `first`.
        """

        def hook(
            _: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]] | None:
            changed = change(args[0] if args else next(iter(kwargs.values())))
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): changed}

        handle = module._module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        self._handles.append(handle)

    def at_output(self, module: SimpleNamespace, change: Change) -> None:
        """Let a function see a module's output, and its arguments: `change(output, *args)`."""

        def hook(
            _: torch.nn.Module, args: tuple[torch.Tensor, ...], output: Output
        ) -> Output | None:
            if not isinstance(output, tuple):
                return change(output, *args)
            changed = change(output[0], *args)
            return None if changed is None else (changed, *output[1:])

        self._handles.append(module._module.register_forward_hook(hook))

    def remove(self) -> None:
        """Take all of them down."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
