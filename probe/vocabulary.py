"""Vocabulary: the words and constants that a recipe and the engines behind it share.

Plain data only, so that a recipe can be read and checked without torch.

    >>> typing.get_args(Granularity)
    ('qkv', 'block', 'head', 'expert')
"""

from typing import Literal

DType = Literal["float32", "bfloat16", "float16", "float64"]
"""Precision of weights and activations."""

Kernels = Literal["auto", "eager", "liger"]
"""Kernels of transformers (`eager`), fused ones (`liger`), or these where they run."""

Engine = Literal["auto", "continuous", "static"]
"""How batches of prompts are answered; see `probe.solutions`."""

Decoding = Literal["greedy", "model"]
"""How tokens are chosen: greedily, or by the model's own settings; see `probe.models`."""

Grading = Literal["math", "exact"]
"""How answers are compared: by what they mean as mathematics, or as texts."""

Convention = Literal["code", "paper"]
"""Whose rules of selection: those of the published code, or of the paper's text."""

Granularity = Literal["qkv", "block", "head", "expert"]
"""How fine attentions and mixtures of experts are; see `probe.models.Graph`."""

Ablation = Literal["zero", "mean"]
"""What removing an edge leaves of its source's output: nothing, or its mean."""

Steps = int | Literal["auto"]
"""Points of an integral; `auto` also chooses a way on which they come near it."""

BINS = 100
"""Bins of the histogram behind the entropies."""

RESAMPLES = 1000
"""How many times edges are drawn for an interval of faithfulness."""

CUT_OFF_SHARE = 0.1
"""A run and its report say so where more answers than this did not end."""

FLIPS = 20_000
"""Random sign flips behind a p-value, at the least."""

JOBS = 4
"""How many batches may be under way on a server at once."""

TIMEOUT = 600
"""Seconds without a sign of life from a server after which a batch is sent once more."""

HOSTED = "ndif"
"""The address that stands for the hosted NDIF."""

KEY_VARIABLE = "NDIF_API_KEY"
"""The environment variable that holds the key of a server."""
