"""Every nnsight tracing context of the project.

One forward and one backward pass give all edges of a batch. Two rules keep that right:

- Each branch reads its own clone of the residual stream (or of the norm's output, for query, key
  and value), so the gradient at that clone is the gradient of that one branch, not of the stream.
- The body of a `with ... trace(...)` uses torch and local variables only, and only the edge
  matrix and the losses leave it: the same body can run on a server that does not have this
  package, and activations never travel.

`edge_scores` is called through `probe.attribute`, which makes the batches.
"""

from operator import attrgetter
from typing import NamedTuple

import nnsight
import torch

from probe.graph import Graph
from probe.models import Model

# Positions are contracted in slices whose float32 copies stay small beside the activations.
SLICE_BYTES = 64 * 2**20


class Batch(NamedTuple):
    """Sequences that run together, filled up on the right.

    No attention mask goes with them: attention is causal, so what is scored never sees the
    filling behind it.
    """

    input_ids: torch.Tensor
    """int64 [sequence, position]: prompt and answer, without the answer's last token."""

    positions: torch.Tensor
    """int64 [sequence, scored]: where each scored token is predicted."""

    labels: torch.Tensor
    """int64 [sequence, scored]: the answer tokens, -100 past an answer's end."""


def edge_scores(model: Model, batch: Batch, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every edge by EAP with zero ablation: -<dL/dH, O> (paper, Eq. 9).

    L is a sequence's mean negative log-likelihood over its scored tokens (Eq. 13); O the output
    of the source, H the input of the target branch before its norm; the product runs over all
    positions, prompt included, and over d_model, and is accumulated in float32 (float64 for a
    float64 model).

    Returns:
        Scores [sequence, source, target], 0 where there is no edge, and losses [sequence],
        both on the CPU.
    """
    network = model.network
    row = model.architecture
    layers = list(attrgetter(row.layers)(network))
    final_norm = attrgetter(row.final_norm)(network)
    modules = [
        tuple(
            attrgetter(path)(layer)
            for path in (
                row.attention_norm,
                row.query,
                row.key,
                row.value,
                row.attention_output,
                row.ffn_norm,
                row.ffn_output,
            )
        )
        for layer in layers
    ]
    split = graph.granularity == "qkv"
    input_ids, labels = batch.input_ids.to(model.device), batch.labels.to(model.device)
    kept = batch.positions.unique()
    columns = torch.searchsorted(kept, batch.positions).to(model.device)
    kept = kept.to(model.device)
    no_edge = ~graph.mask.to(model.device)
    slice_bytes = SLICE_BYTES

    with network.trace(input_ids=input_ids, use_cache=False, logits_to_keep=kept):
        # The one line that switches the graph on: parameters are frozen.
        stream = layers[0].input.clone().requires_grad_(True)
        layers[0].input = stream
        outputs = [stream]
        branches: list[torch.Tensor] = []
        norms = []
        for attention_norm, query, key, value, attention, ffn_norm, ffn in modules:
            branch = attention_norm.input.clone()
            attention_norm.input = branch
            if split:
                normed = attention_norm.output
                norms.append((len(branches), normed, branch))
                for projection in (query, key, value):
                    read = normed.clone()
                    projection.input = read
                    branches.append(read)
            else:
                branches.append(branch)
            written = attention.output
            outputs.append(written[0] if isinstance(written, tuple) else written)
            branch = ffn_norm.input.clone()
            ffn_norm.input = branch
            branches.append(branch)
            written = ffn.output
            outputs.append(written[0] if isinstance(written, tuple) else written)
        branch = final_norm.input.clone()
        final_norm.input = branch
        branches.append(branch)

        logits = network.output.logits
        scored = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
        if scored.dtype != torch.float64:
            scored = scored.float()
        losses = torch.nn.functional.cross_entropy(
            scored.transpose(1, 2), labels, reduction="none", ignore_index=-100
        ).sum(1) / (labels != -100).sum(1)
        # Sequences do not touch each other, so the gradient of the sum holds each one's own.
        gradients = list(torch.autograd.grad(losses.sum(), branches, retain_graph=split))
        for first, normed, branch in norms:
            # From behind the norm, where q, k and v part, to the residual stream before it.
            for target in range(first, first + 3):
                (gradients[target],) = torch.autograd.grad(
                    normed, branch, gradients[target], retain_graph=True
                )

        sequences, length, d_model = stream.shape
        exact = torch.promote_types(stream.dtype, torch.float32)
        scores = torch.zeros(
            sequences, len(outputs), len(gradients), dtype=exact, device=stream.device
        )
        step = max(1, slice_bytes // (4 * sequences * d_model * (len(outputs) + len(gradients))))
        for start in range(0, length, step):
            part = slice(start, start + step)
            written = torch.stack([o.detach()[:, part] for o in outputs], 1).flatten(2).to(exact)
            read = torch.stack([g[:, part] for g in gradients], 1).flatten(2).to(exact)
            scores -= torch.bmm(written, read.transpose(1, 2))
        scores = nnsight.save(scores.masked_fill(no_edge, 0).cpu())
        losses = nnsight.save(losses.detach().cpu())
    return scores, losses
