"""Interventions: run a model with some edges removed, kept, scaled or carried over.

>>> found = intervene(model, sequences, [[("m3", "logits")], []], do="remove")
>>> found.loss - found.whole.loss                 # [set, sequence]
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from probe.attribution import Batching, BatchSize, Given, TokenSequence, make_batch
from probe.causes._edge_sets import Sets
from probe.causes._greedy import Judge, answers_of
from probe.causes._plans import Changes, Do, Leaves, Plan, prepare
from probe.errors import ProbeError, check_count
from probe.models import Model, as_model
from probe.tracing import OUTCOMES, MemoryMode, exact_dtype
from probe.vocabulary import Granularity


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a model does, each a mean over the answer's tokens, for each set and sequence."""

    loss: torch.Tensor
    """[set, sequence]: negative log-likelihood of the answer's token, in nats."""

    margin: torch.Tensor
    """[set, sequence]: its logit less the largest of another token."""

    kl: torch.Tensor
    """[set, sequence]: KL(model as it is || model with changed edges), in nats."""

    accuracy: torch.Tensor
    """[set, sequence]: the share of answer tokens that are the likeliest, given those before."""

    greedy: torch.Tensor | None
    """bool [set, sequence]: whether the answer that the model then writes is right; None where
    nobody judged."""

    whole: "Outcomes | None" = None
    """The same of the model as it is, [1, sequence]; None in itself."""


def intervene(
    model: Model | str | Path,
    sequences: Given,
    sets: Sets,
    do: Do = "remove",
    *,
    granularity: Granularity = "qkv",
    ablation: Leaves = "zero",
    factor: float | None = None,
    other: Model | str | Path | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Run a model with some edges changed, once for each set of edges and each sequence.

    An edge is changed at the one branch that reads it: H <- H - (O - B), where O is what its
    source writes in that very run. A set is changed as a whole, so what one edge changes
    downstream is in the O of the next. What all sets leave as it is is computed once: a set costs
    the layers from its first target on.

    Args:
        model: A model from `load_model`, or its reference.
        sequences: What to run it on, as `attribute` takes them.
        sets: Sets of edges, each a list of pairs (source, target), by name or place, or a matrix
            bool [source, target]; an empty set is one too.
        do: `remove` the edges of a set; `keep` them, and remove all others; `scale` them by a
            factor; `patch` in what the other model's source writes on the same tokens; `swap` the
            source for the other model's, which then reads what this model's stream holds, so that
            nothing comes through from further up; `add` the
            other model's value less this one's, both of the models as they are, times a factor.
        granularity: That of the edges.
        ablation: B, what is left of a removed output: `zero`; its `mean` over all positions of
            these sequences; or `resample`, what the source writes at the same position of another
            of these sequences, or at its last one where that is shorter.
        factor: What O is multiplied by, 1 - factor of B taking the place of the rest; for `add`
            what the difference is multiplied by, 1 if not given.
        other: The other model of the pair, for `patch`, `swap` and `add`.
        judge: Says whether an answer is right that the model writes greedily while its edges are
            changed: `judge(place of the sequence, its tokens)`. None for no writing.
        max_new_tokens: The longest answer.
        seed: Which sequence stands for which, for `resample`.
        batch_size: How many sets run at once, or `auto`.
        progress: Called with how many rows, a set on a sequence each, have come.

    Raises:
        ProbeError: As `attribute`; sets that are none of the graph; another model that has another
            graph; a result that is not finite.
    """
    check_count("max_new_tokens", max_new_tokens)
    model = as_model(model)
    plan = Plan.of(do, factor, ablation, None if other is None else as_model(other))
    changes, changed, texts = prepare(model, plan, sequences, sets, granularity, seed, batch_size)
    found = torch.zeros(len(OUTCOMES), 1 + len(changed), len(texts), dtype=exact_dtype(model))
    for place, text in enumerate(texts):
        found[:, :, place] = outcomes_of(changes, changed, place, text, batch_size, progress)
    if not found.isfinite().all():
        place = int((~found.isfinite()).any(0).any(0).nonzero()[0])
        raise ProbeError(f"sequence {texts[place].id}: an outcome is NaN or infinite")
    greedy = None
    if judge is not None:
        rows = torch.cat([torch.zeros_like(changed[:1]), changed])
        answers = answers_of(changes, rows, texts, max_new_tokens)
        right = [[judge(place, one) for place, one in enumerate(row)] for row in answers]
        greedy = torch.tensor(right)
    whole = _named(found[:, :1], None if greedy is None else greedy[:1])
    return _named(found[:, 1:], None if greedy is None else greedy[1:], whole)


def _named(
    values: torch.Tensor, greedy: torch.Tensor | None, whole: Outcomes | None = None
) -> Outcomes:
    """Outcomes of values [outcome, set, sequence]."""
    loss, margin, kl, accuracy = values
    return Outcomes(loss, margin, kl, accuracy, greedy, whole)


def outcomes_of(
    changes: Changes,
    changed: torch.Tensor,
    place: int,
    text: TokenSequence,
    batch_size: BatchSize,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """All sets on one sequence, and the model as it is before them: [outcome, 1 + set]."""
    model, batch = changes.model, make_batch([text])
    values = changes.values(place, batch)
    # By the first layers that see a change; sets that change nothing come last.
    order = changes.graph.first_layers(changed).argsort(stable=True).tolist()
    found = torch.zeros(len(OUTCOMES), 1 + len(changed), dtype=exact_dtype(model))
    batching = Batching(model, changes.graph, batch_size, recompute=False)

    def run(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        some = changed[[order[index] for index in sorted(indices)]]
        rows = torch.cat([torch.zeros_like(some[:1]), some])
        return changes.run(batch, rows, values).values

    for indices, part in batching.run([text.length] * len(order), run):
        found[:, [1 + order[index] for index in sorted(indices)]] = part[:, 1:]
        found[:, 0] = part[:, 0]
        if progress:
            progress(len(indices))
    return found
