"""Every nnsight tracing context of the project.

One forward and one backward pass give all edges of a batch. Two rules keep that right:

- Each branch reads its own clone of the residual stream (or of the norm's output, for query, key
  and value), so the gradient at that clone is the gradient of that one branch, not of the stream.
- The body of a `with ... trace(...)` uses torch and local variables only, and only edge scores
  and losses leave it: the same body can run on a server that does not have this package, and
  activations never travel. (That is why heads and a layer's modules lie in plain namespaces, and
  why the rules of relevance patching are functions inside a function.) It starts with `settle`,
  since only the server knows on which device its model is.

`edge_scores` is behind the gradient methods, `ablated_losses` behind the exact one, `source_means`
behind mean ablation; all are called through `probe.attribution`, which makes the batches.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import nnsight
import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import push

from probe.architectures import projection_columns
from probe.graph import Graph
from probe.models import Model
from probe.remote import Deployment

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Positions are contracted in slices whose float32 copies stay small beside the activations; on a
# GPU every slice costs a few hundred launches, so there are few.
SLICE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


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
    """What comes out of one batch, on the CPU."""

    scores: torch.Tensor
    """[sequence, source, target], 0 where there is no edge."""

    losses: torch.Tensor
    """[sequence]: mean negative log-likelihood of the scored tokens, in nats."""

    residual_error: float
    """How far the sources' sum is from the final norm's input, relative to that."""


def edge_scores(
    model: Model,
    batch: Batch,
    graph: Graph,
    steps: int = 1,
    relevance: bool = False,
    means: torch.Tensor | None = None,
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

    Args:
        model: The model.
        batch: The sequences.
        graph: The model's graph; its granularity decides which branches are apart.
        steps: Points of the integral.
        relevance: Whether to follow those rules.
        means: B of each source, [source, d_model]; zero if not given.
    """
    network, row, heads = model.network, model.architecture, _heads(model)
    layers = _layers(model)
    final_norm = attrgetter(row.final_norm)(network)
    input_ids, labels, kept, columns = _inputs(model, batch, steps)
    n_sequences, length = batch.input_ids.shape
    valid = (torch.arange(length) < batch.lengths[:, None]).to(model.device)[..., None]
    shares = torch.arange(1, steps + 1).repeat_interleave(n_sequences) / steps
    shares = shares[:, None, None].to(model.device, model.dtype)
    left = torch.zeros(len(graph.sources), model.d_model) if means is None else means
    left = left.to(model.device, model.dtype)
    no_edge = ~graph.mask.to(model.device)
    by_head = graph.granularity == "head"
    # Query, key and value part at the inputs of their projections where they have their own;
    # otherwise, and head by head, at columns of the projections' outputs.
    at_inputs = graph.granularity == "qkv" and row.layout == "split"
    at_columns = [] if at_inputs else _branch_columns(model, graph)
    scale, transposed = _scale(model), row.transposed
    norms_last = row.head_norms_last
    exact = torch.promote_types(model.dtype, torch.float32)
    settle, tensor_of, mean_losses = _trace_functions(exact)
    hold, straighten, halve = _relevance_rules(row.centred_norms)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=_backend(model)
    ):
        left, shares, valid, no_edge = settle(network.device, left, shares, valid, no_edge)
        columns, labels = settle(network.device, columns, labels)
        at_columns = [(place, chosen.to(network.device)) for place, chosen in at_columns]
        # The one line that switches the graph on: parameters are frozen.
        stream = left[0] + shares * (layers[0].module.input.detach() - left[0])
        stream.requires_grad_(True)
        layers[0].module.input = stream
        outputs = [stream]
        branches: list[torch.Tensor] = []
        pulls: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for layer in layers:
            reader = layer.attention_norm or layer.attention
            branch = reader.input.clone()
            reader.input = branch
            normed = branch
            if layer.attention_norm and (at_inputs or relevance):
                normed = layer.attention_norm.output
                if relevance:
                    normed = hold(layer.attention_norm, branch)
                    layer.attention_norm.output = normed
            if not (at_inputs or at_columns):
                branches.append(branch)
            projected = []
            for place, projection in enumerate(layer.projections):
                if at_inputs:
                    read = normed.clone()
                    projection.input = read
                    if layer.attention_norm:
                        pulls.append((len(branches), normed, branch, None))
                    branches.append(read)
                if at_columns:
                    projected.append(projection.output.clone())
                    projection.output = projected[-1]
                if relevance and not norms_last and place < len(layer.head_norms):
                    norm = layer.head_norms[place]
                    norm.output = hold(norm, norm.input)
            if relevance and norms_last:
                for norm in layer.head_norms:
                    norm.output = hold(norm, norm.input)
            for place, chosen in at_columns:
                pulls.append((len(branches), projected[place], branch, chosen))
                branches.append(projected[place])
            if by_head:
                beside = layer.attention_projection.input.detach()
                weight = layer.attention_projection.weight
                weight = weight if transposed else weight.T
                for head in range(heads.query):
                    part = slice(head * heads.width, (head + 1) * heads.width)
                    outputs.append(beside[..., part] @ weight[part] * scale)
                if layer.attention_projection.bias is not None:
                    outputs.append((layer.attention_projection.bias * scale).expand_as(stream))
            else:
                if relevance and layer.attention_output is not layer.attention:
                    written = hold(layer.attention_output, layer.attention_output.input)
                    layer.attention_output.output = written
                else:
                    written = tensor_of(layer.attention_output.output)
                outputs.append(written * scale)

            reader = layer.ffn_norm or layer.ffn
            branch = reader.input.clone()
            reader.input = branch
            branches.append(branch)
            if relevance:
                if layer.ffn_norm:
                    layer.ffn_norm.output = hold(layer.ffn_norm, branch)
                if layer.experts:
                    tokens, chosen, share = layer.experts.inputs[0]
                    mixed = torch.zeros_like(tokens)
                    for expert in range(layer.experts.num_experts):
                        place, rank = (chosen == expert).nonzero(as_tuple=True)
                        both = tokens[place] @ layer.experts.gate_up_proj[expert].T
                        gate, up = both.chunk(2, dim=-1)
                        opened = halve(straighten(layer.experts.act_fn(gate), gate) * up)
                        answer = opened @ layer.experts.down_proj[expert].T
                        answer = halve(answer * share[place, rank, None])
                        mixed = mixed.index_add(0, place, answer.to(mixed.dtype))
                    layer.experts.output = mixed
                else:
                    value = layer.activation.input
                    layer.activation.output = straighten(layer.activation.output, value)
                    if layer.product:
                        layer.product.input = halve(layer.product.input)
            if relevance and layer.ffn_output is not layer.ffn:
                written = hold(layer.ffn_output, layer.ffn_output.input)
                layer.ffn_output.output = written
            else:
                written = tensor_of(layer.ffn_output.output)
            outputs.append(written * scale)
        end = final_norm.input.clone()
        final_norm.input = end
        branches.append(end)
        if relevance:
            final_norm.output = hold(final_norm, end)

        losses = mean_losses(network.output.logits, columns, labels)
        # Sequences do not touch each other, so the gradient of the sum holds each one's own.
        distinct = list({id(tensor): tensor for tensor in branches}.values())
        found = torch.autograd.grad(losses.sum(), distinct, retain_graph=bool(pulls))
        of = {id(tensor): gradient for tensor, gradient in zip(distinct, found, strict=True)}
        gradients = [of[id(tensor)] for tensor in branches]
        for target, output, origin, only in pulls:
            # From where the branches part back to the residual stream before the norm.
            gradient = gradients[target] if only is None else gradients[target] * only
            (gradients[target],) = torch.autograd.grad(output, origin, gradient, retain_graph=True)

        clean = slice(-n_sequences, None)  # the last rows hold the inputs as they are
        scores = torch.zeros(
            n_sequences, len(outputs), len(gradients), dtype=exact, device=stream.device
        )
        distance, size = scores.new_zeros(()), scores.new_zeros(())
        width = 4 * n_sequences * stream.shape[-1] * (len(outputs) + len(gradients))
        step = max(1, SLICE_BYTES[stream.device.type] // width)
        for start in range(0, length, step):
            part = slice(start, start + step)
            written = torch.stack([o.detach()[clean, part] for o in outputs], 1).to(exact)
            total = end.detach()[clean, part].to(exact)
            distance += ((written.sum(1) - total) * valid[:, part]).square().sum()
            size += (total * valid[:, part]).square().sum()
            written = (written - left[:, None].to(exact)).flatten(2)
            read = torch.stack(
                [g[:, part].to(exact).unflatten(0, (steps, -1)).mean(0) for g in gradients], 1
            )
            scores -= torch.bmm(written, read.flatten(2).transpose(1, 2))
        error = nnsight.save((distance / size).sqrt().cpu())
        scores = nnsight.save(scores.masked_fill(no_edge, 0).cpu())
        losses = nnsight.save(losses[clean].detach().cpu().clone())
    return EdgeBatch(scores, losses, float(error))


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
    settle, tensor_of, mean_losses = _trace_functions(exact)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept, backend=_backend(model)
    ):
        left, columns, labels = settle(network.device, left, columns, labels)
        branch_columns = [(place, chosen.to(network.device)) for place, chosen in branch_columns]
        outputs = {0: layers[0].module.input.clone()}
        n_sources = 1

        def without(value: torch.Tensor, rows: list[int]) -> torch.Tensor:
            """The input of a branch in these rows, without the source that each row removes."""
            gone = [outputs[source_of[r]][r] - left[source_of[r]] for r in rows]
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
                        output[rows] = torch.where(chosen, projection(changed), output[rows])
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
    settle, tensor_of, _ = _trace_functions(exact)

    with network.trace(
        input_ids=input_ids, use_cache=False, logits_to_keep=kept[:1], backend=_backend(model)
    ):
        (valid,) = settle(network.device, valid)
        outputs = [layers[0].module.input[valid].to(exact).sum(0)]
        for layer in layers:
            if by_head:
                beside = layer.attention_projection.input[valid].to(exact).sum(0)
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
                outputs.append(written[valid].to(exact).sum(0) * scale)
            written = tensor_of(layer.ffn_output.output)
            outputs.append(written[valid].to(exact).sum(0) * scale)
        sums = nnsight.save(torch.stack(outputs).cpu())
    return sums


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
) -> torch.Tensor:
    """Prompts with what the model generates after them: int64 [sequence, position]."""
    network = model.network
    settle, *_ = _trace_functions(torch.float32)

    with network.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=options,
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
        return path and attrgetter(path)(layer)

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
            branches.append((place, chosen.to(model.device)))
    return branches


