"""Every nnsight tracing context of the project.

One forward and one backward pass give all edges of a batch. Two rules keep that right:

- Each branch reads its own view of the residual stream (or of the norm's output, for query, key
  and value), so the gradient at that view is the gradient of that one branch, not of the stream
  (`probe.branches`).
- The body of a `with ... trace(...)` uses torch and local variables only, and only edge scores
  and losses leave it: the same body can run on a server that does not have this package, and
  activations never travel. (That is why heads and a layer's modules lie in plain namespaces.) It
  starts with `settle`, since only the server knows on which device its model is, and defines no
  function of its own: one would hold all that the body holds until Python collects garbage.

`edge_scores` is behind the gradient methods, `ablated_losses` behind the exact one, `source_sums`
behind mean ablation; all are called through `probe.attribution`, which makes the batches. `states`
is behind `probe.states`. What the bodies call is in `probe.branches`,
`probe.edge_product` and `probe.trace_functions`, and where a model's modules are in
`probe.layers`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import nnsight
import torch
import torch.utils.checkpoint
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import push

from probe.branches import watchers
from probe.edge_product import edge_product
from probe.graph import Graph
from probe.layers import branch_columns_of, heads_of, layers_of, output_scale, there
from probe.models import Model
from probe.remote import Deployment
from probe.trace_functions import logits_scoring, trace_functions

if TYPE_CHECKING:
    from transformers import GenerationConfig, StoppingCriteriaList

# At so many positions of each sequence the sources' sum is compared with the residual stream.
CHECKED_POSITIONS = 16


class Batch(NamedTuple):
    """Sequences that run together, filled up on the right.

    No attention mask goes with them: attention is causal, so what is scored never sees the
    filling behind it.
    """

    input_ids: torch.Tensor
    """int64 [sequence, position]: prompt and answer, without the answer's last token."""

    lengths: torch.Tensor
    """int64 [sequence]: how many positions are no filling."""

    positions: torch.Tensor
    """int64 [sequence, scored]: where each scored token is predicted."""

    labels: torch.Tensor
    """int64 [sequence, scored]: the answer tokens, -100 past an answer's end."""


class EdgeBatch(NamedTuple):
    """What comes out of one batch, where it was computed."""

    scores: torch.Tensor
    """[sequence, source, target], 0 where there is no edge."""

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


class Thrift(NamedTuple):
    """What a batch does to need less memory."""

    recompute: bool = False
    """Whether a layer's activations are dropped and computed again in the backward pass. Not with
    `relevance`, whose rules a second pass through a layer would not follow."""

    sources_on_host: bool = False
    """Whether the sources' outputs wait in the host's memory."""


PLENTY = Thrift()
"""What a batch does where memory is plenty: nothing."""


