"""How fast are answers written: static batches of 32 against the continuous engine.

    python benchmarks/generation.py                # 7B Mistral shape on a GPU, about three minutes
    python benchmarks/generation.py --variants     # also other settings of the continuous engine
    python benchmarks/generation.py --prompts 1319 # as many as GSM8K has, about six minutes more
    python benchmarks/generation.py --small        # SmolLM2-135M's shape in float32 on a GPU
    python benchmarks/generation.py --tiny         # a small model on a CPU, to try it out

Weights are random (bfloat16 on a GPU), so no answer ends by itself: the end-of-sequence token is
off, and each prompt has a forced length. These lengths are synthetic: the quantiles of a lognormal
distribution with mean 200 and largest value near 700 tokens, which is about what a 7B model writes
on GSM8K; prompts likewise, with mean 110. Every prompt is its own random tokens.

Prints one JSON line and a table. An engine that fails is shown with its reason.
"""

import argparse
import gc
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, MistralConfig

import probe.solutions._continuous
import probe.solutions._flash
from probe.models import Model, architecture_of
from probe.solutions import generate
from probe.vocabulary import Engine

SHAPE = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
SMALL = SHAPE | {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
BATCH_SIZE = 32


def lengths(number: int, mean: float, spread: float, seed: int) -> list[int]:
    """Quantiles of a lognormal distribution, shuffled."""
    middle = math.log(mean) - spread**2 / 2
    parts = [(place + 0.5) / number for place in range(number)]
    values = [round(math.exp(NormalDist(middle, spread).inv_cdf(part))) for part in parts]
    random.Random(seed).shuffle(values)
    return values


def random_model(shape: dict[str, int | None], device: str, dtype: torch.dtype) -> Model:
    """A model of random weights, made on the device; no token ends its answers."""
    config = MistralConfig(**shape, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.requires_grad_(False).eval()
    module.generation_config.eos_token_id = None
    return Model(
        "random",
        SimpleNamespace(_module=module),
        SimpleNamespace(eos_token_id=None, pad_token_id=0),
        config,
        architecture_of("mistral"),
        torch.device(device),
        dtype,
    )


@contextmanager
def settings(requests: int | None = None, flash: bool = True, **options: object) -> Iterator[None]:
    """Let the continuous engine have other settings for a while."""
    usual, usable = probe.solutions._continuous.REQUESTS, probe.solutions._flash.usable
    finish = ContinuousBatchingConfig.__post_init__

    def changed(config: ContinuousBatchingConfig) -> None:
        finish(config)
        for name, value in options.items():
            setattr(config, name, value)

    probe.solutions._continuous.REQUESTS = requests or usual
    if not flash:
        probe.solutions._flash.usable = lambda *given: False
    ContinuousBatchingConfig.__post_init__ = changed
    try:
        yield
    finally:
        probe.solutions._continuous.REQUESTS, probe.solutions._flash.usable = usual, usable
        ContinuousBatchingConfig.__post_init__ = finish


def mean_gap(model: Model, prompts: list[list[int]], answers: dict[int, list[int]]) -> float:
    """How far the logits of some answers' tokens lie below the largest, in standard deviations.

    Random weights leave the largest logits so close together that rounding decides, so two runs
    differ in words; but a token of a greedy answer is never far from the largest, and a token that
    was chosen from wrong numbers is.
    """
    gaps = []
    for place in range(min(4, len(prompts))):
        tokens = torch.tensor([prompts[place] + answers[place]], device=model.device)
        with torch.inference_mode():
            logits = model.network._module(tokens).logits[0].float()
        logits = logits[len(prompts[place]) - 1 : -1]
        chosen = logits.gather(1, tokens[0, len(prompts[place]) :, None])[:, 0]
        gaps.append((logits.max(1).values - chosen) / logits.std(1))
    return round(float(torch.cat(gaps).mean()), 5)


def measure(
    model: Model, prompts: list[list[int]], limits: list[int], engine: Engine
) -> dict[str, object]:
    """Time one engine on all prompts, and see whether what it wrote is greedy."""
    cuda = model.device.type == "cuda"
    answers: dict[int, list[int]] = {}
    said: list[str] = []
    attention = model.config._attn_implementation
    try:
        few = prompts[:BATCH_SIZE]
        list(generate(model, few, [4] * len(few), engine=engine, say=said.append))
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        first = None
        for finished in generate(
            model, prompts, limits, batch_size=BATCH_SIZE, engine=engine, say=said.append
        ):
            first = first or time.perf_counter() - start
            answers |= {answer.place: answer.tokens for answer in finished}
        seconds = time.perf_counter() - start
    except Exception as error:  # the other engine is still worth measuring
        return {"failed": f"{type(error).__name__}: {error}"}
    found = [len(answers[place]) for place in range(len(prompts))]
    assert found == limits, "an answer has not its forced length"
    assert model.config._attn_implementation == attention, "the attention was not switched back"
    result: dict[str, object] = {
        "tokens": sum(found),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(found) / seconds, 1),
        "first_answer_seconds": round(first or seconds, 2),
        "mean_gap": mean_gap(model, prompts, answers),
    }
    if said:  # that another way was taken than the best
        result["said"] = sorted(set(said))
    if cuda:
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        gc.collect()
        result["left_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model in float32 on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    parser.add_argument("--variants", action="store_true", help="more settings of the engine")
    parser.add_argument("--skip-static", action="store_true", help="the continuous engine alone")
    parser.add_argument("--prompts", type=int, help="how many; 256, or 48 with --tiny")
    options = parser.parse_args()

    number = options.prompts or (48 if options.tiny else 256)
    device = "cpu" if options.tiny else "cuda"
    dtype = torch.float32 if options.tiny or options.small else torch.bfloat16
    shape = TINY if options.tiny else SMALL if options.small else SHAPE
    limits = lengths(number, 20 if options.tiny else 200, 0.47, seed=1)
    draw = random.Random(2)
    start = time.perf_counter()
    model = random_model(shape, device, dtype)
    prompts = [
        [draw.randrange(3, int(model.config.vocab_size)) for _ in range(size)]
        for size in lengths(number, 110, 0.4, seed=3)
    ]
    print(f"model ready after {time.perf_counter() - start:.1f} s", flush=True)

    runs: list[tuple[str, Engine, dict[str, Any]]] = [
        ("static batches of 32", "static", {}),
        ("continuous, as probe uses it", "continuous", {}),
    ]
    if options.skip_static:
        runs = runs[1:]
    if options.variants:
        runs += [
            ("continuous, no CUDA graphs", "continuous", {"use_cuda_graph": False}),
            ("continuous, steps overlap", "continuous", {"use_async_batching": True}),
            ("continuous, 512 at once", "continuous", {"requests": 512}),
            ("continuous, masks (sdpa)", "continuous", {"flash": False}),
            ("continuous, masks, 64 at once", "continuous", {"flash": False, "requests": 64}),
        ]
    results: dict[str, dict[str, object]] = {}
    for name, engine, changes in runs:
        with settings(**changes):
            results[name] = measure(model, prompts, limits, engine)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    base = results[runs[0][0]].get("tokens_per_second")
    for result in results.values():
        if isinstance(base, float) and "tokens_per_second" in result:
            result["times"] = round(float(str(result["tokens_per_second"])) / base, 2)
    here = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": number,
        "mean_length": round(sum(limits) / number, 1),
        "longest": max(limits),
    }
    print(json.dumps(here | {"results": results}))
    columns = ["tokens_per_second", "times", "seconds", "peak_gb", "left_gb", "mean_gap"]
    print(" ".join(["engine".ljust(30), *(column.rjust(18) for column in columns)]))
    for name, result in results.items():
        cells = [str(result.get(column, "")).rjust(18) for column in columns]
        failed = [f"failed: {result['failed']}"] if "failed" in result else cells
        print(" ".join([name.ljust(30), *failed]))


if __name__ == "__main__":
    main()
