"""Sections: the parts of a recipe, each a dataclass whose docstrings are its documentation.

>>> Pair(name="mine", before="a/b", after="a/c").max_new_tokens
1024
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from probe.vocabulary import (
    BINS,
    FLIPS,
    JOBS,
    TIMEOUT,
    Ablation,
    Convention,
    Decoding,
    DType,
    Engine,
    Grading,
    Granularity,
    Kernels,
)

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""A key that is not known is an error."""


def whole_number(value: object) -> object:
    """Let no true, "3" or 3.0 pass for a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number was expected")
    return value


CHAT = "chat"
"""The prompt that stands for the tokenizer's chat template."""


def names_of(value: object) -> object:
    """Names in a list, or in one text with commas; `none` for none."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    return [] if value in (["none"], [""]) else value


def _prompt(value: str) -> str:
    if value != CHAT and "{question}" not in value:
        raise ValueError("a prompt needs {question} in it, or is just 'chat'")
    return value


def _place(value: str) -> str:
    if "\0" in value:
        raise ValueError("a name without a zero byte was expected, as no file has one")
    return value


Number = Annotated[int, BeforeValidator(whole_number), Field(ge=1)]
Count = Annotated[int, BeforeValidator(whole_number), Field(ge=1, lt=2**31)]
Seed = Annotated[int, BeforeValidator(whole_number), Field(ge=0, lt=2**63)]
Place = Annotated[str, AfterValidator(_place)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


CLUSTER = r"^(auto|local|(ray://)?[A-Za-z0-9_.-]+:[0-9]+)?$"
"""What a cluster may be called."""


class Asked(NamedTuple):
    """A model as a pair asks it: all that its solutions depend on."""

    model: str
    """Its reference."""

    prompt: str
    """The literal prompt."""

    max_new_tokens: int
    """Longest answer, in tokens."""

    stop: tuple[str, ...]
    """Texts that end an answer."""

    given: str | None
    """Where its solutions come from: a file, or the address of a server."""

    @property
    def file(self) -> str | None:
        """A file with solutions that it has written already."""
        return None if is_address(self.given) else self.given

    @property
    def server(self) -> str | None:
        """The address of a server that writes them."""
        return self.given if is_address(self.given) else None


def is_address(given: str | None) -> bool:
    """Whether solutions come from a server."""
    return given is not None and given.lower().startswith(("http://", "https://"))


@dataclass(frozen=True, config=STRICT)
class SolutionFiles:
    """Solutions that are generated elsewhere; see `probe.solutions` for what is understood."""

    before: Place | None = None
    """A file or folder with those of the model before, or the address of a server that writes them,
    `http://host:8000/v1`; None to generate them here."""

    after: Place | None = None
    """Likewise of the model after."""


@dataclass(frozen=True, config=STRICT)
class Shape:
    """How large the two models of a pair are, so that a plan needs neither of them."""

    parameters: Number
    """How many numbers one model has."""

    n_layers: Count
    """Decoder layers."""

    d_model: Count
    """Width of the residual stream."""

    d_ffn: Count
    """Width inside an FFN."""


@dataclass(frozen=True, config=STRICT)
class Pair:
    """Two checkpoints of one architecture."""

    name: Name
    """Its name in tables and file names."""

    before: Place
    """The model before: a folder, a hub id, or any other [reference](own-model.md)."""

    after: Place
    """The model after."""

    method: str = ""
    """How the one became the other: GRPO, PPO, DPO, ..."""

    prompt: Annotated[str, AfterValidator(_prompt)] = "{question}"
    """The literal prompt; `{question}` in it stands for the question. `chat`: the tokenizer's chat
    template, around the question and a request to box the answer; `chat: TEXT` around this text."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""

    shape: Shape | None = None
    """How large its models are; only a plan reads it, and only where they are not here."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, as an end-of-sequence token does; see `probe.solutions`."""

    solutions: SolutionFiles = Field(default_factory=SolutionFiles)
    """Files with solutions that were generated elsewhere, or servers that write them."""

    def asked(self) -> tuple[Asked, Asked]:
        """How it asks its two models."""
        how = (self.prompt, self.max_new_tokens, self.stop)
        return (
            Asked(self.before, *how, self.solutions.before),
            Asked(self.after, *how, self.solutions.after),
        )


