"""Known answers: pairs of models whose true difference is known, through the whole pipeline.

Each case changes the SFT model that ships with the package in one known way, and lets a recipe
compare the two. It is right if everything that is there was found, and nothing else. What a case
asks is in its docstring; a case that needs a control which the report does not have is wrong.

    python benchmarks/known_answers.py                      # minutes on two cores
    python benchmarks/known_answers.py --questions 300
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import probe
from probe.attribution import EdgeScores
from probe.checkpoints import PACKAGE_DATA
from probe.recipe import recipe_from
from probe.report import build_report
from probe.stats import Accuracy, Cell, shares_of_edges
from probe.store import RunFolder

SFT = PACKAGE_DATA / "tiny-math" / "sft"
LAYERS, HEADS, WIDTH = 4, 4, 40
ALPHA = 0.3
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What the pipeline says of one pair."""

    cells: dict[str, Cell]
    """The raw cells by their metric."""

    controls: dict[tuple[str, str], Cell]
    """Those of a control, by control and metric."""

    accuracy: Accuracy
    """How many questions both models solve."""

    moved: dict[str, float]
    """How far each matrix moved, relative to its size."""

    sides: tuple[EdgeScores, ...]
    """The edges of both models; none where no question is left to compare."""

    missing: str
    """Why there are none."""

    @property
    def starred(self) -> set[str]:
        """The metrics with a star."""
        return {name for name, cell in self.cells.items() if cell.significant}

    @property
    def largest(self) -> str:
        """The source whose share of the scores changed most."""
        names = [str(name) for name in self.sides[0].graph.sources]
        return max(names, key=lambda name: abs(self.share_change(name)))

    def share_change(self, node: str) -> float:
        """How the share of a source in the scores changed: log of the geometric mean of ratios."""
        graph = self.sides[0].graph
        row = list(map(str, graph.sources)).index(node)
        chosen = graph.mask.nonzero()[:, 0].numpy() == row
        old, new = (shares_of_edges(s.scores, s.graph)[:, chosen].sum(1) for s in self.sides)
        return float(np.log((new + 1e-12) / (old + 1e-12)).mean())

    def most_fallen(self, source: str, target: str) -> bool:
        """Whether, of all edges out of a source, this one lost the largest part of its share."""
        graph = self.sides[0].graph
        row, column = list(map(str, graph.sources)).index(source), graph.targets.index(target)
        places = graph.mask.nonzero()
        old, new = (shares_of_edges(side.scores, graph).mean(0) for side in self.sides)
        ratio = {
            int(place[1]): new[i] / old[i] for i, place in enumerate(places) if place[0] == row
        }
        return min(ratio, key=lambda key: ratio[key]) == column

    def silent(self, node: str) -> bool:
        """Whether every edge out of a node scores 0 after, and some do before."""
        row = list(map(str, self.sides[0].graph.sources)).index(node)
        before, after = (side.scores[:, row].abs() for side in self.sides)
        return bool(before.max() > 0 and after.max() == 0)


class Case(NamedTuple):
    """A pair with a known answer."""

    change: Callable[[Weights], None]
    """What makes the model after of that before."""

    right: Callable[[Found], dict[str, bool]]
    """What must have been found, and what not, by what it is."""


def nothing(found: Found) -> dict[str, bool]:
    """Nothing may be found: the two compute the same."""
    rest = [abs(cell.change or 0) for cell in found.cells.values()]
    return {
        "no star": not found.starred,
        "no change": max(rest) < 1e-4,
        "the same answers": found.accuracy.gained == found.accuracy.lost == 0,
    }


def broken(found: Found) -> dict[str, bool]:
    """It solves nothing any more: accuracy fell, and the report says why it has no cell."""
    return {
        "accuracy fell": bool(found.accuracy.significant)
        and found.accuracy.after < found.accuracy.before,
        "said why nothing is compared": "no question that both models solve" in found.missing
        or bool(found.sides),
        "one matrix moved": sum(by > 0 for by in found.moved.values()) == 1,
    }


