"""Where the parts of a model are that its row of the architecture table names.

>>> layers_of(model)[0].attention_norm
LlamaRMSNorm((160,), eps=1e-05)
"""

from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace

import torch

from probe.models import Architecture, Blocks, Graph, Model, has, projection_columns
from probe.tracing._norm_vjp import NormVjp
from probe.tracing._readout import Objective, Readout
from probe.tracing._targets import Target
from probe.tracing._wiring import Wiring


def wiring_of(model: Model, graph: Graph) -> Wiring:
    """How the nodes of a model's graph lie in its layers."""
    row, key = model.architecture, model.architecture.residual_scale
    by_expert = graph.granularity == "expert"
    return Wiring(
        len(graph.targets),
        graph.layers,
        (model.heads.query, model.heads.width),
        branch_columns_of(model, graph),
        by_head=graph.granularity == "head",
        scale=float(getattr(model.config, key)) if key else 1.0,
        transposed=row.transposed,
        at_inputs=graph.attention == "qkv" and row.layout in ("split", "latent"),
        clips=getattr(model.config, "clip_qkv", None) is not None,
        experts=[mixture.experts for mixture in model.mixtures] if by_expert else (),
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
    return Objective(target.slope, target.shared_temperature, own, target.is_loss)


def exact_dtype(model: Model) -> torch.dtype:
    """The precision of losses and scores: float32, or float64 for a float64 model."""
    return torch.promote_types(model.dtype, torch.float32)


def layers_of(model: Model) -> list[SimpleNamespace]:
    """The modules of each decoder layer, by the names of the architecture's row."""
    layers = attrgetter(model.architecture.layers)(model.network)
    return [
        _modules_of(model, number, layer, blocks)
        for number, (layer, blocks) in enumerate(zip(layers, model.blocks, strict=True))
    ]


def _modules_of(
    model: Model, number: int, layer: SimpleNamespace, blocks: Blocks
) -> SimpleNamespace:
    """The modules of one layer; None for those that it does not have."""
    row, shared = model.architecture, model.shares_norm

    def module(path: str | None, wanted: bool = True) -> SimpleNamespace | None:
        if path is None or not wanted:
            return None
        try:
            return there(attrgetter(path)(layer))
        except AttributeError:
            model.part(number, path)  # one line that says what is missing
            raise

    def optional(*paths: str | None) -> list[SimpleNamespace]:
        found = [module(path) for path in paths if path and has(layer._module, path)]
        return [part for part in found if part]

    attends, splits = bool(blocks.attention), blocks.splits
    behind = row.attention_output if row.attention_output != row.attention else blocks.attention
    norms = [*row.head_norms] if splits else []
    norms += [row.attention_output] if attends and row.attention_output != row.attention else []
    norms += [row.ffn_output] if blocks.ffn and row.ffn_output != row.ffn else []
    # Some layers of a mixture may be dense.
    experts = next(iter(optional(row.experts)), None)
    dense = blocks.ffn and not experts and row.relp
    return SimpleNamespace(
        module=layer,
        attention_norm=module(row.attention_norm, attends),
        attention=module(blocks.attention),
        projections=_projections(row, module, optional) if splits else [],
        latent=_latent(model, module) if splits else None,
        other_norms=optional(*norms),
        attention_projection=module(row.attention_projection, splits),
        attention_output=module(behind, attends),
        shared_norm=shared,
        ffn_norm=module(row.ffn_norm, blocks.ffn and not shared),
        ffn=module(row.ffn, blocks.ffn),
        activation=module(row.ffn_activation, dense),
        product=module(row.ffn_product, dense),
        experts=experts,
        experts_projection=next(iter(optional(row.experts_projection)), None),
        shared_expert=next(iter(optional(row.shared_expert)), None) if experts else None,
        ffn_output=module(row.ffn_output, blocks.ffn),
    )


def _projections(
    row: Architecture,
    module: Callable[[str], SimpleNamespace | None],
    optional: Callable[..., list[SimpleNamespace]],
) -> list[SimpleNamespace | None]:
    """The projections of an attention, as `Architecture.projections` names them."""
    if row.layout != "latent":
        return [module(path) for path in row.projections]
    *begin, first, last = row.projections
    return [optional(*begin)[0], module(first), module(last)]


def _latent(
    model: Model, module: Callable[[str], SimpleNamespace | None]
) -> SimpleNamespace | None:
    """What keys and values are made of: its norm, and how wide it is."""
    if model.architecture.key_value_latent is None:
        return None
    norm, key = model.architecture.key_value_latent
    return SimpleNamespace(norm=module(norm), width=int(getattr(model.config, key)))


def there(module: SimpleNamespace) -> SimpleNamespace | None:
    """A module, or None where it was taken out of the model."""
    return None if isinstance(module._module, torch.nn.Identity) else module


def branch_columns_of(model: Model, graph: Graph) -> list[list[tuple[int, torch.Tensor]]]:
    """For each branch of an attention its projections, each with its columns as bool [column].

    Empty where an attention is one branch.
    """
    if graph.attention == "block":
        return []
    heads, row = model.heads, model.architecture
    if row.layout == "latent":
        return _latent_columns(model)
    branches = []
    counts = (heads.query, heads.key_value, heads.key_value)
    gates = 1 + row.query_gate
    for branch, count in enumerate(counts):
        for head in range(count) if graph.granularity == "head" else (None,):
            place, columns = projection_columns(row.layout, heads, branch, head, gates)
            width = count if row.layout == "split" else sum(counts)
            width *= gates if branch == 0 else 1
            chosen = torch.zeros(width * heads.width, dtype=torch.bool)
            chosen[columns] = True
            branches.append([(place, chosen)])
    return branches


def _latent_columns(model: Model) -> list[list[tuple[int, torch.Tensor]]]:
    """The same of query, key and value where the two are made of one narrow vector."""
    layer = next(number for number, here in enumerate(model.blocks) if here.splits)
    modules = _modules_of(
        model,
        layer,
        attrgetter(model.architecture.layers)(model.network)[layer],
        model.blocks[layer],
    )
    begin, first, last = (len(part._module.weight) for part in modules.projections)
    rotated = torch.arange(first) >= modules.latent.width
    # Behind the vector each head has first its key's columns, then its value's.
    wide = int(model.config.v_head_dim)
    per_head = last // model.heads.query
    values = torch.arange(last) % per_head >= per_head - wide
    whole = torch.ones(begin, dtype=torch.bool)
    return [[(0, whole)], [(1, rotated), (2, ~values)], [(2, values)]]


def norm_epsilon(model: Model) -> float:
    """What norms add to the mean square."""
    norm = attrgetter(model.architecture.final_norm)(model.network._module)
    if isinstance(norm, torch.nn.Identity):
        return 0.0
    # A norm that keeps it to itself has that of torch; what norms give is checked by the formula.
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-5)))
