import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import call

import probe
from probe.errors import ProbeError
from probe.problems import Problem, load_problems
from probe.report import build_report
from probe.solutions import Given, GivenAnswer, imported, match, read_given
from probe.store import RunFolder

DATA = Path(__file__).parents[1] / "data" / "solutions"
PROMPT = "Q: {question} A:"


@pytest.fixture
def problems():
    return load_problems("gsm8k", DATA / "problems.jsonl")


def data(file):
    return DATA / (file if "." in file else f"{file}.jsonl")


def solutions(tiny, problems, file, prompt=PROMPT):
    given = match(read_given(data(file)), {"gsm8k": problems}, "gsm8k")
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
        ("inspect.eval", "inspect_ai", "the recipe's", "derived again from the text"),
        ("inspect.json", "inspect_ai", "the recipe's", "derived again from the text"),
        ("lighteval.parquet", "lighteval", "the file's", "derived again from the text"),
        ("trl.parquet", "TRL", "the recipe's", "derived again from the text"),
        ("verl", "verl", "the recipe's", "derived again from the text"),
        ("openai_batch", "OpenAI batch", "the recipe's", "derived again from the text"),
    ],
)
def test_formats_are_recognised_by_their_columns(file, format, prompts, tokens):
    given = read_given(data(file))
    assert given.format == format
    assert given.table["prompts"] == prompts
    assert given.table["token_ids"] == tokens
    assert f"{data(file).name} ({format}), graded again; prompts are {prompts}" in given.account


EVERY = [
    *("lm_eval", "qwen_math", "vllm_text", "plain", "inspect.eval", "inspect.json"),
    *("lighteval.parquet", "trl.parquet", "verl", "openai_batch"),
]


@pytest.mark.parametrize("file", EVERY)
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
            r"arguments and resps \(lm-evaluation-harness\); doc and model_response \(lighteval\)",
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
            r"given\.jsonl:1: (0 answers to one question|no answer; needed)",
        ),
    ],
)
def test_files_that_are_no_solutions(tmp_path, rows, message):
    with pytest.raises(ProbeError, match=message):
        read_given(write(tmp_path, *rows))


SAID = "He has 7.\n#### 7"
SPOKEN = {"role": "assistant", "content": SAID}
PART = {"type": "text", "text": SAID}


@pytest.mark.parametrize(
    "columns",
    [
        {"text": [SAID]},
        {"TEXT": SAID},
        {"Response": [[SAID]]},
        {"completion": [SPOKEN]},
        {"completion": SPOKEN},
        {"completion": [{"role": "user", "content": "q"}, SPOKEN]},
        {"messages": [{"role": "user", "content": "q"}, SPOKEN]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": SAID}]},
        {"output": {"role": "assistant", "content": [PART]}},
        {"output": [{"type": "thinking", "thinking": "#### 8"}, PART]},
        {"output": [{"type": "reasoning"}, {"type": "message", **SPOKEN, "content": [PART]}]},
        {"response": {"choices": [{"index": 0, "message": SPOKEN}]}},
        {"generation": {"text": SAID}},
        {"generated_text": [{"generated_text": SAID}]},
        {"text": json.dumps([SPOKEN])},
        {"text": repr([SPOKEN])},
        {"text": repr([SAID])},
    ],
)
def test_one_text_is_unwrapped(tmp_path, columns):
    (answer,) = read_given(write(tmp_path, {"question": "q", **columns})).answers
    assert answer.text == SAID


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"response": 104}, "the answer is a number; needed is the text that the model wrote"),
        ({"response": 1.5}, "the answer is a number"),
        ({"response": True}, "the answer is true or false"),
        ({"response": []}, "0 answers to one question"),
        ({"response": [None]}, "0 answers to one question"),
        ({"response": [SAID, SAID]}, "2 answers to one question"),
        ({"response": [PART, PART]}, "2 answers to one question"),
        ({"response": [SPOKEN, SPOKEN]}, "2 messages of the assistant"),
        ({"response": [{"role": "user", "content": "q"}]}, "0 messages of the assistant"),
        ({"response": {"role": "user", "content": "q"}}, "a message of the user, not of the"),
        ({"response": {"role": "assistant", "content": None}}, "an object without text: role"),
        ({"response": {"score": 1}}, "the answer is an object without text: score"),
        ({"response": {"type": "thinking", "text": "x"}}, "a thought without an answer"),
        ({"response": {"content": 104}}, "the answer is a number"),
        ({"text": SAID, "id": [1]}, "the id is no text or number"),
    ],
)
def test_what_holds_no_text_or_several_is_an_error(tmp_path, columns, message):
    with pytest.raises(ProbeError, match=rf"given\.jsonl:1: .*{message}"):
        read_given(write(tmp_path, {"question": "q", **columns}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input": "q", "epoch": 1, "output": {"choices": []}, "error": {"message": "limit"}},
            r"this sample has no answer \(limit\)",
        ),
        (
            {"custom_id": "1", "response": {"body": {"error": {"message": "too long"}}}},
            r"the request has no answer \(too long\)",
        ),
        ({"custom_id": "1", "response": None, "error": {"message": "expired"}}, "expired"),
    ],
)
def test_a_failed_request_is_an_error(tmp_path, row, message):
    with pytest.raises(ProbeError, match=message):
        read_given(write(tmp_path, row))


