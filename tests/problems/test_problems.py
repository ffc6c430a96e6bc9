import json
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from probe.errors import ProbeError
from probe.grading import last_boxed, same_answer
from probe.problems import (
    BENCHMARKS,
    Benchmark,
    Problem,
    _reading,
    load_problems,
    one_text,
    read_rows,
)

REAL = Path(__file__).parents[3] / "shared" / "benchmarks"


def test_the_shipped_problems_are_right():
    problems = load_problems("tiny-math")
    assert len(problems) == 1000
    for problem in problems:
        assert re.fullmatch(r"\d+([+*-]\d+){2,4}=\?", problem.question), problem
        total, *steps = re.findall(r"^\d+|[+-]\d+", problem.question)
        assert int(total) + sum(map(int, steps)) == int(problem.answer), problem


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)
@pytest.mark.parametrize(
    ("benchmark", "file", "number", "first", "shape"),
    [
        ("gsm8k", "gsm8k", 1319, ("0", "18"), r"-?[\d,]+(\.\d+)?"),
        (
            "math",
            "math500",
            500,
            ("test/precalculus/807.json", r"\left( 3, \frac{\pi}{2} \right)"),
            r"[^$]+|\\\$.+",
        ),
        ("college_math", "college_math", 2818, ("0", "$10-4 n$"), r"(?s)\S(.*\S)?"),
        ("minerva_math", "minerva_math", 272, ("0", "1.6"), r"(?s)\S(.*\S)?"),
        ("olympiadbench", "olympiadbench", 675, ("1606", "2"), r"[^\[].*|\[.*[^']\]"),
        ("aime24", "aime24", 30, ("60", "204"), r"0|[1-9]\d{0,2}"),
        ("amc23", "amc23", 40, ("0", "27"), r"-?[1-9]\d*"),
    ],
)
def test_every_benchmark_from_its_real_file(benchmark, file, number, first, shape):
    problems = load_problems(benchmark, REAL / f"{file}.jsonl")
    assert len(problems) == number
    assert (problems[0].id, problems[0].answer) == first
    for problem in problems:
        assert re.fullmatch(shape, problem.answer), problem
        assert len(problem.question) > 10


@pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real benchmark files, not in this repository"
)
def test_golds_that_need_more_than_a_column():
    def golds(benchmark, file):
        return {p.id: p.answer for p in load_problems(benchmark, REAL / f"{file}.jsonl")}

    olympiad = golds("olympiadbench", "olympiadbench")
    assert olympiad["2253"] == r"45 \text{ minute}"
    assert olympiad["2592"] == "4.2%"
    assert olympiad["1664"] == "$69$,$84$"
    minerva = golds("minerva_math", "minerva_math")
    assert minerva["1"] == "4.5e33"
    assert minerva["5"] == r"\arcsin(10/13)"
    # The solution of MATH says the same as its column of answers.
    with_column = load_problems("math", REAL / "math500.jsonl")
    for row, problem in zip(read_rows(REAL / "math500.jsonl"), with_column, strict=True):
        boxed = last_boxed(str(row.columns["solution"]))
        assert same_answer(problem.answer, boxed), problem


def test_a_larger_draw_contains_the_smaller():
    small, large, other = (
        {p.id for p in load_problems("tiny-math", questions=n, seed=s)}
        for n, s in ((20, 42), (50, 42), (20, 1))
    )
    assert len(small) == 20
    assert small < large
    assert small != other
    assert len(load_problems("tiny-math", questions=10**6)) == 1000


def write(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    return path


GOOD = json.dumps({"question": "1+1=?", "answer": "2"})


def test_a_file_without_ids_counts_lines(tmp_path):
    problems = load_problems("tiny-math", write(tmp_path, GOOD, "", GOOD))
    assert [p.id for p in problems] == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", "ans', r"p\.jsonl:2: not JSON .*; mend or remove this line"),
        ("[1]", r"p\.jsonl:2: not a JSON object"),
        (
            '{"question": "x", "level": 3}',
            r"p\.jsonl:2: no column with the answer; found: question, level; "
            r"needed: (answer or final_answer|final_answer or )",
        ),
        (
            '{"text": "x", "answer": "1"}',
            r"p\.jsonl:2: no column with the question; found: text, answer; "
            r"needed: question or problem or prompt",
        ),
        ('{"question": "x", "answer": " "}', r"p\.jsonl:2: the answer (is empty|' ' is no whole)"),
    ],
)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_broken_line_is_named(tmp_path, benchmark, line, message):
    with pytest.raises(ProbeError, match=message):
        load_problems(benchmark, write(tmp_path, GOOD, line))


