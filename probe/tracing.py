"""Every nnsight tracing context of the project.

One forward and one backward pass give all edges of a batch. Two rules keep that right:

- Each branch reads its own clone of the residual stream (or of the norm's output, for query, key
  and value), so the gradient at that clone is the gradient of that one branch, not of the stream.
- The body of a `with ... trace(...)` uses torch and local variables only, and only edge scores
  and losses leave it: the same body can run on a server that does not have this package, and
  activations never travel. (That is why heads and a layer's modules lie in plain namespaces, and
  why the rules of relevance patching are functions inside a function.) It starts with `settle`,
  since only the server knows on which device its model is.

`edge_scores` is behind the gradient methods, `ablated_losses` behind the exact one, `source_sums`
behind mean ablation; all are called through `probe.attribution`, which makes the batches. `states`
is behind `probe.states`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import nnsight
import torch
import torch.utils.checkpoint
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import push

from probe.architectures import projection_columns
from probe.graph import Graph
from probe.models import Model
from probe.remote import Deployment

if TYPE_CHECKING:
    from transformers import GenerationConfig, StoppingCriteriaList

# Float32 copies, where a product needs them, stay small beside the activations; so do logits.
SLICE_BYTES = 64 * 2**20
LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}

# Gradients of so many groups of layers are multiplied one after the other: the more groups, the
# less memory, and the more often the outputs are read.
GRADIENT_GROUPS = 16

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


Pair = tuple[torch.Tensor, torch.Tensor]


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
    those, at each sequence's last position."""


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
    network, row = model.network, model.architecture
    n_heads, head_width = model.heads.query, model.heads.width
    layers = _layers(model)
    final_norm = attrgetter(row.final_norm)(network)
    exact = torch.promote_types(model.dtype, torch.float32)
    # What is copied without waiting lets one batch begin while the one before is computed.
    input_ids = batch.input_ids.repeat(steps, 1).to(model.device, non_blocking=True)
    rows, positions, labels, shares = (
        part.to(model.device, non_blocking=True) for part in _scored(batch, steps, exact)
    )
    n_sequences = len(batch.input_ids)
    points = torch.arange(1, steps + 1).repeat_interleave(n_sequences).to(exact) / steps
    points = points[:, None, None].to(model.device, model.dtype, non_blocking=True)
    checked = torch.linspace(0, 1, CHECKED_POSITIONS)[None] * (batch.lengths[:, None] - 1)
    checked = checked.long().to(model.device, non_blocking=True)
    left = None if means is None else means.to(model.device, model.dtype)
    by_head = graph.granularity == "head"
    # Query, key and value part at the inputs of their projections where they have their own;
    # otherwise, and head by head, at columns of the projections' outputs.
    at_inputs = graph.granularity == "qkv" and row.layout == "split"
    at_columns = [] if at_inputs else _branch_columns(model, graph)
    scale, transposed = _scale(model), row.transposed
    norms_last = row.head_norms_last
    logits_width = 4 * int(model.config.vocab_size)
    epsilon = _epsilon(model)
    settle, bring, tensor_of, _ = _trace_functions(model, exact)
    own_logits = _own_logits(model)
    hold, straighten, halve = _relevance_rules(row.centred_norms, row.norm_offset)
    n_columns = len(at_columns) or len(row.projections)
    pull = _norm_pull(row.centred_norms, row.norm_offset, epsilon, relevance)
    open_product, write, expect, receive, close_product = _edge_product(
        graph, len(layers), n_sequences, steps, left, thrift.sources_on_host
    )

    with _recomputing(model, thrift.recompute):  # noqa: SIM117 - a trace needs its own statement
        with network.trace(
            input_ids=input_ids, use_cache=False, logits_to_keep=1, backend=_backend(model)
        ):
            points, checked = settle(network.device, points, checked)
            at_columns = [(number, chosen.to(network.device)) for number, chosen in at_columns]
            # The one line that switches the graph on: parameters are frozen.
            stream = layers[0].module.input.detach()
            if steps > 1:
                base = 0 if left is None else left[0].to(stream.device)
                stream = base + points * (stream - base)
            stream.requires_grad_(True)
            layers[0].module.input = stream
            open_product(stream)
            write(stream, 1.0)
            place = 0
            for layer in layers:
                reader = layer.attention_norm or layer.attention
                branch = reader.input
                if not (at_inputs or at_columns):
                    # A view has a gradient of its own, and costs nothing.
                    branch = branch.view_as(branch)
                    reader.input = branch
                    receive(branch, place)
                    place += 1
                normed = branch
                if layer.attention_norm and (at_inputs or relevance):
                    normed = layer.attention_norm.output
                    if relevance:
                        normed = hold(layer.attention_norm, branch, epsilon)
                        layer.attention_norm.output = normed
                if layer.attention_norm and (at_inputs or at_columns):
                    expect(place, n_columns, pull(branch.detach(), layer.attention_norm.weight))
                for number, projection in enumerate(layer.projections):
                    if at_inputs:
                        read = normed.view_as(normed)
                        projection.input = read
                        receive(read, place)
                        place += 1
                    here = [chosen for at, chosen in at_columns if at == number]
                    if here:
                        projected = projection.output.view_as(projection.output)
                        projection.output = projected
                        weight = projection.weight.T if transposed else projection.weight
                        for chosen in here:
                            chosen = chosen.to(weight.device)
                            receive(projected, place, chosen, weight[chosen])
                            place += 1
                    if relevance and not norms_last and number < len(layer.head_norms):
                        norm = layer.head_norms[number]
                        norm.output = hold(norm, norm.input, epsilon)
                if relevance and norms_last:
                    for norm in layer.head_norms:
                        norm.output = hold(norm, norm.input, epsilon)
                if by_head:
                    beside = layer.attention_projection.input.detach()
                    weight = layer.attention_projection.weight
                    weight = weight if transposed else weight.T
                    for head in range(n_heads):
                        part = slice(head * head_width, (head + 1) * head_width)
                        write(beside[..., part] @ weight[part], scale)
                    if layer.attention_projection.bias is not None:
                        write(layer.attention_projection.bias.expand_as(stream), scale)
                else:
                    if relevance and layer.attention_output is not layer.attention:
                        norm = layer.attention_output
                        norm.output = hold(norm, norm.input, epsilon)
                    write(tensor_of(layer.attention_output.output), scale)

                reader = layer.ffn_norm or layer.ffn
                branch = reader.input
                branch = branch.view_as(branch)
                reader.input = branch
                receive(branch, place)
                place += 1
                if relevance:
                    if layer.ffn_norm:
                        layer.ffn_norm.output = hold(layer.ffn_norm, branch, epsilon)
                    if layer.experts:
                        tokens, chosen, share = layer.experts.inputs[0]
                        mixed = torch.zeros_like(tokens)
                        for expert in range(layer.experts.num_experts):
                            at, rank = (chosen == expert).nonzero(as_tuple=True)
                            both = tokens[at] @ layer.experts.gate_up_proj[expert].T
                            gate, up = both.chunk(2, dim=-1)
                            opened = halve(straighten(layer.experts.act_fn(gate), gate) * up)
                            answer = opened @ layer.experts.down_proj[expert].T
                            answer = halve(answer * share[at, rank, None])
                            mixed = mixed.index_add(0, at, answer.to(mixed.dtype))
                        layer.experts.output = mixed
                    else:
                        value = layer.activation.input
                        layer.activation.output = straighten(layer.activation.output, value)
                        if layer.product:
                            layer.product.input = halve(layer.product.input)
                if relevance and layer.ffn_output is not layer.ffn:
                    norm = layer.ffn_output
                    norm.output = hold(norm, norm.input, epsilon)
                write(tensor_of(layer.ffn_output.output), scale)
            end = final_norm.input
            end = end.view_as(end)
            final_norm.input = end
            receive(end, place)
            hidden = final_norm.output
            if relevance:
                hidden = hold(final_norm, end, epsilon)

            # The loss and its gradient at the last hidden states, a few rows of logits at a time.
            # Sequences do not touch each other, so the gradient of the sum holds each one's own.
            rows, positions, labels, shares = settle(hidden.device, rows, positions, labels, shares)
            logit_rows = max(1, LOGITS_BYTES[hidden.device.type] // logits_width)
            losses = torch.zeros(len(stream), dtype=exact, device=hidden.device)
            entropies = torch.zeros_like(losses)
            found = torch.zeros_like(hidden)
            for start in range(0, len(rows), logit_rows):
                part = slice(start, start + logit_rows)
                at = rows[part], positions[part]
                last = hidden.detach()[at].requires_grad_(True)
                logits = network.lm_head(last).to(last.device)
                logs = own_logits(logits).to(exact).log_softmax(-1)
                each = -logs.gather(1, labels[part, None])[:, 0] * shares[part]
                found[at] = torch.autograd.grad(each.sum(), last)[0]
                losses.index_add_(0, at[0], each.detach())
                logs = logs.detach()
                entropies.index_add_(0, at[0], -(logs.exp() * logs).sum(-1) * shares[part])
            torch.autograd.grad(hidden, stream, found)

            own = network.output.logits.detach()[:, -1].to(exact)
            ours = own_logits(network.lm_head(hidden.detach()[:, -1])).to(own.device, exact)
            scores, residual_error = close_product(end.detach(), checked)
            scores = nnsight.save(bring(scores))
            residual_error = nnsight.save(bring(residual_error))
            logits_error = nnsight.save(bring((own - ours).norm() / own.norm()))
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
    network, row, heads = model.network, model.architecture, _heads(model)
    layers = _layers(model)
    final_norm = attrgetter(row.final_norm)(network)
    input_ids, labels, kept, columns = _inputs(model, batch)
    left = torch.zeros(len(graph.sources), model.d_model) if means is None else means
    left = left.to(model.device, model.dtype)
    by_head = graph.granularity == "head"
    branch_columns = _branch_columns(model, graph)
    per_layer = (len(branch_columns) or 1) + 1
    source_of = {place: edge[0] for place, edge in enumerate(edges) if edge}
    needed = set(source_of.values())
    rows_of: dict[int, list[int]] = {}
    for place, edge in enumerate(edges):
        if edge:
            rows_of.setdefault(edge[1], []).append(place)
    scale, transposed = _scale(model), row.transposed
    exact = torch.promote_types(model.dtype, torch.float32)
    settle, _, tensor_of, mean_losses = _trace_functions(model, exact)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=_backend(model)
    ):
        left, columns, labels = settle(network.device, left, columns, labels)
        branch_columns = [(place, chosen.to(network.device)) for place, chosen in branch_columns]
        outputs = {0: layers[0].module.input.clone()}
        n_sources = 1

        def without(value: torch.Tensor, rows: list[int]) -> torch.Tensor:
            """The input of a branch in these rows, without the source that each row removes."""
            gone = [
                (outputs[source_of[r]][r] - left[source_of[r]].to(outputs[source_of[r]].device)).to(
                    value.device
                )
                for r in rows
            ]
            return value[rows] - torch.stack(gone)

        for number, layer in enumerate(layers):
            first = number * per_layer
            reader = layer.attention_norm or layer.attention
            stream = reader.input
            if not branch_columns and first in rows_of:
                changed = stream.clone()
                changed[rows_of[first]] = without(stream, rows_of[first])
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
                        changed = without(stream, rows)
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
                changed[rows_of[target]] = without(changed, rows_of[target])
                reader.input = changed
            if n_sources in needed:
                written = tensor_of(layer.ffn_output.output)
                outputs[n_sources] = written * scale
            n_sources += 1
        target = len(layers) * per_layer
        if target in rows_of:
            changed = final_norm.input.clone()
            changed[rows_of[target]] = without(changed, rows_of[target])
            final_norm.input = changed
        losses = mean_losses(network.output.logits, columns, labels)
        losses = nnsight.save(losses.detach().cpu())
    return losses


