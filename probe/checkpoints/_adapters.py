"""PEFT adapters: whether each of their tensors has a place in the base, and merging them in.

peft itself puts in what fits, leaves the rest as it was, and warns: an adapter with other names
would be its base, and a run would say that nothing changed. So names and shapes are compared first.

    >>> module = merge_adapter(module, Path("my-lora"))
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from probe.checkpoints._patterns import SECONDS, in_time, patterns_in
from probe.checkpoints._references import ADAPTER_WEIGHTS, weights_in
from probe.checkpoints._tensor_files import open_tensors, read_headers
from probe.errors import ProbeError, install, reason

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_EMBEDDINGS = re.compile(r"(embed_tokens|lm_head|wte|embed_in|embed_out)(\.base_layer)?\.weight$")


_ON_EMBEDDINGS = re.compile(r"\.(embed_tokens|lm_head|wte|embed_in|embed_out)\.(lora|hada|lokr)_")


def check_adapter(module: "PreTrainedModel", adapter: Path, base: Path) -> tuple[str, ...]:
    """Check that an adapter fits its base, without its numbers but those that must not be zero.

    Args:
        module: The base on the device `meta`; it is changed.
        adapter: The adapter's folder.
        base: The base's folder, for what is said.

    Returns:
        What is applied, in a sentence.

    Raises:
        ProbeError: A tensor of it has no place in the base, is missing or has another shape, all
            of it is zero, or it is of a kind that cannot be merged.
    """
    config = _config(adapter)
    headers = read_headers(weights_in(adapter, ADAPTER_WEIGHTS))
    resized = _resize(module, headers, adapter)
    expected = _expected(module, config, adapter)
    own = {name for name in headers.keys() - expected.keys() if _EMBEDDINGS.search(name)}
    missing = sorted(expected.keys() - headers.keys())
    surplus = sorted(headers.keys() - expected.keys() - own)
    shaped = sorted(
        name
        for name in headers.keys() & expected.keys()
        if headers[name].shape != expected[name].shape
    )
    parts = []
    if surplus:
        parts.append(
            f"{_names(surplus)} {'fits' if len(surplus) == 1 else 'fit'} nowhere in the base"
        )
    if missing:
        parts.append(f"{_names(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if shaped:
        name = shaped[0]
        parts.append(
            f"{_names(shaped)} of another shape ({list(headers[name].shape)} instead of "
            f"{list(expected[name].shape)})"
        )
    if parts:
        raise ProbeError(
            f"the adapter {adapter} does not fit its base {base}: {'; '.join(parts)}; take its "
            "weights and its adapter_config.json from one training, and the base that it names"
        )
    _check_effect(adapter, expected, bool(own))
    return (_account(adapter, base, config, len(headers), own, resized),)


def merge_adapter(module: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """Merge an adapter into its base.

    Args:
        module: The base; it is changed.
        adapter: The adapter's folder, which `check_adapter` has accepted.

    Raises:
        ProbeError: peft is not installed, or refuses.
    """
    peft = _peft(adapter)
    headers = read_headers(weights_in(adapter, ADAPTER_WEIGHTS))
    _resize(module, headers, adapter)
    if any(_ON_EMBEDDINGS.search(name) for name in headers):
        _untie(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is checked before
            merged: PreTrainedModel = peft.PeftModel.from_pretrained(
                module, adapter
            ).merge_and_unload()
    except Exception as error:  # as in `_expected`
        raise ProbeError(_refused(adapter, error)) from error
    return merged


def _config(adapter: Path) -> "PeftConfig":
    peft = _peft(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: PeftConfig = peft.PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # as in `_expected`
        raise ProbeError(
            f"cannot read the config of the adapter {adapter}: {reason(error)}; is it of a newer "
            "peft than the one here?"
        ) from error
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ProbeError(
            f"the adapter {adapter} is of the kind {kind}, which adds tokens to the prompt and "
            "cannot be merged into weights"
        )
    return config


def _peft(adapter: Path) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ProbeError(
            f"{adapter} is a PEFT adapter, which needs, in a checkout of probe: {install('peft')}"
        ) from error
    return peft


def _expected(
    module: "PreTrainedModel", config: "PeftConfig", adapter: Path
) -> dict[str, torch.Tensor]:
    """The tensors that a whole adapter of this config holds, by their names in its file."""
    peft = _peft(adapter)
    names = [name for name, _ in module.named_modules()]
    names += [f"base_model.model.{name}" for name in names]
    if not in_time(patterns_in(config.to_dict()), names):
        raise ProbeError(
            f"the adapter {adapter}: its patterns (target_modules and the like in "
            f"adapter_config.json) take more than {SECONDS:g} s to match the base's names; list "
            "the modules by name"
        )
    config = copy(config)
    # How a new adapter starts does not matter here, and some ways need the base's numbers.
    if isinstance(getattr(config, "init_lora_weights", None), str):
        setattr(config, "init_lora_weights", True)  # noqa: B010
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: PeftModel = peft.get_peft_model(module, config, low_cpu_mem_usage=True)
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = getattr(config.peft_type, "value", config.peft_type)
                raise ProbeError(
                    f"the adapter {adapter} is of the kind {kind}, which cannot be merged into "
                    "its base"
                )
            state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
                adapted, save_embedding_layers=False
            )
    except ProbeError:
        raise
    except Exception as error:  # what a config of strangers says may end in any
        raise ProbeError(_refused(adapter, error)) from error
    return state


def _resize(module: "PreTrainedModel", headers: Mapping[str, torch.Tensor], adapter: Path) -> bool:
    """Give the base as many tokens as an adapter that was trained with more of them.

    Returns:
        Whether it had others.

    Raises:
        ProbeError: The adapter does not hold all that this takes.
    """
    rows = {name: len(x) for name, x in headers.items() if _EMBEDDINGS.search(name)}
    counts = sorted(set(rows.values()) - {module.config.vocab_size})
    if not counts:
        return False
    tied = bool(getattr(module.config, "tie_word_embeddings", False))
    if len(set(rows.values())) > 1 or (len(rows) < 2 and not tied):
        raise ProbeError(
            f"the adapter {adapter} resizes the vocabulary to {counts[-1]} tokens, but does not "
            "hold both embeddings; merge it into its base where it was trained"
        )
    module.resize_token_embeddings(counts[0], mean_resizing=False)
    return True


def _untie(module: "PreTrainedModel") -> None:
    """Give the head weights of its own: what is merged into one embedding is not for the other."""
    head = module.get_output_embeddings()
    shared: torch.Tensor = module.get_input_embeddings().weight  # type: ignore[assignment]
    if head is not None and head.weight is shared:
        head.weight = torch.nn.Parameter(shared.detach().clone())
        module.config.tie_word_embeddings = False


def _check_effect(adapter: Path, expected: Mapping[str, torch.Tensor], own: bool) -> None:
    """Refuse an adapter that changes nothing: one that was saved before, or without, training."""
    ups = [name for name in expected if re.search(r"lora_(embedding_)?B", name)]
    others = [name for name in expected if not re.search(r"lora_|\.bias$", name)]
    if not ups or others or own:
        return
    with open_tensors(weights_in(adapter, ADAPTER_WEIGHTS)) as tensors:
        if all(not tensors[name][...].any() for name in ups):
            raise ProbeError(
                f"the adapter {adapter} changes nothing: all of its B matrices are zero, as before "
                "training"
            )


def _account(
    adapter: Path, base: Path, config: "PeftConfig", count: int, own: Iterable[str], resized: bool
) -> str:
    """What is applied, in a sentence."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rank = getattr(config, "r", None)
    details = [f"rank {rank}"] if rank else []
    details += ["rsLoRA"] if getattr(config, "use_rslora", False) else []
    details += ["DoRA"] if getattr(config, "use_dora", False) else []
    modules = getattr(config, "target_modules", None) or ()
    names = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    saved = getattr(config, "modules_to_save", None)
    parts = [f"{count} tensors on {names}" if names else f"{count} tensors"]
    parts += [f"whole modules: {', '.join(saved)}"] if saved else []
    parts += ["single tokens"] if getattr(config, "trainable_token_indices", None) else []
    parts += ["its own embeddings"] if own else []
    parts += ["a resized vocabulary"] if resized else []
    how = f" ({', '.join(details)})" if details else ""
    return f"{adapter}: {kind}{how} merged into {base}: {'; '.join(parts)}"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def _refused(adapter: Path, error: Exception) -> str:
    return f"the adapter {adapter} does not fit its base: {reason(error, line=-1)}"