def test_other_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ProbeError, match="'gsm' is not known; one of: tiny-math, gsm8k"):
        load_problems("gsm")
    with pytest.raises(ProbeError, match=r"cannot read the benchmark file .*No such file"):
        load_problems("tiny-math", tmp_path / "none.jsonl")
    with pytest.raises(ProbeError, match="holds no problem"):
        load_problems("tiny-math", write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ProbeError, match="byte 14 is not UTF-8"):
        load_problems("tiny-math", tmp_path / "latin.jsonl")
    (tmp_path / "p.xlsx").write_text("")
    with pytest.raises(ProbeError, match=r"the format \.xlsx is not known; known: \.jsonl, "):
        load_problems("tiny-math", tmp_path / "p.xlsx")
    twice = [Problem("a", "1", "1"), Problem("a", "2", "2")]
    monkeypatch.setitem(BENCHMARKS, "own", Benchmark(lambda path: twice, None))
    with pytest.raises(ProbeError, match="id 'a' stands twice"):
        load_problems("own")


def test_answers_that_are_none(tmp_path):
    half = write(tmp_path, json.dumps({"question": "1", "answer": 27.5}))
    with pytest.raises(ProbeError, match=r"p\.jsonl:1: the answer '27\.5' is no whole number"):
        load_problems("amc23", half)
    unboxed = write(tmp_path, json.dumps({"problem": "1", "solution": "It is 3."}))
    with pytest.raises(ProbeError, match=r"p\.jsonl:1: the solution has no \\boxed\{\}"):
        load_problems("math", unboxed)


ROWS = [
    {"id": 7, "Problem": 'a, "b"\nc', "final_answer": ["$\\frac{1}{2}$"], "unit": "km"},
    {"id": 8, "Problem": "Größe\u2028?", "final_answer": ["$3$, $4$"], "unit": None},
]
PROBLEMS = [
    Problem("7", 'a, "b"\nc', r"$\frac{1}{2}$ \text{ km}"),
    Problem("8", "Größe\u2028?", "$3$, $4$"),
]


def write_rows(path, rows):
    """Write rows as people do, in the format that the suffix says."""
    import pandas

    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        pandas.DataFrame(rows).to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.name == "data.json":
        path.write_text(json.dumps({"version": "1", "data": rows}))
    elif path.name == "indented.json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


@pytest.mark.parametrize(
    "name",
    ["p.jsonl", "p.ndjson", "p.json", "data.json", "indented.json", "p.csv", "p.tsv", "p.parquet"],
)
def test_every_format_says_the_same(tmp_path, name):
    assert load_problems("olympiadbench", write_rows(tmp_path / name, ROWS)) == PROBLEMS


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps(ROWS[0]))
    assert load_problems("olympiadbench", tmp_path / "1.json") == PROBLEMS[:1]


def test_a_folder_is_its_test_files(tmp_path):
    write_rows(tmp_path / "data" / "train-0.parquet", ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    write_rows(tmp_path / ".git" / "test.json", ROWS)
    assert load_problems("olympiadbench", tmp_path) == PROBLEMS
    write_rows(tmp_path / "data" / "test-0.parquet", ROWS[1:])
    write_rows(tmp_path / "data" / "test-1.csv", [dict(ROWS[0], id=9)])
    assert [p.id for p in load_problems("olympiadbench", tmp_path)] == ["8", "9"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProbeError, match=r"empty holds no file of a known format: \.jsonl, "):
        load_problems("olympiadbench", tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "{\n'a': 1}", r"p\.json:2: not JSON \(.*\); mend this line"),
        ("p.json", "[1]", r"p\.json, row 1: not a JSON object"),
        ("p.json", "1", r"p\.json: not a list of JSON objects"),
        ("p.json", '{"a": 1}\n{"b', r"p\.json:2: not JSON"),
        ("p.csv", "question,answer\n1,2,3\n", r"p\.csv, row 1: 3 values for 2 columns"),
        ("p.csv", 'question,answer\n1,"2\n', r"p\.csv:2: not CSV \(.*\); mend this line"),
        ("p.csv", "question,level\n1,2\n", r"p\.csv, row 1: no column with the answer"),
        ("p.parquet", "PAR", r"p\.parquet: not a parquet file"),
    ],
)
def test_other_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ProbeError, match=message):
        load_problems("gsm8k", tmp_path / name)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"id": ["b", "a"]}, ["b", "a"]),
        ({"id": ["a", "a"], "idx": [4, 5]}, ["4", "5"]),
        ({"id": ["a", "a"]}, ["0", "1"]),
        ({"id": ["a", None]}, ["0", "1"]),
    ],
)
def test_an_id_is_one_that_tells_rows_apart(tmp_path, ids, expected):
    rows = [
        {"question": "1", "answer": "2"} | {name: values[place] for name, values in ids.items()}
        for place in range(2)
    ]
    problems = load_problems("tiny-math", write(tmp_path, *map(json.dumps, rows)))
    assert [p.id for p in problems] == expected


