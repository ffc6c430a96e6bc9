"""How fast attribution is, against the bare forward and backward pass of the same model.

    python benchmarks/attribution.py --profile cpu            # a minute on two cores
    python benchmarks/attribution.py --profile gpu --output attribution.json
    python benchmarks/attribution.py --profile gpu --only two-cards --only local-cluster  # with Ray

Weights are random: neither time nor memory depends on them. The floor is the forward and backward
pass of the same frozen model on the same tokens, with the loss at the same positions, from the
embeddings' output on, with nothing captured. Both run in one process; a time is the median of
several, from the call to the results on the CPU. docs/performance.md explains the results.
"""

import argparse
import gc
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nnsight
import torch
import transformers
from nnsight.modeling.transformers import TransformersModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import probe
from probe.attribution import make_batch
from probe.models import architecture_of, fuse, read_tokenizer
from probe.recipe import read_recipe
from probe.run import OnEvent, Workers, on_each, progress_bar
from probe.run._cluster import cluster_of
from probe.run._parallel import Unit
from probe.tracing import MemoryMode, edge_scores, role_faults

SHAPES: dict[str, dict[str, object]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "sliding_window": None,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-55m": {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 27000,
        "tie_word_embeddings": False,
    },
    "llama-1m": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
}
GIB = 2**30
CARD = 79 * GIB  # what a card sold as 80 GB has


def random_model(
    shape: str, device: str, dtype: torch.dtype, kernels: str = "eager", **changes: object
) -> probe.Model:
    """A model of one of the shapes with random weights, made where it will run."""
    settings = SHAPES[shape] | changes
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    place = torch.device(device)
    if place.index is not None:
        torch.cuda.set_device(place)
    with place:
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    module.requires_grad_(False).eval()
    if kernels == "liger":
        fuse(module)
    tokenizer = read_tokenizer("probe:tiny-math/sft")
    network = TransformersModel(module, task="text-generation", tokenizer=tokenizer, device=place)
    row = architecture_of(config.model_type)
    return probe.Model(shape, network, tokenizer, config, row, place, dtype, kernels)


def random_sequences(model: probe.Model, lengths: list[int]) -> list[probe.Sequence]:
    """Random tokens, the last quarter of which is the answer."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (length + 1,), generator=generator).tolist()
        cut = length + 1 - max(1, length // 4)
        sequences.append(probe.Sequence(tokens[:cut], tokens[cut:]))
    return sequences


def bare_pass(
    model: probe.Model, batch: int, length: int, batches: int = 1
) -> Callable[[], object]:
    """The floor: forward and backward of the same model, nothing captured, batch after batch."""
    module = model.network._module
    sequences = random_sequences(model, [length] * batch)
    tokens = torch.tensor([[*s.prompt, *s.answer] for s in sequences], device=model.device)
    scored = len(sequences[0].answer)

    def run() -> object:
        for _ in range(batches):
            embedded = module.get_input_embeddings()(tokens[:, :-1]).detach().requires_grad_(True)
            logits = module(
                inputs_embeds=embedded, use_cache=False, logits_to_keep=scored
            ).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[:, -scored:].flatten())
            (gradient,) = torch.autograd.grad(loss, embedded)
        return gradient[0, 0, 0].item()

    return run


def attribution(
    model: probe.Model, batch: int, length: int, granularity: str = "qkv", batches: int = 1
) -> Callable[[], object]:
    """What a user calls, for so many batches."""
    sequences = random_sequences(model, [length] * batch * batches)
    return lambda: probe.attribute(model, sequences, granularity=granularity, batch_size=batch)


def clock(run: Callable[[], object], times: int = 5, warm: int = 3) -> float:
    """Median seconds of a call."""
    for _ in range(warm):
        run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak(run: Callable[[], object]) -> float:
    """GiB that a call holds at most, above what was held before it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / GIB


@contextmanager
def free_after() -> Iterator[None]:
    """Give a model's memory back after its rows."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


class Results:
    """Rows as they come; printed at once, and written at the end."""

    def __init__(self) -> None:
        """Start with none."""
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, **values: float | str) -> None:
        """Keep a row."""
        self.rows.append({"what": what, **values})
        shown = "  ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()
        )
        print(f"{what}: {shown}", flush=True)

    def view(self) -> Table:
        """All rows as a table."""
        table = Table()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        for name in names:
            table.add_column(name)
        for row in self.rows:
            cells = [row.get(name, "") for name in names]
            table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
        return table


def operations(model: probe.Model, tokens: int) -> float:
    """4 operations per weight and token: forward, and backward to the activations alone."""
    module = model.network._module
    weights = sum(p.numel() for p in module.parameters())
    return 4.0 * (weights - module.get_input_embeddings().weight.numel()) * tokens


def matrix_rate() -> float:
    """Operations per second of a large bf16 matrix product on random numbers."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()

    return 10 * 2 * 8192**3 / clock(run)


