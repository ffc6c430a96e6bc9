"""Whether a row of the architecture table describes the model that it was used for.

A wrong row gives scores that look like any others, so what comes with a batch is compared with
what the model itself did: the sources' sum, the logits, and, in the first batch, what every branch
reads (`probe.tracing`). Before what scores nothing, as removing edges does, a few tokens are.

    >>> check_row(model, graph, batch)           # raises, or all is well
"""

from collections.abc import Iterator, Sequence

import torch

from probe.attribution._methods import make_batch
from probe.attribution._sequences import TokenSequence
from probe.errors import ProbeError
from probe.models import GUIDE, Graph, Model, Node, cpu_threads
from probe.tracing import EdgeBatch, edge_scores, role_faults

# A relative distance from what the model itself computes that is no rounding any more.
_LARGEST = {torch.bfloat16: 3e-2, torch.float16: 3e-2}
# Gradients of many branches, each rounded, are added up in the model's precision.
_LARGEST_OF_GRADIENTS = {torch.bfloat16: 0.1, torch.float16: 0.1}
_LARGEST_ELSE = 1e-3

TOKENS = 16
"""So many are fed where a row is checked before anything else runs."""

CLEARLY = 0.5
"""Where another sum is nearer to what a branch reads than this share, it is that one."""


def check_row(model: Model, graph: Graph, batch: EdgeBatch) -> None:
    """Refuse a model whose row of the architecture table does not describe it.

    Raises:
        ProbeError: It does not; the message says which branch reads what.
    """
    largest = _LARGEST.get(model.dtype, _LARGEST_ELSE)
    most = _LARGEST_OF_GRADIENTS.get(model.dtype, _LARGEST_ELSE)
    errors = batch.reading_errors.cpu()
    for fault, error, limit in (
        *_mixture_faults(errors, largest),
        *_sum_faults(batch, largest),
        *_reading_faults(graph, errors, largest),
        (
            "something beside the branches that the row names reads the residual stream: their "
            "gradients are not all of its gradient",
            float(batch.gradient_error),
            most,
        ),
    ):
        if not error <= limit:
            raise ProbeError(
                f"{model.reference}: {fault} (relative error {error:.1e}; rounding is at most "
                f"{limit:g}): the row {model.config.model_type!r} of the architecture table is "
                f"wrong for this checkpoint; see {GUIDE}"
            )
    if errors.numel():
        model.readings_known.add(graph.granularity)


def check_before(model: Model, graph: Graph, sequences: Sequence[TokenSequence]) -> None:
    """Check a row before something runs that compares nothing itself, if nobody has yet.

    A few tokens of the first sequence are scored; what is not finite there is told by what runs.

    Raises:
        ProbeError: The row does not describe the model.
    """
    check_roles(model, graph)
    if graph.granularity in model.readings_known or not sequences:
        return
    tokens = [*sequences[0].prompt, *sequences[0].answer][: TOKENS + 1]
    few = make_batch([TokenSequence(tokens[:-1], tokens[-1:])])
    with cpu_threads(model.threads):
        batch = edge_scores(model, few, graph)
    if bool(batch.losses.isfinite().all()) and bool(batch.scores.isfinite().all()):
        check_row(model, graph, batch)


def check_roles(model: Model, graph: Graph) -> None:
    """Refuse a row that takes a query, a key, a value or a head for another.

    Raises:
        ProbeError: It does.
    """
    if graph.attention in model.roles_known:
        return
    faults = role_faults(model, graph)
    if faults:
        raise ProbeError(
            f"{model.reference}: {faults[0]}: the row {model.config.model_type!r} of the "
            f"architecture table says wrong where query, key and value lie; see {GUIDE}"
        )
    model.roles_known.add(graph.attention)


def _sum_faults(batch: EdgeBatch, largest: float) -> Iterator[tuple[str, float, float]]:
    """What every batch is asked: what it would be called, the error, and the largest allowed."""
    error = float(batch.residual_error)
    yield "the sources do not sum to the residual stream", error, largest
    yield "the logits are not the model's own", float(batch.logits_error), largest


def _mixture_faults(errors: torch.Tensor, largest: float) -> Iterator[tuple[str, float, float]]:
    """The same of mixtures whose experts are apart; `errors` as in `EdgeBatch`."""
    if errors.numel():
        experts, beside, *_ = errors[-1].tolist()
        yield "a mixture's experts do not sum to what it makes of them", experts, largest
        yield (
            "a mixture adds something else to its experts than the row's shared expert",
            beside,
            largest,
        )


def _reading_faults(
    graph: Graph, errors: torch.Tensor, largest: float
) -> Iterator[tuple[str, float, float]]:
    """The same of what branches read; `errors` as in `EdgeBatch`."""
    if not errors.numel():
        return
    reach_of = dict(zip(graph.targets, graph.mask.sum(0).tolist(), strict=True))
    reaches = graph.reaches
    behind = [Node.parse(graph.sources[end - 1]).block for end in reaches]
    readers: dict[str, int] = {}
    for target, reach in reach_of.items():
        readers.setdefault(Node.parse(target).block, reach)
    for (reader, reach), (given, formula, *sums) in zip(
        readers.items(), errors.tolist()[:-2], strict=True
    ):
        said = sums[reaches.index(reach)]
        best = min(range(len(sums)), key=sums.__getitem__)
        # However small what is left out may be, a sum that fits far better is what it reads.
        wrong = not said <= largest or sums[best] < CLEARLY * said
        if said == torch.inf:
            yield f"nothing was seen to read where the row says that {reader} reads", said, 0.0
        elif wrong and sums[best] <= largest:
            yield (
                f"{reader} reads what is in the residual stream behind "
                f"{behind[best]}, and not, as the row says, behind {behind[reaches.index(reach)]}",
                said,
                min(largest, sums[best]),
            )
        yield f"what {reader} reads is no sum of sources before it", said, largest
        yield f"the norm of {reader} computes another formula than the row says", formula, largest
        yield (
            f"{reader}, or a projection in it, is given something else than what the norm gives "
            "that the row names for it",
            given,
            largest,
        )
    given, formula, *_ = errors.tolist()[-2]
    yield "keys and values are not made of the vector that the row says", given, largest
    yield (
        "a norm inside or behind a block computes another formula than the row says",
        formula,
        largest,
    )
