"""Whether a model is understood: the command that one runs on a new one.

Everything that a run compares in its first batch is compared at each granularity, edges are held
against finite differences, and methods are tried. A model whose weights are not here is built from
its config at reduced size. If its architecture has no row, those of the table are tried.

    >>> found = check("probe:tiny-math/sft")
    >>> found.sound, found.granularities["qkv"].refusal
    (True, None)
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter

import torch

from probe.attribution._edges import EdgeScores
from probe.attribution._methods import METHODS, make_batch
from probe.attribution._scoring import attribute
from probe.attribution._sequences import TokenSequence
from probe.checkpoints import fetch_checkpoint, find_checkpoint, weight_files
from probe.errors import ProbeError
from probe.models import (
    ARCHITECTURES,
    GUIDE,
    INSIDE,
    REFUSED,
    Architecture,
    Graph,
    Model,
    architecture_of,
    has,
    load_model,
    read_config,
    reduced_model,
)
from probe.tracing import ablated_values
from probe.vocabulary import Granularity

GRANULARITIES: tuple[Granularity, ...] = ("qkv", "block", "head", "expert")
EDGES = 12
"""Edges of each granularity that are held against finite differences."""

EXACT_UP_TO = 200_000_000
"""Models of so many numbers are checked in float64, larger ones in float32."""

LARGEST_GAP = {torch.float64: 1e-3, torch.float32: 2e-2}
"""How far a finite difference may be from the largest score; its own error is of that order."""


@dataclass(frozen=True)
class GranularityCheck:
    """How a model does at one granularity."""

    refusal: str | None
    """Why it cannot be; None where it can."""

    shape: tuple[int, int] = (0, 0)
    """Sources and targets."""

    residual_error: float = 0.0
    """How far the sources' sum is from the residual stream, relative to that."""

    gap: float = 0.0
    """How far edges are from finite differences, relative to the largest score."""


@dataclass(frozen=True, repr=False)
class ModelCheck:
    """What of a model is understood."""

    reference: str
    """What was checked."""

    model: str
    """What it is, in words."""

    row: str
    """Its row of the architecture table, or how to write one."""

    granularities: dict[str, GranularityCheck]
    """What comes of each."""

    methods: dict[str, str | None]
    """Each method, and why it cannot be used; None where it can."""

    @property
    def sound(self) -> bool:
        """Whether it can be attributed at all."""
        return any(found.refusal is None for found in self.granularities.values())

    def __repr__(self) -> str:
        """Say it as `probe check` does."""
        return "\n".join(check_lines(self))


def check(reference: str) -> ModelCheck:
    """Check that a model is understood.

    Args:
        reference: A folder, a hub id, or the `probe:` name of a model that ships with the package.
            Without weights its config is enough, and weights are random.

    Raises:
        ProbeError: It cannot be read.
    """
    config = read_config(reference)
    kind = INSIDE.get(config.model_type, config.model_type)
    known = architecture_of(kind) if kind in {*ARCHITECTURES, *REFUSED} else None
    model, how = _loaded(reference, known or Architecture())
    sequences = _sequences(model)
    row = f"{config.model_type}, in the table"
    if known is None:
        found = _row_that_fits(model, sequences)
        row = f"none for {config.model_type}. {_template(model, found)}"
        if found is None:
            return ModelCheck(reference, _described(model, how), row, {}, {})
        model = replace(model, architecture=ARCHITECTURES[found])
    granularities: dict[str, GranularityCheck] = {
        name: _granularity(model, sequences, name) for name in GRANULARITIES
    }
    finest = next((name for name in GRANULARITIES if not granularities[name].refusal), None)
    methods = {} if finest is None else _methods(model, sequences, finest)
    return ModelCheck(reference, _described(model, how), row, granularities, methods)


def check_lines(found: ModelCheck) -> list[str]:
    """Lay out what was found, a line for each part."""
    lines = [found.reference, f"  {'model:':10}{found.model}", f"  {'row:':10}{found.row}"]
    for name, part in found.granularities.items():
        if part.refusal:
            text = f"refused: {part.refusal.removeprefix(f'{found.reference}: ')}"
        else:
            text = (
                f"all checks pass; {part.shape[0]} sources, {part.shape[1]} targets; sum within "
                f"{part.residual_error:.0e}; edges within {part.gap:.0e} of finite differences"
            )
        lines.append(f"  {name + ':':10}{text}")
    good = [name for name, refusal in found.methods.items() if refusal is None]
    if found.methods:
        lines.append(f"  {'methods:':10}{', '.join(good)}")
    lines += [f"  {'':10}{refusal}" for refusal in found.methods.values() if refusal]
    lines.append("It can be attributed." if found.sound else "It cannot be attributed.")
    return lines


def _loaded(reference: str, row: Architecture) -> tuple[Model, str]:
    """A model, and with which weights; reduced and random where it has none here."""
    here = find_checkpoint(reference)
    if here is not None and not weight_files(reference):
        config = read_config(reference)
        return reduced_model(reference, config, row), "reduced, with random weights"
    fetch_checkpoint(reference)
    size = sum(path.stat().st_size for path in weight_files(reference))
    dtype = "float64" if size <= 2 * EXACT_UP_TO else "float32"
    return load_model(reference, dtype=dtype, architecture=row), "with its own weights"


def _described(model: Model, how: str) -> str:
    precision = str(model.dtype).removeprefix("torch.")
    return (
        f"{model.config.model_type}, {model.n_layers} layers, width {model.d_model}, {how}, "
        f"in {precision}"
    )