def speed(results: Results) -> None:
    """Time and share of the card's rate at several shapes, eager and fused."""
    rate = matrix_rate()
    results.add("matrix rate", tflops=rate / 1e12)
    shapes = [(1, 128), (8, 256), (32, 256), (4, 1024)]
    floors = {}
    for kernels in ("eager", "liger"):
        with free_after():
            model = random_model("mistral-7b", "cuda", torch.bfloat16, kernels)
            for batch, length in shapes:
                share = operations(model, batch * length) / rate
                for batches in (1, 4) if batch in (4, 8) else (1,):
                    bare = clock(bare_pass(model, batch, length, batches)) / batches
                    floor = floors.setdefault((batch, length, batches), bare)
                    for granularity in ("qkv", "block"):
                        run = attribution(model, batch, length, granularity, batches)
                        took = clock(run) / batches
                        results.add(
                            f"{granularity}, {kernels}, {batch} x {length}, {batches} in a row",
                            ms=1000 * took,
                            bare_ms=1000 * bare,
                            ratio_to_eager_bare=took / floor,
                            ratio_to_own_bare=took / bare,
                            share_of_rate=share / took,
                        )
            del model


def mixed(results: Results) -> None:
    """A hundred sequences of mixed length, from a loaded model to edges on disk."""
    lengths = torch.randint(100, 401, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    floor = 0.0
    for kernels in ("eager", "liger"):
        with free_after():
            model = random_model("mistral-7b", "cuda", torch.bfloat16, kernels)
            if kernels == "eager":
                floor = clock(bare_pass(model, 32, 256)) / (32 * 256) * sum(lengths)
            sequences = random_sequences(model, lengths)

            def run(model: probe.Model, sequences: list[probe.Sequence]) -> None:
                edges = probe.attribute(model, sequences)
                with tempfile.TemporaryDirectory() as folder:
                    save_file({"scores": edges.scores}, Path(folder) / "edges.safetensors")

            took = clock(lambda m=model, s=sequences: run(m, s), times=5)
            results.add(
                f"100 sequences of 100-400 tokens, {kernels}",
                ms=1000 * took,
                bare_ms=1000 * floor,
                ratio_to_eager_bare=took / floor,
            )
            del model


def memory(results: Results) -> None:
    """Peak memory of one sequence of 4096 tokens, with and without recomputation."""
    for kernels in ("eager", "liger"):
        with free_after():
            model = random_model("mistral-7b", "cuda", torch.bfloat16, kernels)
            bare = peak(bare_pass(model, 1, 4096))
            batch = make_batch(random_sequences(model, [4096]))
            for memory in (MemoryMode(), MemoryMode(recompute=True), MemoryMode(True, True)):
                took = peak(
                    lambda t=memory, m=model, b=batch: edge_scores(m, b, m.graph("qkv"), memory=t)
                )
                results.add(
                    f"memory, 1 x 4096, {kernels}, recompute {memory.recompute}, "
                    f"sources on host {memory.sources_on_host}",
                    gib=took,
                    bare_gib=bare,
                    ratio_to_own_bare=took / bare,
                )
            del model


def long(results: Results) -> None:
    """The longest sequences, on as much memory as a card of 80 GB has."""
    total = torch.cuda.get_device_properties(0).total_memory
    with free_after():
        model = random_model("qwen2.5-7b", "cuda", torch.bfloat16, "liger")
        torch.cuda.set_per_process_memory_fraction(CARD / total)
        for length in (32768, 65536):
            sequences = random_sequences(model, [length])
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            edges = probe.attribute(model, sequences)
            assert edges.scores.isfinite().all()
            results.add(
                f"1 x {length}, qwen2.5-7b, liger",
                ms=1000 * (time.perf_counter() - start),
                peak_gib=torch.cuda.max_memory_allocated() / GIB,
                residual_error=edges.residual_error,
            )
        torch.cuda.set_per_process_memory_fraction(1.0)
        del model


def equality(results: Results) -> None:
    """Fused against plain, and against float32; and with too little memory for the batch."""
    small = {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 2816}
    small |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4000}
    lengths = [256] * 8
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kernels in ("eager", "liger"):
            with free_after():
                model = random_model("mistral-7b", "cuda", torch.float32, kernels, **small)
                module = model.network._module.to(dtype)
                model = probe.Model(
                    "small",
                    model.network,
                    model.tokenizer,
                    model.config,
                    model.architecture,
                    model.device,
                    dtype,
                    model.kernels,
                )
                del module
                sequences = random_sequences(model, lengths)
                found[dtype, kernels] = probe.attribute(model, sequences, batch_size=8).scores
                if kernels == "eager" and dtype == torch.float32:
                    need = peak(lambda m=model, s=sequences: probe.attribute(m, s, batch_size=8))
                    gc.collect()
                    torch.cuda.empty_cache()
                    held = torch.cuda.memory_allocated()
                    total = torch.cuda.get_device_properties(0).total_memory
                    torch.cuda.set_per_process_memory_fraction((held + need * GIB / 3) / total)
                    batches: list[int] = []
                    less = probe.attribute(
                        model,
                        sequences,
                        batch_size=8,
                        finished=lambda places, _, b=batches: b.append(len(places)),
                    ).scores
                    torch.cuda.set_per_process_memory_fraction(1.0)
                    truth = found[dtype, kernels]
                    error = float((less - truth).abs().max() / truth.abs().max())
                    results.add(
                        f"out of memory provoked, float32: batches of {batches} instead of [8]",
                        largest_difference=error,
                    )
                del model
    truth = found[torch.float32, "eager"]
    for (dtype, kernels), scores in found.items():
        results.add(
            f"{kernels} {str(dtype).removeprefix('torch.')} against eager float32",
            largest_difference=float((scores - truth).abs().max() / truth.abs().max()),
            frobenius=float((scores - truth).norm() / truth.norm()),
        )


