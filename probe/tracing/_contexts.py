"""Every nnsight tracing context of the project.

One forward and one backward pass give all edges of a batch. Two rules keep that right:

- Each branch reads its own view of the residual stream (or of the norm's output, for query, key
  and value), so the gradient at that view is the gradient of that one branch, not of the stream
  (`_branches`).
- The body of a `with ... trace(...)` uses torch, local variables and what `SENT` names, and only
  edge scores and losses leave it: the same body can run on a server that does not have this
  package, and activations never travel. (That is why a layer's modules lie in plain namespaces.)
  It starts with `settle`, since only the server knows on which device its model is, and defines
  no function of its own: one would hold all that the body holds until Python collects garbage.

`edge_scores` is behind the gradient methods, `ablated_values` behind the exact one, `source_sums`
behind mean ablation; all are called through `probe.attribution`, which makes the batches.
`changed_outcomes`, `written_values` and `read_values` are behind the interventions of
`probe.causes`. `states` is behind `probe.attribution`. Where a model's modules are is in `_layers`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import nnsight
import torch
import torch.utils.checkpoint
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import push

from probe.models import Graph, Model
from probe.remote import Deployment
from probe.tracing._branch_checks import BranchChecks
from probe.tracing._branches import Branches
from probe.tracing._edge_changes import EdgeChanges
from probe.tracing._edge_inputs import Batch, EdgeInputs, RowBlocks, edge_inputs
from probe.tracing._edge_pass import EdgePass
from probe.tracing._edge_product import EdgeProduct
from probe.tracing._hooks import Hooks
from probe.tracing._integration import HERE, Path
from probe.tracing._layers import (
    exact_dtype,
    layers_of,
    norm_vjp_of,
    objective_of,
    readout_of,
    there,
    wiring_of,
)
from probe.tracing._norm_vjp import NormVjp
from probe.tracing._readout import Readout, bring, losses_at, settle
from probe.tracing._relp_rules import follow_rules
from probe.tracing._row_outcomes import RowOutcomes
from probe.tracing._targets import Target, loss
from probe.tracing._wiring import Readings, Writes

if TYPE_CHECKING:
    from transformers import GenerationConfig, StoppingCriteriaList

SENT = (
    *(Hooks, Writes, Branches, BranchChecks, NormVjp, EdgeProduct, EdgePass, EdgeChanges, Readout),
    *(follow_rules, loss, RowOutcomes),
)
"""What travels to a server with a trace, by its source: the modules that these are in."""

for part in SENT:
    nnsight.register(part.__module__)

LOSS = Target()
"""The paper's target."""


def send_module(name: str) -> None:
    """Let a module of the user's travel to a server by its source too."""
    nnsight.register(name)


class EdgeBatch(NamedTuple):
    """What comes out of one batch, where it was computed."""

    scores: torch.Tensor
    """[sequence, source, target], 0 where there is no edge; a row for each position of each
    sequence where that was asked for."""

    values: torch.Tensor
    """[sequence]: the target."""

    ablated_values: torch.Tensor
    """[sequence]: the target where an integral begins, or of the corrupted texts; else empty."""

    losses: torch.Tensor
    """[sequence]: mean negative log-likelihood of the scored tokens, in nats."""

    entropies: torch.Tensor
    """[sequence]: mean entropy of the next-token distribution at the scored tokens, in nats."""

    residual_error: torch.Tensor
    """[]: how far the sources' sum is from the final norm's input, relative to that, at a few
    positions of each sequence."""

    logits_error: torch.Tensor
    """[]: how far the logits that the loss is computed from are from the model's own, relative to
    those, at the last position of the longest sequence."""

    reading_errors: torch.Tensor
    """[reading, 2 + reach]: how far what branches read is from what the graph says; empty where
    nobody looked. See `_branch_checks`."""

    gradient_error: torch.Tensor
    """[]: how far the gradients of all branches are from that of the stream."""


class MemoryMode(NamedTuple):
    """What a batch does to need less memory."""

    recompute: bool = False
    """Whether a layer's activations are dropped and computed again in the backward pass. Not with
    `relp`, whose rules a second pass through a layer would not follow."""

    sources_on_host: bool = False
    """Whether the sources' outputs wait in the host's memory."""


FASTEST = MemoryMode()
"""What a batch does where memory is plenty: nothing."""


