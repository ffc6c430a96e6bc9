"""Diagnosis: what a model on the disk is, and whether a run would take it.

The check is the one that a run makes before it starts; what is told beside it is what one wants to
see before a run of hours.

    >>> found = doctor("probe:tiny-math/sft", "probe:tiny-math/grpo")
    >>> found.sound, found.models[0].parameters, found.differences
    (True, 1212640, ('weights',))
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from probe.checkpoints import (
    Checkpoint,
    base_files,
    check_folder,
    fetch_checkpoint,
    find_not_finite,
    fingerprint,
    gguf_remark,
    is_gguf,
    read_headers,
    weight_files,
)
from probe.errors import ProbeError
from probe.models._architectures import architecture_of
from probe.models._decoding import end_tokens, left_out, read_settings
from probe.models._loading import (
    check_pair,
    read_config,
    read_tokenizer,
    tokenizer_at,
    weights_checked,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class ModelFacts:
    """What one model is. What could not be found out is empty or 0."""

    reference: str
    """The folder, hub id or `probe:` name."""

    refusal: str | None
    """Why a run would refuse it; None where it would not."""

    remarks: tuple[str, ...] = ()
    """What a run says of it: what of its files is applied, and what is left out."""

    files: tuple[str, ...] = ()
    """Its weight files, those of an adapter last."""

    weights: str = ""
    """A short name for the weights themselves."""

    dtypes: tuple[str, ...] = ()
    """The precisions of its tensors, the one of most numbers first."""

    parameters: int = 0
    """How many numbers its weight files hold, without those of an adapter."""

    architecture: str = ""
    """Its `model_type`."""

    n_layers: int = 0
    """Decoder layers."""

    d_model: int = 0
    """Width of the residual stream."""

    vocabulary: tuple[int, int] = (0, 0)
    """Tokens of the model, and of the tokenizer."""

    template: str = ""
    """Its chat template, as a short name; empty where there is none."""

    ends: tuple[str, ...] = ()
    """The tokens that end an answer."""

    left_out: tuple[str, ...] = ()
    """Its own generation settings that greedy decoding leaves out, as `name=value`."""

    adapter: str = ""
    """The folder of its adapter; empty where it is a whole model."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What some models are, and in what they differ."""

    models: tuple[ModelFacts, ...]
    """Each, in the order in which they were given."""

    differences: tuple[str, ...]
    """In what the first two differ, in words."""

    refusal: str | None
    """Why the first two cannot be compared; None where they can, or there is one."""

    def __repr__(self) -> str:
        """Say it as `probe doctor` does."""
        return "\n".join(diagnosis_lines(self))

    @property
    def sound(self) -> bool:
        """Whether a run would take them."""
        return self.refusal is None and all(model.refusal is None for model in self.models)


def check_model(reference: str, numbers: bool = True) -> tuple[str, ...]:
    """Check all of a model that its files tell, as a run does before it starts.

    Args:
        reference: A folder, a hub id, or the `probe:` name of a model that ships with the package.
        numbers: Whether to look through its numbers too, which takes as long as reading them.

    Returns:
        What a reader should know of it, a sentence each.

    Raises:
        ProbeError: A run would refuse it.
    """
    check_folder(reference)
    architecture_of(read_config(reference).model_type)
    tokenizer_at(reference)
    remarks = weights_checked(reference)
    if numbers:
        check_numbers(reference)
    settings = _left_out(read_settings(fetch_checkpoint(reference).folder))
    if settings:
        remarks = (
            *remarks,
            f"{reference}: greedy decoding leaves out its own {', '.join(settings)}",
        )
    return remarks


def check_numbers(reference: str) -> None:
    """Check that all numbers of a model are finite, which takes as long as reading them.

    Raises:
        ProbeError: One is not.
    """
    broken = find_not_finite(weight_files(reference))
    if broken:
        raise ProbeError(
            f"{reference}: {broken} holds a number that is NaN or infinite; train and save the "
            "model again"
        )


