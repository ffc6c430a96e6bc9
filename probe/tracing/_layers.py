"""Where the parts of a model are that its row of the architecture table names.

>>> layers_of(model)[0].attention_norm
LlamaRMSNorm((160,), eps=1e-05)
"""

from operator import attrgetter
from types import SimpleNamespace

import torch

from probe.models import Graph, Model, projection_columns
from probe.tracing._norm_vjp import NormVjp
from probe.tracing._readout import Objective, Readout
from probe.tracing._targets import Target
from probe.tracing._wiring import Wiring


def wiring_of(model: Model, graph: Graph) -> Wiring:
    """How the nodes of a model's graph lie in its layers."""
    row, key = model.architecture, model.architecture.residual_scale
    return Wiring(
        len(graph.targets),
        graph.layers,
        (model.heads.query, model.heads.width),
        branch_columns_of(model, graph),
        by_head=graph.granularity == "head",
        scale=float(getattr(model.config, key)) if key else 1.0,
        transposed=row.transposed,
        at_inputs=graph.granularity == "qkv" and row.layout == "split",
    )


def norm_vjp_of(model: Model, constant_rate: bool) -> NormVjp:
    """The norms of a model; see `NormVjp` for `constant_rate`."""
    row = model.architecture
    return NormVjp(row.centred_norms, row.norm_offset, norm_epsilon(model), constant_rate)


def readout_of(model: Model, target: Target, n_sequences: int, n_silent: int) -> Readout:
    """How a model makes logits, and what of them is differentiated; see `Readout`."""
    row, config = model.architecture, model.config
    divisor = float(getattr(config, row.logits_divisor)) if row.logits_divisor else 1.0
    times = float(getattr(config, row.logits_multiplier)) if row.logits_multiplier else 1.0
    cap = getattr(config, row.logits_cap) if row.logits_cap else None
    return Readout(
        int(config.vocab_size),
        exact_dtype(model),
        objective_of(target),
        n_sequences,
        n_silent,
        divisor,
        times,
        cap,
    )


def objective_of(target: Target) -> Objective:
    """What is differentiated, as a trace takes it along."""
    own = target.compares_itself
    return Objective(target.slope, float(target.temperature), own, target.is_loss)


def exact_dtype(model: Model) -> torch.dtype:
    """The precision of losses and scores: float32, or float64 for a float64 model."""
    return torch.promote_types(model.dtype, torch.float32)


def layers_of(model: Model) -> list[SimpleNamespace]:
    """The modules of each decoder layer, by the names of the architecture's row."""
    row, layers = model.architecture, attrgetter(model.architecture.layers)(model.network)
    numbers = range(model.n_layers)

    def module(number: int, path: str | None) -> object:
        if path is None:
            return None
        try:
            return there(attrgetter(path)(layers[number]))
        except AttributeError:
            model.part(number, path)  # one line that says what is missing
            raise

    def experts(number: int) -> object:
        # Some layers of a mixture may be dense.
        inside = dict(layers[number]._module.named_modules())
        return module(number, row.experts) if row.experts in inside else None

    norms = [*row.head_norms]
    norms += [row.attention_output] if row.attention_output != row.attention else []
    norms += [row.ffn_output] if row.ffn_output != row.ffn else []
    return [
        SimpleNamespace(
            module=layers[number],
            attention_norm=module(number, row.attention_norm),
            attention=module(number, row.attention),
            projections=[module(number, path) for path in row.projections],
            other_norms=[norm for path in norms if (norm := module(number, path))],
            attention_projection=module(number, row.attention_projection),
            attention_output=module(number, row.attention_output),
            shared_norm=row.shared_norm,
            ffn_norm=None if row.shared_norm else module(number, row.ffn_norm),
            ffn=module(number, row.ffn),
            activation=None if mixed else module(number, row.ffn_activation),
            product=None if mixed else module(number, row.ffn_product),
            experts=mixed,
            ffn_output=module(number, row.ffn_output),
        )
        for number in numbers
        for mixed in (experts(number),)
    ]


def there(module: SimpleNamespace) -> SimpleNamespace | None:
    """A module, or None where it was taken out of the model."""
    return None if isinstance(module._module, torch.nn.Identity) else module


def branch_columns_of(model: Model, graph: Graph) -> list[tuple[int, torch.Tensor]]:
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
            branches.append((place, chosen))
    return branches


def norm_epsilon(model: Model) -> float:
    """What norms add to the mean square."""
    norm = attrgetter(model.architecture.final_norm)(model.network._module)
    if isinstance(norm, torch.nn.Identity):
        return 0.0
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
