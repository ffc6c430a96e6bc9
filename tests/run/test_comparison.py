import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DATA
from transformers import AutoTokenizer

import probe
from probe.cli import main
from probe.errors import ProbeError
from probe.recipe import read_recipe, recipe_table
from probe.run import compare_recipe, default_folder
from probe.store import RunFolder

SFT, GRPO = "probe:tiny-math/sft", "probe:tiny-math/grpo"
SMALL = {
    "solutions.questions": 60,
    "selection.samples": 5,
    "compute.dtype": "float32",
    "report.resamples": 20,
}


def test_comparing_is_running_a_recipe(tmp_path):
    saved = tmp_path / "mine.toml"
    report = probe.compare(
        SFT,
        GRPO,
        ["tiny-math"],
        alpha=[0.3],
        prompt="{question}",
        overrides=SMALL,
        output=tmp_path / "run",
        save_recipe=saved,
    )
    assert report.recipe.name == "sft-vs-grpo"
    assert {cell.alpha for cell in report.cells} == {0.3}
    assert report.accuracy[0].questions == 60
    again = probe.run_recipe(saved, tmp_path / "again")
    assert again.recipe == report.recipe
    assert again.cells == report.cells
    assert again.accuracy == report.accuracy
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert kept["pairs"][0]["before"] == SFT


def test_the_command_is_the_function(tmp_path):
    saved = tmp_path / "mine.toml"
    result = CliRunner().invoke(
        main,
        [
            *("compare", "me/base", "./tests/data/oracle/llama/model", "--benchmark", "gsm8k"),
            *("--benchmark", "math", "--alpha", "0.1", "--alpha", "0.5", "--limit", "7"),
            *("--prompt", r"Q: {question}\nA:", "--method", "relp", "--device", "cpu"),
            *("--benchmark-path", "math=tests/data/README.md", "--dtype", "float16"),
            *("--set", "pairs.0.max_new_tokens=99", "--save-recipe", str(saved), "--dry-run"),
        ],
    )
    assert "the format .md is not known" in result.stderr  # of the plan: the recipe is saved
    assert read_recipe(saved) == compare_recipe(
        "me/base",
        "./tests/data/oracle/llama/model",
        ["gsm8k", "math"],
        alpha=[0.1, 0.5],
        prompt="Q: {question}\nA:",
        benchmark_paths=["math=tests/data/README.md"],
        overrides={
            "solutions.questions": 7,
            "attribution.method": "relp",
            "compute.device": "cpu",
            "compute.dtype": "float16",
            "pairs.0.max_new_tokens": 99,
        },
    )


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("a/b", "a/c", "b-vs-c"),
        ("./x y/", "~/models/z!", "x-y-vs-z"),
        ("..", "/", "model-vs-model"),
    ],
)
def test_names(before, after, name):
    assert compare_recipe(before, after).name == name


def test_models_of_one_name_have_a_run_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("base", "ft", "b/ft"):
        shutil.copytree(DATA / "oracle" / "llama" / "model", tmp_path / place)
    recipes = [compare_recipe("base", after, prompt="chat") for after in ("ft", "b/ft", "c/ft")]
    folders = []
    for recipe in (*recipes[:2], *recipes[:2]):
        folder = RunFolder(default_folder(recipe))
        if not folder.record.exists():
            folder.open()
            folder.write_json("run.json", {"schema": 1, "recipe": recipe_table(recipe)})
        folders.append(folder.path.as_posix())
    assert folders == 2 * ["runs/base-vs-ft", "runs/base-vs-ft-2"]
    assert default_folder(recipes[2]).name == "base-vs-ft-3"


def test_a_mistake_is_told(tmp_path):
    with pytest.raises(ProbeError, match="the tokenizer has no chat template; give the prompt as"):
        probe.compare(SFT, GRPO, ["tiny-math"], prompt="chat", output=tmp_path / "run")
    with pytest.raises(ProbeError, match=r"a/b and a/c: .*a prompt needs \{question\}"):
        compare_recipe("a/b", "a/c", prompt="hello")
    with pytest.raises(ProbeError, match="did you mean 'samples'"):
        compare_recipe("a/b", "a/c", overrides={"selection.sample": 3})
    assert not (tmp_path / "run").exists()


