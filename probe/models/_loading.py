"""Loading a model: its weights, its tokenizer and its row of the architecture table.

A reference names a model as `probe.checkpoints` says. Parameters are frozen on loading: attribution
needs gradients of activations only, and unfrozen weights would cost a third more work and far more
memory.

    >>> model = load_model("probe:tiny-math/sft")
    >>> model.n_layers, model.d_model
    (4, 160)
"""

import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from probe.checkpoints import Checkpoint, fetch_checkpoint, stamp_of
from probe.errors import ProbeError, not_known, reason
from probe.models._architectures import GUIDE, Architecture, Heads, architecture_of
from probe.models._blocks import Blocks, Mixture, blocks_of, mixture_of, single_block, text_inside
from probe.models._graph import Graph
from probe.models._recordings import Recordings
from probe.vocabulary import DType, Granularity

if TYPE_CHECKING:
    import torch
    from nnsight.modeling.transformers import TransformersModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from probe.remote import Deployment
    from probe.vocabulary import Kernels


@dataclass(frozen=True)
class Model:
    """A causal language model, ready to generate and to be traced."""

    reference: str
    """The folder, hub id or `probe:` name it was loaded from."""

    network: "TransformersModel"
    """The nnsight model; `network._module` is the transformers module itself."""

    tokenizer: "PreTrainedTokenizerBase"
    """Its tokenizer."""

    config: "PretrainedConfig"
    """Its transformers configuration."""

    architecture: Architecture
    """Where its residual stream is written and read."""

    device: "torch.device"
    """Where its weights are."""

    dtype: "torch.dtype"
    """The precision of its weights and activations."""

    kernels: Literal["eager", "liger"] = "eager"
    """Whether it runs as transformers has it, or with fused kernels."""

    threads: int | None = None
    """CPU threads that it runs with; None for as many as torch uses, which a GPU's host may."""

    settings: Mapping[str, object] = field(default_factory=dict)
    """Its own generation settings, as they lie beside its weights; see `_decoding`."""

    deployment: "Deployment | None" = None
    """Where on a server it runs; None for here. There `network` has no weights, and `device` is
    only where inputs and results are."""

    roles_known: set[Granularity] = field(
        default_factory=set, init=False, repr=False, compare=False
    )
    """At which granularities its row was found to take no query, key or head for another: a matter
    of the row, so it is asked once."""

    readings_known: set[Granularity] = field(
        default_factory=set, init=False, repr=False, compare=False
    )
    """At which granularities its branches were found to read what the graph says."""

    recordings: Recordings = field(
        default_factory=Recordings, init=False, repr=False, compare=False
    )
    """Its passes that were recorded on its GPU."""

    @property
    def jobs(self) -> int:
        """How many batches of it may run at once."""
        return self.deployment.host.jobs if self.deployment else 1

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def context(self) -> int | None:
        """The most positions it was made for; None where its config does not say."""
        return _context(self.config)

    @property
    def turning_point(self) -> int | None:
        """The length beyond which it is another model, and batches must not lie on both sides.

        Long-context rotations (`longrope`, arXiv 2402.13753) have two sets of frequencies, and the
        longest sequence of a batch chooses for all. Those of `dynamic` begin beyond the context;
        linear, YaRN's and Llama 3's are the same for every length. None where there is no such.
        """
        table = getattr(self.config, "rope_parameters", None) or {}
        # Models with two kinds of layers have a table for each.
        tables = [table, *(part for part in table.values() if isinstance(part, dict))]
        points = [
            int(part["original_max_position_embeddings"])
            for part in tables
            if part.get("rope_type") == "longrope"
        ]
        return min(points, default=None)

    @property
    def heads(self) -> Heads:
        """The heads of its attention."""
        query = int(self.config.num_attention_heads)
        key_value = getattr(self.config, "num_key_value_heads", None) or query
        width = getattr(self.config, "head_dim", None) or self.d_model // query
        return Heads(query, int(key_value), int(width))

    def part(self, layer: int, path: str) -> "torch.nn.Module":
        """A module of a decoder layer, by its path there.

        Raises:
            ProbeError: The layer does not have it.
        """
        inside: torch.nn.Module = attrgetter(self.architecture.layers)(self.network._module)[layer]
        try:
            return inside.get_submodule(path)
        except AttributeError as error:
            raise ProbeError(
                f"{self.reference}: the row {self.config.model_type!r} of the architecture table "
                f"names {path!r}, which layer {layer} does not have; see {GUIDE}"
            ) from error

    def graph(self, granularity: Granularity) -> Graph:
        """Its residual graph.

        Raises:
            ProbeError: An unknown granularity; heads of an attention, or experts of a mixture,
                whose output is normed: then it is no sum over them; or experts where there are
                none.
        """
        row, blocks = self.architecture, self.blocks
        if granularity not in ("block", "expert"):
            self._check_attentions(granularity)
        if granularity == "head" and row.attention_output != row.attention:
            raise ProbeError(
                f"{self.reference}: {self.config.model_type} norms the sum of an attention's heads "
                "before adding it, so a head has no output of its own; use granularity qkv"
            )
        bias = False
        if granularity == "head":
            layer = next(number for number, here in enumerate(blocks) if here.attention)
            bias = getattr(self.part(layer, row.attention_projection), "bias", None) is not None
        parallel = self.says(row.parallel) or self.shares_norm
        names = ["a" * bool(here.attention) + "m" * here.ffn for here in blocks]
        mixtures = self.mixtures if granularity == "expert" else None
        splits = all(here.splits for here in blocks if here.attention)
        return Graph.build(
            self.n_layers, granularity, self.heads, bias, parallel, names, mixtures, splits
        )

    def _check_attentions(self, granularity: Granularity) -> None:
        """Refuse query, key and value, or heads, where an attention has none."""
        for layer, here in enumerate(self.blocks):
            if here.attention and not here.splits:
                raise ProbeError(
                    f"{self.reference}: {here.attention} of layer {layer} "
                    f"({self.config.model_type}) is no attention and has no query, key and value; "
                    "use granularity block"
                )
        if granularity == "head" and self.architecture.layout == "latent":
            raise ProbeError(
                f"{self.reference}: the keys of {self.config.model_type} share their rotated part "
                "over all heads, so a key has no head of its own; use granularity qkv"
            )

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The experts of each layer.

        Raises:
            ProbeError: There are none, or they have no outputs of their own.
        """
        row, kind = self.architecture, self.config.model_type
        layers = attrgetter(row.layers)(self.network._module)
        try:
            found = tuple(mixture_of(row, layer) for layer in layers)
        except ProbeError as error:
            raise ProbeError(f"{self.reference}: {error}") from error
        if not any(mixture.experts for mixture in found):
            raise ProbeError(
                f"{self.reference}: no layer of {kind} is a mixture of experts; use granularity qkv"
            )
        if row.ffn_output != row.ffn:
            raise ProbeError(
                f"{self.reference}: {kind} norms the sum of a mixture's experts before adding it, "
                "so an expert has no output of its own; use granularity qkv"
            )
        return found

    def says(self, value: str | bool) -> bool:
        """A field of the row that is a truth value, or the key of the config that has it."""
        return bool(getattr(self.config, value)) if isinstance(value, str) else value

    @property
    def shares_norm(self) -> bool:
        """Whether attention and FFN of a layer read what one norm gives."""
        return self.says(self.architecture.shared_norm)

    @cached_property
    def blocks(self) -> tuple[Blocks, ...]:
        """What each layer has."""
        row, key = self.architecture, self.architecture.single_block
        if key:
            return tuple(single_block(row, kind) for kind in getattr(self.config, key))
        layers = attrgetter(row.layers)(self.network._module)
        return tuple(blocks_of(row, layer) for layer in layers)


class ModelFiles(NamedTuple):
    """What lies beside a model's weights."""

    reference: str
    """The model."""

    tokenizer: "PreTrainedTokenizerBase"
    """Its tokenizer."""

    config: "PretrainedConfig"
    """Its config."""

    settings: Mapping[str, object]
    """Its own generation settings."""

    @property
    def context(self) -> int | None:
        """The most positions it was made for; None where its config does not say."""
        return _context(self.config)


