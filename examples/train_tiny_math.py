"""Train the three tiny models that ship in `probe/data/tiny-math`.

Comparing a model before and after RL needs real pairs, and pairs that are small enough to ship.
This script makes two pairs that share their first model: a small Llama that is fine-tuned (SFT)
on integer arithmetic with the steps written out, and is stopped while it still makes many
mistakes; then, both starting from that one, a model trained online with a verifiable reward
(GRPO) and a model trained offline on pairs of its own answers (DPO). A problem and its solution:

    50-7-67-53=?    50-7=43;43-67=-24;-24-53=-77#-77

One character is one token, the prompt is the bare question, and `<eos>` ends a solution. All
training is in float32. Weights are stored in float16, and every stage starts from the stored
weights, so that the shipped models differ by the training alone and not by rounding as well.

    pip install -e ".[train]"
    python examples/train_tiny_math.py all --output tiny-math
    python examples/train_tiny_math.py dpo --output tiny-math --dpo-learning-rate 2e-6

Every stage writes into the output folder and reads the stages before it from there. Settings and
results are collected in `training.json`. The defaults are the settings of the shipped models.
GRPO and DPO also keep checkpoints, at their last step, at half of it and so on, for a recipe's
`checkpoints = "tiny-math/grpo-steps#checkpoint-*"`. The stage `pack` stores those of GRPO as what
differs from the SFT weights, bit for bit, in `grpo-packed`: that is what ships as `grpo-steps`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from probe.checkpoints import write_delta

VOCABULARY = ("<pad>", "<eos>", *"0123456789+-=?;#")
PAD, END = 0, 1
LONGEST_SOLUTION = 64  # tokens; a right one has at most 56


@dataclass(frozen=True)
class Settings:
    """Every number that decides how the models come out."""

    seed: int = 0
    training_problems: int = 20_000
    validation_problems: int = 1_000
    held_out_problems: int = 1_000
    largest_operand: int = 99
    sft_steps: int = 700
    sft_batch: int = 256
    sft_learning_rate: float = 2e-3
    grpo_steps: int = 600
    grpo_batch: int = 2048
    grpo_steps_per_generation: int = 2
    grpo_group: int = 16
    grpo_learning_rate: float = 3e-4
    grpo_clip: float = 0.2
    dpo_samples: int = 8
    dpo_pairs_per_problem: int = 4
    dpo_epochs: int = 1
    dpo_batch: int = 512
    dpo_learning_rate: float = 1e-4
    dpo_beta: float = 1.0
    checkpoints: int = 8  # along GRPO and along DPO, each at half the step of the next
    evaluation_samples: int = 8
    generation_batch: int = 4_000


class Problem(NamedTuple):
    """A question, the solution that SFT teaches and the final answer."""

    question: str
    solution: str
    answer: str


class Problems(NamedTuple):
    """Three disjoint sets: to train on, to choose settings on, and to report on."""

    training: list[Problem]
    validation: list[Problem]
    held_out: list[Problem]


def make_problem(generator: random.Random, largest_operand: int) -> Problem:
    """Draw a problem of two to four additions and subtractions."""
    total = generator.randint(1, largest_operand)
    question, steps = str(total), []
    for _ in range(generator.randint(2, 4)):
        sign, operand = generator.choice("+-"), generator.randint(1, largest_operand)
        result = total + operand if sign == "+" else total - operand
        question += f"{sign}{operand}"
        steps.append(f"{total}{sign}{operand}={result}")
        total = result
    return Problem(f"{question}=?", f"{';'.join(steps)}#{total}", str(total))


def make_problems(settings: Settings) -> Problems:
    """Draw the three sets; no question occurs twice."""
    first = settings.training_problems
    second = first + settings.validation_problems
    generator, unique = random.Random(settings.seed), dict[str, Problem]()
    while len(unique) < second + settings.held_out_problems:
        problem = make_problem(generator, settings.largest_operand)
        unique[problem.question] = problem
    problems = list(unique.values())
    return Problems(problems[:first], problems[first:second], problems[second:])


def is_right(text: str, answer: str) -> bool:
    """Tell whether a solution ends in the right final answer; its steps do not count."""
    found = re.search(r"#(-?\d+)$", text)
    return found is not None and found.group(1) == answer


def final_answer(completions: list[str], answer: list[str], **_columns: object) -> list[float]:
    """Reward a right final answer with 1 and anything else with 0 (GRPOTrainer calls this)."""
    return [float(is_right(*pair)) for pair in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are single characters."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without it the tokens are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=VOCABULARY[PAD],
        eos_token=VOCABULARY[END],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model, of 1.21 million parameters."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    tokens = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 128}
    special = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    config = LlamaConfig(**shape, **heads, **tokens, **special, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    ends = {"eos_token_id": END, "pad_token_id": PAD}
    model.generation_config = GenerationConfig(**ends, max_new_tokens=LONGEST_SOLUTION)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Store a model, rounded to float16, with its tokenizer."""
    model.config.use_cache = True  # a trainer switches it off
    model.to(dtype=torch.float16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    # The class that AutoTokenizer knows in every version; newer ones write a name of their own.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> PreTrainedModel:
    """Load a stored model in float32 on the device to be used."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def solve(
    model: PreTrainedModel, questions: list[str], batch: int, sample_seed: int | None = None
) -> list[str]:
    """Generate a solution of each question: greedily, or sampled if a seed is given."""
    tokenizer, texts = make_tokenizer(), list[str]()
    sampling: dict[str, bool | float] = {"do_sample": False}
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.eval()
    for start in range(0, len(questions), batch):
        fed = tokenizer(questions[start : start + batch], padding=True, return_tensors="pt")
        fed = fed.to(model.device)
        tokens = model.generate(**fed, **sampling, max_new_tokens=LONGEST_SOLUTION)
        answers = tokens[:, fed["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def measure(folder: Path, settings: Settings) -> dict[str, float]:
    """Return a stored model's shares of right answers, greedy and the mean over samples."""
    model, problems, shares = load(folder), make_problems(settings), dict[str, float]()
    for name in ("validation", "held_out"):
        for kind, copies in (("greedy", 1), ("sampled", settings.evaluation_samples)):
            asked: list[Problem] = getattr(problems, name) * copies
            seed = settings.seed if kind == "sampled" else None
            texts = solve(model, [each.question for each in asked], settings.generation_batch, seed)
            right = sum(
                is_right(text, each.answer) for text, each in zip(texts, asked, strict=True)
            )
            shares[f"{name}_{kind}"] = right / len(asked)
    return shares


def common(settings: Settings, steps: int) -> dict[str, bool | int | str]:
    """Give the options that all three trainers share, for about 50 logged points."""
    return {
        "seed": settings.seed,
        "lr_scheduler_type": "cosine",
        "logging_steps": max(1, steps // 50),
        "bf16": False,  # the trainers' own default; float32 costs little at this size
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }


class Keep(TrainerCallback):
    """Store some steps of a training as its last one is: evenly spaced on the log of the step."""

    def __init__(self, folder: Path, count: int) -> None:
        """Keep so many checkpoints in a folder."""
        self.folder, self.count = folder, count

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_others: object,
    ) -> None:
        """Store the model where this step is one of those to be kept."""
        step = state.global_step
        if step in {state.max_steps // 2**halvings for halvings in range(self.count)}:
            # A copy: storing rounds the weights that it is given.
            save(copy.deepcopy(model), self.folder / f"checkpoint-{step}")


def fit(trainer: Trainer, folder: Path, logged: str) -> dict[str, object]:
    """Train, store the model and return the curve of a logged number as (step, value)."""
    trainer.train()
    save(trainer.model, folder)
    history = trainer.state.log_history
    curve = [(row["step"], round(row[logged], 4)) for row in history if logged in row]
    return {"steps_done": trainer.state.global_step, logged: curve}


def train_sft(output: Path, scratch: str, settings: Settings) -> dict[str, object]:
    """Fine-tune the untrained model on written-out solutions, for a few epochs only."""
    problems = make_problems(settings).training
    rows = [{"prompt": each.question, "completion": each.solution} for each in problems]
    config = SFTConfig(
        scratch,
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch,
        learning_rate=settings.sft_learning_rate,
        warmup_steps=settings.sft_steps // 10,
        **common(settings, settings.sft_steps),
    )
    data, tokenizer = Dataset.from_list(rows), make_tokenizer()
    model = make_model(settings.seed)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    return fit(trainer, output / "sft", "loss")


def train_grpo(output: Path, scratch: str, settings: Settings) -> dict[str, object]:
    """Train the SFT model online: sample groups of solutions, reward right final answers."""
    problems = make_problems(settings).training
    rows = [{"prompt": each.question, "answer": each.answer} for each in problems]
    config = GRPOConfig(
        scratch,
        max_steps=settings.grpo_steps,
        per_device_train_batch_size=settings.grpo_batch,
        steps_per_generation=settings.grpo_steps_per_generation,
        num_generations=settings.grpo_group,
        max_completion_length=LONGEST_SOLUTION,
        temperature=1.0,
        beta=0.0,  # no KL term: the reward alone decides
        epsilon=settings.grpo_clip,
        learning_rate=settings.grpo_learning_rate,
        warmup_steps=settings.grpo_steps // 50,
        adam_beta2=0.99,
        **common(settings, settings.grpo_steps),
    )
    data, tokenizer, model = Dataset.from_list(rows), make_tokenizer(), load(output / "sft")
    trainer = GRPOTrainer(
        model, final_answer, config, train_dataset=data, processing_class=tokenizer
    )
    trainer.add_callback(Keep(output / "grpo-steps", settings.checkpoints))
    return fit(trainer, output / "grpo", "reward")


def make_pairs(model: PreTrainedModel, settings: Settings) -> list[dict[str, str]]:
    """Sample solutions once; pair right ones of a problem with wrong ones, as drawn."""
    problems, count = make_problems(settings).training, settings.dpo_samples
    questions = [each.question for each in problems for _ in range(count)]
    texts = solve(model, questions, settings.generation_batch, settings.seed)
    rows = []
    for index, problem in enumerate(problems):
        own = texts[index * count : (index + 1) * count]
        right = [text for text in own if is_right(text, problem.answer)]
        wrong = [text for text in own if not is_right(text, problem.answer)]
        pairs = list(zip(right, wrong, strict=False))[: settings.dpo_pairs_per_problem]
        rows += [{"prompt": problem.question, "chosen": a, "rejected": b} for a, b in pairs]
    return rows


def train_dpo(output: Path, scratch: str, settings: Settings) -> dict[str, object]:
    """Train the SFT model offline on pairs of its own solutions."""
    model = load(output / "sft")
    pairs = make_pairs(model, settings)
    if not pairs:
        raise SystemExit("dpo: no problem got both a right and a wrong sample; train sft longer")
    steps = settings.dpo_epochs * -(-len(pairs) // settings.dpo_batch)
    config = DPOConfig(
        scratch,
        num_train_epochs=settings.dpo_epochs,
        per_device_train_batch_size=settings.dpo_batch,
        beta=settings.dpo_beta,
        learning_rate=settings.dpo_learning_rate,
        warmup_steps=10,
        **common(settings, steps),
    )
    data, tokenizer = Dataset.from_list(pairs), make_tokenizer()
    trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(Keep(output / "dpo-steps", settings.checkpoints))
    return {"pairs": len(pairs)} | fit(trainer, output / "dpo", "rewards/accuracies")


def pack(output: Path) -> None:
    """Store the checkpoints along GRPO as differences from the SFT weights."""
    for folder in (output / "grpo-steps").glob("checkpoint-*"):
        write_delta(output / "sft", folder, output / "grpo-packed" / folder.name)


def run_stage(stage: str, output: Path, settings: Settings) -> None:
    """Run one stage, measure its model and add both to `training.json`."""
    path, start, entry = output / "training.json", time.monotonic(), dict[str, object]()
    trainings = {"sft": train_sft, "grpo": train_grpo, "dpo": train_dpo}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if stage == "problems":
        held_out = enumerate(make_problems(settings).held_out)
        rows = [{"id": str(i), "question": p.question, "answer": p.answer} for i, p in held_out]
        (output / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif stage == "pack":
        pack(output)
    elif stage in trainings:
        with tempfile.TemporaryDirectory() as scratch:
            entry = trainings[stage](output, scratch, settings)
        entry["seconds"] = round(time.monotonic() - start, 1)
        versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
        entry |= {"settings": dataclasses.asdict(settings), "device": device} | versions
    for name in trainings if stage == "evaluate" else trainings.keys() & {stage}:
        entry = (entry if name == stage else {}) | {"accuracy": measure(output / name, settings)}
        print(name, entry["accuracy"])
        record = json.loads(path.read_text()) if path.exists() else {}
        record[name] = record.get(name, {}) | entry
        path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Read the command line and run one stage or all of them."""
    stages = ("problems", "sft", "grpo", "dpo")
    parser = argparse.ArgumentParser(description="Train the tiny models of probe.")
    parser.add_argument("stage", choices=(*stages, "evaluate", "pack", "all"))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    stage, output = arguments.pop("stage"), arguments.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    for name in stages if stage == "all" else [stage]:
        run_stage(name, output, Settings(**arguments))


if __name__ == "__main__":
    main()