def doctor(before: str, after: str | None = None) -> Diagnosis:
    """Say what one or two models are, and whether a run would take them.

    Args:
        before: A folder, a hub id, or the `probe:` name of a model that ships with the package.
        after: Another, to be compared with it.
    """
    models = tuple(_facts(reference) for reference in (before, after) if reference is not None)
    if after is None:
        return Diagnosis(models, (), None)
    refusal = None
    try:
        check_pair(before, after)
    except ProbeError as error:
        # What is wrong with one of them is said there.
        refusal = None if any(model.refusal for model in models) else str(error)
    names = {
        "weights": "weights",
        "dtypes": "precision of the files",
        "parameters": "parameters",
        "architecture": "architecture",
        "n_layers": "layers",
        "d_model": "width",
        "vocabulary": "vocabulary",
        "template": "chat template",
        "ends": "end tokens",
        "left_out": "own generation settings",
    }
    differences = tuple(
        name for key, name in names.items() if len({getattr(model, key) for model in models}) > 1
    )
    return Diagnosis(models, differences, refusal)


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """Lay out a diagnosis, about ten lines for each model."""
    lines = []
    for model in found.models:
        lines += [model.reference, *(f"  {line}" for line in _model_lines(model)), ""]
    if len(found.models) > 1:
        lines.append(f"They differ in: {', '.join(found.differences) or 'nothing'}.")
    if found.refusal:
        lines.append(f"A run would refuse the pair: {found.refusal}")
    return lines


def _model_lines(model: ModelFacts) -> list[str]:
    rows = {
        "files": f"{', '.join(model.files[:3])}{' ...' * (len(model.files) > 3)}",
        "adapter": model.adapter,
        "numbers": f"{model.parameters:,} in {', '.join(model.dtypes)}" * bool(model.parameters),
        "model": f"{model.architecture}, {model.n_layers} layers, width {model.d_model}"
        * bool(model.architecture),
        "vocabulary": f"{model.vocabulary[0]:,}, tokenizer {model.vocabulary[1]:,}"
        * bool(model.vocabulary[1]),
        "chat template": model.template or "none",
        "answers end at": ", ".join(model.ends) or "no token",
        "left out": ", ".join(model.left_out),
    }
    lines = [f"{name + ':':16}{text}" for name, text in rows.items() if text]
    lines += [remark for remark in model.remarks if "greedy decoding" not in remark]
    verdict = f"A run would refuse it: {model.refusal}" if model.refusal else "A run would take it."
    return [*lines, verdict]


def _facts(reference: str) -> ModelFacts:
    """Find out what a model is, as far as its files let one."""
    remarks: tuple[str, ...] = ()
    refusal = None
    try:
        remarks = check_model(reference)
    except ProbeError as error:
        refusal = str(error)
    if is_gguf(reference) and refusal is None:
        remarks = (*remarks, gguf_remark(reference))
    checkpoint = _known(lambda: fetch_checkpoint(reference, weights=False))
    if checkpoint is None:
        return ModelFacts(reference, refusal)
    config = _known(lambda: read_config(reference))
    tokenizer = _known(lambda: read_tokenizer(reference))
    settings = _known(lambda: read_settings(checkpoint.folder)) or {}
    headers = _known(lambda: read_headers(base_files(checkpoint))) or {}
    counts: Counter[str] = Counter()
    for tensor in headers.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return ModelFacts(
        reference,
        refusal,
        remarks,
        tuple(path.name for path in _known(lambda: weight_files(reference)) or ()),
        _known(lambda: fingerprint(reference)) or "",
        tuple(name for name, _ in counts.most_common()),
        counts.total(),
        str(getattr(config, "model_type", "")),
        int(getattr(config, "num_hidden_layers", 0)),
        int(getattr(config, "hidden_size", 0)),
        (int(getattr(config, "vocab_size", 0)), len(tokenizer) if tokenizer else 0),
        _template(tokenizer),
        _ends(settings, tokenizer),
        tuple(_left_out(settings)),
        _adapter(checkpoint),
    )


def _known(find: Callable[[], Fact]) -> Fact | None:
    """What a function finds; None where its file is broken, which the refusal says."""
    try:
        return find()
    except ProbeError:
        return None


def _template(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    from hashlib import sha256

    if isinstance(template, dict):
        return f"several: {', '.join(map(str, template))}"
    return f"{len(str(template)):,} characters, {sha256(str(template).encode()).hexdigest()[:8]}"


def _ends(
    settings: Mapping[str, object], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[str, ...]:
    if tokenizer is None:
        return ()
    ends = list(end_tokens(settings, tokenizer))
    names = tokenizer.convert_ids_to_tokens(ends)
    return tuple(f"{name} ({end})" for name, end in zip(names, ends, strict=True))


def _left_out(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in sorted(left_out(settings).items())]


def _adapter(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.adapter} on {checkpoint.folder}" if checkpoint.adapter else ""