@pytest.mark.parametrize(
    ("benchmark", "row", "gold"),
    [
        ("gsm8k", {"question": "q", "answer": "So 2*9=18.\n#### 18 "}, "18"),
        ("gsm8k", {"input": "q", "target": "18"}, "18"),
        (
            "math",
            {"problem": "q", "solution": r"\boxed{1}, no \boxed{\frac{1}{2}}"},
            r"\frac{1}{2}",
        ),
        ("math", {"problem": "q", "solution": r"\boxed{1}", "answer": "2"}, "2"),
        ("math", {"Problem": "q", "Answer": r"$\boxed{2}$"}, "2"),
        ("minerva_math", {"question": "q", "answer": "1e-3"}, "1e-3"),
        ("olympiadbench", {"question": "q", "final_answer": "['$n=2$.']"}, "$n=2$"),
        ("olympiadbench", {"question": "q", "final_answer": r"['$\\pi$']"}, r"$\pi$"),
        (
            "olympiadbench",
            {"question": "q", "final_answer": ["1", "2"], "unit": "$cm^2$"},
            r"1, 2 \text{ cm^2}",
        ),
        ("olympiadbench", {"question": "q", "answer": "3", "unit": "^{\\circ}"}, "3^{\\circ}"),
        ("aime24", {"Problem": "q", "Answer": 33}, "33"),
        ("aime24", {"problem": "q", "answer": "033"}, "33"),
        ("aime24", {"problem": "q", "solution": r"\boxed{000}"}, "0"),
        ("amc23", {"question": "q", "answer": -1.0}, "-1"),
        ("amc23", {"question": "q", "answer": "0" * 10**6 + "7"}, "7"),
    ],
)
def test_golds_in_the_wild(tmp_path, benchmark, row, gold):
    assert load_problems(benchmark, write(tmp_path, json.dumps(row)))[0].answer == gold


MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1=?"}]


def test_questions_that_are_messages(tmp_path):
    rows = [{"prompt": MESSAGES, "answer": ["2"]}, {"prompt": json.dumps(MESSAGES), "answer": 2}]
    found = load_problems("tiny-math", write(tmp_path, *map(json.dumps, rows)))
    assert [(p.question, p.answer) for p in found] == [("1+1=?", "2")] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": ["a", "b"], "answer": "1"}, "the question is no text, nor messages"),
        ({"question": {"text": "a"}, "answer": "1"}, "the question is no text, nor messages"),
        ({"question": "a", "answer": {"value": 1}}, "the answer is no text or number"),
        ({"question": "a", "answer": ["1", "2"]}, "the answer is no text or number"),
    ],
)
def test_questions_and_answers_of_another_kind(tmp_path, row, message):
    with pytest.raises(ProbeError, match=rf"p\.jsonl:1: {message}"):
        load_problems("tiny-math", write(tmp_path, json.dumps(row)))


def test_context_comes_before_the_question(tmp_path):
    row = {"context": "Let $n=1$.", "question": "What is $n$?", "final_answer": ["1"]}
    problem = load_problems("olympiadbench", write(tmp_path, json.dumps(row)))[0]
    assert problem.question == "Let $n=1$.\nWhat is $n$?"