def only(*matrices: str) -> Callable[[Found], bool]:
    """Whether these matrices moved, and no other."""
    return lambda found: {name for name, by in found.moved.items() if by > 0} == set(matrices)


def same_answers(found: Found) -> bool:
    """Whether both solve the same questions, and accuracy has no star."""
    alike = found.accuracy.gained == found.accuracy.lost == 0
    return alike and not found.accuracy.significant


def at_equal_loss(found: Found, metric: str = "activation_intensity") -> bool:
    """Whether a control at equal loss takes the change away."""
    cell = found.controls.get(("equal loss", metric))
    return cell is not None and not cell.significant


def layer(number: int, part: str) -> str:
    """The name of a matrix."""
    return f"model.layers.{number}.{part}.weight"


def itself(weights: Weights) -> None:
    """A model and itself."""


def sharpened(weights: Weights) -> None:
    """The logits twice as far apart: surer, and nothing else."""
    weights["model.norm.weight"] *= 2


def flattened(weights: Weights) -> None:
    """The logits half as far apart."""
    weights["model.norm.weight"] /= 2


def noise(size: float) -> Callable[[Weights], None]:
    """Noise of a known size on every matrix."""

    def change(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(7)
        for name, values in weights.items():
            random = torch.randn(values.shape, generator=generator)
            weights[name] = values + size * values.norm() * random / random.norm()

    return change


def rounded(weights: Weights) -> None:
    """Every weight rounded to bfloat16."""
    for name, values in weights.items():
        weights[name] = values.bfloat16().float()


def attention_silenced(weights: Weights) -> None:
    """The attention of layer 1 writes nothing."""
    weights[layer(1, "self_attn.o_proj")] *= 0


def attention_weaker(weights: Weights) -> None:
    """The attention of layer 1 writes a tenth less."""
    weights[layer(1, "self_attn.o_proj")] *= 0.9


def head_silenced(weights: Weights) -> None:
    """Head 2 of layer 1 writes nothing."""
    weights[layer(1, "self_attn.o_proj")][:, 2 * WIDTH : 3 * WIDTH] = 0


HEAD = slice(2 * WIDTH, 3 * WIDTH)


def head_halved(weights: Weights) -> None:
    """Head 2 of layer 1 writes half as much."""
    weights[layer(1, "self_attn.o_proj")][:, HEAD] /= 2


def edge_silenced(weights: Weights) -> None:
    """The FFN of layer 1 reads nothing of the eight directions that head 2 there writes most along.

    Its norm still sees their size, and what others write along them is lost with it: weights alone
    cannot take one edge away and leave all else.
    """
    written = weights[layer(1, "self_attn.o_proj")][:, HEAD]
    directions = torch.linalg.svd(written, full_matrices=False).U[:, :8]
    scale = weights[layer(1, "post_attention_layernorm")]
    for part in ("mlp.up_proj", "mlp.gate_proj"):
        read = weights[layer(1, part)] * scale
        weights[layer(1, part)] = (read - read @ directions @ directions.T) / scale


def ffn_silenced(weights: Weights) -> None:
    """The FFN of layer 2 writes nothing."""
    weights[layer(2, "mlp.down_proj")] *= 0


def ffn_scaled(weights: Weights) -> None:
    """The FFN of layer 2 writes a quarter more."""
    weights[layer(2, "mlp.down_proj")] *= 1.25


def neurons_permuted(weights: Weights) -> None:
    """The neurons of every FFN in another order."""
    generator = torch.Generator().manual_seed(3)
    for number in range(LAYERS):
        count = weights[layer(number, "mlp.up_proj")].shape[0]
        order = torch.randperm(count, generator=generator)
        for part in ("mlp.up_proj", "mlp.gate_proj"):
            weights[layer(number, part)] = weights[layer(number, part)][order]
        weights[layer(number, "mlp.down_proj")] = weights[layer(number, "mlp.down_proj")][:, order]


def heads_permuted(weights: Weights) -> None:
    """The heads of every attention in another order."""
    order = torch.cat([torch.arange(WIDTH) + WIDTH * head for head in (2, 0, 3, 1)])
    for number in range(LAYERS):
        for part in ("q_proj", "k_proj", "v_proj"):
            name = layer(number, f"self_attn.{part}")
            weights[name] = weights[name][order]
        name = layer(number, "self_attn.o_proj")
        weights[name] = weights[name][:, order]


def norms_folded(weights: Weights) -> None:
    """Every norm twice as large, and what reads it half."""
    for number in range(LAYERS):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
        ):
            weights[layer(number, norm)] *= 2
            for reader in readers:
                weights[layer(number, reader)] /= 2


