import json
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import call

import probe
from probe.errors import ProbeError
from probe.imported import GivenAnswer, imported, match, read_given
from probe.problems import Problem, load_problems
from probe.report import build_report
from probe.run_folder import RunFolder

DATA = Path(__file__).parent / "data" / "solutions"
PROMPT = "Q: {question} A:"


@pytest.fixture
def problems():
    return load_problems("gsm8k", DATA / "problems.jsonl")


def solutions(tiny, problems, file, prompt=PROMPT):
    given = match(read_given(DATA / f"{file}.jsonl"), {"gsm8k": problems}, "gsm8k")
    parts = imported(tiny.tokenizer, problems, prompt, given)
    return [solution for part in parts for solution in part]


@pytest.mark.parametrize(
    ("file", "format", "prompts", "tokens"),
    [
        ("lm_eval", "lm-evaluation-harness", "the file's", "derived again from the text"),
        ("qwen_math", "Qwen2.5-Math", "the recipe's", "derived again from the text"),
        ("vllm", "vLLM", "the file's", "the file's"),
        ("vllm_text", "vLLM", "the file's", "derived again from the text"),
        ("plain", "question and answer", "the recipe's", "derived again from the text"),
        ("by_id", "question and answer", "the recipe's", "the file's"),
    ],
)
def test_formats_are_recognised_by_their_columns(file, format, prompts, tokens):
    given = read_given(DATA / f"{file}.jsonl")
    assert given.format == format
    assert given.table["prompts"] == prompts
    assert given.table["token_ids"] == tokens
    assert f"{file}.jsonl ({format}), graded again; prompts are {prompts}" in given.account


@pytest.mark.parametrize("file", ["lm_eval", "qwen_math", "vllm_text", "plain"])
def test_answers_find_their_problems_and_are_graded_again(llama, problems, file):
    """Files say that all are wrong, or nothing; the third one is."""
    found = solutions(llama, problems, file)
    assert [s.id for s in found] == ["0", "1", "2"]
    assert [s.correct for s in found] == [True, True, False]
    assert [s.extracted for s in found] == ["7", "0.75", "11"]
    assert [s.gold for s in found] == [p.answer for p in problems]


def test_token_ids_are_the_files_where_it_has_them(tiny, llama, problems):
    assert [s.answer for s in solutions(llama, problems, "by_id")] == [[40, 2], [41, 2], [42, 2]]
    encoded = llama.tokenizer(PROMPT.replace("{question}", problems[0].question))["input_ids"]
    assert solutions(llama, problems, "by_id")[0].prompt == encoded
    with pytest.raises(ProbeError, match=r"vllm\.jsonl:1: its token ids spell .* not its text"):
        solutions(llama, problems, "vllm")
    with pytest.raises(
        ProbeError, match=r"by_id\.jsonl:1: token 40 is none of the \d\d of the mod"
    ):
        solutions(tiny, problems, "by_id")


def test_text_is_read_behind_the_prompt_that_it_answered(tiny):
    asked = [Problem("0", "50-7=?", "43")]
    whole = tiny.tokenizer("50-7=?50-7=43#43")["input_ids"]
    (part,) = imported(tiny.tokenizer, asked, "{question}", given_answers(asked, "50-7=43#43"))
    assert part[0].prompt + part[0].answer == whole
    assert part[0].correct


def given_answers(problems, text):
    path = DATA / "made.jsonl"
    return {p.id: GivenAnswer(str(path), None, p.id, None, None, text, None) for p in problems}


def write(tmp_path, *rows):
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


ROW = {"question": "Tom has 3 apples and buys 4. How many has he?", "text": "#### 7"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"given\.jsonl holds no solution"),
        (
            [{"question": "q", "level": 3}],
            r"given\.jsonl:1: not recognised as solutions; found: question, level; needed: doc and "
            r"arguments and resps \(lm-evaluation-harness\); question and code and pred \(Qwen2",
        ),
        ([ROW, {"prompt": "p", "outputs": ["x"]}], r"given\.jsonl:2: of format vLLM, but the rows"),
        (
            [{"question": "q", "answer": "18"}],
            r"given\.jsonl:1: no answer; needed: text in text or ",
        ),
        (
            [{"prompt": "p", "outputs": ["x", "y"]}],
            r"given\.jsonl:1: 2 answers to one question; one is needed",
        ),
        (
            [{"question": "q", "code": [], "pred": []}],
            r"given\.jsonl:1: 0 answers to one question",
        ),
    ],
)
def test_files_that_are_no_solutions(tmp_path, rows, message):
    with pytest.raises(ProbeError, match=message):
        read_given(write(tmp_path, *rows))


def test_questions_without_an_answer_and_with_two(tmp_path, problems):
    asked = {"gsm8k": problems}
    with pytest.raises(
        ProbeError, match=r"no answer to 2 of 3 questions of gsm8k; the first is 1: "
    ):
        match(read_given(write(tmp_path, ROW)), asked, "gsm8k")
    twice = read_given(write(tmp_path, ROW, ROW | {"text": "#### 8"}))
    with pytest.raises(
        ProbeError, match=r"jsonl:2: question 0 of gsm8k has another answer at .*:1;"
    ):
        match(twice, asked, "gsm8k")
    again = read_given(write(tmp_path, ROW, ROW))
    assert set(match(again, {"gsm8k": problems[:1]}, "gsm8k")) == {"0"}


