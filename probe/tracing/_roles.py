"""Which of a row's branches is query, which key and which value, told by what each one does.

Rows of the architecture table say where query, key and value lie. Exchanged, they would give right
scores under wrong names. In one forward pass over a few tokens each branch of each layer is
disturbed at one position, in a row of its own, and what reaches the output projection says which
it is: a query changes its own position only, a key and a value later ones too, and only in a value
is the change linear. Heads are told apart likewise.

    >>> role_faults(model, model.graph("qkv"))
    []
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from probe.models import Graph, Model, Node
from probe.tracing._hooks import Hooks
from probe.tracing._layers import exact_dtype, layers_of, wiring_of

LENGTH, PLACE = 4, 1
"""So many tokens, the one at `PLACE` disturbed: others come before and behind it."""

SEEN = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""A relative change that is no rounding; 1e-4 in others."""

STRENGTH = 4.0
"""How much is added, beside the mean size of what is there."""


def role_faults(model: Model, graph: Graph) -> list[str]:
    """What the branches of a model do that their names do not say, a sentence each.

    Empty too where nothing is told apart, or where the model is on a server.
    """
    if graph.attention == "block" or model.deployment is not None:
        return []
    found = _Disturbed(model, graph)
    with torch.no_grad():
        try:
            found.run()
        finally:
            found.hooks.remove()
    return found.faults


class _Disturbed:
    """One forward pass whose rows are the same tokens, all but the first disturbed in a branch."""

    def __init__(self, model: Model, graph: Graph) -> None:
        self.model, self.graph, self.hooks = model, graph, Hooks()
        self.wiring = wiring_of(model, graph)
        self.by_head = graph.granularity == "head"
        self.faults: list[str] = []

    def run(self) -> None:
        """Hang hooks and let the model run."""
        for layer, modules in enumerate(layers_of(self.model)):
            if modules.projections:
                self._watch(layer, modules)
        tokens = torch.arange(LENGTH, device=self.model.device) % int(self.model.config.vocab_size)
        rows = 1 + 2 * 3
        self.model.network._module(input_ids=tokens.expand(rows, -1), use_cache=False)

    def _branches(self, layer: int) -> list[tuple[int, int, str]]:
        """Of a layer a query, a key and a value: row, branch and name; another head in each."""
        _, targets, _, _ = self.graph.layers[layer]
        names = [Node.parse(self.graph.targets[target]) for target in targets]
        chosen = []
        for number, kind in enumerate("qkv"):
            own = [branch for branch, node in enumerate(names) if node.branch == kind]
            branch = own[layer % len(own)]
            chosen.append((1 + 2 * number, branch, self.graph.targets[targets.start + branch]))
        return chosen

    def _watch(self, layer: int, modules: SimpleNamespace) -> None:
        branches = self._branches(layer)
        for number, projection in enumerate(modules.projections):
            self.hooks.at_output(
                projection,
                lambda output, *_, number=number: self._disturb(output, number, branches),
            )
        self.hooks.at_input(
            modules.attention_projection, lambda mixed: self._judge(mixed, branches)
        )
        self.hooks.at_output(modules.attention, lambda output, *_: output[:1].expand_as(output))

    def _disturb(
        self, output: torch.Tensor, number: int, branches: Sequence[tuple[int, int, str]]
    ) -> torch.Tensor:
        """Add to a branch once in one row, and twice in the next."""
        output = output.clone()
        noise = torch.linspace(-1, 1, output.shape[-1], device=output.device).sin_()
        noise = noise.to(output.dtype) * output.abs().mean() * STRENGTH
        for row, branch, name in branches:
            for projection, columns in self.wiring.columns[branch]:
                if projection == number and len(columns) != output.shape[-1]:
                    self.faults.append(
                        f"the projection of {name} is {output.shape[-1]} wide, not {len(columns)}"
                    )
                elif projection == number:
                    added = noise * columns.to(output.device)
                    output[row, ..., PLACE, :] += added
                    output[row + 1, ..., PLACE, :] += 2 * added
        return output

    def _judge(self, mixed: torch.Tensor, branches: Sequence[tuple[int, int, str]]) -> None:
        """See what has come of it before the output projection, [row, position, column]."""
        mixed = mixed.to(exact_dtype(self.model))
        seen = SEEN.get(self.model.dtype, 1e-4)
        size = mixed[0].norm()
        for row, _, name in branches:
            once, twice = mixed[row] - mixed[0], mixed[row + 1] - mixed[0]
            if not (once + twice).isfinite().all():
                continue  # a narrow precision overflows, which a run says
            node = Node.parse(name)
            later = float(once[PLACE + 1 :].norm() / size) > seen
            linear = float((twice - 2 * once).norm()) <= 3 * seen * float(twice.norm())
            # That a key changes nothing later says little: attention may pass over a position.
            if node.branch == "q" and later:
                self.faults.append(f"{name} changes what later positions write, as no query does")
            if node.branch != "v":
                continue
            if not linear and not self.wiring.clips:
                self.faults.append(f"what comes of {name} is not linear in it, as in a value")
            # Queries and keys may have norms over all of their heads.
            if self.by_head:
                self._judge_head(once, node, name, seen * float(size))

    def _judge_head(self, change: torch.Tensor, node: Node, name: str, least: float) -> None:
        """See whether a head's value reaches the heads that share it and no others."""
        heads = self.model.heads
        share = heads.query // heads.key_value
        number = int(node.part.removeprefix("h"))
        by_head = change.unflatten(-1, (heads.query, -1)).norm(dim=(0, 2)) > least
        own = torch.arange(heads.query, device=change.device) // share == number
        if (by_head & ~own).any():
            self.faults.append(f"{name} reaches other heads than its own")