def values_folded(weights: Weights) -> None:
    """Every value four times as large, and what an attention writes of it a quarter."""
    for number in range(LAYERS):
        weights[layer(number, "self_attn.v_proj")] *= 4
        weights[layer(number, "self_attn.o_proj")] /= 4


LORA = layer(3, "self_attn.q_proj")


def lora(weights: Weights) -> None:
    """A change of rank 2 to one matrix, a tenth of its size."""
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(2, 160, generator=generator), torch.randn(160, 2, generator=generator)
    delta = up @ down
    weights[LORA] = weights[LORA] + 0.1 * weights[LORA].norm() * delta / delta.norm()


def sizes_are(size: float, found: Found) -> bool:
    """Whether every matrix moved by this share of its size."""
    return all(abs(by / size - 1) < 0.01 for by in found.moved.values())


CASES: dict[str, Case] = {
    "itself": Case(itself, nothing),
    "neurons permuted": Case(neurons_permuted, nothing),
    "heads permuted": Case(heads_permuted, nothing),
    "norms folded": Case(norms_folded, nothing),
    "values folded": Case(values_folded, nothing),
    "sharpened": Case(
        sharpened,
        lambda found: {
            "the same answers": same_answers(found),
            "surer": (found.cells["token_entropy"].change or 0) < -0.3,
            "no matrix moved": only()(found),
            "at equal loss, intensity is the same": at_equal_loss(found),
        },
    ),
    "flattened": Case(
        flattened,
        lambda found: {
            "the same answers": same_answers(found),
            "less sure": (found.cells["token_entropy"].change or 0) > 0.3,
            "no matrix moved": only()(found),
            "at equal loss, intensity is the same": at_equal_loss(found),
        },
    ),
    "noise of 0.1 %": Case(
        noise(1e-3),
        lambda found: {
            "its size": sizes_are(1e-3, found),
            "accuracy has no star": not found.accuracy.significant,
            "no change above 5 %": all(abs(c.change or 0) < 0.05 for c in found.cells.values()),
        },
    ),
    "noise of 20 %": Case(
        noise(0.2),
        lambda found: {
            "its size": sizes_are(0.2, found),
            "accuracy fell": bool(found.accuracy.significant)
            and found.accuracy.after < found.accuracy.before,
        },
    ),
    "rounded": Case(
        rounded,
        lambda found: {
            "its size": 0 < max(found.moved.values()) < 0.004,
            "accuracy has no star": not found.accuracy.significant,
            "no change above 10 %": all(abs(c.change or 0) < 0.1 for c in found.cells.values()),
        },
    ),
    "attention silenced": Case(attention_silenced, broken),
    "FFN silenced": Case(ffn_silenced, broken),
    "attention a tenth weaker": Case(
        attention_weaker,
        lambda found: {
            "its share fell": found.share_change("a1") < 0,
            "its matrix moved": only(layer(1, "self_attn.o_proj"))(found),
            "by its size": abs(found.moved[layer(1, "self_attn.o_proj")] - 0.1) < 1e-3,
        },
    ),
    "head silenced": Case(
        head_silenced,
        lambda found: {
            "its edges are 0": found.silent("a1.h2"),
            "it changed most": found.largest == "a1.h2",
            "its matrix moved": only(layer(1, "self_attn.o_proj"))(found),
        },
    ),
    "head halved": Case(
        head_halved,
        lambda found: {
            "its share fell": found.share_change("a1.h2") < 0,
            "its matrix moved": only(layer(1, "self_attn.o_proj"))(found),
        },
    ),
    "edge silenced": Case(
        edge_silenced,
        lambda found: {
            "it lost most of all out of its head": found.most_fallen("a1.h2", "m1"),
            "what reads it moved": only(layer(1, "mlp.up_proj"), layer(1, "mlp.gate_proj"))(found),
        },
    ),
    "FFN a quarter stronger": Case(
        ffn_scaled,
        lambda found: {
            "its matrix moved": only(layer(2, "mlp.down_proj"))(found),
            "by its size": abs(found.moved[layer(2, "mlp.down_proj")] - 0.25) < 1e-3,
        },
    ),
    "LoRA on one matrix": Case(
        lora,
        lambda found: {
            "its matrix moved": only(LORA)(found),
            "by its size": abs(found.moved[LORA] - 0.1) < 1e-3,
        },
    ),
}
"""Every case by its name."""