def edge_scores(
    model: Model,
    batch: Batch,
    graph: Graph,
    path: Path = HERE,
    relp: bool = False,
    baseline: torch.Tensor | None = None,
    memory: MemoryMode = FASTEST,
    target: Target = LOSS,
    check: bool = True,
    positions: bool = False,
) -> EdgeBatch:
    """Score every edge: -<G, O - B>, accumulated in float32 (float64 for a float64 model).

    L is the target, by default a sequence's mean negative log-likelihood over its scored tokens
    (paper, Eq. 13), O the output of the source, B what an ablation leaves of it; the product runs
    over all positions, prompt included, and over d_model. G stands for the gradient dL/dH at the
    input H of the target branch, before its norm:

    - by default at the input as it is (EAP, Eq. 9);
    - with a `path` its weighted sum over the inputs B + point (embedding - B);
    - with `relp` by the rules of relevance patching: a norm's denominator is held constant,
      an activation f counts as the line f(x)/x, and the gradient of a product of gate and
      input is halved.

    Args:
        model: The model.
        batch: The sequences.
        graph: The model's graph; its granularity decides which branches are apart.
        path: Points and weights of an integral; where it begins at a mean, that is B of `input`.
        relp: Whether to follow those rules.
        baseline: B of each source, [source, d_model]; zero if not given. Where the batch has
            corrupted texts it is what the source writes there, position by position.
        memory: What to do for the sake of memory.
        target: L.
        check: Whether to compare what branches read with what the graph says that they read.
        positions: Whether to leave positions apart: [sequence * position, source, target].
    """
    blocks = RowBlocks(len(path.points), batch.corrupted is not None)
    inputs = edge_inputs(batch, blocks, exact_dtype(model)).to(model.device)
    if baseline is not None:
        inputs = inputs._replace(baseline=baseline.to(model.device, model.dtype))
    asked = (path, relp, memory, target, check, positions)
    edge_pass = edge_pass_of(model, inputs, blocks, graph, *asked)
    with _recomputing(model, memory.recompute):
        return run_edge_pass(model, inputs, edge_pass)


def run_edge_pass(model: Model, inputs: EdgeInputs, edge_pass: EdgePass) -> EdgeBatch:
    """Run a pass that scores edges."""
    network = model.network
    away, exact, layers = model.deployment is not None, exact_dtype(model), layers_of(model)
    final = attrgetter(model.architecture.final_norm)(network)
    unembedding = attrgetter(model.architecture.unembedding)(network)
    final_norm, n_sequences = there(final), len(inputs.lengths)
    hooks, readout, n_silent = edge_pass.hooks, edge_pass.readout, edge_pass.readout.n_silent
    input_ids, scored, checked, kept = inputs.input_ids, inputs.scored, inputs.checked, inputs.kept
    compared, compared_row, reference = inputs.compared, inputs.compared_row, inputs.reference

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=backend
        ):
            (checked,) = settle(away, network.device, checked)
            try:
                edge_pass.watch(layers, final, final_norm)
                # Here the model runs.
                own = network.output.logits.detach()[compared_row, -1].to(exact)
                scores = edge_pass.finish(unembedding, scored, compared, reference, checked)
            finally:
                hooks.remove()
            scores = nnsight.save(bring(away, scores))
            residual_error = nnsight.save(bring(away, edge_pass.residual_error))
            error = (own - readout.compared.to(own)).norm() / own.norm()
            logits_error = nnsight.save(bring(away, error))
            reading_errors = nnsight.save(bring(away, edge_pass.reading_errors))
            gradient_error = nnsight.save(bring(away, edge_pass.gradient_error))
            # The last rows hold the inputs as they are, and the first ones where a path begins.
            values = nnsight.save(bring(away, readout.values[-n_sequences:]))
            ablated_values = nnsight.save(bring(away, readout.values[:n_silent]))
            losses = nnsight.save(bring(away, readout.losses[-n_sequences:]))
            entropies = nnsight.save(bring(away, readout.entropies[-n_sequences:]))
    return EdgeBatch(
        *(scores, values, ablated_values, losses, entropies),
        *(residual_error, logits_error, reading_errors, gradient_error),
    )