def _sequences(model: Model) -> list[TokenSequence]:
    """Two short sequences of tokens that it knows."""
    generator = torch.Generator().manual_seed(0)
    most = int(model.config.vocab_size)
    tokens = torch.randint(min(3, most - 1), most, (16,), generator=generator).tolist()
    return [TokenSequence(tokens[:6], tokens[6:10]), TokenSequence(tokens[10:13], tokens[13:])]


def _granularity(
    model: Model, sequences: Sequence[TokenSequence], granularity: Granularity
) -> GranularityCheck:
    """Check a model at one granularity."""
    try:
        graph = model.graph(granularity)
        edges = attribute(model, sequences, granularity=granularity)
    except ProbeError as error:
        return GranularityCheck(str(error))
    gap = _gap(model, sequences[0], graph, edges)
    refusal = None
    if not gap <= LARGEST_GAP.get(model.dtype, 1.0):
        refusal = f"edges are {gap:.1e} of the largest score from finite differences"
    n_sources, n_targets = graph.mask.shape
    return GranularityCheck(refusal, (n_sources, n_targets), edges.residual_error, gap)


def _gap(model: Model, sequence: TokenSequence, graph: Graph, edges: EdgeScores) -> float:
    """How far random edges are from what the loss does when a little of a source is removed.

    The derivative is extrapolated from two symmetric steps, so its error is of their fourth power.
    Of several steps the best counts for each edge: a long one may change the choice of experts, and
    a short one drowns in rounding, which is that of float32 where a model adds up experts in it.
    """
    every = graph.mask.nonzero()
    generator = torch.Generator().manual_seed(0)
    chosen = every[torch.randperm(len(every), generator=generator)[:EDGES]].tolist()
    batch = make_batch([sequence] * len(chosen))
    steps = (1e-2, 3e-3, 1e-3, 1e-4) if model.dtype == torch.float64 else (5e-2, 1e-2)

    def values(strength: float) -> torch.Tensor:
        removed = [(source, target) for source, target in chosen]
        return ablated_values(model, batch, graph, removed, strength=strength).double()

    def slopes(step: float) -> torch.Tensor:
        one, two = ((values(h) - values(-h)) / (2 * h) for h in (step, 2 * step))
        return (4 * one - two) / 3

    scores = torch.stack([edges.scores[0, source, target].double() for source, target in chosen])
    gaps = torch.stack([(slopes(step) - scores).abs() for step in steps]).amin(0)
    return float(gaps.max() / edges.scores[0].abs().max())


def _methods(
    model: Model, sequences: Sequence[TokenSequence], granularity: Granularity
) -> dict[str, str | None]:
    """Try every method; one that has to compute a block anew must come to the same loss."""
    plain = attribute(model, sequences, granularity=granularity).losses
    found: dict[str, str | None] = {}
    for name, way in METHODS.items():
        found[name] = None
        if way.passes is None:  # it removes edges, as the finite differences do
            continue
        try:
            with warnings.catch_warnings():  # that an integral of two points misses much
                warnings.simplefilter("ignore", UserWarning)
                losses = attribute(model, sequences, name, granularity, ig_steps=2).losses
        except ProbeError as error:
            found[name] = str(error)
        else:
            if not torch.allclose(losses, plain, rtol=1e-3, atol=1e-4):
                found[name] = f"{name} changes the loss: its rules do not fit these blocks"
    return found


def _row_that_fits(model: Model, sequences: Sequence[TokenSequence]) -> str | None:
    """The name of a row of the table that passes every check on this model."""
    tried: list[Architecture] = []
    for name, row in ARCHITECTURES.items():
        if row in tried or not _could_fit(model, row):
            continue
        tried.append(row)
        for granularity in ("qkv", "block"):
            try:
                there = replace(model, architecture=row)
                attribute(there, sequences, granularity=granularity)
            except (ProbeError, AttributeError, RuntimeError, TypeError, IndexError, KeyError):
                continue  # this row is not the one
            return name
    return None


def _could_fit(model: Model, row: Architecture) -> bool:
    """Whether a model has what a row names, where it can be told without a run."""
    module = model.network._module
    keys = (row.logits_divisor, row.logits_multiplier, row.residual_scale, row.single_block)
    if any(key and not hasattr(model.config, key) for key in keys):
        return False
    if not (has(module, row.layers) and has(module, row.final_norm)):
        return False
    layer = attrgetter(row.layers)(module)[0]
    paths = [row.ffn, row.ffn_output, *filter(None, (row.attention_norm,))]
    return all(has(layer, path) for path in paths)


def _template(model: Model, found: str | None) -> str:
    """How a row is written, or of which modules to write it."""
    kind = model.config.model_type
    if found is not None:
        row = ARCHITECTURES[found]
        said = ", ".join(
            f"{field.name}={getattr(row, field.name)!r}"
            for field in fields(row)
            if getattr(row, field.name) != field.default
        )
        return (
            f"The row of {found} passes every check; put it into a module of yours: "
            f'probe.ARCHITECTURES.register("{kind}", probe.Architecture({said}))'
        )
    places = "; ".join(_layer_paths(model))
    return f"None of the table fits ({places}); {GUIDE} shows how to write one"


def _layer_paths(model: Model) -> Iterator[str]:
    """Where the decoder layers are, and what is in one."""
    module = model.network._module
    lists = {
        name: part for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList)
    }
    if not lists:
        yield "it has no list of layers"
        return
    name = max(lists, key=lambda key: len(lists[key]))
    yield f"layers={name!r}"
    inside = (path for path, _ in lists[name][0].named_modules() if path and path.count(".") < 2)
    yield f"a layer has {', '.join(inside)}"