@dataclass(frozen=True, config=STRICT)
class Trajectory:
    """Checkpoints of one training, each compared with the model that it began from."""

    name: Name
    """Its name; its pairs are called `name-step-100`. Names that differ by `-seed-1` alone are one
    training from several seeds."""

    base: Place
    """The model before training."""

    checkpoints: Place | tuple[Place, ...]
    """The checkpoints, or a pattern for those in a trainer's output folder:
    `runs/grpo#checkpoint-*`."""

    steps: tuple[Annotated[int, BeforeValidator(whole_number), Field(ge=0)], ...] = ()
    """The step of each; where there are none, they are read from names like `step_100`."""

    method: str = ""
    """As of a pair, like all that follows."""

    prompt: Annotated[str, AfterValidator(_prompt)] = "{question}"
    """The literal prompt, or `chat`."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""

    shape: Shape | None = None
    """How large its models are."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer."""


class Comparison(NamedTuple):
    """One pair on one benchmark at one alpha."""

    pair: Pair
    """The pair."""

    benchmark: str
    """The benchmark's name."""

    alpha: float
    """Scored length as a share of the reference length."""

    @property
    def name(self) -> str:
        """The part of a file name that says which comparison of a run it belongs to."""
        return f"{self.pair.name}.{self.benchmark}.alpha-{self.alpha:g}"

    @property
    def key(self) -> tuple[str, str, float]:
        """Names of pair and benchmark, and alpha."""
        return self.pair.name, self.benchmark, self.alpha


@dataclass(frozen=True, config=STRICT)
class BenchmarkChoice:
    """A benchmark to solve."""

    name: Name
    """A name in `probe.problems.BENCHMARKS`; any name for a file of one's own."""

    path: Place | None = None
    """A local file or folder with its problems, instead of the benchmark's own source."""

    grading: Grading | None = None
    """`math` or `exact`: how answers are compared, as mathematics where not given. A file of one's
    own must say it."""


@dataclass(frozen=True, config=STRICT)
class Compute:
    """Where and how precisely the models run."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or several by commas: then models take turns on them."""

    dtype: DType = "bfloat16"
    """Precision of weights and activations; scores are accumulated in float32 in any case."""

    kernels: Kernels = "auto"
    """Fused kernels (`liger`), those of transformers (`eager`), or fused ones where they run."""

    threads: Count | None = None
    """Threads of a run on CPU; by each model's size if not given (docs/performance.md)."""

    cluster: Annotated[str, Field(pattern=CLUSTER)] = ""
    """`auto`, `local`, `ray://host:port` or `host:port`: the Ray cluster whose nodes run the
    models; `auto` is the one that this machine is in. See docs/cluster.md."""

    gpus: Annotated[int, BeforeValidator(whole_number), Field(ge=0)] | Literal["auto"] = "auto"
    """How many GPUs a model gets on a cluster; `auto` is one, or none where it has none."""

    remote: str = ""
    """`ndif` or `http://host:port`: the NDIF server that runs the models; nothing to run them
    here. See `probe.remote`."""

    jobs: Count = JOBS
    """How many batches may be under way on that server at once."""

    timeout: Count = TIMEOUT
    """Seconds without a sign of life from that server after which a batch is sent once more, and
    for which other faults are tried again."""

    @property
    def device_here(self) -> str:
        """The device; with a server the CPU, and with a cluster what this machine has."""
        return "cpu" if self.remote else "auto" if self.cluster else self.device