def edge_pass_of(
    model: Model,
    inputs: EdgeInputs,
    blocks: RowBlocks,
    graph: Graph,
    path: Path,
    relp: bool,
    memory: MemoryMode,
    target: Target,
    check: bool,
    positions: bool,
) -> EdgePass:
    """What a pass that scores a batch consists of; the arguments are those of `edge_scores`."""
    hooks, wiring, n_sequences = Hooks(), wiring_of(model, graph), len(inputs.lengths)
    product = EdgeProduct(
        graph.mask,
        [min(part.start for part in parts[1::2] if part) for parts in graph.layers],
        n_sequences,
        path.points,
        path.weights,
        inputs.baseline,
        lengths=inputs.lengths if path.from_mean else None,
        corrupted=blocks.corrupted,
        on_host=memory.sources_on_host,
        positions=positions,
    )
    checks = None
    if check:
        last = slice(-n_sequences, None)
        checks = BranchChecks(wiring.readings(), graph.reaches, last, inputs.checked)
    norm_vjp = norm_vjp_of(model, constant_rate=relp)
    branches = Branches(wiring, hooks, norm_vjp, product, checks)
    readout = readout_of(model, target, n_sequences, n_sequences * blocks.beside)
    return EdgePass(hooks, Writes(wiring, checks=checks), branches, product, readout, relp)


def ablated_values(
    model: Model,
    batch: Batch,
    graph: Graph,
    edges: Sequence[tuple[int, int] | None],
    baseline: torch.Tensor | None = None,
    target: Target = LOSS,
    wholes: Sequence[int] = (),
    beside: Sequence[int] = (),
    strength: float = 1.0,
) -> torch.Tensor:
    """The target with one edge of each row removed: H <- H - (O - B) at that one branch (Eq. 8).

    Args:
        model: The model.
        batch: The rows; a sequence may stand in many. Or one sequence, which then stands in all
            rows: what they have in common is computed once, as in `changed_outcomes`.
        graph: The model's graph.
        edges: For each row its edge, as indices (source, target) in the graph, or None. Of one
            sequence: None of row 0, and targets that ascend.
        baseline: B of each source, [source, d_model]; zero if not given.
        target: The target.
        wholes: For each row, which row is the same sequence with all edges.
        beside: For each row, which row is its corrupted text, whose outputs are B; empty where
            there is none.
        strength: How much of O - B is removed.

    Returns:
        [row], on the CPU, in float32 (float64 for a float64 model).
    """
    network, layers = model.network, layers_of(model)
    away, exact = model.deployment is not None, exact_dtype(model)
    final_norm = attrgetter(model.architecture.final_norm)(network)
    input_ids, labels, kept, columns = _inputs(model, batch)
    baseline = None if baseline is None else baseline.to(model.device, model.dtype)
    hooks, objective = Hooks(), objective_of(target)
    changed = torch.zeros(len(edges), *graph.mask.shape, dtype=torch.bool)
    for row, edge in enumerate(edges):
        if edge:
            changed[row, edge[0], edge[1]] = True
    wiring, shares = wiring_of(model, graph), (1 - strength, strength)
    born = _births(graph, changed) if len(batch.input_ids) == 1 else []
    changes = EdgeChanges(wiring, graph.mask, changed, *shares, baseline, beside, born)
    reference = batch.reference
    if born:
        columns, labels = (part.expand(len(edges), -1) for part in (columns, labels))
        if reference is not None:
            reference = reference.expand(len(edges), -1, -1)

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=backend
        ):
            columns, labels = settle(away, network.device, columns, labels)
            try:
                changes.watch(hooks, layers, final_norm)
                # Here the model runs.
                logits = network.output.logits
                values = objective.means(logits, columns, labels, exact, reference, wholes)
            finally:
                hooks.remove()
            values = nnsight.save(values.detach().cpu())
    return values


class ChangedBatch(NamedTuple):
    """What comes out of sequences with some edges changed, on the CPU."""

    values: torch.Tensor
    """[outcome, row], in the order of `_row_outcomes.OUTCOMES`."""

    choices: torch.Tensor
    """int64 [row, scored]: the likeliest token at each scored position."""