def edge_scores(
    model: Model,
    batch: Batch,
    graph: Graph,
    steps: int = 1,
    relevance: bool = False,
    means: torch.Tensor | None = None,
    thrift: Thrift = PLENTY,
) -> EdgeBatch:
    """Score every edge: -<G, O - B>, accumulated in float32 (float64 for a float64 model).

    L is a sequence's mean negative log-likelihood over its scored tokens (paper, Eq. 13), O the
    output of the source, B what an ablation leaves of it; the product runs over all positions,
    prompt included, and over d_model. G stands for the gradient dL/dH at the input H of the
    target branch, before its norm:

    - by default at the input as it is (EAP, Eq. 9);
    - with `steps` > 1 averaged over the inputs B + k/steps (embedding - B), k = 1 ... steps;
    - with `relevance` by the rules of relevance patching: a norm's denominator is held constant,
      an activation f counts as the line f(x)/x, and the gradient of a product of gate and
      input is halved.

    Outputs are kept from the forward pass. A gradient is kept only until the few layers around it
    have theirs, and is then multiplied with all outputs at once: one thin matrix product for many
    edges, and no gradient waits for the end.

    Args:
        model: The model.
        batch: The sequences.
        graph: The model's graph; its granularity decides which branches are apart.
        steps: Points of the integral.
        relevance: Whether to follow those rules.
        means: B of each source, [source, d_model]; zero if not given.
        thrift: What to do for the sake of memory.
    """
    network = model.network
    layers = layers_of(model)
    final = attrgetter(model.architecture.final_norm)(network)
    final_norm = there(final)
    exact = torch.promote_types(model.dtype, torch.float32)
    # What is copied without waiting lets one batch begin while the one before is computed.
    input_ids = batch.input_ids.repeat(steps, 1).to(model.device, non_blocking=True)
    scored = _scored(batch, steps, exact)
    placed = [part.to(model.device, non_blocking=True) for part in scored]
    # The model itself gives logits at the last position, where the longest sequence is scored.
    compared = int((scored.positions == batch.input_ids.shape[1] - 1).nonzero()[0])
    compared_row = int(scored.rows[compared])
    n_sequences = len(batch.input_ids)
    checked = torch.linspace(0, 1, CHECKED_POSITIONS)[None] * (batch.lengths[:, None] - 1)
    checked = checked.long().to(model.device, non_blocking=True)
    left = None if means is None else means.to(model.device, model.dtype)
    settle, bring, _, _ = trace_functions(model, exact)
    score_logits = logits_scoring(model, exact)
    open_product, write, receive, receive_part, join_parts, check_sum, close_product = edge_product(
        graph, len(layers), n_sequences, steps, left, thrift.sources_on_host
    )
    watch, watch_ends, release = watchers(
        model, graph, relevance, write, receive, receive_part, join_parts
    )

    with _recomputing(model, thrift.recompute):  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=1, backend=_backend(model)
        ):
            (checked,) = settle(network.device, checked)
            try:
                found = watch_ends(layers[0].module, open_product, final, final_norm)
                for number, layer in enumerate(layers):
                    watch(number, layer)
                # Here the model runs.
                own = network.output.logits.detach()[compared_row, -1].to(exact)
                residual_error = check_sum(found.pop("end").detach(), checked)
                hidden = found.pop("hidden")
                placed = settle(hidden.device, *placed)
                weight = network.lm_head.weight.detach()
                losses, entropies, ours, slopes = score_logits(
                    hidden.detach(), placed, network.lm_head, weight, compared
                )
                # From here on nobody needs the hidden states themselves.
                edge = torch.autograd.graph.get_gradient_edge(hidden)
                del hidden
                torch.autograd.grad([edge], found["stream"], slopes)
                scores = close_product()
            finally:
                release()
            scores = nnsight.save(bring(scores))
            residual_error = nnsight.save(bring(residual_error))
            error = (own - ours.to(own)).norm() / own.norm()
            logits_error = nnsight.save(bring(error))
            # The last rows hold the inputs as they are.
            losses = nnsight.save(bring(losses[-n_sequences:]))
            entropies = nnsight.save(bring(entropies[-n_sequences:]))
    return EdgeBatch(scores, losses, entropies, residual_error, logits_error)