def make_model(case: Case, folder: Path) -> Path:
    """Save the model after of a case, unless an earlier run has."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for file in SFT.iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {key: values.float() for key, values in load_file(SFT / "model.safetensors").items()}
    case.change(weights)
    save_file(
        {key: values.contiguous() for key, values in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def slug(name: str) -> str:
    """A case's name in files."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def run(names: list[str], granularity: str, questions: int, folder: Path) -> None:
    """Compare the pairs of some cases in one run."""
    pairs = [
        {
            "name": slug(name),
            "before": "probe:tiny-math/sft",
            "after": str(make_model(CASES[name], folder / "models" / slug(name))),
            "max_new_tokens": 64,
        }
        for name in names
    ]
    recipe = {
        "name": "known-answers",
        "pairs": pairs,
        "benchmarks": [{"name": "tiny-math"}],
        "compute": {"dtype": "float32", "threads": 1, "device": "cpu"},
        "solutions": {"questions": questions, "batch_size": 100},
        "selection": {"alpha": [ALPHA]},
        "attribution": {"batch_size": 25, "granularity": granularity},
        "report": {"extra": ["weights"]},
    }
    probe.run_recipe(recipe_from(recipe, "known answers"), folder / granularity)


def read(names: list[str], path: Path) -> Iterator[tuple[str, Found]]:
    """What a run has found of each case."""
    report, folder = build_report(path), RunFolder(path)
    for name in names:
        cells = [cell for cell in report.cells if cell.pair == slug(name)]
        (accuracy,) = (row for row in report.accuracy if row.pair == slug(name))
        table = folder.read_json(f"extras/{slug(name)}.weights.json") or {}
        moved = {m["name"]: m["moved"] / m["size"] for m in table["matrices"]}  # type: ignore
        comparison = f"{slug(name)}.tiny-math.alpha-{ALPHA:g}"
        why = "".join(line for line in report.missing if line.startswith(comparison))
        sides = () if why else tuple(folder.read_sides(comparison, "before", "after"))
        yield (
            name,
            Found(
                {cell.metric: cell for cell in cells if not cell.control},
                {(cell.control, cell.metric): cell for cell in cells if cell.control},
                accuracy,
                moved,
                sides,
                why,
            ),
        )


