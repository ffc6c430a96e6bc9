"""Fitting: weights put into the model that a config describes, and refused where they do not fit.

A tensor that the file lacks would be filled with random numbers, and one that the model lacks be
dropped. Both end a run in numbers that mean nothing, so every name and shape has to fit; what is
known to be harmless is allowed by name in `HARMLESS`. The same function puts headers without
numbers into a model without memory, which takes no time and tells the same.

    >>> check_weights("probe:tiny-math/sft", read_config("probe:tiny-math/sft"))
    ()
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from probe.checkpoints import (
    ADAPTER_CONFIG,
    Checkpoint,
    base_files,
    check_adapter,
    dequantized,
    fetch_checkpoint,
    merge_adapter,
    open_tensors,
    read_headers,
)
from probe.errors import ProbeError, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HARMLESS = {
    r"(^|\.)v_head\.": "the value head of PPO training is left out",
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "",
    r"(^|\.)(attn|attention)\.(bias|masked_bias)$": "",
}
"""Names that a file may hold beyond the model, and what is said of them: position tables and causal
masks are computed anew. Tied heads, which a file need not hold, are transformers' own knowledge."""

WRAPPERS = {
    "base_model.model.": "PEFT; save it after merge_and_unload()",
    "_orig_mod.": "torch.compile; save its _orig_mod",
    "module.": "DistributedDataParallel or DeepSpeed; save its module",
    "_fsdp_wrapped_module.": "FSDP; gather the full state dict",
    "pretrained_model.": "TRL's value head model; save its pretrained_model",
    "model.": "another model; strip that from the names",
}
"""What puts a prefix before every name, and how to save without."""

SHOWN = 3
"""How many names a message holds."""


class _Misfit(NamedTuple):
    """A tensor of another shape than the model's."""

    name: str
    found: tuple[int, ...]
    wanted: tuple[int, ...]