def test_a_question_that_a_benchmark_asks_twice(tmp_path):
    asked = {"math": [Problem("a", "What is $n$?", "1"), Problem("b", "What is $n$?", "2")]}
    rows = [{"problem": "What is  $n$?", "output": text} for text in ("1", "2")]
    found = match(read_given(write(tmp_path, *rows)), asked, "math")
    assert [found[name].text for name in "ab"] == ["1", "2"]


def test_one_file_for_several_benchmarks(tmp_path):
    asked = {"gsm8k": [Problem("0", "One?", "1")], "math": [Problem("0", "Two?", "2")]}
    rows = [{"question": "Two?", "text": "b"}, {"question": "One?", "text": "a"}]
    given = read_given(write(tmp_path, *rows))
    assert match(given, asked, "gsm8k")["0"].text == "a"
    assert match(given, asked, "math")["0"].text == "b"
    ids = read_given(write(tmp_path, {"id": "0", "text": "a"}))
    with pytest.raises(
        ProbeError, match=r"the id '0' is in gsm8k and in math; add a column with t"
    ):
        match(ids, asked, "math")


def test_a_prompt_with_examples_answers_its_last_question(tmp_path):
    asked = {
        "gsm8k": [Problem("0", "One?", "1"), Problem("1", "Two?", "2"), Problem("2", "Two", "")]
    }
    rows = [
        {"prompt": f"Q: {a}\nA: x\nQ: {b}\nA:", "output": b}
        for a, b in (("One?", "Two?"), ("Two?", "One?"), ("One?", "Two"))
    ]
    found = match(read_given(write(tmp_path, *rows)), asked, "gsm8k")
    assert [found[name].text for name in "012"] == ["One?", "Two?", "Two"]


def test_an_empty_answer_is_wrong(llama, tmp_path, problems):
    given = match(read_given(write(tmp_path, ROW | {"text": ""})), {"gsm8k": problems[:1]}, "gsm8k")
    ((solution,),) = imported(llama.tokenizer, problems[:1], PROMPT, given)
    assert (solution.answer, solution.correct) == ([], False)


SMALL = {
    "solutions.questions": 60,
    "selection.samples": 6,
    "selection.alpha": "[0.1]",
    "report.resamples": 0,
}


@pytest.fixture(scope="module")
def pair_recipe(tmp_path_factory):
    """A recipe of one pair, a finished run of it, and its solutions as another program's file."""
    folder = tmp_path_factory.mktemp("given")
    text = (Path(__file__).parents[1] / "recipes" / "tiny-math.toml").read_text()
    first, second, *rest = text.split("[[pairs]]")
    recipe = folder / "pair.toml"
    recipe.write_text(
        first + "[[pairs]]" + second + "[[benchmarks]]" + rest[0].split("[[benchmarks]]")[1]
    )
    with open("/dev/null", "w") as nowhere:
        probe.run_recipe(recipe, folder / "run", overrides=SMALL, console=Console(file=nowhere))
    run = RunFolder(folder / "run")
    files = {}
    for side, name in (("before", "tiny-math--sft"), ("after", "tiny-math--grpo")):
        found, _ = run.read_solutions(run.solutions_file(name, "tiny-math"))
        files[side] = folder / f"{side}.jsonl"
        rows = [
            {
                "prompt_token_ids": s.prompt,
                "id": s.id,
                "prompt": "",
                "outputs": [{"text": s.text, "token_ids": s.answer}],
            }
            for s in found
        ]
        files[side].write_text("\n".join(map(json.dumps, reversed(rows))))
    return recipe, run.path, files


def test_a_run_with_solutions_from_elsewhere_ends_in_the_same_report(pair_recipe, tmp_path):
    recipe, generated, files = pair_recipe
    arguments = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    given = ",".join(f"{side}={path}" for side, path in files.items())
    done = call("recipe", recipe, "--solutions", given, "--output", tmp_path / "run", *arguments)
    assert done.exit_code == 0, done.stderr
    assert (
        f"solutions of tiny-math--sft: 60 answers from {files['before']} (vLLM), graded"
        in done.stderr
    )
    assert build_report(tmp_path / "run").table["cells"] == build_report(generated).table["cells"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["given_solutions"]["tiny-math--grpo"]["token_ids"] == "the file's"

    with files["after"].open("a") as file:
        file.write("\n" + json.dumps({"id": "more", "prompt": "", "outputs": ["1"]}))
    done = call("recipe", recipe, "--solutions", given, "--output", tmp_path / "run", *arguments)
    assert done.exit_code == 2
    assert "holds a run of another solutions" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("somewhere.jsonl", "--solutions somewhere.jsonl: write before=FILE,after=FILE"),
        (
            "before=a.jsonl",
            "--solutions is for one pair, and tiny-math has 2; use --set pairs.0.sol",
        ),
    ],
)
def test_the_option_is_checked(given, message):
    done = call("recipe", "tiny-math", "--solutions", given)
    assert done.exit_code == 2
    assert message in done.stderr