def copies(questions: int, folder: Path) -> dict[str, bool]:
    """Five copies of every question, said to be clusters, must say no more than one of each."""
    lines = (PACKAGE_DATA / "tiny-math" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: questions // 4]]
    reports = []
    for count in (1, 5):
        path = folder / f"copies-{count}.jsonl"
        many = [
            {**row, "id": f"{row['id']}-{copy}", "cluster": row["id"]}
            for row in rows
            for copy in range(count)
        ]
        path.write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
        changes = {
            "pairs": [
                {
                    "name": "sft-dpo",
                    "before": "probe:tiny-math/sft",
                    "after": "probe:tiny-math/dpo",
                    "max_new_tokens": 64,
                }
            ],
            "selection.alpha": [ALPHA],
            "report.extra": [],
            "benchmarks.0.path": str(path),
        }
        reports.append(probe.run_recipe("tiny-math", folder / f"copies-{count}", overrides=changes))  # type: ignore
    once, five = ({cell.metric: cell for cell in report.cells} for report in reports)
    metrics = [name for name in once if name != "sample_diversity"]  # copies have no diversity
    return {
        "the same changes": all(
            np.isclose(once[name].change or 0, five[name].change or 0, atol=1e-5)
            for name in metrics
        ),
        "the same intervals": all(
            np.allclose(once[name].interval or 0, five[name].interval or 0, atol=1e-5)
            for name in metrics
        ),
        "the same p of accuracy": np.isclose(
            reports[0].accuracy[0].p_value or 0, reports[1].accuracy[0].p_value or 0, atol=0.02
        ).item(),
    }


def exchanged(questions: int, folder: Path) -> dict[str, bool]:
    """A pair the other way round must say the inverse, exactly as surely."""
    names = ("probe:tiny-math/sft", "probe:tiny-math/grpo")
    pairs = [
        {"name": name, "before": before, "after": after, "max_new_tokens": 64}
        for name, before, after in (("there", *names), ("back", *names[::-1]))
    ]
    changes = {
        "pairs": pairs,
        "selection.alpha": [ALPHA],
        "solutions.questions": questions,
        "report.extra": [],
    }
    report = probe.run_recipe("tiny-math", folder / "exchanged", overrides=changes)  # type: ignore
    there, back = (
        {c.metric: c for c in report.cells if c.pair == name and not c.control}
        for name in ("there", "back")
    )
    once, again = report.accuracy
    ratios = ("activation_intensity", "information_complexity", "output_entropy", "token_entropy")
    return {
        "changes are inverse": all(
            np.isclose((1 + (there[m].change or 0)) * (1 + (back[m].change or 0)), 1, atol=1e-5)
            for m in ratios
        ),
        "as sure": all(
            np.isclose(there[m].p_value or 0, back[m].p_value or 0, atol=0.02) for m in there
        ),
        "accuracy mirrored": (once.gained, once.lost) == (again.lost, again.gained),
    }


def mixed(questions: int, folder: Path) -> dict[str, bool]:
    """Each question must say the same in any mix, and a mix what its questions say.

    Whole answers of any length are scored: what part and which lengths are else depends on the mix.
    """
    lines = (PACKAGE_DATA / "tiny-math" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:questions]]
    short = [row for row in rows if sum(row["question"].count(sign) for sign in "+-") == 2]
    mixes = {"short": short, "long": [row for row in rows if row not in short], "all": rows}
    cells: dict[str, dict[str, Cell]] = {}
    scores: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, chosen in mixes.items():
        path = folder / f"mix-{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
        pair = {"before": "probe:tiny-math/sft", "after": "probe:tiny-math/grpo"}
        changes = {
            "pairs": [{"name": "pair", **pair, "max_new_tokens": 64}],
            "selection": {"alpha": [9.0], "beta": 0.01, "gamma": 9.0, "delta": 9.0},
            "attribution.control": [],
            "report.extra": [],
            "benchmarks.0.path": str(path),
        }
        report = probe.run_recipe("tiny-math", folder / f"mix-{name}", overrides=changes)  # type: ignore
        cells[name] = {cell.metric: cell for cell in report.cells}
        sides = RunFolder(folder / f"mix-{name}").read_sides(
            "pair.tiny-math.alpha-9", "before", "after"
        )
        scores[name] = [dict(zip(side.ids, side.scores, strict=True)) for side in sides]
    parts = [
        (name, side, key)
        for name in ("short", "long")
        for side in (0, 1)
        for key in scores[name][side]
    ]

    def total(name: str, metric: str) -> float:
        cell = cells[name][metric]
        return float(np.log1p(cell.change or 0)) * cell.samples

    return {
        "every question is compared": len(parts) == 2 * len(scores["all"][0]) > 0,
        "a question's edges are the same": all(
            torch.allclose(
                a := scores[name][side][key],
                scores["all"][side][key],
                rtol=1e-3,
                atol=1e-4 * float(a.abs().max()),
            )
            for name, side, key in parts
        ),
        "changes are those of the parts": all(
            np.isclose(
                total("short", metric) + total("long", metric), total("all", metric), atol=1e-2
            )
            for metric in cells["all"]
            if metric != "sample_diversity"  # of pairs across both parts
        ),
    }


