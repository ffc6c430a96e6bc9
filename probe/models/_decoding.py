"""Decoding: how the next token is chosen, and which tokens end an answer.

`greedy` takes the most likely token and nothing else: of the settings that lie beside a model's
weights (`generation_config.json`: a repetition penalty, beams, tokens that may not be written) none
is used. `model` uses them, and draws with the seed of the recipe. Either way an answer ends at any
token that the tokenizer, the generation settings or the config name as the end.

    >>> greedy(ends=[1], filling=0, longest=64)["repetition_penalty"]
    1.0
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.checkpoints import CONFIG
from probe.errors import ProbeError
from probe.files import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "generation_config.json"

_MARKS = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version")
"""What the file says that is no way to decode."""

_MOST_TOKENS = 2**31
"""More than any vocabulary has; what is beyond is no token, and no library takes it for one."""

_PRIVATE = ("_from_model_config", "_commit_hash", "_original_object_hash")

NOT_DECODING = (
    *(
        "max_length",
        "max_new_tokens",
        "max_time",
        "num_return_sequences",
        "return_dict_in_generate",
    ),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config", "low_memory"),
    *("is_assistant", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    *("speculation_type", "decoder_start_token_id", "token_healing"),
)
"""Settings that say how long, how fast or in what form, or that ask for a second model: those are
the recipe's or ours also where the model's own are asked for."""


def read_settings(folder: Path) -> dict[str, object]:
    """Read a model's own generation settings, and the end token of its config.

    Args:
        folder: Where its config is.

    Raises:
        ProbeError: The file is no JSON object.
    """
    from transformers import GenerationConfig

    fields = vars(GenerationConfig())
    # Old checkpoints have them in their config, where transformers still finds them.
    found = {
        key: value
        for key, value in _read(folder / CONFIG).items()
        if key in fields and key not in NOT_DECODING and value is not None
    }
    own = _read(folder / SETTINGS)
    ends = [*_tokens(own.get("eos_token_id")), *_tokens(found.get("eos_token_id"))]
    found |= {key: value for key, value in own.items() if value is not None}
    return found | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})


def end_tokens(
    settings: Mapping[str, object], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """The tokens that end an answer: of the generation settings, the config and the tokenizer."""
    ends = [*_tokens(settings.get("eos_token_id")), *_tokens(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys(ends))


def left_out(settings: Mapping[str, object]) -> dict[str, object]:
    """What of a model's own settings greedy decoding leaves out, but for what does nothing."""
    neutral = _neutral()
    return {
        key: value
        for key, value in settings.items()
        if key in neutral
        and key not in (*_MARKS, *NOT_DECODING)
        and value not in (None, neutral[key], [], {})
    }


def greedy(ends: Sequence[int], filling: int, longest: int) -> dict[str, object]:
    """Greedy decoding: a value for every field that transformers has, None where it has no other.

    Args:
        ends: The tokens that end an answer.
        filling: A token that may stand where none is read.
        longest: The longest answer, in tokens.
    """
    return _neutral() | {
        "do_sample": False,
        "max_new_tokens": longest,
        "max_length": None,
        "eos_token_id": list(ends) or None,
        "pad_token_id": filling,
    }


def own(
    settings: Mapping[str, object], ends: Sequence[int], filling: int, longest: int
) -> dict[str, object]:
    """Decoding as a model's own settings say, for answers that end as all do here."""
    chosen = {
        key: value
        for key, value in settings.items()
        if key in _neutral() and key not in (*_MARKS, *NOT_DECODING, "stop_strings")
    }
    return greedy(ends, filling, longest) | chosen


def own_stops(settings: Mapping[str, object]) -> tuple[str, ...]:
    """The texts at which a model's own settings end an answer.

    Raises:
        ProbeError: They are no texts.
    """
    found = settings.get("stop_strings") or []
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ProbeError(f"{SETTINGS}: stop_strings is {found!r}; it must be a list of texts")
    return tuple(texts)


def over(settings: Mapping[str, object], wanted: Mapping[str, object]) -> dict[str, object]:
    """What must be set to None where a model brings its own settings along, as on a server.

    There, whatever is None in what is asked for is filled in from those settings; only what is
    given beside, by name, stays None.
    """
    return {key: None for key in settings if key in wanted and wanted[key] is None}


def _neutral() -> dict[str, object]:
    """Every field of transformers' generation settings, at the value that does nothing."""
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    skipped = ("transformers_version", *_PRIVATE)
    fields = [name for name in vars(GenerationConfig()) if name not in skipped]
    # Sampling's defaults do nothing without sampling, and transformers warns of them.
    idle = (
        *("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "num_assistant_tokens"),
    )
    return {name: None if name in idle else defaults.get(name) for name in fields}


def _read(file: Path) -> dict[str, object]:
    try:
        table = json.loads(read_file(file).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ProbeError(f"{file}: not JSON; mend or remove it") from error
    if not isinstance(table, dict):
        raise ProbeError(f"{file}: not a JSON object; mend or remove it")
    return table


def _tokens(value: object) -> list[int]:
    """Token ids of one number, a list of them, or nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [x for x in values if isinstance(x, int) and not isinstance(x, bool)]
    return [int(x) for x in numbers if 0 <= x < _MOST_TOKENS]
