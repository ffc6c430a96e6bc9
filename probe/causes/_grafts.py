"""Grafts: parts of one model's weights in another, and what it then does.

>>> found = graft("probe:tiny-math/sft", "probe:tiny-math/grpo", sequences, [["m3"], ["m3", "a3"]])
>>> found.loss - found.whole.loss                 # [graft, sequence]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import torch

from probe.attribution import Batching, Given, TokenSequence, as_sequences, make_batch
from probe.causes._greedy import Judge
from probe.causes._interventions import Outcomes
from probe.errors import ProbeError, check_count, not_known
from probe.models import Model, as_model, cpu_threads
from probe.solutions import generate
from probe.tracing import OUTCOMES, MemoryMode, RowOutcomes, exact_dtype, states

Instead = Literal["weights", "random", "shuffled"]
"""What is put in: the other model's weights; or, as a null, weights as far away as those in a
random direction, or the difference with its numbers in random places."""


def graft(
    model: Model | str | Path,
    other: Model | str | Path,
    sequences: Given,
    grafts: Sequence[Sequence[str]],
    *,
    instead: Instead = "weights",
    judge: Judge | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Outcomes:
    """Put parts of another model's weights into a model, once for each graft, and run it.

    Each graft is put in alone; for a cumulative one, name in each all that were before. The model
    has its own weights again afterwards, to the last bit.

    Args:
        model: The model that gets them; it runs here.
        other: The model they are from, of the same shapes.
        sequences: What to run it on, as `attribute` takes them.
        grafts: Lists of parts: `a3` an attention, `m3` an FFN, `l3` a whole layer with its norms,
            `rest` all that is in no layer, or a matrix by its own name.
        instead: The other's weights, or a null of the same size, matrix by matrix.
        judge: As in `intervene`; the model writes without a change but of its weights.
        max_new_tokens: The longest answer.
        seed: Where nulls are drawn.

    Returns:
        What the model does with each graft; `kl` is from the model as it is.

    Raises:
        ProbeError: A part that there is not, models of other shapes, weights on a server, or
            weights that are no plain numbers.
    """
    check_count("max_new_tokens", max_new_tokens)
    if instead not in get_args(Instead):
        raise ProbeError(not_known("instead", instead, get_args(Instead)))
    model, other = as_model(model), as_model(other)
    weights, theirs = _weights(model), _weights(other)
    if isinstance(grafts, str) or any(isinstance(parts, str) for parts in grafts):
        raise ProbeError("grafts are lists of parts; give [['m3'], ['a3', 'm3']]")
    named = [_names(model, weights, parts) for parts in grafts]
    for name in dict.fromkeys(name for names in named for name in names):
        if name not in theirs or theirs[name].shape != weights[name].shape:
            raise ProbeError(f"{other.reference} has no {name} of the shape in {model.reference}")
    texts = as_sequences(model, sequences)
    whole, found = _log_probabilities(model, texts), []
    right = None if judge is None else [_judged(model, texts, judge, max_new_tokens)]
    for names in named:
        with _grafted(weights, theirs, names, instead, seed):
            found.append(_log_probabilities(model, texts))
            if right is not None and judge is not None:
                right.append(_judged(model, texts, judge, max_new_tokens))
    greedy = None if right is None else torch.tensor(right)
    return _outcomes(model, texts, [whole, *found], greedy)


def _weights(model: Model) -> dict[str, torch.Tensor]:
    """All parameters of a model by their names."""
    if model.deployment is not None:
        raise ProbeError(
            f"the weights of {model.reference} are on a server; graft where it is here"
        )
    found: dict[str, torch.Tensor] = dict(model.network._module.named_parameters())
    for name, weight in found.items():
        if not weight.is_floating_point():
            raise ProbeError(f"{model.reference}: {name} is quantized ({weight.dtype})")
    return found


def _names(model: Model, weights: dict[str, torch.Tensor], parts: Sequence[str]) -> list[str]:
    """The parameters of some parts, none twice."""
    found: dict[str, None] = {}
    for part in parts:
        found |= dict.fromkeys(_of_part(model, weights, part))
    return list(found)


def _of_part(model: Model, weights: dict[str, torch.Tensor], part: str) -> list[str]:
    """The parameters of one part."""
    if part in weights:
        return [part]
    row = model.architecture
    if part == "rest":
        return [name for name in weights if not name.startswith(f"{row.layers}.")]
    kind, number = part[:1], part[1:]
    if kind in ("a", "m", "l") and number.isdecimal() and int(number) < model.n_layers:
        layer = attrgetter(row.layers)(model.network._module)[int(number)]
        blocks = model.blocks[int(number)]
        path = {"a": blocks.attention, "m": row.ffn if blocks.ffn else None, "l": ""}[kind]
        if path is not None:
            root = ".".join(filter(None, (row.layers, number, path)))
            module = layer.get_submodule(path) if path else layer
            own = [f"{root}.{name}" for name, _ in module.named_parameters()]
            return [name for name in own if name in weights]
    raise ProbeError(
        f"{model.reference} has no part {part!r}; parts are a0 to a{model.n_layers - 1}, m0, l0, "
        "rest, or a matrix by its name"
    )


@contextmanager
def _grafted(
    weights: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    names: Sequence[str],
    instead: Instead,
    seed: int,
) -> Iterator[None]:
    """Other numbers in some weights, for a while."""
    generator = torch.Generator().manual_seed(seed)
    own = {name: weights[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name in names:
                put = theirs[name].to(own[name])
                if instead != "weights":
                    put = _null(own[name], put, instead, generator)
                weights[name].copy_(put)
        yield
    finally:
        with torch.no_grad():
            for name in names:
                weights[name].copy_(own[name])


def _null(
    own: torch.Tensor, put: torch.Tensor, instead: Instead, generator: torch.Generator
) -> torch.Tensor:
    """Weights that are as far from a model's own as another's are."""
    difference = (put.double() - own.double()).flatten().cpu()
    if instead == "shuffled":
        moved = difference[torch.randperm(len(difference), generator=generator)]
    else:
        moved = torch.randn(len(difference), generator=generator, dtype=torch.float64)
        moved *= difference.norm() / moved.norm()
    return (own.double().cpu() + moved.view(own.shape)).to(own)


def _log_probabilities(model: Model, texts: Sequence[TokenSequence]) -> list[torch.Tensor]:
    """What a model thinks comes next: [answer token, vocabulary] of each text, on the CPU."""
    vocabulary = int(model.config.vocab_size)
    found = [torch.empty(0)] * len(texts)
    batching = Batching(model, model.graph("block"), "auto", recompute=False)

    def read(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        batch = make_batch([texts[index] for index in indices])
        with torch.no_grad():
            return states(model, batch, vocabulary).log_probabilities.cpu()

    for indices, logs in batching.run([text.length for text in texts], read):
        for index, part in zip(indices, logs, strict=True):
            found[index] = part[: len(texts[index].answer)].clone()
    return found


def _judged(
    model: Model, texts: Sequence[TokenSequence], judge: Judge, max_new_tokens: int
) -> list[bool]:
    """Whether each answer that a model writes is right."""
    right = [False] * len(texts)
    prompts = [list(text.prompt) for text in texts]
    with cpu_threads(model.threads):
        for answers in generate(model, prompts, [max_new_tokens] * len(texts), engine="static"):
            for place, tokens in answers:
                right[place] = judge(place, tokens)
    return right


def _outcomes(
    model: Model,
    texts: Sequence[TokenSequence],
    logs: Sequence[Sequence[torch.Tensor]],
    greedy: torch.Tensor | None,
) -> Outcomes:
    """Outcomes of log probabilities, of the model as it is first."""
    values = torch.zeros(len(OUTCOMES), len(logs), len(texts), dtype=exact_dtype(model))
    for place, text in enumerate(texts):
        rows = RowOutcomes(len(logs), exact_dtype(model))
        labels = torch.tensor(list(text.answer))[None]
        columns = torch.arange(labels.shape[1])[None]
        rows.read(torch.stack([one[place] for one in logs]), columns, labels)
        values[:, :, place] = rows.values

    def some(rows: slice, whole: Outcomes | None = None) -> Outcomes:
        of_rows = None if greedy is None else greedy[rows]
        loss, margin, kl, accuracy = values[:, rows]
        return Outcomes(loss, margin, kl, accuracy, of_rows, whole)

    return some(slice(1, None), some(slice(1)))