def written_out(generator: random.Random) -> tuple[str, str]:
    """A problem as in `tiny-math`, and its solution."""
    total = generator.randint(1, 99)
    question, steps = str(total), []
    for _ in range(generator.randint(2, 4)):
        sign, operand = generator.choice("+-"), generator.randint(1, 99)
        result = total + operand if sign == "+" else total - operand
        question += f"{sign}{operand}"
        steps.append(f"{total}{sign}{operand}={result}")
        total = result
    return f"{question}=?", f"{';'.join(steps)}#{total}"


def trained(seed: int, folder: Path) -> Path:
    """Train the SFT model for 40 more steps of SFT, unless an earlier run has."""
    if folder.exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = random.Random(seed)
    for _ in range(40):
        texts = [written_out(generator) for _ in range(64)]
        prompts = [tokenizer(question)["input_ids"] for question, _ in texts]
        answers = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for _, answer in texts]
        rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
        labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
        loss = model(
            input_ids=pad_sequence(rows, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    part = folder.with_name(f"{folder.name}-part")  # a stopped run leaves no model of this name
    shutil.copytree(SFT, part, dirs_exist_ok=True)
    weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, part / "model.safetensors", {"format": "pt"})  # tied: stored once
    config = json.loads((SFT / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "dtype": "float32"})
    (part / "config.json").write_text(text, encoding="utf-8")
    return part.rename(folder)


def seeds(questions: int, folder: Path) -> dict[str, bool]:
    """Two trainings that differ by their seed alone: neither did what the other did not."""
    before, after = (str(trained(seed, folder / "models" / f"seed-{seed}")) for seed in (1, 2))
    changes = {
        "pairs": [{"name": "seeds", "before": before, "after": after, "max_new_tokens": 64}],
        "selection.alpha": [ALPHA],
        "solutions.questions": questions,
        "report.extra": [],
    }
    report = probe.run_recipe("tiny-math", folder / "seeds", overrides=changes)  # type: ignore
    return {
        "no cell has a star": not any(cell.significant for cell in report.cells),
        "accuracy has no star": not any(row.significant for row in report.accuracy),
    }


def main() -> None:
    """Ask all, and print which answers are right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=200, help="of tiny-math, for each pair")
    parser.add_argument("--runs", type=Path, default=Path("runs/known-answers"))
    options = parser.parse_args()
    start = time.monotonic()
    of_heads = ["head silenced", "head halved", "edge silenced"]
    rest = [name for name in CASES if name not in of_heads]
    verdicts: dict[str, dict[str, bool]] = {}
    for names, granularity in ((rest, "qkv"), (of_heads, "head")):
        run(names, granularity, options.questions, options.runs)
        for name, found in read(names, options.runs / granularity):
            verdicts[name] = CASES[name].right(found)
    verdicts["copies in clusters"] = copies(options.questions, options.runs)
    verdicts["sides exchanged"] = exchanged(options.questions, options.runs)
    verdicts["another mix"] = mixed(options.questions, options.runs)
    verdicts["two seeds"] = seeds(options.questions, options.runs)
    print("| case | right | what is wrong |")
    print("|---|---|---|")
    for name, checks in verdicts.items():
        wrong = [check for check, passed in checks.items() if not passed]
        print(f"| {name} | {'no' if wrong else 'yes'} | {', '.join(wrong)} |")
    right = sum(all(checks.values()) for checks in verdicts.values())
    print(f"\n{time.monotonic() - start:.0f} s, {options.questions} questions for each pair\n")
    print(f"{right} of {len(verdicts)} known answers right")


if __name__ == "__main__":
    main()
