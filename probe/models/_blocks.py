"""Which blocks a decoder layer has, by its row of the architecture table.

>>> single_block(ARCHITECTURES["nemotron_h"], "mlp")
Blocks(attention=None, splits=False, ffn=True)
"""

from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple

from probe.errors import ProbeError
from probe.models._architectures import GUIDE, Architecture

if TYPE_CHECKING:
    import torch


class Blocks(NamedTuple):
    """The blocks of one layer."""

    attention: str | None
    """The path of its attention, or of what stands in its place; None where it has none."""

    splits: bool
    """Whether that has query, key and value."""

    ffn: bool
    """Whether it has an FFN."""


class Mixture(NamedTuple):
    """The experts of a layer's FFN."""

    experts: int
    """How many; 0 where it is none."""

    shared: bool
    """Whether something that every token has is added to theirs."""

    @property
    def parts(self) -> list[str]:
        """What it is a sum of, by names: `e0`, `e1`, ..., `shared`; none where it is no mixture."""
        return [f"e{number}" for number in range(self.experts)] + ["shared"] * self.shared


_SINGLE = {
    **dict.fromkeys(("full_attention", "attention"), "attention"),
    **dict.fromkeys(("linear_attention", "mamba"), "mixer"),
    **dict.fromkeys(("mlp", "moe"), "ffn"),
}
"""What configs call a layer's only block, and what it is."""


def single_block(row: Architecture, kind: str) -> Blocks:
    """The block of a layer that has one, by what the config calls it.

    Raises:
        ProbeError: It calls it something that is not known.
    """
    what = _SINGLE.get(kind)
    if what is None:
        raise ProbeError(f"{row.single_block} in config.json has {kind!r}, which is not known here")
    if what == "ffn":
        return Blocks(None, False, True)
    return Blocks(row.attention, what == "attention", False)


def blocks_of(row: Architecture, layer: "torch.nn.Module") -> Blocks:
    """The blocks of a layer, by the modules that it has.

    Raises:
        ProbeError: It has none of the attentions that the row names.
    """
    if not row.other_mixers:
        return Blocks(row.attention, True, True)
    for path in (row.attention, *row.other_mixers):
        if has(layer, path):
            return Blocks(path, path == row.attention, True)
    names = ", ".join((row.attention, *row.other_mixers))
    raise ProbeError(
        f"a layer has none of the attentions that its row names ({names}); see {GUIDE}"
    )


def mixture_of(row: Architecture, layer: "torch.nn.Module") -> Mixture:
    """The experts of a layer, by the modules that it has.

    Raises:
        ProbeError: They cannot be told apart.
    """
    if row.experts is None or not has(layer, row.experts):
        return Mixture(0, False)
    experts = layer.get_submodule(row.experts)
    count = getattr(experts, "num_experts", None)
    takes = len(signature(type(experts).forward).parameters) - 1
    if not isinstance(count, int) or takes not in (1, 3):
        raise ProbeError(
            f"{type(experts).__name__} is not known to keep experts apart: it has to take all "
            "tokens with the numbers and weights of their experts; use another granularity"
        )
    return Mixture(count, row.shared_expert is not None and has(layer, row.shared_expert))


def text_inside(row: Architecture, module: "torch.nn.Module") -> Architecture:
    """A row whose paths lead to the text decoder inside a multimodal model, or the row itself."""

    def found(path: str) -> str:
        end = path.removeprefix("model.")
        places = (path, f"model.language_model.{end}", f"language_model.{path}")
        return next((place for place in places if has(module, place)), path)

    return replace(
        row,
        layers=found(row.layers),
        final_norm=found(row.final_norm),
        unembedding=found(row.unembedding),
    )


def has(layer: "torch.nn.Module", path: str) -> bool:
    """Whether a layer has a module."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