@dataclass(frozen=True, config=STRICT)
class SolutionOptions:
    """How the problems are solved."""

    questions: Count | Literal["all"] = "all"
    """How many questions of each benchmark; a random part if fewer than all."""

    seed: Seed = 42
    """Seed of that part."""

    engine: Engine = "auto"
    """`continuous` or `static` batches; `auto` is continuous on a GPU; see `probe.solutions`."""

    server: str = ""
    """Address of a server that speaks OpenAI's API and writes the solutions, `http://host:8000/v1`;
    behind a `#` its name of a model. Files and servers that a pair names come before it."""

    batch_size: Count = 32
    """How many questions run at once in a static batch, or are under way on such a server."""

    decoding: Decoding = "greedy"
    """`greedy`, or `model`: by the settings in the model's own generation_config.json, where they
    draw with `seed`; in static batches, and not on a server. See `probe.models`."""


@dataclass(frozen=True, config=STRICT)
class SelectionOptions:
    """Which questions are compared; the constants are those of the published runs."""

    alpha: tuple[Positive, ...] = (0.03, 0.1, 0.3, 0.5)
    """Scored lengths, as shares of the reference length; none of them: only accuracy is wanted."""

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Shortest answer, as a share of the reference length."""

    gamma: Positive = 1.5
    """Longest answer, likewise."""

    delta: Positive = 0.5
    """Largest difference of the two lengths, as a share of their mean."""

    samples: Count = 1000
    """At most this many questions: a budget. Of fewer that qualify, all are scored."""

    seed: Seed = 42
    """Seed of their draw."""

    convention: Convention = "code"
    """The published code's rules or the paper's; see `probe.solutions`."""


@dataclass(frozen=True, config=STRICT)
class AttributionOptions:
    """How edges are scored."""

    method: str = "eap"
    """A name in `probe.attribution.METHODS`."""

    granularity: Granularity = "qkv"
    """`qkv`, `block`, `head` or `expert`; see `probe.models`."""

    ablation: Ablation = "zero"
    """What is left of a removed output: nothing, or its `mean` over a side's sequences."""

    ig_steps: Count | Literal["auto"] = "auto"
    """Points of the integral of `eap-ig` from the embedding that the ablation leaves. `auto`: 60,
    with zero ablation from the mean of a sequence's own embeddings."""

    target: str = "loss"
    """What is differentiated: a name in `probe.tracing.TARGETS`."""

    batch_size: Count | Literal["auto"] = "auto"
    """How many sequences (for `exact`: edges) run at once; `auto` for as many as make it faster and
    fit into memory."""

    control: Annotated[tuple[str, ...], BeforeValidator(names_of)] = ("sharpness", "loss-matched")
    """Names in `probe.stats.CONTROLS`, `"none"` for none of them. Each scores more sides: the
    two of the default cost about as much as the raw change."""


@dataclass(frozen=True, config=STRICT)
class FaithfulnessOptions:
    """Whether and how methods are compared with the exact effects of edges."""

    edges: Annotated[int, BeforeValidator(whole_number), Field(ge=0)] = 0
    """How many edges of each model are computed exactly; 0 to leave this out."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("eap", "eap-ig", "relp")
    """What is compared; the edges are drawn by the strength that the first one gives them."""

    sequences: Count = 8
    """How many sequences of each model the edges are from."""

    seed: Seed = 42
    """Seed of the draw."""

    batch_size: Count = 32
    """How many edges run at once."""


@dataclass(frozen=True, config=STRICT)
class ReportOptions:
    """How metrics are computed and shown."""

    bins: Count = BINS
    """Bins of the histogram behind the entropies."""

    resamples: Annotated[int, BeforeValidator(whole_number), Field(ge=0)] = FLIPS
    """How many random sign flips a p-value is from (more, if many cells need it); 0 leaves all
    statistics out."""

    extra: tuple[str, ...] = ("overlap",)
    """Further tables: names in `probe.report.EXTRAS`, which says what costs another pass."""

    entries: Literal["dense", "real"] = "dense"
    """What tables show: metrics over the dense matrix (the paper's) or over real edges only.
    The JSON holds both."""