def source_sums(model: Model, batch: Batch, graph: Graph) -> torch.Tensor:
    """Sum of each source's output over all positions that are no filling: [source, d_model]."""
    network, row, heads = model.network, model.architecture, _heads(model)
    layers = _layers(model)
    input_ids, _, kept, _ = _inputs(model, batch)
    valid = (torch.arange(input_ids.shape[1]) < batch.lengths[:, None]).to(model.device)
    by_head = graph.granularity == "head"
    scale, transposed = _scale(model), row.transposed
    exact = torch.promote_types(model.dtype, torch.float32)
    settle, _, tensor_of, _ = _trace_functions(model, exact)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept[:1], backend=_backend(model)
    ):
        (valid,) = settle(network.device, valid)

        def inside(value: torch.Tensor) -> torch.Tensor:
            """What is no filling, in the precision of sums."""
            return value[valid.to(value.device)].to(exact)

        outputs = [inside(layers[0].module.input).sum(0)]
        for layer in layers:
            if by_head:
                beside = inside(layer.attention_projection.input).sum(0)
                weight = layer.attention_projection.weight.to(exact) * scale
                weight = weight if transposed else weight.T
                for head in range(heads.query):
                    part = slice(head * heads.width, (head + 1) * heads.width)
                    outputs.append(beside[part] @ weight[part])
                if layer.attention_projection.bias is not None:
                    bias = layer.attention_projection.bias.to(exact) * scale
                    outputs.append(bias * valid.sum())
            else:
                written = tensor_of(layer.attention_output.output)
                outputs.append(inside(written).sum(0) * scale)
            written = tensor_of(layer.ffn_output.output)
            outputs.append(inside(written).sum(0) * scale)
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
    layers = _layers(model)
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
    network, layers = model.network, _layers(model)
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
    settle, *_ = _trace_functions(model, torch.float32)

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