def read_files(reference: str) -> ModelFiles:
    """Read what lies beside a model's weights.

    Raises:
        ProbeError: There is no such model here or on the hub, or a file is damaged.
    """
    from probe.models._decoding import read_settings

    folder = fetch_checkpoint(reference, weights=False).folder
    config, settings = read_config(reference), read_settings(folder)
    return ModelFiles(reference, read_tokenizer(reference), config, settings)


def _context(config: "PretrainedConfig") -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def read_config(reference: str, whole: bool = False) -> "PretrainedConfig":
    """Read a model's configuration without its weights.

    Args:
        reference: The model.
        whole: Whether to give that of a multimodal model as it is, and not that of the text decoder
            inside.

    Raises:
        ProbeError: There is no such model here or on the hub, or its config is damaged.
    """
    from transformers import AutoConfig

    folder = fetch_checkpoint(reference, weights=False).folder
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a file of strangers holds may end in any
        raise ProbeError(_cannot_read("the config", reference, error)) from error
    return config if whole else config.get_text_config(decoder=True)


def read_tokenizer(reference: str) -> "PreTrainedTokenizerBase":
    """Read a model's tokenizer.

    Raises:
        ProbeError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = fetch_checkpoint(reference, weights=False).tokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # that of tokenizers is of no narrower kind
        raise ProbeError(_cannot_read("the tokenizer", reference, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ProbeError(
            f"{folder} holds no tokenizer (tokenizer.json); copy that of the model's base into it"
        )
    return tokenizer


def tokenizer_at(reference: str) -> "PreTrainedTokenizerBase":
    """A model's tokenizer, to be looked at alone: it is read once, as long as no file changes.

    Raises:
        ProbeError: See `read_tokenizer`.
    """
    return _tokenizer_at(reference, _stamps(fetch_checkpoint(reference, weights=False)))


@lru_cache(maxsize=16)
def _tokenizer_at(reference: str, _: tuple[Hashable, ...]) -> "PreTrainedTokenizerBase":
    return read_tokenizer(reference)


def weights_checked(reference: str) -> tuple[str, ...]:
    """What `check_weights` says of a model, once as long as no file changes.

    Raises:
        ProbeError: See there.
    """
    return _weights_checked(reference, _stamps(fetch_checkpoint(reference)))


@lru_cache(maxsize=64)
def _weights_checked(reference: str, _: tuple[Hashable, ...]) -> tuple[str, ...]:
    from probe.models._fitting import check_weights

    return check_weights(reference, read_config(reference, whole=True))


def _stamps(checkpoint: Checkpoint) -> tuple[Hashable, ...]:
    """What changes with any file of a model."""
    folders = {checkpoint.folder, checkpoint.adapter or checkpoint.folder, checkpoint.tokenizer}
    files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
    return tuple((str(file), *stamp_of(file)) for file in files)


def load_model(
    reference: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    kernels: "Kernels" = "eager",
    threads: int | None = None,
    architecture: Architecture | None = None,
) -> Model:
    """Load a causal language model, frozen and in evaluation mode.

    One whose weights stay on a server is loaded by `probe.hosting.load_hosted`.

    Args:
        reference: A folder, a hub id, or the `probe:` name of a model that ships with the package.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one. Several, as in
            `cuda:0,cuda:1`, share its layers.
        dtype: `float32`, `bfloat16`, `float16` or `float64`.
        kernels: `eager`, as transformers has it; `liger`, fused kernels, which the method `relp`
            cannot use; or `auto` for these where they run.
        threads: CPU threads; by the model's size, as `threads_for` has it, if not given.
        architecture: A row to use in place of that of the architecture table.

    Raises:
        ProbeError: The model cannot be found or read, its architecture is not in the table, or
            the device or dtype is not to be had here.
    """
    import torch
    from nnsight.modeling.transformers import TransformersModel

    from probe.checkpoints import is_finite
    from probe.models._decoding import read_settings
    from probe.models._fitting import load_weights
    from probe.models._kernels import fuse, resolve_kernels

    reference = str(reference)
    check_dtype(dtype)
    place, *more = resolve_devices(device)
    if more and any(part.type != "cuda" for part in (place, *more)):
        raise ProbeError(f"device {device!r}: only CUDA devices can share a model")
    config = read_config(reference)
    architecture = architecture or architecture_of(config.model_type)
    whole = read_config(reference, whole=True)
    chosen = resolve_kernels(kernels, place, whole.model_type)
    tokenizer = read_tokenizer(reference)
    # The fused kernel for experts knows no float64.
    experts = (
        {"experts_implementation": "eager"} if architecture.experts and dtype == "float64" else {}
    )
    # Over several devices a model's layers are laid out evenly.
    layout = {"device_map": "balanced", "max_memory": _room(place, *more)} if more else {}
    weights_checked(reference)
    checkpoint = fetch_checkpoint(reference)
    with without_bars():
        module = load_weights(checkpoint, whole, getattr(torch, dtype), **experts, **layout)
    # An adapter may bring tokens.
    config.vocab_size = module.config.get_text_config(decoder=True).vocab_size
    architecture = text_inside(architecture, module)
    module.requires_grad_(False).eval()
    if not more:
        module.to(place)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            raise ProbeError(
                f"{reference}: {name} holds a number that is NaN or infinite in {dtype}; try "
                "bfloat16 or float32, or train and save the model again"
            )
    if chosen == "liger":
        fuse(module)
    # Without a device the pipeline inside would move the model to the first GPU there is.
    own = {} if more else {"device": place}
    network = TransformersModel(module, task="text-generation", tokenizer=tokenizer, **own)
    if threads is None and place.type == "cpu":
        threads = threads_for(module.num_parameters())
    settings = read_settings(checkpoint.folder)
    return Model(
        *(reference, network, tokenizer, config, architecture, place, module.dtype, chosen),
        *(threads, settings),
    )


def as_model(model: Model | str | Path) -> Model:
    """A model, loaded where its reference is given.

    Raises:
        ProbeError: It is neither, or it cannot be loaded.
    """
    if isinstance(model, str | Path):
        return load_model(str(model))
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise ProbeError(f"model is a {kind}; give a reference, or what probe.load_model returns")
    return model


def _room(*devices: "torch.device") -> dict[int | str, int]:
    """What a model may take of each device, in bytes; nothing of the others."""
    import torch

    return {device.index or 0: torch.cuda.mem_get_info(device)[0] for device in devices}


def check_dtype(dtype: str) -> None:
    """Check that a precision is known.

    Raises:
        ProbeError: It is not.
    """
    if dtype not in get_args(DType):
        raise ProbeError(not_known("dtype", dtype, get_args(DType)))


_DEVICES = ("cpu", "cuda", "mps", "xpu")
_KNOWN = "auto, cpu, cuda or cuda:0,cuda:1"


def resolve_devices(device: str) -> "list[torch.device]":
    """Turn `auto`, `cpu`, `cuda` or `cuda:0,cuda:1` into devices that exist.

    Args:
        device: The devices, by commas.

    Raises:
        ProbeError: A name is not a device, or the device is not on this machine.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = device.split(",")
    devices = []
    for name in names:
        try:
            place = torch.device(name.strip())
        except RuntimeError as error:
            raise ProbeError(f"device {name!r} is not known; use {_KNOWN}") from error
        if place.type not in _DEVICES:
            raise ProbeError(f"device {name!r} runs no models here; use {_KNOWN}")
        count = torch.cuda.device_count()
        if place.type == "cuda" and (place.index or 0) >= count:
            raise ProbeError(f"device {name!r} is not on this machine ({count} CUDA devices here)")
        devices.append(place)
    return devices


