"""What trace bodies call, as functions inside functions.

A trace may run on a server that does not have this package. A function of a module would be looked
up there by its name, and not be found; one that was made inside another travels with the trace.

    >>> settle, bring, tensor_of, mean_losses = trace_functions(model, torch.float32)
"""

from collections.abc import Callable

import torch

from probe.models import Model

# Logits stay small beside the activations.
LOGITS_BYTES = 64 * 2**20

Pull = Callable[[torch.Tensor], torch.Tensor]
"""From a gradient behind a norm to the gradient before it."""

Gradients = tuple[torch.Tensor, ...]
"""Of some branches, each [sequence, position, d_model]."""


def trace_functions(
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


def relevance_rules() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Rules of relevance patching (Jafari et al. 2025, arXiv 2508.21258), as local functions."""

    def straighten(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """An activation's output as the line through the origin at this input."""
        slope = torch.where(value == 0, torch.zeros_like(value), output / value)
        return value * slope.detach()

    def halve(product: torch.Tensor) -> torch.Tensor:
        """A product each factor of which gets half of its gradient."""
        return (product + product.detach()) / 2

    return straighten, halve


def norm_pull(
    centred: bool, offset: float, epsilon: float, held: bool
) -> Callable[[torch.Tensor, torch.Tensor], Pull]:
    """How gradients are pulled from a norm's output to its input, as a local function.

    With x the (centred) input, r = 1 / sqrt(mean(x^2) + epsilon) and a = weight * gradient, it is
    r a - r^3 <a, x> x / d (a centred too), in closed form: no walk through autograd. What does not
    depend on the gradient is computed once for the query, key and value that read one norm.

    Args:
        centred: Whether norms subtract the mean.
        offset: What is added to norms' weights.
        epsilon: What norms add to the mean square.
        held: Whether r counts as a constant.
    """
    plain = not (centred or offset or held)

    def through(value: torch.Tensor, weight: torch.Tensor) -> Pull:
        width, exact = value.shape[-1], torch.promote_types(value.dtype, torch.float32)
        # Looked up here: it cannot be sent.
        native = getattr(torch.ops.aten, "_fused_rms_norm_backward", None)
        if native is not None and plain and value.device.type == "cuda":
            # torch's own kernels read and write each gradient once; they are for CUDA alone.
            _, rate = torch.ops.aten._fused_rms_norm(value, [width], weight, epsilon)
            wanted = [True, False]
            return lambda gradient: native(gradient, value, [width], rate, weight, wanted)[0]
        wide = value.to(exact)
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        rate = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        gain = weight.to(exact) + offset
        straight, along = rate * gain, wide * gain
        shrink = rate**3 / -width

        def pull(gradient: torch.Tensor) -> torch.Tensor:
            result = gradient * straight
            if not held:
                radial = (gradient * along).sum(-1, keepdim=True)
                result = torch.addcmul(result, wide, radial * shrink, out=result)
            if centred:
                result -= result.mean(-1, keepdim=True)
            return result.to(value.dtype)

        return pull

    return through


def logits_scoring(
    model: Model, exact: torch.dtype
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What turns last hidden states into losses, as a local function.

    Args:
        model: The model.
        exact: The precision of losses.
    """
    row = model.architecture
    divisor = float(getattr(model.config, row.logits_divisor)) if row.logits_divisor else 1.0
    cap = getattr(model.config, row.logits_cap) if row.logits_cap else None
    logit_rows = max(1, LOGITS_BYTES // (4 * int(model.config.vocab_size)))

    def score_logits(
        hidden: torch.Tensor,
        scored: list[torch.Tensor],
        unembed: Callable[[torch.Tensor], torch.Tensor],
        weight: torch.Tensor,
        compared: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score tokens, a few rows of logits at a time.

        Sequences do not touch each other, so the gradient of their sum holds each one's own.

        Args:
            hidden: [sequence, position, d_model], without a graph.
            scored: The row, position, label and share of each token.
            unembed: The model's unembedding.
            weight: Its weight, [token, d_model].
            compared: A token whose logits are wanted.

        Returns:
            Each sequence's loss and mean entropy, those logits, and the gradient of all losses at
            the hidden states.
        """
        rows, positions, labels, shares = scored
        losses = torch.zeros(len(hidden), dtype=exact, device=hidden.device)
        entropies = torch.zeros_like(losses)
        slopes = torch.zeros_like(hidden)
        for start in range(0, len(rows), logit_rows):
            part = slice(start, start + logit_rows)
            at, label, share = (rows[part], positions[part]), labels[part, None], shares[part]
            logits = unembed(hidden[at]).detach().to(hidden.device)
            if divisor != 1:
                logits = logits / divisor
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            if start <= compared < start + logit_rows:
                ours = logits[compared - start].clone()
            logs = logits.to(exact).log_softmax(-1)
            losses.index_add_(0, at[0], -logs.gather(1, label)[:, 0] * share)
            slope = logs.exp()
            entropies.index_add_(0, at[0], -logs.mul_(slope).sum(-1) * share)
            # -log p falls by the logit of the label, and grows with each logit by its p.
            slope.scatter_add_(1, label, -torch.ones_like(share)[:, None])
            slope *= share[:, None] / divisor
            if cap is not None:
                slope *= 1 - (logits.to(exact) / cap).square()
            slope = slope.to(logits.dtype).to(weight.device)
            slopes[at] = (slope @ weight).to(hidden.device)
        return losses, entropies, ours, slopes

    return score_logits
