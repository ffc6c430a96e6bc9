"""Changing what branches read while a model runs, other edges in each row.

It travels with a trace to a server; see `_hooks`.

    >>> changes = EdgeChanges(wiring, mask, changed, values=baseline)
    >>> changes.watch(hooks, layers, final_norm)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from probe.tracing._wiring import Writes, project

if TYPE_CHECKING:
    from probe.tracing._hooks import Hooks
    from probe.tracing._wiring import Wiring

    Values = torch.Tensor | Mapping[int, torch.Tensor] | None
    """B of each source: constant, [source, d_model]; or by its index, [1 or row, position,
    d_model]; zero for None."""


class EdgeChanges:
    """Some edges of each row that carry another value: kept O + given B instead of O.

    O is what the edge's source writes in this very row, B a value from elsewhere. So kept 0 and
    given 1 removes edges, and leaves B.

    Rows may be fewer at first: those that change nothing before a layer are there only from that
    layer on, as copies of row 0, which then is to change nothing at all.
    """

    def __init__(
        self,
        wiring: Wiring,
        mask: torch.Tensor,
        changed: torch.Tensor,
        kept: float = 0.0,
        given: float = 1.0,
        values: Values = None,
        beside: Sequence[int] = (),
        born: Sequence[int] = (),
    ) -> None:
        """Say which.

        Args:
            wiring: Where sources and targets are.
            mask: Where there are edges, bool [source, target].
            changed: The changed edges, bool [row, source, target].
            kept: The share of O.
            given: The share of B.
            values: B.
            beside: For each row, the row whose outputs are B; empty where there is none.
            born: For each layer, and the final norm behind them, how many rows there are from it
                on; empty where all are there from the beginning.
        """
        self.wiring, self.mask, self.changed = wiring, mask, changed
        self.kept, self.given, self.values = kept, given, values
        self.beside, self.born = beside, born
        # Where a branch is summed up anew, bool [row, target]. What is left of a stream less most
        # of its parts is mostly rounding, and a norm makes that as large as any; so there the parts
        # are added instead. With kept 1 nothing is taken away.
        self._anew = (2 * changed.sum(1) > mask.sum(0)) & (kept != 1)
        touched = changed.any(1)  # [row, target]
        self._rows_of = {
            target: touched[:, target].nonzero()[:, 0]
            for target in touched.any(0).nonzero()[:, 0].tolist()
        }
        self._outputs: dict[int, torch.Tensor] = {}
        self._streams: dict[int, torch.Tensor] = {}

    def watch(
        self, hooks: Hooks, layers: Sequence[SimpleNamespace], final_norm: SimpleNamespace
    ) -> None:
        """Keep what sources write as it comes, and change it where branches read.

        Args:
            hooks: Where to hang hooks.
            layers: The model's layers, from `_layers`.
            final_norm: The norm behind them.
        """
        writes = Writes(self.wiring, wanted=self._wanted())
        writes.watch_input(hooks, layers[0].module, self._outputs.__setitem__)
        for number, layer in enumerate(layers):
            self._bear(hooks, layer.module, number)
            _, attention, _, ffn = self.wiring.layers[number]
            if attention and self.wiring.columns:
                self._change_columns(hooks, number, layer, attention.start)
            elif attention:
                self._change_block(hooks, number, layer, layer.attention, attention.start)
            if ffn:
                self._change_block(hooks, number, layer, layer.ffn, ffn.start)
            writes.watch(hooks, number, layer, self._outputs.__setitem__)
        self._bear(hooks, final_norm, len(layers))
        self._change(hooks, final_norm, self.wiring.n_targets - 1)

    def _wanted(self) -> set[int]:
        """The sources whose outputs are needed."""
        # Those beside a changed edge, too, where a branch is summed up anew.
        wanted = self.changed.any(0).any(1)
        wanted |= self.mask[:, self._anew.any(0)].any(1)
        return set(wanted.nonzero()[:, 0].tolist())

    def _bear(self, hooks: Hooks, module: SimpleNamespace, number: int) -> None:
        """Let further rows begin at a layer."""
        if not self.born:
            return
        before = self.born[number - 1] if number else 1
        more = self.born[number] - before
        if more:
            hooks.at_input(
                module, lambda stream: torch.cat([stream, stream[:1].expand(more, -1, -1)])
            )

    def _change(self, hooks: Hooks, reader: SimpleNamespace, target: int) -> None:
        """Change what a branch reads that reads by itself."""
        rows = self._rows_of.get(target)
        if rows is None:
            return

        def change(stream: torch.Tensor) -> torch.Tensor:
            changed = stream.clone()
            changed[rows] = self._read(stream, target)
            return changed

        hooks.at_input(reader, change)

    def _change_block(
        self,
        hooks: Hooks,
        number: int,
        layer: SimpleNamespace,
        block: SimpleNamespace,
        target: int,
    ) -> None:
        """Change what an attention reads, or an FFN."""
        norm = layer.attention_norm if block is layer.attention else layer.ffn_norm
        rows = self._rows_of.get(target)
        if not layer.shared_norm:
            self._change(hooks, norm or block, target)
        elif rows is not None:
            # Only this block is to see the change, behind the norm that both read.
            norm = layer.attention_norm
            hooks.at_input(norm or layer.attention, partial(self._streams.__setitem__, number))

            def change(normed: torch.Tensor) -> torch.Tensor:
                changed = self._read(self._streams[number], target)
                normed = normed.clone()
                normed[rows] = norm._module.forward(changed) if norm else changed
                return normed

            hooks.at_input(block, change)

    def _change_columns(
        self, hooks: Hooks, number: int, layer: SimpleNamespace, first: int
    ) -> None:
        """Change what branches read that are columns of projections."""
        todo: dict[int, list[tuple[int, torch.Tensor | slice]]] = {}
        for target, places in enumerate(self.wiring.columns, first):
            for projection, columns in places if target in self._rows_of else ():
                some = slice(None) if columns.all() else columns.nonzero()[:, 0]
                todo.setdefault(projection, []).append((target, some))
        if not todo:
            return
        reader = layer.attention_norm or layer.attention
        hooks.at_input(reader, partial(self._streams.__setitem__, number))

        def change(
            projection: int,
            parts: list[tuple[int, torch.Tensor | slice]],
            output: torch.Tensor,
            *_: object,
        ) -> torch.Tensor:
            output = output.clone()  # [row, position, column]
            for target, columns in parts:
                rows = self._rows_of[target]
                changed = self._read(self._streams[number], target)
                if layer.attention_norm:
                    changed = layer.attention_norm._module.forward(changed)
                if isinstance(columns, torch.Tensor):
                    columns = columns.to(output.device)
                changed = project(self.wiring, layer, projection, changed, columns)
                own = output[rows]
                own[..., columns] = changed.view(*own.shape[:-1], -1)
                output[rows] = own
            return output

        for projection, parts in todo.items():
            hooks.at_output(layer.projections[projection], partial(change, projection, parts))

    def _read(self, stream: torch.Tensor, target: int) -> torch.Tensor:
        """What a branch reads in the rows where it is changed: [row, position, d_model]."""
        exact = torch.promote_types(stream.dtype, torch.float32)
        rows = self._rows_of[target]
        changed = self.changed[rows, :, target].double()  # [row, source]
        anew = self._anew[rows, target]  # [row]
        # Of O beside the stream, or of O where the stream counts nothing.
        share = changed * (self.kept - 1.0) + (self.mask[:, target] & anew[:, None])
        given = changed * self.given
        read = stream[rows].to(exact)
        read[anew] = 0
        other = self._outputs if self.beside else self.values
        if isinstance(other, torch.Tensor):
            read += (given.to(read) @ other.to(read))[:, None]
            other = None
        some = share != 0 if other is None else (share != 0) | changed.bool()
        numbers = some.cumsum(1)
        for number in range(1, int(numbers[:, -1].max()) + 1):
            # Of each row another source: nothing is added to twice at once, in no order.
            places, sources = (some & (numbers == number)).nonzero().T
            part = _parts(self._outputs, sources, rows[places], share[places, sources], read)
            if other is not None:
                # O and B are put together first: where they are the same, nothing is changed.
                own = changed[places, sources].nonzero()[:, 0]
                at, of = places[own], sources[own]
                there = torch.tensor(self.beside)[rows[at]] if self.beside else rows[at]
                beside = _parts(other, of, there, given[at, of], read)
                part.index_add_(0, own.to(read.device), beside)
            read.index_add_(0, places.to(read.device), part)
        return read.to(stream.dtype)


def _parts(
    held: Mapping[int, torch.Tensor],
    sources: torch.Tensor,
    rows: torch.Tensor,
    shares: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    """Shares of what is held of sources in some rows, or in row 0 where it has no such row.

    Args:
        held: By source, [row of the batch, position, d_model].
        sources: int64 [row].
        rows: Of the batch, int64 [row].
        shares: [row].
        like: Of the type, and on the device, that is wanted.

    Returns:
        [row, position, d_model].
    """
    if not len(sources):
        return like[:0]
    there = {source: held[source].to(like.device) for source in set(sources.tolist())}
    pairs = [
        (there[source], row if row < len(there[source]) else 0)
        for source, row in zip(sources.tolist(), rows.tolist(), strict=True)
    ]
    if len(there) == 1:
        found = pairs[0][0][[row for _, row in pairs]]
    else:
        found = torch.stack([value[row] for value, row in pairs])
    return found.to(like.dtype) * shares.to(like)[:, None, None]
