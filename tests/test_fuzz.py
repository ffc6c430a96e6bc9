"""Every door, with input that nobody would write on purpose."""

import json
import shutil
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w
import zstandard
from conftest import DATA
from fuzzing import DEEP, SCALARS, TEXTS, VALUES, damaged, door, examples, mutated
from hypothesis import given
from hypothesis import strategies as st

from probe.grading import extract_answer
from probe.models import read_config, read_tokenizer
from probe.problems import load_problems
from probe.recipe import read_recipe, recipe_files, recipe_from
from probe.solutions import match, read_given

RECIPES = [tomllib.loads(Path(path).read_text()) for path in recipe_files().values()]
PROBLEMS = [
    {"id": "a", "question": "1+1=?", "answer": "2", "cluster": "x"},
    {"problem": "2+2=?", "solution": "It is \\boxed{4}.", "level": 3},
]
SOLUTIONS = {
    path.name: path.read_bytes()
    for path in sorted((DATA / "solutions").iterdir())
    if path.name != "README.md"
}


@examples()
@given(table=st.sampled_from(RECIPES).flatmap(mutated), as_file=st.booleans())
def test_recipes(tmp_path_factory, table, as_file):
    if not as_file:
        door(lambda: recipe_from(table, "recipe"))
        return
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    try:
        path.write_bytes(tomli_w.dumps(table).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError):
        return  # TOML cannot say it
    door(lambda: read_recipe(path))


@examples()
@given(data=st.binary(max_size=200) | st.sampled_from(RECIPES).map(tomli_w.dumps).map(str.encode))
def test_recipes_that_are_no_text(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_bytes(data[: len(data) // 2 + 7])
    door(lambda: read_recipe(path))


@st.composite
def rows(draw, row):
    lines = [json.dumps(draw(mutated(row))) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 9)) == 0:
        lines.append(draw(DEEP))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@examples()
@given(
    data=st.sampled_from(PROBLEMS).flatmap(rows) | st.binary(max_size=100),
    end=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ""]),
    benchmark=st.sampled_from(["mine", "gsm8k", "math", "olympiadbench", "aime24"]),
    grading=st.sampled_from([None, "math", "exact"]),
)
def test_problem_files(tmp_path_factory, data, end, benchmark, grading):
    path = tmp_path_factory.mktemp("problems") / f"p{end}"
    path.write_bytes(data)
    door(lambda: load_problems(benchmark, path, grading=grading))


def first_row(data):
    return json.loads(data.decode().splitlines()[0])


TABLES = [first_row(data) for name, data in SOLUTIONS.items() if name.endswith(".jsonl")]


@examples()
@given(
    data=st.sampled_from(TABLES).flatmap(rows)
    | st.sampled_from(list(SOLUTIONS.values())).flatmap(damaged),
    end=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".eval"]),
)
def test_solution_files(tmp_path_factory, data, end):
    path = tmp_path_factory.mktemp("solutions") / f"s{end}"
    path.write_bytes(data)
    given_answers = door(lambda: read_given(path))
    if given_answers is not None:
        file = DATA / "solutions" / "problems.jsonl"
        problems = {"mine": load_problems("mine", file, grading="math")}
        door(lambda: match(given_answers, problems, "mine"))


@examples(3)
@given(
    text=st.lists(TEXTS | st.sampled_from(["The answer is", "\\boxed{", "}", "5"])).map("".join)
    | st.tuples(TEXTS, st.sampled_from([10, 1000, 50000])).map(lambda part: part[0] * part[1])
)
def test_answers(text):
    door(lambda: extract_answer(text[:200000]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder to be damaged, and its files."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(DATA / "oracle" / "llama" / "model", folder)
    return folder, {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".json"}


@examples()
@given(draw=st.data())
def test_model_folders(model, draw):
    folder, files = model
    name = draw.draw(st.sampled_from(sorted(files)))
    data = draw.draw(
        damaged(files[name])
        | mutated(json.loads(files[name])).map(
            lambda table: json.dumps(table).encode("utf-8", "surrogatepass")
        )
        | VALUES.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
        | DEEP.map(str.encode)
    )
    (folder / name).write_bytes(data)
    try:
        door(lambda: read_config(str(folder)))
        door(lambda: read_tokenizer(str(folder)))
    finally:
        (folder / name).write_bytes(files[name])


@examples()
@given(value=VALUES | SCALARS, as_bytes=st.booleans())
def test_words_of_a_server(value, as_bytes):
    from probe.remote import failure, read_response, read_saved, refusal

    text = json.dumps(value)
    data = text.encode("utf-8", "surrogatepass")
    for call in (
        lambda: read_response(data if as_bytes else text),
        lambda: read_saved("http://x", zstandard.ZstdCompressor().compress(data)),
        lambda: read_saved("http://x", data),
    ):
        with suppress(ValueError):  # what the caller knows as "not a response"
            door(call)
    for words in (failure("http://x", text), refusal("http://x", "k", 418, text)):
        assert str(words).strip()