PARAMETERS_PER_THREAD = 100_000_000
"""What makes another CPU thread worth its while. On two idle cores, a second thread made scoring
1.05 times as fast at 1.2 million parameters, 1.3 at 56 and 1.6 at 163 million; on two cores with
much other work, 8 times as slow at 1.2 and 6 times at 56 million (docs/performance.md)."""


def threads_for(parameters: int) -> int:
    """How many CPU threads a model of so many parameters runs with best.

    Threads wait for each other after every operation, which is short in a small model, and where
    a core is busy they wait for the operating system. So there is one thread, and one more for
    every `PARAMETERS_PER_THREAD`, up to what torch uses. OMP_NUM_THREADS, where set, is kept.
    """
    import torch

    most = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return most
    return min(most, 1 + parameters // PARAMETERS_PER_THREAD)


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers show no progress bar, a line for each file of weights, for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads for a while, or as many as it did."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_pair(before: str, after: str) -> None:
    """Check that two models can be compared edge by edge, from their configs and tokenizers.

    Tokens that were added on one side only (a pad token, say) do no harm and are not compared.

    Raises:
        ProbeError: They differ in architecture, layers, width or vocabulary.
    """
    configs = [read_config(before), read_config(after)]
    for config in configs:
        architecture_of(config.model_type)
    for key, name in (
        ("model_type", "architecture"),
        ("num_hidden_layers", "number of layers"),
        ("hidden_size", "width"),
    ):
        left, right = (getattr(config, key) for config in configs)
        if left != right:
            raise ProbeError(
                f"{before} and {after} differ in {name} ({left} and {right}): "
                "a pair needs two checkpoints of one architecture"
            )
    vocabularies = []
    for reference in (before, after):
        tokenizer = tokenizer_at(reference)
        added = tokenizer.get_added_vocab()
        vocabularies.append({t: i for t, i in tokenizer.get_vocab().items() if t not in added})
    if vocabularies[0] != vocabularies[1]:
        differing = len(vocabularies[0].items() ^ vocabularies[1].items())
        raise ProbeError(
            f"{before} and {after} differ in tokenizer ({differing} entries of the vocabulary): "
            "a pair needs the same tokens on both sides"
        )


def _cannot_read(what: str, reference: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"cannot read {what} of {reference!r}: it brings code of its own, which is not run; "
            "save the model as a class that transformers has"
        )
    return f"cannot read {what} of {reference!r}: {reason(error)}"