def check_cost(results: Results, model: probe.Model, batch: int, length: int, what: str) -> None:
    """What the checks of a model's first batch add to it: on and off in turn, and the role pass.

    A run pays both once for each model and granularity, however many batches follow.
    """
    graph, sequences = model.graph("qkv"), make_batch(random_sequences(model, [length] * batch))

    def run(check: bool) -> None:
        found = edge_scores(model, sequences, graph, check=check)
        found.scores.cpu()
        float(found.residual_error)

    rounds: list[dict[bool, float]] = []
    for turn in range(12):
        rounds.append({})
        for check in (True, False) if turn % 2 else (False, True):
            start = time.perf_counter()
            run(check)
            rounds[-1][check] = time.perf_counter() - start
    del rounds[:2]  # they warm up
    off = statistics.median(seconds[False] for seconds in rounds)
    more = statistics.median(seconds[True] - seconds[False] for seconds in rounds)
    roles = clock(lambda: role_faults(model, graph), times=5, warm=1)
    results.add(
        f"checks of the first batch, {what}, {batch} x {length}",
        unchecked_ms=1000 * off,
        check_ms=1000 * more,
        role_pass_ms=1000 * roles,
        ratio_to_unchecked=1 + (more + roles) / off,
    )


def checks(results: Results) -> None:
    """What the checks of the first batch cost at the 7B Mistral shape."""
    for kernels in ("eager", "liger"):
        with free_after():
            model = random_model("mistral-7b", "cuda", torch.bfloat16, kernels)
            for batch, length in ((1, 128), (8, 256), (32, 256)):
                check_cost(results, model, batch, length, f"mistral-7b, {kernels}")
            del model


def exact_rate(results: Results, model: probe.Model, length: int, count: int, what: str) -> None:
    """Edges that are removed in a second, beside plain forward passes of the same prompt.

    The edges are drawn evenly over the graph. Both run in batches; of the plain ones, the fastest
    size counts.
    """
    graph, sequence = model.graph("qkv"), random_sequences(model, [length])[0]
    every = graph.mask.nonzero()
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(3))[:count]
    edges = [probe.Edge(0, *edge) for edge in every[drawn].tolist()]
    module, scored = model.network._module, len(sequence.answer)
    tokens = torch.tensor([[*sequence.prompt, *sequence.answer][:-1]], device=model.device)

    def plain(batch: int) -> None:
        with torch.no_grad():
            rows = tokens.expand(batch, -1)
            module(input_ids=rows, use_cache=False, logits_to_keep=scored).logits[0, 0, 0].item()

    passes = max(batch / clock(lambda batch=batch: plain(batch), 3, 1) for batch in (8, 32, 64))
    rate = count / clock(lambda: probe.exact_effects(model, [sequence], edges).sum().item(), 1, 1)
    results.add(
        f"exact, {what}, 1 x {length}, {count} edges",
        edges_per_second=rate,
        plain_passes_per_second=passes,
        ratio=rate / passes,
    )


def exact(results: Results) -> None:
    """Exact effects at the 7B Mistral shape."""
    with free_after():
        model = random_model("mistral-7b", "cuda", torch.bfloat16)
        exact_rate(results, model, 256, 1024, "mistral-7b, eager")
        del model