def test_models_that_are_asked_by_their_chat_template(tmp_path):
    """A template that adds nothing gives what the literal prompt gives."""
    for name in ("sft", "grpo"):
        shutil.copytree(Path(probe.__file__).parent / "data" / "tiny-math" / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{% else %}50{% endif %}"
        )
    reports = [
        probe.compare(
            *(str(tmp_path / name) for name in ("sft", "grpo")),
            ["tiny-math"],
            alpha=[0.3],
            prompt=prompt,
            overrides=SMALL,
            output=tmp_path / f"run-{number}",
        )
        for number, prompt in enumerate(("chat: {question}", "{question}"))
    ]
    assert reports[0].cells == reports[1].cells
    assert len(reports[0].cells) > 0


def test_models_that_ship_need_no_more_than_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--limit", "20", "--set", "selection.samples=3", "--set", "report.resamples=0"]
    result = CliRunner().invoke(main, ["compare", SFT, GRPO, "--alpha", "0.5", *small])
    assert result.exit_code == 0, result.output
    assert "the tokenizer has no chat template, so the prompt is the question" in result.stderr
    assert "tiny-math · sft-vs-grpo · 3 samples" in result.stdout
    run = {"solutions.questions": 20, "selection.samples": 3, "report.resamples": 0}
    report = probe.compare(SFT, GRPO, alpha=[0.5], overrides=run)
    assert report.path == Path("runs/sft-vs-grpo")
    assert "sft → grpo on 20 questions of tiny-math" in result.stdout
    assert report.accuracy[0].questions == 20


def test_questions_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"question": f"{n}+{n}+1=?", "answer": str(2 * n + 1)}) for n in range(9)]
    for place in ("mine.jsonl", "other/mine.jsonl"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text("\n".join(lines))
    arguments = ["compare", SFT, GRPO, "--benchmark", "mine.jsonl", "--dry-run"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert 'say grading = "exact" or "math" (--grading)' in refused.stderr
    done = CliRunner().invoke(main, [*arguments, "--grading", "exact"])
    assert done.exit_code == 0, done.output
    assert "mine.jsonl" in done.stdout
    both = compare_recipe(
        SFT, GRPO, ["mine.jsonl", "./other/mine.jsonl", "gsm8k"], prompt="chat", grading="math"
    )
    assert [(c.name, c.path, c.grading) for c in both.benchmarks] == [
        ("mine", "mine.jsonl", "math"),
        ("mine-2", "./other/mine.jsonl", "math"),
        ("gsm8k", None, "math"),
    ]


def test_one_of_anything_needs_no_list(tmp_path):
    one = compare_recipe(SFT, GRPO, "tiny-math", alpha=0.5, prompt="{question}")
    assert one == compare_recipe(SFT, GRPO, ["tiny-math"], alpha=[0.5], prompt="{question}")
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "1+1=?", "answer": "2"}\n')
    one = compare_recipe(SFT, GRPO, "gsm8k", benchmark_paths=f"{file}", prompt="{question}")
    assert [(choice.name, choice.path) for choice in one.benchmarks] == [("gsm8k", str(file))]


def test_the_prompt_follows_the_tokenizer(tmp_path):
    told = []
    shutil.copytree(DATA / "oracle" / "llama" / "model", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = compare_recipe(str(tmp_path / "chat"), "not/here", say=told.append)
    assert (chat.pairs[0].prompt, told) == ("chat", [])
    plain = compare_recipe(str(tmp_path / "chat"), SFT, say=told.append)
    assert plain.pairs[0].prompt == "{question}"
    assert told[0].startswith(f"{SFT}: the tokenizer has no chat template")
    explicit = compare_recipe(SFT, GRPO, prompt="chat", say=told.append)
    assert (explicit.pairs[0].prompt, len(told)) == ("chat", 1)