def _inputs(
    model: Model, batch: Batch, times: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as a model takes it: tokens, labels, which positions get logits, which of these."""
    kept = batch.positions.unique()
    columns = torch.searchsorted(kept, batch.positions)
    tokens, labels, columns = (
        tensor.repeat(times, 1).to(model.device)
        for tensor in (batch.input_ids, batch.labels, columns)
    )
    return tokens, labels, kept.to(model.device), columns


def _heads(model: Model) -> SimpleNamespace:
    """The numbers of heads and their width, in what a server can unpack without this package."""
    return SimpleNamespace(**model.heads._asdict())


def _layers(model: Model) -> list[SimpleNamespace]:
    """The modules of each decoder layer, by the names of the architecture's row."""
    row = model.architecture

    def module(layer: object, path: str | None) -> object:
        found = path and attrgetter(path)(layer)
        # A norm may have been taken out of a model: then there is none.
        return None if isinstance(getattr(found, "_module", None), torch.nn.Identity) else found

    return [
        SimpleNamespace(
            module=layer,
            attention_norm=module(layer, row.attention_norm),
            attention=module(layer, row.attention),
            projections=[module(layer, path) for path in row.projections],
            head_norms=[module(layer, path) for path in row.head_norms],
            attention_projection=module(layer, row.attention_projection),
            attention_output=module(layer, row.attention_output),
            ffn_norm=module(layer, row.ffn_norm),
            ffn=module(layer, row.ffn),
            activation=None if row.experts else module(layer, row.ffn_activation),
            product=None if row.experts else module(layer, row.ffn_product),
            experts=module(layer, row.experts),
            ffn_output=module(layer, row.ffn_output),
        )
        for layer in attrgetter(row.layers)(model.network)
    ]


def _scale(model: Model) -> float:
    """By what every output is multiplied before it is added to the stream."""
    key = model.architecture.residual_scale
    return float(getattr(model.config, key)) if key else 1.0


def _branch_columns(model: Model, graph: Graph) -> list[tuple[int, torch.Tensor]]:
    """For each branch of an attention its projection and, as bool [column], its columns.

    Empty where an attention is one branch.
    """
    if graph.granularity == "block":
        return []
    heads, layout = model.heads, model.architecture.layout
    branches = []
    counts = (heads.query, heads.key_value, heads.key_value)
    for branch, count in enumerate(counts):
        for head in range(count) if graph.granularity == "head" else (None,):
            place, columns = projection_columns(layout, heads, branch, head)
            width = count if layout == "split" else sum(counts)
            chosen = torch.zeros(width * heads.width, dtype=torch.bool)
            chosen[columns] = True
            branches.append((place, chosen.to(model.device, non_blocking=True)))
    return branches


def _trace_functions(
    model: Model, exact: torch.dtype
) -> tuple[
    Callable[..., list[torch.Tensor]],
    Callable[..., torch.Tensor],
    Callable[..., torch.Tensor],
    Callable[..., torch.Tensor],
]:
    """What trace bodies have in common, as local functions.

    Args:
        model: The model.
        exact: The precision of losses.
    """
    away = model.deployment is not None

    def settle(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors where the model is; from here on in the precision that they have.

        A server runs traces of a bfloat16 model under autocast, where even a product of float32
        tensors is taken in bfloat16.
        """
        if away:
            torch.set_autocast_enabled(device.type, False)
        return [tensor.to(device, non_blocking=True) for tensor in tensors]

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        """What leaves a server: a copy that is no part of something larger."""
        return tensor.detach().cpu().clone() if away else tensor

    def tensor_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What a module gives on, without what some modules give beside it."""
        return output[0] if isinstance(output, tuple) else output

    def mean_losses(
        logits: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the scored tokens of each sequence: [sequence]."""
        columns, labels = columns.to(logits.device), labels.to(logits.device)
        scored = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
        return torch.nn.functional.cross_entropy(
            scored.to(exact).transpose(1, 2), labels, reduction="none", ignore_index=-100
        ).sum(1) / (labels != -100).sum(1)

    return settle, bring, tensor_of, mean_losses


def _relevance_rules(centred: bool, offset: float) -> tuple[Callable[..., torch.Tensor], ...]:
    """The rules of relevance patching (Jafari et al. 2025, arXiv 2508.21258), as local functions.

    Args:
        centred: Whether norms subtract the mean.
        offset: What is added to norms' weights.
    """

    def hold(norm: SimpleNamespace, value: torch.Tensor, epsilon: float) -> torch.Tensor:
        """A norm's output as a linear function of its input, the denominator held."""
        line = value.to(torch.promote_types(value.dtype, torch.float32))
        if centred:
            line = line - line.mean(-1, keepdim=True)
        size = line.detach().square().mean(-1, keepdim=True)
        output = line * (size + epsilon).rsqrt() * (offset + norm.weight)
        if centred:
            output = output + norm.bias
        return output.to(value.dtype)

    def straighten(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """An activation's output as the line through the origin at this input."""
        slope = torch.where(value == 0, torch.zeros_like(value), output / value)
        return value * slope.detach()

    def halve(product: torch.Tensor) -> torch.Tensor:
        """A product each factor of which gets half of its gradient."""
        return (product + product.detach()) / 2

    return hold, straighten, halve


def _norm_pull(
    centred: bool, offset: float, epsilon: float, held: bool
) -> Callable[[torch.Tensor, torch.Tensor], Callable[[torch.Tensor], None]]:
    """How gradients are pulled from a norm's output to its input, as a local function.

    Query, key and value each need their own gradient at the residual stream. With x the (centred)
    input, r = 1 / sqrt(mean(x^2) + epsilon) and a = weight * gradient, it is
    r a - r^3 <a, x> x / d (a centred too), in closed form: no second walk through autograd.

    Args:
        centred: Whether norms subtract the mean.
        offset: What is added to norms' weights.
        epsilon: What norms add to the mean square.
        held: Whether r counts as a constant.
    """
    plain = not (centred or offset or held)

    def pull(value: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def pulled(gradients: torch.Tensor) -> None:
            """Replace gradients [branch, ...], three at a time: their copies stay small."""
            nonlocal value, weight
            # A model may lie on several devices.
            value, weight = value.to(gradients.device), weight.to(gradients.device)
            width, exact = value.shape[-1], torch.promote_types(value.dtype, torch.float32)
            # Looked up here: it cannot be sent.
            native = getattr(torch.ops.aten, "_fused_rms_norm_backward", None)
            if native is not None and plain and value.device.type == "cuda":
                # torch's own kernel reads and writes each gradient once; it is for CUDA alone.
                size = torch.linalg.vector_norm(value, dim=-1, keepdim=True, dtype=exact)
                rate = (size.square() / width + epsilon).rsqrt()
                for room in gradients:
                    room.copy_(native(room, value, [width], rate, weight, [True, False])[0])
                return
            wide = value.to(exact)
            if centred:
                wide = wide - wide.mean(-1, keepdim=True)
            rate = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            gain = weight.to(exact) + offset
            for room in gradients.split(3):
                result = room * (rate * gain)
                if not held:
                    radial = (room * (wide * gain)).sum(-1, keepdim=True)
                    radial *= rate**3 / -width
                    result = torch.addcmul(result, wide, radial, out=result)
                if centred:
                    result -= result.mean(-1, keepdim=True)
                room.copy_(result)

        return pulled

    return pull


def _edge_product(
    graph: Graph,
    n_layers: int,
    n_sequences: int,
    steps: int,
    left: torch.Tensor | None,
    on_host: bool,
) -> tuple[
    Callable[..., None],
    Callable[..., None],
    Callable[..., None],
    Callable[..., None],
    Callable[..., Pair],
]:
    """What multiplies outputs with gradients as they come, as local functions.

    Args:
        graph: The graph.
        n_layers: How many layers it is of.
        n_sequences: How many of the rows hold sequences as they are: the last ones.
        steps: How many rows each sequence has.
        left: What an ablation leaves of each source, [source, d_model].
        on_host: Whether outputs wait in the host's memory.
    """
    mask = graph.mask
    n_sources, n_targets = mask.shape
    per_layer = (n_targets - 1) // n_layers
    # Gradients of a group of layers are multiplied at once, from the last group to the first.
    group = per_layer * -(-n_layers // GRADIENT_GROUPS)
    slice_bytes = SLICE_BYTES
    held: dict[str, torch.Tensor] = {}
    state = {"written": 0, "start": n_targets, "stop": n_targets, "piece": 1}
    missing: set[int] = set()
    pulls: dict[int, tuple[range, Callable[[torch.Tensor], None]]] = {}

    def open_product(stream: torch.Tensor) -> None:
        """Make room for all outputs and for the gradients of one group."""
        _, length, width = stream.shape
        # The sum over positions falls into equal pieces, about enough of them for a whole GPU.
        wanted = max(1, n_sequences * length // 1024)
        divisors = (p for p in range(1, length + 1) if length % p == 0)
        piece = min(divisors, key=lambda p: max(p / wanted, wanted / p))
        state["piece"] = (length if stream.device.type == "cpu" else piece) * width
        shape = (n_sequences, length, width)
        place = "cpu" if on_host else stream.device
        held["outputs"] = torch.empty(
            n_sources, *shape, dtype=stream.dtype, device=place, pin_memory=on_host
        )
        # A multiple of 8, for which matrix products have their fast kernels.
        held["gradients"] = stream.new_zeros(-(-group // 8) * 8, steps, *shape)
        exact = torch.promote_types(stream.dtype, torch.float32)
        held["scores"] = stream.new_zeros(n_sequences, n_sources, n_targets, dtype=exact)

    def write(output: torch.Tensor, scale: float) -> None:
        """Keep the output of the next source."""
        room = held["outputs"][state["written"]]
        state["written"] += 1
        output = output.detach()[-n_sequences:]
        room.copy_(output if scale == 1 else output * scale, non_blocking=True)

    def expect(first: int, count: int, pulled: Callable[[torch.Tensor], None]) -> None:
        """Pull the gradients of these branches back to the stream once all of them are there."""
        branches = range(first, first + count)
        for target in branches:
            pulls[target] = branches, pulled

    def receive(
        branch: torch.Tensor,
        target: int,
        chosen: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Take a branch's gradient when it comes.

        `chosen` are the columns of a projection's output that are this branch, and `weight` what
        they are computed with.
        """

        def take(gradient: torch.Tensor) -> None:
            if target < state["start"]:
                multiply()
                size = 1 if state["start"] == n_targets else group  # the final norm comes alone
                state["stop"] = state["start"]
                state["start"] = max(0, state["stop"] - size)
                missing.update(range(state["start"], state["stop"]))
            gradient = gradient.detach()
            if chosen is not None and weight is not None:
                gradient = gradient[..., chosen] @ weight
            room = held["gradients"][target - state["start"]]
            room.copy_(gradient.view_as(room))
            missing.discard(target)
            if target in pulls and missing.isdisjoint(pulls[target][0]):
                pull(target)

        branch.register_hook(take)

    def pull(target: int) -> None:
        """Pull back the gradients of the branches that belong together with this one."""
        branches, pulled = pulls[target]
        first = branches.start - state["start"]
        pulled(held["gradients"][first : first + len(branches)].flatten(1, 2))
        for branch in branches:
            del pulls[branch]

    def multiply() -> None:
        """Multiply the gradients that are there with the outputs that they can have an edge to."""
        start, stop = state["start"], state["stop"]
        if start == stop:
            return
        for target in missing:  # a branch without influence
            held["gradients"][target - start] = 0
        missing.clear()
        for target in [target for target in pulls if target >= start]:
            if target in pulls:
                pull(target)
        full = -(-(stop - start) // 8) * 8
        gradients = held["gradients"][:full]
        reach = int(mask[:, start:stop].any(1).nonzero().max()) + 1
        outputs = held["outputs"][:reach].flatten(1).unflatten(1, (-1, state["piece"]))
        for step in range(steps):
            read = gradients[:, step].flatten(1).unflatten(1, (-1, state["piece"]))
            found = product(outputs, read.permute(1, 2, 0))
            found = found.unflatten(0, (n_sequences, -1)).sum(1)[..., : stop - start]
            held["scores"][:, :reach, start:stop] -= found / steps
        if left is not None:
            total = gradients[: stop - start].sum((1, 3), dtype=held["scores"].dtype) / steps
            kept = torch.einsum("sd,tnd->nst", left[:reach].to(total.dtype), total)
            held["scores"][:, :reach, start:stop] += kept

    def product(outputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """[source, piece, ...] times [piece, ..., target], summed in float32 or better."""
        exact = held["scores"].dtype
        if gradients.device != outputs.device:
            here = (row.to(gradients.device, non_blocking=True) for row in outputs.split(1))
            return torch.cat([product(row, gradients) for row in here], 1)
        outputs = outputs.transpose(0, 1)
        if gradients.dtype == exact:
            return torch.bmm(outputs, gradients)
        if gradients.device.type == "cuda":
            # Products of 16-bit numbers are exact in float32, and are summed there.
            return torch.bmm(outputs, gradients, out_dtype=exact)
        shape = len(outputs), outputs.shape[1], gradients.shape[2]
        found = gradients.new_empty(shape, dtype=exact)
        width = exact.itemsize * outputs.shape[2] * (shape[1] + shape[2])
        step = max(1, slice_bytes // width)
        for start in range(0, len(outputs), step):
            part = slice(start, start + step)
            torch.bmm(outputs[part].to(exact), gradients[part].to(exact), out=found[part])
        return found

    def close_product(end: torch.Tensor, checked: torch.Tensor) -> Pair:
        """Give the scores, and how far the outputs' sum is from the end of the stream."""
        multiply()
        scores = held["scores"].masked_fill(~mask.to(held["scores"].device, non_blocking=True), 0)
        at = (torch.arange(n_sequences, device=end.device)[:, None], checked.to(end.device))
        here = tuple(part.to(held["outputs"].device) for part in at)
        total = sum(output[here].to(end.device, scores.dtype) for output in held["outputs"])
        truth = end[-n_sequences:][at].to(scores.dtype)
        error = (total - truth).norm() / truth.norm()
        held.clear()
        return scores, error

    return open_product, write, expect, receive, close_product


def _own_logits(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model does to its unembedding's output, as a local function."""
    row = model.architecture
    divisor = float(getattr(model.config, row.logits_divisor)) if row.logits_divisor else 1.0
    cap = getattr(model.config, row.logits_cap) if row.logits_cap else None

    def own_logits(logits: torch.Tensor) -> torch.Tensor:
        if divisor != 1:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return own_logits


def _epsilon(model: Model) -> float:
    """What norms add to the mean square."""
    norm = attrgetter(model.architecture.final_norm)(model.network._module)
    if isinstance(norm, torch.nn.Identity):
        return 0.0
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _scored(batch: Batch, steps: int, exact: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Row, position, token and share of each scored token; those of a sequence sum to 1."""
    valid = batch.labels != -100
    shares = valid.double() / valid.sum(1, keepdim=True)
    rows = valid.nonzero()[:, 0] + len(valid) * torch.arange(steps)[:, None]
    return (
        rows.flatten(),
        batch.positions[valid].repeat(steps),
        batch.labels[valid].repeat(steps),
        shares[valid].repeat(steps).to(exact),
    )


@contextmanager
def _recomputing(model: Model, wanted: bool) -> Iterator[None]:
    """Let decoder layers drop their activations and compute them again, for a while."""
    # Not the first: its input is replaced, which a second pass through it would not know of.
    layers = attrgetter(model.architecture.layers)(model.network._module)[1:] if wanted else ()
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
