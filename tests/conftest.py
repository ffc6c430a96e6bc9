"""What several tests use: the data folder, small models, the oracle's sequences."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads gain nothing on models this small, and lose much where the cores are not free.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import probe
from probe.attribution import EdgeScores
from probe.models import Graph
from probe.recipe import read_recipe, recipe_table
from probe.store import RunFolder

DATA = Path(__file__).parent / "data"
ORACLES = ("llama", "qwen2")


@pytest.fixture(params=ORACLES)
def oracle(request):
    """Folder of one oracle."""
    return DATA / "oracle" / request.param


@pytest.fixture(scope="session")
def llama():
    """The oracle's Llama, loaded."""
    return probe.load_model(str(DATA / "oracle" / "llama" / "model"))


@pytest.fixture(scope="session")
def tiny():
    """The SFT model that ships with the package, loaded."""
    return probe.load_model("probe:tiny-math/sft")


@pytest.fixture
def half_run(tmp_path):
    """A run folder of which one pair has edges for one alpha: twice as strong after."""
    folder = RunFolder(tmp_path / "run")
    folder.open()
    keys = {"selection.alpha": "[0.1, 0.5]", "attribution.control": "none"}
    recipe = read_recipe("tiny-math", keys)
    folder.write_json("run.json", {"schema": 1, "recipe": recipe_table(recipe)})
    graph = Graph.build(2, "qkv")
    torch.manual_seed(0)
    scores = torch.randn(5, *graph.mask.shape) * graph.mask
    for side, factor in (("before", 1), ("after", 2)):
        edges = EdgeScores(factor * scores, torch.ones(5), torch.ones(5), graph)
        path = folder.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
        folder.write_edges(path, edges, list("abcde"), "key")
    return folder


def oracle_sequences(folder):
    """The sequences that an oracle's numbers belong to, and those numbers."""
    with np.load(folder / "float32.npz") as arrays:
        truth = dict(arrays)
    sequences = []
    for row in range(len(truth["input_ids"])):
        prompt = truth["input_ids"][row, : truth["prompt_len"][row]].tolist()
        answer = truth["answer_ids"][row, : truth["answer_len"][row]].tolist()
        sequences.append(probe.Sequence(prompt, answer))
    return sequences, truth


def save_random_model(folder, model_type="llama", seed=0, **changes):
    """Save a small random model of an architecture, with the oracle's toy tokenizer."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DATA / "oracle" / "llama" / "model").save_pretrained(folder)
    return folder


def save_dull_model(folder):
    """Save a model with the shape and tokenizer of those that ship, which solves nothing."""
    source = Path(probe.__file__).parent / "data" / "tiny-math" / "sft"
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    shape = {key: config[key] for key in keys} | {"num_key_value_heads": 4}
    random = folder.with_name(f"{folder.name}-random")
    save_random_model(random, tie_word_embeddings=True, **shape)
    shutil.copy(random / "model.safetensors", folder / "model.safetensors")
    return folder


def run_recorded(overrides, folder, fresh=False):
    """Run tiny-math with some keys changed; the report and what was said."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=300)
        report = probe.run_recipe(
            "tiny-math", folder, overrides=overrides, fresh=fresh, console=console
        )
    return report, console.export_text()


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """The folder of a run that a module's `run` has made."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    request.module.run(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run that a module has finished, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def no_slots(monkeypatch):
    """As where too few slots fit: continuous batching is that of transformers."""
    from probe.solutions import _slots

    monkeypatch.setattr(_slots, "slots_for", lambda *given: 0)