def changed_outcomes(
    model: Model,
    batch: Batch,
    graph: Graph,
    changed: torch.Tensor,
    kept: float = 0.0,
    given: float = 1.0,
    values: Mapping[int, torch.Tensor] | torch.Tensor | None = None,
) -> ChangedBatch:
    """Run with edges that carry kept O + given B instead of O, and see what comes of it.

    Args:
        model: The model.
        batch: The rows; or one sequence, which then stands in all rows. What they have in common
            is computed once: rows begin at the first layer where they change something.
        graph: The model's graph.
        changed: The changed edges of each row, bool [row, source, target]; none in row 0, and the
            layers of their first targets ascend where the batch is one sequence.
        kept: The share of O, what the source writes in that very row.
        given: The share of B.
        values: B of each source, [source, d_model], or by its index, [1 or row, position,
            d_model]; zero if not given.
    """
    network, layers = model.network, layers_of(model)
    away, exact = model.deployment is not None, exact_dtype(model)
    final_norm = attrgetter(model.architecture.final_norm)(network)
    input_ids, labels, kept_positions, columns = _inputs(model, batch)
    born = _births(graph, changed) if len(batch.input_ids) == 1 else []
    hooks = Hooks()
    changes = EdgeChanges(
        wiring_of(model, graph), graph.mask, changed, kept, given, values, born=born
    )
    outcomes = RowOutcomes(len(changed), exact)

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=kept_positions, backend=backend
        ):
            columns, labels = settle(away, network.device, columns, labels)
            try:
                changes.watch(hooks, layers, final_norm)
                # Here the model runs.
                outcomes.read(network.output.logits.detach(), columns, labels)
            finally:
                hooks.remove()
            found = nnsight.save(outcomes.values.cpu())
            choices = nnsight.save(outcomes.choices.cpu())
    return ChangedBatch(found, choices)


def _births(graph: Graph, changed: torch.Tensor) -> list[int]:
    """How many rows there are from each layer on, and from the final norm on.

    The last layers' rows and those that change nothing are there at the final norm.
    """
    first = graph.first_layers(changed)
    first[0] = 0
    return [int((first <= number).sum()) for number in range(graph.n_layers + 1)]


def written_values(
    model: Model,
    batch: Batch,
    graph: Graph,
    wanted: Sequence[int],
    read: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """What some sources write: [sequence, position, d_model] of each by its index.

    Here and in `read_values` activations leave a trace: they are on their way into another.

    Args:
        model: The model.
        batch: What it is fed.
        graph: Its graph.
        wanted: The sources.
        read: What every block reads instead of the stream, as `read_values` gives it.
    """
    writes = Writes(wiring_of(model, graph), wanted=set(wanted))
    values = _written(model, batch, writes, Readings(read) if read is not None else None)
    return dict(zip(sorted(set(wanted)), values, strict=True))


def read_values(model: Model, batch: Batch) -> torch.Tensor:
    """What every block reads of the residual stream: [block, sequence, position, d_model]."""
    return _written(model, batch, Readings())


def temperature_losses(model: Model, batch: Batch, temperatures: torch.Tensor) -> torch.Tensor:
    """Mean losses of the scored tokens with logits divided by each of some temperatures.

    Returns:
        float64 [temperature, sequence], on the CPU, in nats.
    """
    network, away = model.network, model.deployment is not None
    input_ids, labels, kept, columns = _inputs(model, batch)

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=backend
        ):
            columns, labels = settle(away, network.device, columns, labels)
            losses = losses_at(network.output.logits.detach(), columns, labels, temperatures)
            losses = nnsight.save(losses.cpu())
    return losses


def source_sums(model: Model, batch: Batch, graph: Graph) -> torch.Tensor:
    """Sum of each source's output over all positions that are no filling: [source, d_model]."""
    valid = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]  # [sequence, position]
    writes = Writes(wiring_of(model, graph), summed=valid.to(model.device))
    return _written(model, batch, writes).cpu()


def _written(
    model: Model, batch: Batch, kept: Writes | Readings, given: Readings | None = None
) -> torch.Tensor:
    """What `kept` keeps, in the order of its places: [place, ...]."""
    network, layers = model.network, layers_of(model)
    away = model.deployment is not None
    input_ids = batch.input_ids.to(model.device)
    hooks = Hooks()
    found: dict[int, torch.Tensor] = {}

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(input_ids=input_ids, use_cache=False, logits_to_keep=1, backend=backend):
            settle(away, network.device)
            try:
                kept.hang(hooks, layers, found.__setitem__)
                if given is not None:
                    given.hang(hooks, layers, found.__setitem__)
                # Here the model runs.
                network.output.logits  # noqa: B018 - waits for it
            finally:
                hooks.remove()
            one = found[min(found)].device  # layers may be on several
            parts = [bring(away, found[source].to(one)) for source in sorted(found)]
            values = nnsight.save(torch.stack(parts))
    return values


class States(NamedTuple):
    """What a model holds where it predicts each scored token, on its device."""

    residuals: torch.Tensor
    """[point, sequence, scored, d_model]: the residual stream before each layer, and at the end."""

    log_probabilities: torch.Tensor
    """[sequence, scored, token]: of the tokens that could come next, in nats."""