def cpu(results: Results, threads: int) -> None:
    """The shape and length at which the published method's own code was timed."""
    torch.set_num_threads(threads)
    model = random_model("llama-55m", "cpu", torch.float32)
    parameters = sum(p.numel() for p in model.network._module.parameters())
    for batch in (1, 8):
        bare = clock(bare_pass(model, batch, 128), times=5, warm=1)
        took = clock(attribution(model, batch, 128), times=5, warm=1)
        results.add(
            f"attribution qkv, {parameters / 1e6:.0f} M parameters, {batch} x 128, float32, "
            f"{threads} thread, a sample",
            ms=1000 * took / batch,
            bare_ms=1000 * bare / batch,
            ratio_to_own_bare=took / bare,
            peak_gib_of_process=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        )
    check_cost(results, model, 1, 128, "55 M parameters")
    model = random_model("llama-1m", "cpu", torch.float32)
    for batch, length in ((1, 32), (16, 64)):
        bare = clock(bare_pass(model, batch, length))
        took = clock(attribution(model, batch, length))
        results.add(
            f"attribution qkv, 1 M parameters, {batch} x {length}",
            ms=1000 * took,
            bare_ms=1000 * bare,
            ratio_to_own_bare=took / bare,
        )
        check_cost(results, model, batch, length, "1 M parameters")


class Worked(NamedTuple):
    """When a piece of work was where, in seconds."""

    began: float
    """Its process was there."""

    ready: float
    """Its model was there, and had run once."""

    ended: float
    """All was done."""


def work_on(batches: int, *, device: str, on_event: OnEvent) -> Worked:
    """Attribute on one card."""
    began = time.time()
    model = random_model("mistral-7b", device, torch.bfloat16, "liger")
    sequences = random_sequences(model, [256] * 32 * batches)
    probe.attribute(model, sequences[:64])
    ready = time.time()
    probe.attribute(model, sequences)
    return Worked(began, ready, time.time())


def until_both_work(found: Sequence[Worked], before: float, what: str) -> dict[str, float]:
    """How long it took from a moment until processes and models were there."""
    return {
        f"seconds_until_processes_{what}": max(work.began for work in found) - before,
        f"seconds_until_both_work_{what}": max(work.ready for work in found) - before,
    }


def two_cards(results: Results) -> None:
    """A pair of models, one after the other on one card, and at once on two; then a phase more."""
    work = [partial(work_on, 80)] * 2
    alone = on_each(work, ["cuda:0"], print)
    gc.collect()
    torch.cuda.empty_cache()
    with Workers(["cuda:0", "cuda:1"]) as workers:
        start = time.time()
        together = workers.do(work, print)
        waited = until_both_work(together, start, "first")
        start = time.time()
        waited |= until_both_work(workers.do([partial(work_on, 2)] * 2, print), start, "later")
    one = sum(work.ended - work.ready for work in alone)
    two = max(work.ended for work in together) - min(work.ready for work in together)
    results.add(
        "a pair, 2 x 2560 sequences of 256 tokens, liger, two cards against one",
        ms=1000 * two,
        one_card_ms=1000 * one,
        times_faster=one / two,
        times_faster_once_both_work=one / max(work.ended - work.ready for work in together),
        **waited,
    )


def local_cluster(results: Results) -> None:
    """The pair of `two-cards` as `--cluster local` places it; to be held against `one_card_ms`."""
    # Ray asks for a model's files; what is made on a card here is of random numbers.
    units = [
        Unit(f"model {number}", "probe:tiny-math/sft", 1, partial(work_on, 80))
        for number in range(2)
    ]
    recipe = read_recipe("tiny-math", {"compute.cluster": "local"})
    before = time.time()
    with cluster_of(recipe, print) as cluster, progress_bar(Console()) as progress:
        assert cluster is not None
        together = cluster.do(units, None, progress, "two cards")
    two = max(work.ended for work in together) - min(work.ready for work in together)
    results.add(
        "the same pair on two cards by --cluster local",
        ms=1000 * two,
        **until_both_work(together, before, "first"),
    )


CASES = {
    "speed": speed,
    "checks": checks,
    "exact": exact,
    "mixed": mixed,
    "memory": memory,
    "long": long,
    "equality": equality,
    "two-cards": two_cards,
    "local-cluster": local_cluster,
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--only", choices=list(CASES), action="append", help="GPU cases to run")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU profile")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    results = Results()
    machine = platform.processor() or platform.machine()
    if options.profile == "cpu":
        cpu(results, options.threads)
    else:
        machine = torch.cuda.get_device_name()
        names = options.only or list(CASES)
        if not options.only:  # Ray's is asked for by name: it is an extra
            names.remove("local-cluster")
            if torch.cuda.device_count() < 2:
                names.remove("two-cards")
        for name in names:
            CASES[name](results)
    Console(width=160).print(results.view())
    about = {
        "date": date.today().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nnsight": nnsight.__version__,
        "probe": probe.__version__,
    }
    print(json.dumps(about))
    if options.output:
        options.output.write_text(json.dumps({**about, "rows": results.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