def test_what_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None, *, split):
        asked.append((name, config, split))
        return [{"question": f"{config}?", "answer": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, benchmark in BENCHMARKS.items():
        problems = load_problems(name)
        assert (benchmark.source is None) == (name == "tiny-math")
        assert asked == [] or {source for source, _, _ in asked} == {benchmark.source}
        if name == "math":
            assert [problem.id for problem in problems] == list("0123456")
            assert [part for _, part, _ in asked] == sorted(part for _, part, _ in asked)
        asked.clear()

    def unreachable(name, config=None, *, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ProbeError, match=r"cannot load the data set 'math-ai/amc23' \(no route\)"):
        load_problems("amc23")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "capitals.csv"
    path.write_text("question,answer\nFrance?,Paris\nPeru?,Lima\n")
    found = load_problems("capitals", path, grading="exact")
    assert [problem.answer for problem in found] == ["Paris", "Lima"]
    assert {problem.grading for problem in found} == {"exact"}
    (one,) = load_problems("capitals", path, 1, grading="math")
    assert one.grading == "math"
    assert {p.grading for p in load_problems("tiny-math", questions=3)} == {"math"}
    assert {p.grading for p in load_problems("tiny-math", questions=3, grading="exact")} == {
        "exact"
    }
    with pytest.raises(ProbeError, match=r"'capitals' is not known; .*say grading = \"exact\""):
        load_problems("capitals", path)
    with pytest.raises(ProbeError, match=r"'capitals' is not known; .*amc23$"):
        load_problems("capitals", grading="exact")


WRITABLE = st.characters(exclude_categories=["Cs"])


@given(
    st.lists(st.tuples(st.text(WRITABLE, min_size=1), st.integers(0, 999)), min_size=1, max_size=5)
)
def test_any_text_survives_a_file(rows):
    rows = [{"question": question, "answer": answer} for question, answer in rows]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        problems = load_problems("aime24", path)
    assert [p.question for p in problems] == [row["question"] for row in rows]
    assert [int(p.answer) for p in problems] == [row["answer"] for row in rows]


def test_questions_may_share_a_cluster(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {"question": "1+1=?", "answer": "2", "cluster": "sums"},
        {"question": "1+2=?", "answer": "3", "Cluster": 7},
        {"question": "2-1=?", "answer": "1", "cluster": None},
        {"question": "2-2=?", "answer": "0"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_problems("own", path, grading="math")
    assert [problem.cluster for problem in found] == ["sums", "7", None, None]


def test_a_parquet_file_that_says_it_is_huge(tmp_path, monkeypatch):
    """The same value, however often, takes a few hundred bytes there."""
    path = tmp_path / "p.parquet"
    monkeypatch.setattr(_reading, "MOST_VALUES", 10**6)
    monkeypatch.setattr(_reading, "MOST_BYTES", 2**23)
    words = pyarrow.array(["a" * 10**6])
    for column, message in (
        (pyarrow.nulls(2 * 10**6, "int8"), "more than 1,000,000 values or 8 MiB"),
        (words.take([0] * 9), "more than 1,000,000 values or 8 MiB"),
        (words.dictionary_encode().take([0] * 9), "more than 1,000,000 values or 8 MiB"),
        (words.take([0] * 7), "no column with the answer"),
    ):
        write_table(pyarrow.table({"question": column}), path)
        assert path.stat().st_size < 2 * 10**6
        with pytest.raises(ProbeError, match=message):
            load_problems("own", path, grading="math")


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_log(tmp_path, packing):
    path = tmp_path / "l.eval"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("samples/1_epoch_1.json", json.dumps({"input": "a" * 50, "id": 1}))
    data = path.read_bytes()
    for place in range(50, 80):
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        with suppress(ProbeError):  # a few bits of a header mean nothing
            read_rows(path)


def test_a_log_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "l.eval"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1_epoch_1.json", "[" + "{}," * 30_000_000)
    with pytest.raises(ProbeError, match=r"samples of 0.* MiB unpack to 86 MiB"):
        read_rows(path)


@pytest.mark.parametrize(
    "text",
    [
        "['a', f'" + "{a}" * 200_000 + "']",
        "['''a'b''', f'" + "{a}" * 200_000 + "']",
        "['a' # '\n, rF\"" + "{a}" * 200_000 + '"]',
        "['" + "\\'" * 400_000 + "']",
    ],
)
def test_a_text_that_looks_like_a_list_is_read_in_no_time(text):
    start = time.monotonic()
    one_text(text)
    assert time.monotonic() - start < 5


def test_a_list_as_python_writes_it_is_still_read():
    content = "it's f'(x) \"\"\" ''' # $\\sqrt{2}$"
    assert one_text(repr([{"role": "assistant", "content": content}])) == content