def states(model: Model, batch: Batch, vocabulary: int) -> States:
    """Read the residual stream and the next token's probabilities at the scored positions.

    Args:
        model: The model.
        batch: The sequences.
        vocabulary: The probabilities are those among the first so many tokens.
    """
    network = model.network
    layers = layers_of(model)
    final_norm = attrgetter(model.architecture.final_norm)(network)
    input_ids, _, kept, columns = _inputs(model, batch)
    places = batch.positions.to(model.device)[..., None].expand(-1, -1, model.d_model)
    exact = exact_dtype(model)

    with network.trace(input_ids=input_ids, use_cache=False, logits_to_keep=kept):
        points = [layer.module.input.gather(1, places) for layer in layers]
        points.append(final_norm.input.gather(1, places))
        residuals = nnsight.save(torch.stack(points).to(exact))
        logits = network.output.logits[..., :vocabulary]
        scored = logits.gather(1, columns[..., None].expand(-1, -1, vocabulary))
        log_probabilities = nnsight.save(scored.to(exact).log_softmax(-1))
    return States(residuals, log_probabilities)


def describe(model: Model) -> torch.Tensor:
    """An empty tensor as deep and wide as the model is where it runs, and of its precision.

    Returns:
        [layer, d_model, 0]
    """
    network, layers = model.network, layers_of(model)
    token = torch.zeros(1, 1, dtype=torch.int64)

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.trace(input_ids=token, use_cache=False, backend=backend):
            config = network._module.config.get_text_config(decoder=True)
            shape = (config.num_hidden_layers, config.hidden_size, 0)
            found = nnsight.save(layers[0].module.input.new_zeros(shape).cpu())
    return found


def generate_tokens(
    model: Model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: "GenerationConfig",
    stopping: "StoppingCriteriaList",
    beside: Mapping[str, object] = MappingProxyType({}),
) -> torch.Tensor:
    """Prompts with what the model generates after them: int64 [sequence, position].

    What is given beside the options counts before them, None too.
    """
    network, away = model.network, model.deployment is not None

    with _turn(model) as backend:  # noqa: SIM117 - a trace needs its own statement
        with network.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=options,
            stopping_criteria=stopping,
            backend=backend,
            **beside,
        ) as tracer:
            settle(away, network.device)
            tokens = nnsight.save(tracer.result.cpu())
    return tokens


class _Job(Backend):
    """Runs one trace on a server."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.waits = False

    def __call__(self, tracer: Tracer) -> None:
        """Send the trace, wait, and put what it saved where a local trace would."""
        # nnsight's own backend would send modules of the working tree along: what runs from a
        # checkout would then fail once installed.
        blob = RequestModel.serialize(tracer, compress=True)
        self.deployment.host.preparing.release()
        self.waits = True
        saved = self.deployment.host.run(self.deployment.key, self.deployment.env, blob)
        assert tracer.info is not None
        push(tracer.info.frame, saved)


@contextmanager
def _turn(model: Model) -> Iterator[_Job | None]:
    """What runs the next trace of a model: None for nnsight's choice, which is here.

    Jobs are put together one at a time, and wait for the server at once. nnsight parses sources for
    each, and before Python 3.13 `ast.parse` in two threads fails now and then ("AST constructor
    recursion depth mismatch").
    """
    if model.deployment is None:
        yield None
        return
    job = _Job(model.deployment)
    model.deployment.host.preparing.acquire()
    try:
        yield job
    finally:
        if not job.waits:  # it was not sent
            model.deployment.host.preparing.release()


def _inputs(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """A batch as a model takes it: tokens, labels, how many last positions, which of these."""
    # A number and not the positions: a model on several devices may need those on any of them.
    first = int(batch.positions.min())
    tokens, labels, columns = (
        tensor.to(model.device) for tensor in (batch.input_ids, batch.labels, batch.positions)
    )
    return tokens, labels, batch.input_ids.shape[1] - first, columns - first


@contextmanager
def _recomputing(model: Model, wanted: bool) -> Iterator[None]:
    """Let decoder layers drop their activations and compute them again, for a while."""
    layers = attrgetter(model.architecture.layers)(model.network._module) if wanted else ()
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for layer in layers:
        # Only the layer itself is in training mode, which is its switch: no dropout comes on.
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = again
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