def _trace_functions(
    exact: torch.dtype,
) -> tuple[
    Callable[..., list[torch.Tensor]], Callable[..., torch.Tensor], Callable[..., torch.Tensor]
]:
    """What trace bodies have in common, as local functions.

    Args:
        exact: The precision of losses.
    """

    def settle(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors where the model is; from here on in the precision that they have.

        A server runs traces of a bfloat16 model under autocast, where even a product of float32
        tensors is taken in bfloat16.
        """
        torch.set_autocast_enabled(device.type, False)
        return [tensor.to(device) for tensor in tensors]

    def tensor_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What a module gives on, without what some modules give beside it."""
        return output[0] if isinstance(output, tuple) else output

    def mean_losses(
        logits: torch.Tensor, columns: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the scored tokens of each sequence: [sequence]."""
        scored = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
        return torch.nn.functional.cross_entropy(
            scored.to(exact).transpose(1, 2), labels, reduction="none", ignore_index=-100
        ).sum(1) / (labels != -100).sum(1)

    return settle, tensor_of, mean_losses


def _relevance_rules(centred: bool) -> tuple[Callable[..., torch.Tensor], ...]:
    """The rules of relevance patching (Jafari et al. 2025, arXiv 2508.21258), as local functions.

    Args:
        centred: Whether norms subtract the mean.
    """

    def hold(norm: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> torch.Tensor:
        """A norm's output as a linear function of its input, the denominator held."""
        wide = torch.promote_types(value.dtype, torch.float32)
        with torch.no_grad():
            probe = torch.full_like(value[(0,) * (value.dim() - 1)], 1000)
            bias = torch.zeros_like(probe)
            if centred:
                probe[::2] *= -1
                bias = norm(bias)
            middle = probe - probe.mean() if centred else probe
            # The norm's weight: of something so large that its epsilon is nothing beside it.
            weight = (norm(probe) - bias) * middle.to(wide).square().mean().sqrt() / middle
        line = weight * (value - value.mean(-1, keepdim=True) if centred else value).to(wide)
        output = (norm(value) - bias).detach().to(wide)
        size = line.detach().square().sum(-1, keepdim=True)
        # An input of zeros (a filling token's embedding may be that) has no denominator to hold.
        factor = (output * line.detach()).sum(-1, keepdim=True) / torch.where(size == 0, 1, size)
        return (line * factor).to(value.dtype) + bias

    def straighten(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """An activation's output as the line through the origin at this input."""
        slope = torch.where(value == 0, torch.zeros_like(value), output / value)
        return value * slope.detach()

    def halve(product: torch.Tensor) -> torch.Tensor:
        """A product each factor of which gets half of its gradient."""
        return (product + product.detach()) / 2

    return hold, straighten, halve