@pytest.mark.parametrize(
    ("file", "capitals"), [("qwen_math", str.title), ("lm_eval", str.upper), ("vllm", str.title)]
)
def test_columns_in_any_capitals(tmp_path, file, capitals):
    rows = [json.loads(line) for line in data(file).read_text().splitlines()]
    turned = [{capitals(name): value for name, value in row.items()} for row in rows]
    found, expected = read_given(write(tmp_path, *turned)), read_given(data(file))
    assert found.format == expected.format
    assert [a[1:] for a in found.answers] == [a[1:] for a in expected.answers]


def test_a_question_inside_a_longer_one_is_not_asked(tmp_path):
    asked = {"gsm8k": [Problem("0", "1+1=?", "2")]}
    given = read_given(write(tmp_path, {"prompt": "Q: 11+1=?", "output": "12"}))
    with pytest.raises(ProbeError, match="no answer to 1 of 1 questions"):
        match(given, asked, "gsm8k")


def test_a_damaged_log(tmp_path):
    whole = data("inspect.eval").read_bytes()
    for name, content in (("cut.eval", whole[:4000]), ("none.eval", b"PK"), ("empty.eval", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProbeError, match=rf"{name}: not a log of inspect_ai"):
            read_given(tmp_path / name)
    place = whole.index(b"samples/2_epoch") + 60
    (tmp_path / "bad.eval").write_bytes(whole[:place] + b"????" + whole[place + 4 :])
    with pytest.raises(ProbeError, match=r"bad\.eval: not a log of inspect_ai"):
        read_given(tmp_path / "bad.eval")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"question": "q", "text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question": "q", "text": ' + "1" * 5000 + "}", "not JSON that can be read"),
        (r'{"question": "q", "text": "\ud800"}', "holds half of a surrogate pair"),
    ],
)
def test_json_that_python_cannot_hold(tmp_path, line, message):
    (tmp_path / "given.jsonl").write_text(line)
    with pytest.raises(ProbeError, match=rf"given\.jsonl:1: .*({message})"):
        read_given(tmp_path / "given.jsonl")


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
    text = (Path(__file__).parents[2] / "recipes" / "tiny-math.toml").read_text()
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


def test_questions_are_found_in_long_prompts_in_no_time():
    questions = [f"Tom has {n} apples and buys {7 * n}. How many has he now?" for n in range(500)]
    problems = [Problem(str(n), question, "1") for n, question in enumerate(questions)]
    for before in ("a" * 50_000 + " ", "", "(", "Q: " + questions[3] + " A: 24\n\nQ: "):
        answers = tuple(
            GivenAnswer(f"f:{n}", None, None, f"{before}{question}\nA:", None, question, None)
            for n, question in enumerate(questions[::-1])
        )
        start = time.process_time()
        found = match(Given(Path("f"), "vLLM", answers), {"own": problems}, "own")
        assert time.process_time() - start < 5
        assert all(found[problem.id].text == problem.question for problem in problems)


def test_an_answer_with_letters_that_the_tokenizer_lacks_is_named(tiny, problems):
    with pytest.raises(ProbeError, match=r"plain.jsonl:1: .*tokenizer cannot take the text 'Q: "):
        solutions(tiny, problems, "plain")
    file = problems[:1], "1+1=?", {"0": GivenAnswer("f.jsonl:7", None, "0", None, None, "é!", None)}
    with pytest.raises(
        ProbeError, match=r"f.jsonl:7: .*tokenizer cannot take the text '1\+1=\?é!'"
    ):
        list(imported(tiny.tokenizer, *file))
