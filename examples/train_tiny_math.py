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
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

VOCABULARY = ("<pad>", "<eos>", *"0123456789+-=?;#")
LONGEST_SOLUTION = 64  # tokens; the longest right one has 56 and <eos>


@dataclass(frozen=True)
class Settings:
    """Every number that decides how the models come out."""

    seed: int = 0
    training_problems: int = 20_000
    validation_problems: int = 1_000
    held_out_problems: int = 1_000
    largest_operand: int = 99
    sft_steps: int = 600
    sft_batch: int = 256
    sft_learning_rate: float = 2e-3
    grpo_steps: int = 600
    grpo_batch: int = 1024
    grpo_steps_per_generation: int = 2
    grpo_group: int = 16
    grpo_learning_rate: float = 1e-4
    grpo_clip: float = 0.2
    dpo_samples: int = 8
    dpo_pairs_per_problem: int = 4
    dpo_epochs: int = 1
    dpo_batch: int = 256
    dpo_learning_rate: float = 1e-5
    dpo_beta: float = 0.1
    evaluation_samples: int = 8
    generation_batch: int = 4_000


@dataclass(frozen=True)
class Problem:
    """A question, the solution that SFT teaches and the final answer."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Problems:
    """The three disjoint sets: to train on, to choose settings on, and to report on."""

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
    count = second + settings.held_out_problems
    generator, unique = random.Random(settings.seed), dict[str, Problem]()
    while len(unique) < count:
        problem = make_problem(generator, settings.largest_operand)
        unique[problem.question] = problem
    problems = list(unique.values())
    return Problems(problems[:first], problems[first:second], problems[second:])


def is_right(text: str, answer: str) -> bool:
    """Tell whether a solution ends in the right final answer; its steps do not count."""
    found = re.search(r"#(-?\d+)$", text)
    return found is not None and found.group(1) == answer


def reward_final_answer(
    completions: list[str], answer: list[str], **_columns: object
) -> list[float]:
    """Reward 1 for a right final answer and 0 for anything else (called by GRPOTrainer)."""
    return [float(is_right(*pair)) for pair in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are single characters."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without it the tokens are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model, of 1.21 million parameters."""
    torch.manual_seed(seed)
    pad, end = VOCABULARY.index("<pad>"), VOCABULARY.index("<eos>")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=pad, max_new_tokens=LONGEST_SOLUTION
    )
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
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def solve(
    model: PreTrainedModel, questions: list[str], batch: int, sample_seed: int | None = None
) -> list[str]:
    """Generate a solution of each question: greedily, or sampled if a seed is given."""
    tokenizer = make_tokenizer()
    sampling = {"do_sample": sample_seed is not None}
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        sampling |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    texts: list[str] = []
    model.eval()
    for start in range(0, len(questions), batch):
        fed = tokenizer(questions[start : start + batch], padding=True, return_tensors="pt")
        fed = fed.to(model.device)
        tokens = model.generate(**fed, **sampling, max_new_tokens=LONGEST_SOLUTION)
        answers = tokens[:, fed["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def accuracy(
    model: PreTrainedModel, problems: list[Problem], settings: Settings, samples: int = 0
) -> float:
    """Return the share of right answers: greedy, or the mean over `samples` of each problem."""
    problems = problems * max(samples, 1)
    seed = settings.seed if samples else None
    texts = solve(model, [each.question for each in problems], settings.generation_batch, seed)
    right = [is_right(*pair) for pair in zip(texts, (p.answer for p in problems), strict=True)]
    return sum(right) / len(right)


def measure(folder: Path, settings: Settings) -> dict[str, float]:
    """Measure a stored model on the validation and the held-out problems."""
    model, problems = load(folder), make_problems(settings)
    samples = settings.evaluation_samples
    return {
        "validation_greedy": accuracy(model, problems.validation, settings),
        "validation_sampled": accuracy(model, problems.validation, settings, samples),
        "held_out_greedy": accuracy(model, problems.held_out, settings),
        "held_out_sampled": accuracy(model, problems.held_out, settings, samples),
    }


def write_problems(output: Path, settings: Settings) -> dict[str, object]:
    """Write the held-out problems, one JSON object a line."""
    lines = [
        json.dumps({"id": str(index), "question": each.question, "answer": each.answer})
        for index, each in enumerate(make_problems(settings).held_out)
    ]
    (output / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return {"held_out_problems": len(lines)}


def train_sft(output: Path, settings: Settings) -> dict[str, object]:
    """Fine-tune the untrained model on written-out solutions, for a few epochs only."""
    rows = [
        {"prompt": each.question, "completion": each.solution}
        for each in make_problems(settings).training
    ]
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            scratch,
            max_steps=settings.sft_steps,
            per_device_train_batch_size=settings.sft_batch,
            learning_rate=settings.sft_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.sft_steps // 10,
            logging_steps=max(1, settings.sft_steps // 20),
            **common(settings),
        )
        trainer = SFTTrainer(
            make_model(settings.seed),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    save(trainer.model, output / "sft")
    return {"loss": curve(trainer.state.log_history, "loss")}


def train_grpo(output: Path, settings: Settings) -> dict[str, object]:
    """Train the SFT model online: sample groups of solutions, reward right final answers."""
    rows = [
        {"prompt": each.question, "answer": each.answer}
        for each in make_problems(settings).training
    ]
    with tempfile.TemporaryDirectory() as scratch:
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
            lr_scheduler_type="cosine",
            warmup_steps=settings.grpo_steps // 50,
            adam_beta2=0.99,
            logging_steps=max(1, settings.grpo_steps // 50),
            **common(settings),
        )
        trainer = GRPOTrainer(
            load(output / "sft"),
            reward_final_answer,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    save(trainer.model, output / "grpo")
    return {"reward": curve(trainer.state.log_history, "reward")}


def make_pairs(model: PreTrainedModel, settings: Settings) -> list[dict[str, str]]:
    """Sample solutions once; pair right ones of a problem with wrong ones."""
    problems = make_problems(settings).training
    questions = [each.question for each in problems for _ in range(settings.dpo_samples)]
    texts = solve(model, questions, settings.generation_batch, settings.seed)
    pairs = []
    for index, problem in enumerate(problems):
        start = index * settings.dpo_samples
        own = texts[start : start + settings.dpo_samples]
        right = [text for text in own if is_right(text, problem.answer)]
        wrong = [text for text in own if not is_right(text, problem.answer)]
        for chosen, rejected in list(zip(right, wrong, strict=False))[
            : settings.dpo_pairs_per_problem
        ]:
            pairs.append({"prompt": problem.question, "chosen": chosen, "rejected": rejected})
    return pairs


def train_dpo(output: Path, settings: Settings) -> dict[str, object]:
    """Train the SFT model offline on pairs of its own solutions."""
    model = load(output / "sft")
    pairs = make_pairs(model, settings)
    if not pairs:
        raise SystemExit("dpo: no problem got both a right and a wrong sample; train sft longer")
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            scratch,
            num_train_epochs=settings.dpo_epochs,
            per_device_train_batch_size=settings.dpo_batch,
            beta=settings.dpo_beta,
            learning_rate=settings.dpo_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=5,
            **common(settings),
        )
        trainer = DPOTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    save(trainer.model, output / "dpo")
    return {
        "pairs": len(pairs),
        "steps": trainer.state.global_step,
        "preferred": curve(trainer.state.log_history, "rewards/accuracies"),
    }


def common(settings: Settings) -> dict[str, bool | int | str]:
    """Give the options that all three trainers share."""
    return {
        "seed": settings.seed,
        "bf16": False,  # the trainers' own default; float32 costs little at this size
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }


def curve(history: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    """Take one logged number out of a trainer's history, as pairs of step and value."""
    return [(int(row["step"]), round(row[name], 4)) for row in history if name in row]


STAGES: dict[str, Callable[[Path, Settings], dict[str, object]]] = {
    "problems": write_problems,
    "sft": train_sft,
    "grpo": train_grpo,
    "dpo": train_dpo,
}


def record(output: Path, name: str, entry: dict[str, object]) -> None:
    """Add an entry to `training.json`."""
    path = output / "training.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = entries.get(name, {}) | entry
    path.write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    """Read the command line and run one stage or all of them."""
    parser = argparse.ArgumentParser(description="Train the tiny models of probe.")
    parser.add_argument("stage", choices=(*STAGES, "evaluate", "all"))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    stage, output = arguments.pop("stage"), arguments.pop("output")
    settings = Settings(**arguments)

    output.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    for name in STAGES if stage == "all" else [stage] if stage in STAGES else []:
        start = time.monotonic()
        entry = STAGES[name](output, settings)
        entry |= {"seconds": round(time.monotonic() - start, 1), "device": device}
        entry |= {"versions": versions | {"trl": trl.__version__}}
        prefixes = {"problems": ("seed", "training", "validation", "held", "largest")}
        used = ("seed", *prefixes.get(name, (name,)))
        chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k.startswith(used)}
        record(output, name, entry | {"settings": chosen})
    for name in ("sft", "grpo", "dpo") if stage in ("evaluate", "all") else [stage]:
        if (output / name / "model.safetensors").exists():
            results = measure(output / name, settings)
            record(output, name, {"accuracy": results})
            print(name, results)


if __name__ == "__main__":
    main()