def ablated_losses(
    model: Model,
    batch: Batch,
    graph: Graph,
    edges: Sequence[tuple[int, int] | None],
    means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Losses with one edge of each row removed: H <- H - (O - B) at that one branch (Eq. 8).

    Args:
        model: The model.
        batch: The rows; a sequence may stand in many.
        graph: The model's graph.
        edges: For each row its edge, as (source, target) places in the graph, or None.
        means: B of each source, [source, d_model]; zero if not given.

    Returns:
        [row], in nats, on the CPU, in float32 (float64 for a float64 model).
    """
    network, row, heads = model.network, model.architecture, heads_of(model)
    layers = layers_of(model)
    final_norm = attrgetter(row.final_norm)(network)
    input_ids, labels, kept, columns = _inputs(model, batch)
    left = torch.zeros(len(graph.sources), model.d_model) if means is None else means
    left = left.to(model.device, model.dtype)
    by_head = graph.granularity == "head"
    branch_columns = branch_columns_of(model, graph)
    per_layer = (len(branch_columns) or 1) + 1
    source_of = {place: edge[0] for place, edge in enumerate(edges) if edge}
    needed = set(source_of.values())
    rows_of: dict[int, list[int]] = {}
    for place, edge in enumerate(edges):
        if edge:
            rows_of.setdefault(edge[1], []).append(place)
    scale, transposed = output_scale(model), row.transposed
    exact = torch.promote_types(model.dtype, torch.float32)
    settle, _, tensor_of, mean_losses = trace_functions(model, exact)

    def without(
        value: torch.Tensor,
        rows: list[int],
        outputs: dict[int, torch.Tensor],
        left: torch.Tensor,
    ) -> torch.Tensor:
        """The input of a branch in these rows, without the source that each row removes."""
        gone = []
        for r in rows:
            output = outputs[source_of[r]][r]
            gone.append((output - left[source_of[r]].to(output.device)).to(value.device))
        return value[rows] - torch.stack(gone)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=_backend(model)
    ):
        left, columns, labels = settle(network.device, left, columns, labels)
        branch_columns = [(place, chosen.to(network.device)) for place, chosen in branch_columns]
        outputs = {0: layers[0].module.input.clone()}
        n_sources = 1

        for number, layer in enumerate(layers):
            first = number * per_layer
            reader = layer.attention_norm or layer.attention
            stream = reader.input
            if not branch_columns and first in rows_of:
                changed = stream.clone()
                changed[rows_of[first]] = without(stream, rows_of[first], outputs, left)
                reader.input = changed
            for place, projection in enumerate(layer.projections):
                todo = [
                    (rows_of[first + target], chosen)
                    for target, (at, chosen) in enumerate(branch_columns)
                    if at == place and first + target in rows_of
                ]
                if todo:
                    output = projection.output.clone()
                    for rows, chosen in todo:
                        changed = without(stream, rows, outputs, left)
                        if layer.attention_norm:
                            changed = layer.attention_norm(changed)
                        here = chosen.to(output.device)
                        output[rows] = torch.where(here, projection(changed), output[rows])
                    projection.output = output
            if by_head:
                beside = layer.attention_projection.input
                weight = layer.attention_projection.weight
                weight = weight if transposed else weight.T
                for head in range(heads.query):
                    if n_sources + head in needed:
                        part = slice(head * heads.width, (head + 1) * heads.width)
                        outputs[n_sources + head] = beside[..., part] @ weight[part] * scale
                n_sources += heads.query
                if layer.attention_projection.bias is not None:
                    outputs[n_sources] = (layer.attention_projection.bias * scale).expand_as(stream)
                    n_sources += 1
            else:
                if n_sources in needed:
                    written = tensor_of(layer.attention_output.output)
                    outputs[n_sources] = written * scale
                n_sources += 1
            reader = layer.ffn_norm or layer.ffn
            target = first + per_layer - 1
            if target in rows_of:
                changed = reader.input.clone()
                changed[rows_of[target]] = without(changed, rows_of[target], outputs, left)
                reader.input = changed
            if n_sources in needed:
                written = tensor_of(layer.ffn_output.output)
                outputs[n_sources] = written * scale
            n_sources += 1
        target = len(layers) * per_layer
        if target in rows_of:
            changed = final_norm.input.clone()
            changed[rows_of[target]] = without(changed, rows_of[target], outputs, left)
            final_norm.input = changed
        losses = mean_losses(network.output.logits, columns, labels)
        losses = nnsight.save(losses.detach().cpu())
    return losses


def source_sums(model: Model, batch: Batch, graph: Graph) -> torch.Tensor:
    """Sum of each source's output over all positions that are no filling: [source, d_model]."""
    network, row, heads = model.network, model.architecture, heads_of(model)
    layers = layers_of(model)
    input_ids = batch.input_ids.to(model.device)
    valid = (torch.arange(input_ids.shape[1]) < batch.lengths[:, None]).to(model.device)
    by_head = graph.granularity == "head"
    scale, transposed = output_scale(model), row.transposed
    exact = torch.promote_types(model.dtype, torch.float32)
    settle, _, tensor_of, _ = trace_functions(model, exact)

    def inside(value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """What is no filling, in the precision of sums."""
        return value[valid.to(value.device)].to(exact)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=1, backend=_backend(model)
    ):
        (valid,) = settle(network.device, valid)

        outputs = [inside(layers[0].module.input, valid).sum(0)]
        for layer in layers:
            if by_head:
                beside = inside(layer.attention_projection.input, valid).sum(0)
                weight = layer.attention_projection.weight.to(exact) * scale
                weight = weight if transposed else weight.T
                for head in range(heads.query):
                    part = slice(head * heads.width, (head + 1) * heads.width)
                    outputs.append(beside[part] @ weight[part])
                if layer.attention_projection.bias is not None:
                    bias = layer.attention_projection.bias.to(exact) * scale
                    outputs.append(bias * valid.sum().to(bias.device))
            else:
                written = tensor_of(layer.attention_output.output)
                outputs.append(inside(written, valid).sum(0) * scale)
            written = tensor_of(layer.ffn_output.output)
            outputs.append(inside(written, valid).sum(0) * scale)
        sums = nnsight.save(torch.stack([output.cpu() for output in outputs]))
    return sums


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
    exact = torch.promote_types(model.dtype, torch.float32)

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

    with network.trace(input_ids=token, use_cache=False, backend=_backend(model)):
        config = network._module.config
        shape = (config.num_hidden_layers, config.hidden_size, 0)
        found = nnsight.save(layers[0].module.input.new_zeros(shape).cpu())
    return found


def generate_tokens(
    model: Model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: "GenerationConfig",
    stopping: "StoppingCriteriaList",
) -> torch.Tensor:
    """Prompts with what the model generates after them: int64 [sequence, position]."""
    network = model.network
    settle, *_ = trace_functions(model, torch.float32)

    with network.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=options,
        stopping_criteria=stopping,
        backend=_backend(model),
    ) as tracer:
        settle(network.device)
        tokens = nnsight.save(tracer.result.cpu())
    return tokens


