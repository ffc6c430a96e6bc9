"""Removing edges while a model runs, another one in each row.

It travels with a trace to a server; see `_hooks`.

    >>> ablation = EdgeAblation(wiring, [None, (0, 3)], baseline)
    >>> ablation.watch(hooks, layers, final_norm)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from probe.tracing._wiring import Writes, project

if TYPE_CHECKING:
    from probe.tracing._hooks import Hooks
    from probe.tracing._wiring import Wiring


class EdgeAblation:
    """One edge of each row without its source's output: H <- H - (O - B) at that one branch."""

    def __init__(
        self,
        wiring: Wiring,
        edges: Sequence[tuple[int, int] | None],
        baseline: torch.Tensor | None,
        beside: Sequence[int] = (),
        strength: float = 1.0,
    ) -> None:
        """Say which edges.

        Args:
            wiring: Where sources and targets are.
            edges: For each row its edge, as indices (source, target), or None.
            baseline: B, what an ablation leaves of each source, [source, d_model]; zero for None.
            beside: For each row, the row whose outputs are B; empty where there is none.
            strength: How much of O - B is removed.
        """
        self.strength = strength
        self.wiring, self.baseline, self.beside = wiring, baseline, beside
        self._source_of = {row: edge[0] for row, edge in enumerate(edges) if edge}
        self._rows_of: dict[int, list[int]] = {}
        for row, edge in enumerate(edges):
            if edge:
                self._rows_of.setdefault(edge[1], []).append(row)
        self._outputs: dict[int, torch.Tensor] = {}
        self._streams: dict[int, torch.Tensor] = {}

    def watch(
        self, hooks: Hooks, layers: Sequence[SimpleNamespace], final_norm: SimpleNamespace
    ) -> None:
        """Keep what is to be removed as it comes, and remove it where its branch reads.

        Args:
            hooks: Where to hang hooks.
            layers: The model's layers, from `_layers`.
            final_norm: The norm behind them.
        """
        writes = Writes(self.wiring, wanted=set(self._source_of.values()))
        writes.watch_input(hooks, layers[0].module, self._outputs.__setitem__)
        for number, layer in enumerate(layers):
            _, attention, _, ffn = self.wiring.layers[number]
            if attention and self.wiring.columns:
                self._cut_columns(hooks, number, layer, attention.start)
            elif attention:
                self._cut_block(hooks, number, layer, layer.attention, attention.start)
            if ffn:
                self._cut_block(hooks, number, layer, layer.ffn, ffn.start)
            writes.watch(hooks, number, layer, self._outputs.__setitem__)
        self._cut(hooks, final_norm, self.wiring.n_targets - 1)

    def _cut(self, hooks: Hooks, reader: SimpleNamespace, target: int) -> None:
        """Remove edges into a branch that reads by itself."""
        rows = self._rows_of.get(target)
        if not rows:
            return

        def change(stream: torch.Tensor) -> torch.Tensor:
            changed = stream.clone()
            changed[rows] = self._without(stream, rows)
            return changed

        hooks.at_input(reader, change)

    def _cut_block(
        self,
        hooks: Hooks,
        number: int,
        layer: SimpleNamespace,
        block: SimpleNamespace,
        target: int,
    ) -> None:
        """Remove edges into an attention, or an FFN."""
        norm = layer.attention_norm if block is layer.attention else layer.ffn_norm
        rows = self._rows_of.get(target)
        if not layer.shared_norm:
            self._cut(hooks, norm or block, target)
        elif rows:
            # Only this block is to see the change, behind the norm that both read.
            norm = layer.attention_norm
            hooks.at_input(norm or layer.attention, partial(self._streams.__setitem__, number))

            def change(normed: torch.Tensor) -> torch.Tensor:
                changed = self._without(self._streams[number], rows)
                normed = normed.clone()
                normed[rows] = norm._module.forward(changed) if norm else changed
                return normed

            hooks.at_input(block, change)

    def _cut_columns(self, hooks: Hooks, number: int, layer: SimpleNamespace, first: int) -> None:
        """Remove edges into branches that are columns of projections."""
        todo: dict[int, list[tuple[list[int], torch.Tensor]]] = {}
        for target, places in enumerate(self.wiring.columns, first):
            for projection, columns in places if target in self._rows_of else ():
                todo.setdefault(projection, []).append((self._rows_of[target], columns))
        if not todo:
            return
        reader = layer.attention_norm or layer.attention
        hooks.at_input(reader, partial(self._streams.__setitem__, number))

        def change(
            projection: int,
            parts: list[tuple[list[int], torch.Tensor]],
            output: torch.Tensor,
            *_: object,
        ) -> torch.Tensor:
            output = output.clone()  # [row, position, column]
            for rows, columns in parts:
                changed = self._without(self._streams[number], rows)
                if layer.attention_norm:
                    changed = layer.attention_norm._module.forward(changed)
                changed = project(layer, projection, changed)
                here = columns.to(output.device)
                before = output[rows]
                output[rows] = torch.where(here, changed.view(before.shape), before)
            return output

        for projection, parts in todo.items():
            hooks.at_output(layer.projections[projection], partial(change, projection, parts))

    def _without(self, stream: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """What a branch reads in these rows, without the source that each row removes."""
        gone = []
        for row in rows:
            source = self._source_of[row]
            output = self._outputs[source][row]  # [position, d_model]
            if self.beside:
                output = output - self._outputs[source][self.beside[row]]
            elif self.baseline is not None:
                output = output - self.baseline[source].to(output.device)
            gone.append(output.to(stream.device))
        removed = torch.stack(gone)
        return stream[rows] - (removed if self.strength == 1 else removed * self.strength)