class _Loading(TypedDict):
    """What transformers says of a loading."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]


def check_weights(reference: str, config: "PretrainedConfig") -> tuple[str, ...]:
    """Check that a model's weights are the ones that its config describes, from headers alone.

    Returns:
        What of its files is left out or applied, a sentence each.

    Raises:
        ProbeError: They cannot be read or do not fit.
    """
    checkpoint = fetch_checkpoint(reference)
    headers = read_headers(base_files(checkpoint))
    module, remarks = fit(str(checkpoint.folder), config, headers, device_map={"": "meta"})
    if checkpoint.adapter:
        return (*remarks, *check_adapter(module, checkpoint.adapter, checkpoint.folder))
    if (checkpoint.folder / ADAPTER_CONFIG).is_file():
        remarks = (
            *remarks,
            f"{checkpoint.folder} holds a whole model and a PEFT adapter: the model is taken as it "
            "is, without the adapter",
        )
    return remarks


def load_weights(
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    dtype: torch.dtype,
    **options: object,
) -> "PreTrainedModel":
    """Load a model with its weights, its adapter merged in.

    Args:
        checkpoint: Where its files are.
        config: Its config.
        dtype: The precision of its weights.
        options: What transformers takes beside, as `device_map`.

    Raises:
        ProbeError: The weights cannot be read or do not fit.
    """
    # An adapter's change is small: it would be lost in sums of a short dtype.
    exact = torch.promote_types(dtype, torch.float32) if checkpoint.adapter else dtype
    with open_tensors(base_files(checkpoint)) as tensors:
        module, _ = fit(str(checkpoint.folder), config, tensors, dtype=exact, **options)
    if checkpoint.adapter:
        module = merge_adapter(module, checkpoint.adapter).to(dtype)  # type: ignore[arg-type]
    module.config._name_or_path = str(checkpoint.folder)
    return module


def fit(
    place: str,
    config: "PretrainedConfig",
    tensors: Mapping[str, torch.Tensor],
    **options: object,
) -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """Build the model that a config describes, of these tensors.

    Args:
        place: Where the tensors are from, for messages.
        config: The config.
        tensors: Tensors, slices of a file, or headers on the device `meta`.
        options: What transformers takes beside.

    Returns:
        The model, and what is left out of the tensors, a sentence each.

    Raises:
        ProbeError: They do not fit, or are quantised in a way that cannot be undone here.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        GenerationConfig,
    )

    config = dequantized(place, config)
    build: Callable[..., tuple[PreTrainedModel, _Loading]]
    classes: Mapping[type, Any] = MODEL_FOR_CAUSAL_LM_MAPPING
    text = config.get_text_config(decoder=True)
    if text is not config:  # a text decoder inside others, which transformers may have by itself
        alone = classes.get(type(config), None)
        if alone is not None and alone.config_class is type(text):
            config, classes, tensors = text, {type(text): alone}, text_tensors(tensors)
        else:
            classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) not in classes:
        raise ProbeError(f"{place}: {config.model_type} is no model that writes text")
    build = classes[type(config)].from_pretrained
    try:
        with _quiet():
            module, info = build(
                None,
                config=config,
                state_dict=dict(tensors),
                generation_config=GenerationConfig(),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a config of strangers says may end in any
        why = reason(error)
        if "CONVERSION" in str(error):
            why = "parts of them cannot be joined; one may be missing or of another shape"
        raise ProbeError(f"cannot read the weights of {place!r}: {why}") from error
    wrong = sorted(_Misfit(*part) for part in info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    surplus = [key for key in unexpected if not any(re.search(name, key) for name in HARMLESS)]
    if info["missing_keys"] or wrong or surplus:
        raise ProbeError(_complaint(place, sorted(info["missing_keys"]), surplus, wrong, config))
    said = {
        note
        for key in unexpected
        for name, note in HARMLESS.items()
        if note and re.search(name, key)
    }
    return module, tuple(f"{place}: {note}" for note in sorted(said))


def text_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the text decoder inside a multimodal model, under the decoder's own names."""
    inside = re.compile(r"^(model\.)?language_model\.")
    return {
        inside.sub(lambda found: found[1] or "", name): tensor
        for name, tensor in tensors.items()
        if inside.match(name) or name.startswith("lm_head.")
    }


def _complaint(
    place: str,
    missing: list[str],
    surplus: list[str],
    wrong: list[_Misfit],
    config: "PretrainedConfig",
) -> str:
    """How weights do not fit, what that may come from, and what to do."""
    parts = []
    if missing:
        parts.append(f"{_count(missing)} that the model needs {_are(missing)} not there")
    if surplus:
        parts.append(f"{_count(surplus)} {_are(surplus)} in no place of the model")
    if wrong:
        first = wrong[0]
        parts.append(
            f"{_count([part.name for part in wrong])} {_are(wrong)} of another shape "
            f"({list(first.found)} instead of {list(first.wanted)})"
        )
    text = f"{place}: the weights do not fit the model that config.json describes: "
    return f"{text}{'; '.join(parts)}; {_advice(missing, surplus, wrong, config)}"


def _advice(
    missing: list[str], surplus: list[str], wrong: list[_Misfit], config: "PretrainedConfig"
) -> str:
    if any(0 in part.found for part in wrong):
        return (
            "empty tensors come from saving under DeepSpeed ZeRO-3 without gathering; "
            "run its zero_to_fp32.py"
        )
    if any(re.search(r"qweight|qzeros|scales?(_inv)?$|absmax|quant_map", key) for key in surplus):
        return "they look quantised, but config.json says nothing of it; give the plain weights"
    for prefix, wrapper in WRAPPERS.items():
        inner = {key.removeprefix(prefix) for key in surplus if key.startswith(prefix)}
        if inner & set(missing):
            return f"the names begin with {prefix!r}, from {wrapper}"
    rows = [part for part in wrong if part.found[1:] == part.wanted[1:]]
    if rows and rows[0].wanted[0] == getattr(config, "vocab_size", None):
        return (
            f"the vocabulary was resized: set vocab_size to {rows[0].found[0]} in config.json if "
            "that is the model's, and take its tokenizer"
        )
    if any(key.startswith(("score.", "classifier.")) for key in surplus):
        return "this is a reward model or classifier, not a language model"
    return "take config.json and weights from one checkpoint, or save the model again"


def _count(keys: list[str]) -> str:
    names = ", ".join(keys[:SHOWN])
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)} ({names}{more})"


def _are(keys: Iterable[object]) -> str:
    return "is" if len(list(keys)) == 1 else "are"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing what is said here in a line."""
    from transformers.utils import logging as library

    level, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bar:
            library.enable_progress_bar()