class _Job(Backend):
    """Runs one trace on a server."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def __call__(self, tracer: Tracer) -> None:
        """Send the trace, wait, and put what it saved where a local trace would."""
        # nnsight's own backend would send modules of the working tree along: what runs from a
        # checkout would then fail once installed.
        blob = RequestModel.serialize(tracer, compress=True)
        saved = self.deployment.host.run(self.deployment.key, self.deployment.env, blob)
        assert tracer.info is not None
        push(tracer.info.frame, saved)


def _backend(model: Model) -> _Job | None:
    """What runs the next trace of a model; None for nnsight's choice, which is here."""
    return _Job(model.deployment) if model.deployment else None


def _inputs(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """A batch as a model takes it: tokens, labels, how many last positions, which of these."""
    # A number and not the positions: a model on several devices may need those on any of them.
    first = int(batch.positions.min())
    tokens, labels, columns = (
        tensor.to(model.device) for tensor in (batch.input_ids, batch.labels, batch.positions)
    )
    return tokens, labels, batch.input_ids.shape[1] - first, columns - first


class _Scored(NamedTuple):
    """The scored tokens of all rows, one after the other."""

    rows: torch.Tensor
    """int64 [token]"""

    positions: torch.Tensor
    """int64 [token]: where it is predicted."""

    labels: torch.Tensor
    """int64 [token]: which it is."""

    shares: torch.Tensor
    """[token]: what it counts; those of a sequence sum to 1."""


def _scored(batch: Batch, steps: int, exact: torch.dtype) -> _Scored:
    valid = batch.labels != -100
    shares = valid.double() / valid.sum(1, keepdim=True)
    rows = valid.nonzero()[:, 0] + len(valid) * torch.arange(steps)[:, None]
    return _Scored(
        rows.flatten(),
        batch.positions[valid].repeat(steps),
        batch.labels[valid].repeat(steps),
        shares[valid].repeat(steps).to(exact),
    )


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
