"""The paper's recipes, whole, with random models of the same architecture on the real questions."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from click.testing import CliRunner
from small_models import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probe.cli import main
from probe.grading import Grader
from probe.metrics import METRICS, TOKEN_METRICS
from probe.problems import load_problems
from probe.recipe import read_recipe

REAL = Path(__file__).parents[2] / "shared" / "benchmarks"
FILES = ("gsm8k", "math", "college_math", "minerva_math", "olympiadbench", "aime24", "amc23")

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen2")
"""Those of the paper's four pairs."""

METRIC_COUNT = len(METRICS) + len(TOKEN_METRICS)

needs_files = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)


@pytest.fixture(autouse=True)
def forced_grades(monkeypatch):
    """Random models solve nothing, so what is right is decided by the question alone."""
    monkeypatch.setattr(Grader, "grade", lambda self, gold, answer: is_right(gold))


def is_right(gold):
    return sum(map(ord, gold)) % 5 > 0


@pytest.fixture(scope="module")
def tokenizer():
    """Byte pairs, so that it knows every character of the questions."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    questions = load_problems("gsm8k", REAL / "gsm8k.jsonl", 200)
    words.train_from_iterator((problem.question for problem in questions), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def models_for(recipe, architectures, folder, tokenizer):
    """Options that put two small random models in the place of each pair's."""
    options = []
    for number, architecture in enumerate(architectures):
        for seed, side in enumerate(("before", "after")):
            place = folder / f"{recipe.pairs[number].name}-{side}"
            sizes = {"vocab_size": 640, "max_position_embeddings": 4096}
            small_model(architecture, seed, **sizes).save_pretrained(place)
            tokenizer.save_pretrained(place)
            options += ["--set", f"pairs.{number}.{side}={place}"]
        options += ["--set", f"pairs.{number}.max_new_tokens=30"]
    return options


def file_of(benchmark):
    return REAL / f"{'math500' if benchmark == 'math' else benchmark}.jsonl"


def expected_problems(recipe, questions):
    names = [choice.name for choice in recipe.benchmarks]
    return {name: load_problems(name, file_of(name), questions) for name in names}


def run(recipe, folder, questions, *options):
    """What the command prints, and the report it leaves."""
    for choice in recipe.benchmarks:
        options += ("--benchmark-path", f"{choice.name}={file_of(choice.name)}")
    output = ("--output", str(folder / "run"), "--limit", str(questions))
    result = CliRunner().invoke(main, ["recipe", recipe.name, *output, *options])
    assert result.exit_code == 0, result.stderr
    return result.stdout, json.loads((folder / "run" / "report.json").read_text())


@needs_files
def test_the_whole_of_a_pair(tmp_path, tokenizer):
    """Every phase of `mistral-math`, from the real questions to the printed report."""
    recipe = read_recipe("mistral-math")
    options = models_for(recipe, ["mistral"], tmp_path, tokenizer)
    text, report = run(recipe, tmp_path, 6, *options, "--set", "selection.samples=3")
    assert report["complete"] is True
    for benchmark in FILES[:3]:
        assert f"{benchmark} · mistral (PPO) · 3 samples" in text
    # What the paper prints stands below the cells that it prints.
    published = [cell for cell in report["cells"] if cell["published"]]
    assert len(published) == 7
    assert len(re.findall(r"^ {6,}published  ", text, re.MULTILINE)) == 7
    published = "(published: 41 experiments, +7.6 %, 95.1 % of them improved)"
    assert published in " ".join(text.split())
    asked = expected_problems(recipe, 6)
    raw = [cell for cell in report["cells"] if not cell["control"]]
    cells = {(c["benchmark"], c["alpha"], c["metric"]): c for c in raw}
    assert len(cells) == len(raw) == 3 * 4 * METRIC_COUNT
    assert {cell["samples"] for cell in raw} == {3}
    for row in report["accuracy"]:
        right = [is_right(problem.answer) for problem in asked[row["benchmark"]]]
        assert row["questions"] == 6
        assert row["before"] == row["after"] == sum(right) / 6
        assert 3 / 6 <= row["before"] < 1
    for benchmark, problems in asked.items():
        solutions = [
            {
                row["id"]: row
                for path in (tmp_path / "run" / "solutions").glob(f"*-{side}.{benchmark}.jsonl")
                for row in map(json.loads, path.read_text().splitlines())
            }
            for side in ("before", "after")
        ]
        for problem in problems:
            prompt = tokenizer(f"[INST] {problem.question}[/INST]")["input_ids"]
            assert all(side[problem.id]["prompt"] == prompt for side in solutions)
        solved = [problem.id for problem in problems if is_right(problem.answer)]
        lengths = [fmean(len(side[name]["answer"]) for name in solved) for side in solutions]
        for alpha in recipe.selection.alpha:
            path = tmp_path / "run" / "selection" / f"mistral.{benchmark}.alpha-{alpha:g}.json"
            selection = json.loads(path.read_text())
            assert selection["both_correct"] == len(solved)
            assert selection["cut_length"] == max(1, int(alpha * min(lengths)))
            assert set(selection["ids"]) <= set(solved)
    with pytest.raises(AssertionError, match="holds a run of another recipe"):
        run(recipe, tmp_path, 6, *options, "--set", "selection.samples=2")


@needs_files
def test_the_whole_of_table_1(tmp_path, tokenizer):
    """The four pairs in one report, at one alpha."""
    recipe = read_recipe("paper")
    options = models_for(recipe, ARCHITECTURES, tmp_path, tokenizer)
    options += ["--set", "selection.samples=2", "--set", "selection.alpha=[0.3]"]
    text, report = run(recipe, tmp_path, 4, *options, "--set", "report.resamples=0")
    raw = [cell for cell in report["cells"] if not cell["control"]]
    cells = {(cell["pair"], cell["benchmark"]) for cell in raw}
    assert len(raw) == len(cells) * METRIC_COUNT
    # Random answers differ in length; a cell without questions does not stop the others.
    assert len(cells) >= 6
    assert len(cells) + len(report["missing"]) == 12
    for line in report["missing"]:
        assert re.search(r"none of the \d questions that both models solve", line)
    table = text.partition("Table 1 of the paper")[2].partition("Published values are below")[0]
    for pair, benchmark in cells:
        assert pair in table
        assert benchmark in table


@needs_files
def test_the_whole_of_table_4(tmp_path, tokenizer):
    """Eight models on the seven files, without any attribution."""
    recipe = read_recipe("paper-accuracy")
    options = models_for(recipe, ARCHITECTURES, tmp_path, tokenizer)
    _, report = run(recipe, tmp_path, 3, *options, "--set", "solutions.batch_size=3")
    assert report["complete"] is True
    assert report["cells"] == []
    asked = expected_problems(recipe, 3)
    found = {(row["pair"], row["benchmark"]): row for row in report["accuracy"]}
    assert set(found) == {(pair.name, name) for pair in recipe.pairs for name in FILES}
    for (_, benchmark), row in found.items():
        right = sum(is_right(problem.answer) for problem in asked[benchmark])
        assert row["before"] == row["after"] == right / 3
    assert list((tmp_path / "run" / "edges").iterdir()) == []
    assert len(list((tmp_path / "run" / "solutions").iterdir())) == 8 * 7
