"""Hypothesis strategies for what comes in from outside, and the doors that it comes in by.

A door is a function that reads such input. It may give a result or a `ProbeError` of one line, and
nothing else: no other exception, no wait, no heap of memory, no wrong report. `test_fuzz.py` tries
each door for a few seconds, `fuzz_long.py` as long as one likes.
"""

import csv
import functools
import io
import json
import os
import resource
import signal
import socket
import struct
import threading
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tomli_w
import zstandard
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.recipe import recipe_files

DATA = Path(__file__).parent / "data"
LLAMA = DATA / "oracle" / "llama" / "model"
OLD_RUN = DATA / "old-run"

SECONDS = 30
"""The longest that a door may take."""

GIBIBYTES = 2
"""The most memory that one may add to the process."""


def examples(count: int):
    """Settings for so many inputs."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@contextmanager
def limits():
    """Raise where a door hangs or takes much memory."""

    def late(number, frame):
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GIBIBYTES * 2**20, f"it takes {grown / 2**20:.1f} GiB"


def tried(call: Callable[[], object]) -> bool:
    """Go through a door: whether it gave a result, or refused in one line."""
    try:
        call()
    except ProbeError as error:
        text = str(error)
        assert text.strip(), "a refusal without a reason"
        assert len(text.splitlines()) == 1, f"a refusal of several lines: {text}"
        assert len(text) < 4000, f"a refusal of {len(text)} letters: {text[:200]}"
        text.encode()
        return False
    return True


ODD_TEXTS = st.sampled_from(
    [
        *("", " ", "\n", "\x00", "\ud800", "\u202e", "[/b]", "%s", "../../x", "~", "a" * 400),
        *("9" * 5000, "1e999", "nan", "{question}", "{", "}", "{{", "\\boxed{", "<think>", "####"),
        *("hub/a%b", "/dev/zero", "-", "1/0", "2^{10^{10}}", "\\frac{1}{0}", "[" * 500, "é́"),
        *("http://evil.example:1", "['a', f'{1}']", "=1+1", "\x1b]0;a\x07", "{% for a in b %}"),
    ]
)
TEXTS = ODD_TEXTS | st.text(max_size=30)
NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31, 2**63, 10**400, 0.1, -0.0, 1e308, float("nan"), float("inf"), True, False]
)
SCALARS = st.none() | NUMBERS | TEXTS | st.integers() | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
DEEP = st.sampled_from([100, 2000, 60000]).map(lambda depth: "[" * depth + "]" * depth)


@st.composite
def mutated(draw, table):
    """A copy of plain data with one to three values changed, dropped or added, somewhere."""
    copy = json.loads(json.dumps(table))
    for _ in range(draw(st.integers(1, 3))):
        place = copy
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["change", "change", "change", "drop", "add"]))
            if action == "drop":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(TEXTS)] = draw(VALUES)
            else:
                place[key] = draw(VALUES)
            break
    return copy


@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, cut out, doubled, or all of them gone."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "double", "truncate"]))
        if kind == "flip" and start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[start : start + length]
        elif kind == "insert":
            found[start:start] = draw(st.binary(max_size=length))
        elif kind == "double":
            found[start:start] = found[start : start + length]
        elif kind == "truncate":
            del found[start:]
    return bytes(found)


def as_json(value):
    """JSON as any program may write it, halves of characters and numbers that are none too."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@functools.cache
def source(path):
    return path.read_bytes()


# --- recipes

RECIPES = [tomllib.loads(path.read_text()) for path in recipe_files().values()]


@st.composite
def recipe_inputs(draw):
    table = draw(st.sampled_from(RECIPES).flatmap(mutated))
    kind = draw(st.sampled_from(["data", "file", "file", "bytes", "overrides"]))
    more = None
    if kind == "bytes":
        more = draw(damaged(tomli_w.dumps(draw(st.sampled_from(RECIPES))).encode()))
    if kind == "overrides":
        keys = st.lists(st.sampled_from(["pairs", "0", "compute", "device", "x", ""]) | TEXTS)
        more = draw(st.dictionaries(keys.map(".".join), TEXTS | NUMBERS, max_size=3))
    return kind, table, more


def enter_recipe(value, folder):
    from probe.recipe import read_recipe, recipe_from, recipe_text

    kind, table, more = value
    path = folder / "r.toml"
    if kind == "data":
        recipe_from(table, "recipe")
        return
    if kind == "overrides":
        read_recipe("tiny-math", more)
        return
    try:
        path.write_bytes(more or tomli_w.dumps(table).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError):
        return  # TOML cannot say it
    found = read_recipe(path)
    path.write_text(recipe_text(found), encoding="utf-8")
    assert read_recipe(path) == found, "a wrong report: a recipe that was written is another"


# --- files of problems and of solutions

PROBLEMS = [
    [{"id": i, "question": f"{i}+1=?", "answer": str(i + 1), "cluster": "x"} for i in range(3)],
    [{"problem": "2+2=?", "solution": "It is \\boxed{4}.", "level": 3}],
    [{"question": [{"role": "user", "content": "3+3=?"}], "final_answer": ["6"], "unit": "m"}],
]
ENDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".eval", ".txt", ""]


@functools.cache
def solution_rows():
    from probe.problems import read_rows

    files = [
        [dict(row.columns) for row in read_rows(path)]
        for path in sorted((DATA / "solutions").iterdir())
        if path.suffix != ".md" and path.stem != "problems"
    ]
    return json.loads(json.dumps(files, default=str))


@st.composite
def table_inputs(draw, tables, whole=()):
    """A file of rows in any format, or one that a program wrote, sound or damaged."""
    end = draw(st.sampled_from(ENDS))
    if whole and draw(st.integers(0, 3)) == 0:
        path = draw(st.sampled_from(whole))
        return path.suffix, draw(damaged(source(path)))
    if draw(st.integers(0, 19)) == 0:
        return end, draw(st.binary(max_size=100) | DEEP.map(str.encode))
    rows = list(draw(st.sampled_from(tables)))
    for place in draw(st.sets(st.integers(0, len(rows) - 1), max_size=2)):
        rows[place] = draw(mutated(rows[place]))
    data = packed(end, rows)
    return end, draw(damaged(data)) if draw(st.integers(0, 2)) == 0 else data


def packed(end, rows):
    """Rows in the format of a suffix, as far as it can say them."""
    lines = b"\n".join(map(as_json, rows))
    if end == ".json":
        return b"[" + b",".join(map(as_json, rows)) + b"]"
    if end in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.writer(text, delimiter="," if end == ".csv" else "\t")
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name, "") for name in names)
            writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
        return text.getvalue().encode("utf-8", "surrogatepass")
    if end == ".eval":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for place, row in enumerate(rows):
                archive.writestr(f"samples/{place}_epoch_1.json", as_json(row))
        return file.getvalue()
    if end == ".parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        file = io.BytesIO()
        try:
            write_table(pyarrow.Table.from_pylist(rows), file)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            return lines
        return file.getvalue()
    return lines


@st.composite
def problem_inputs(draw):
    end, data = draw(table_inputs(PROBLEMS))
    known = ["mine", "gsm8k", "math", "olympiadbench", "aime24", "minerva_math"]
    grading = draw(st.sampled_from([None, "math", "exact"]))
    return end, data, draw(st.sampled_from(known)), grading


def enter_problems(value, folder):
    from probe.problems import load_problems

    end, data, benchmark, grading = value
    path = folder / f"p{end}"
    path.write_bytes(data)
    found = load_problems(benchmark, path, grading=grading)
    assert found, "a wrong report: no problem"
    assert all(problem.question and problem.answer for problem in found)


@st.composite
def solution_inputs(draw):
    files = [path for path in sorted((DATA / "solutions").iterdir()) if path.suffix != ".md"]
    return draw(table_inputs(solution_rows(), files))


def enter_solutions(value, folder):
    from probe.models import read_tokenizer
    from probe.problems import load_problems
    from probe.solutions import match, read_given
    from probe.solutions._imported import _tokens

    end, data = value
    path = folder / f"s{end}"
    path.write_bytes(data)
    given = read_given(path)
    assert given.account
    file = DATA / "solutions" / "problems.jsonl"
    problems = load_problems("mine", file, grading="math")
    answers = match(given, {"mine": problems}, "mine")
    for problem in problems:
        _tokens(read_tokenizer(str(LLAMA)), "Q: {question} A:", problem, answers[problem.id])


# --- answers of models

MARKS = st.sampled_from(
    [
        *("The answer is", "answer:", "\\boxed{", "\\boxed ", "}", "5", "####", "#", "$", "\\"),
        *("<think>", "</think>", "<|im_end|>", "<answer>", "</answer>", "**", "\n", " ", "\u2003"),
        *("ки", "\\[", "\\text{", "I hope it is correct", "-", "0", "(", "]", "\\begin{", "√"),
    ]
)
DEGENERATE = st.tuples(
    st.lists(MARKS | TEXTS, min_size=1, max_size=3).map("".join),
    st.sampled_from([10, 1000, 50000]),
).map(lambda part: (part[0] * part[1])[:200000])


@st.composite
def answer_inputs(draw):
    words = st.lists(TEXTS | MARKS).map("".join)
    return draw(words | st.tuples(words, DEGENERATE, words).map("".join))


def enter_answers(value, folder):
    from probe.escaping import html, latex, markdown, one_line
    from probe.grading import exact_answer, extract_answer
    from probe.problems import last_question, one_text

    extract_answer(value)
    exact_answer(value, "5")
    for escape in (one_line, latex, markdown, html):
        assert len(escape(value).splitlines()) <= 1 or escape is html
    last_question(value)
    one_text(value)


AROUND = [
    *("\\sqrt{%}", "(%)!", "(%)!!", "\\binom{%}{2}", "\\sin{%}", "\\log{%}", "\\int{%}dx", "|%|"),
    *("\\sum_{n=1}^{%}n", "\\prod_{n=1}^{9^9}{%}", "\\lim_{x\\to0}{%}", "\\frac{d}{dx}{%}", "$%$"),
    *("\\begin{pmatrix}%&1\\\\2&%\\end{pmatrix}", "\\lfloor{%}\\rfloor", "[%,%)", "\\{%,%\\}"),
    *("\\text{%}", "%\\%", "\\boxed{%}", "\\left(%\\right)^{%}", "\\overline{%}"),
]
BETWEEN = ["+", "-", "*", "/", "^", "=", "<", "\\cdot", "\\leq", ",", "\\cup"]
FORMULAS = st.recursive(
    st.sampled_from(
        [
            *("1", "0", "x", "y", "-3", "10^9", "2.5", "\\pi", "i", "e", "\\infty", "999999999"),
            *("\\emptyset", "\\frac12", "n", "\\%", "km", "3:30", "101_2", "a", "1,024", ""),
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(BETWEEN), inner, inner).map(
            lambda part: f"({part[1]}){part[0]}{{{part[2]}}}"
        ),
        st.tuples(st.sampled_from(AROUND), inner).map(lambda part: part[0].replace("%", part[1])),
        st.tuples(inner, st.integers(2, 40)).map(lambda part: part[0] * part[1]),
    ),
    max_leaves=8,
)


def formula_inputs():
    return st.tuples(FORMULAS, FORMULAS | TEXTS | st.text("0123456789+-*/^(){}\\.!x,", max_size=40))


@functools.cache
def grader():
    from probe.grading import Grader

    return Grader().__enter__()


def enter_grading(value, folder):
    """By way of a grading process, whose limits are those of `Grader`."""
    assert grader().grade(*value) in (True, False)


# --- model folders

TEMPLATES = st.lists(
    st.sampled_from(
        [
            *("{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ bos_token }}"),
            *("{% for a in range(9999) %}", "{% if m %}", "{% endif %}", "{{ 'a' * 10**9 }}"),
            *("{{ messages[0].content }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            *("{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{{ [1] * 9**9 }}", "{%", "x"),
            *("{{ messages | tojson }}", "{{ 'x' | center(10**8) }}", "{{ 9**9**9 }}", "{{ x }}"),
            *("{% set s = messages[0].content * 10**7 %}", "{{ s | list | length }}", "\n"),
        ]
    )
    | TEXTS,
    max_size=5,
).map("".join)


@functools.cache
def model_files():
    """Folders of every layout, each as bytes by name."""
    import torch
    from safetensors.torch import load_file, save

    plain = {path.name: path.read_bytes() for path in LLAMA.iterdir()}
    tensors = load_file(LLAMA / "model.safetensors")
    names = sorted(tensors)
    shards = {"a": names[::2], "b": names[1::2]}
    sharded = plain | {
        f"model-{name}.safetensors": save({n: tensors[n] for n in part})
        for name, part in shards.items()
    }
    del sharded["model.safetensors"]
    sharded["model.safetensors.index.json"] = json.dumps(
        {
            "metadata": {"total_size": 1},
            "weight_map": {n: f"model-{s}.safetensors" for s, part in shards.items() for n in part},
        }
    ).encode()
    pickled = dict(plain)
    del pickled["model.safetensors"]
    file = io.BytesIO()
    torch.save(tensors, file)
    pickled["pytorch_model.bin"] = file.getvalue()
    up, down = torch.ones(64, 2), torch.ones(2, 64)
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter = {
        "adapter_config.json": json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": str(LLAMA),
                "r": 2,
                "lora_alpha": 4,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "layers_pattern": "layers",
            }
        ).encode(),
        "adapter_model.safetensors": save({f"{path}A.weight": down, f"{path}B.weight": up}),
    }
    return [plain, sharded, pickled, adapter]


@st.composite
def model_inputs(draw):
    """Which folder, which of its files, and what that is now."""
    kinds = model_files()
    kind = draw(st.integers(0, len(kinds) - 1))
    files = kinds[kind]
    if draw(st.integers(0, 9)) == 0:
        return kind, "chat_template.jinja", draw(TEMPLATES).encode("utf-8", "surrogatepass")
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    if name.endswith(".json"):
        table = json.loads(data)
        return kind, name, draw(mutated(table).map(as_json) | damaged(data) | texts_of_json())
    if name.endswith(".safetensors") and draw(st.booleans()):
        size = struct.unpack("<Q", data[:8])[0]
        header = draw(mutated(json.loads(data[8 : 8 + size])).map(as_json) | DEEP.map(str.encode))
        length = draw(st.sampled_from([len(header), 0, 2**32, 2**63]))
        return kind, name, struct.pack("<Q", length) + header + data[8 + size :]
    return kind, name, draw(damaged(data))


def texts_of_json():
    return VALUES.map(as_json) | DEEP.map(str.encode) | st.just(b"\xff{")


def enter_models(value, folder):
    from probe.models import doctor, encode_prompt, load_model, read_tokenizer

    kind, name, data = value
    for other, found in model_files()[kind].items():
        (folder / other).write_bytes(data if other == name else found)
    (folder / name).write_bytes(data)
    diagnosis = doctor(str(folder))
    assert str(diagnosis)
    if refusal := diagnosis.models[0].refusal:
        raise ProbeError(refusal)
    model = load_model(str(folder))
    assert model.n_layers > 0
    encode_prompt(read_tokenizer(str(folder)), "{question}", "ab")
    if name in ("chat_template.jinja", "tokenizer_config.json"):
        encode_prompt(model.tokenizer, "chat", "ab")


# --- servers

STATUS = {
    "deployments": {
        "a": {
            "application_state": "RUNNING",
            "deployment_level": "HOT",
            "model_key": "k",
            "repo_id": "org/name",
            "dtype": "float32",
            "config": json.dumps({"model_type": "llama", "num_hidden_layers": 3}),
        }
    }
}
ENVIRONMENT = {"packages": {"nnsight": "0.8.1", "torch": "2.9.0"}, "python_version": "3.12.1"}
RESPONSE = {
    "id": "1",
    "session_id": "1",
    "status": "COMPLETED",
    "description": "well",
    "data": None,
    "meta": {"runtime": 1.0},
}


@functools.cache
def results():
    """What jobs save, packed: plain tensors, and what is none."""
    import torch

    found = []
    for saved in ({"scores": torch.ones(3)}, {"a": [1]}, torch.zeros(2), {"b": print}):
        with io.BytesIO() as file:
            torch.save(saved, file)
            found.append(zstandard.compress(file.getvalue()))
    return found


def http(status, data, *headers):
    head = f"HTTP/1.1 {status} Said\r\nconnection: close\r\n".encode()
    length = b"content-length: %d\r\n" % len(data)
    own = b"".join(header + b"\r\n" for header in headers)
    length = b"" if b"length" in own or b"chunked" in own else length
    return head + length + own + b"\r\n" + data


@st.composite
def server_inputs(draw):
    """What is asked of it, and the bytes that it answers with."""
    kind = draw(st.sampled_from(["words", "saved", "http", "http", "response", "wire"]))
    if kind == "words":
        return kind, draw(VALUES.map(as_json)).decode("utf-8", "surrogatepass")
    if kind in ("saved", "response"):
        good = draw(st.sampled_from(results()))
        if kind == "response":
            made = draw(mutated(RESPONSE).map(as_json))
            return kind, made.decode() if draw(st.booleans()) else draw(damaged(made))
        plain = zstandard.ZstdDecompressor().decompress(good, 2**20)
        inner = draw(damaged(plain).map(zstandard.compress) | damaged(good))
        return kind, inner
    if kind == "wire":
        return kind, draw(damaged(opening_of(draw(mutated(RESPONSE).map(as_json)))))
    table = draw(st.sampled_from([STATUS, ENVIRONMENT]).flatmap(mutated) | VALUES)
    status = draw(st.sampled_from([200, 200, 200, 204, 302, 400, 401, 404, 422, 500, 99, 999]))
    header = st.sampled_from(
        [
            *(b"content-length: 5", b"content-length: 99999", b"transfer-encoding: chunked"),
            *(b"content-encoding: gzip", b"content-encoding: zstd", b"location: http://x.example"),
            *(b"content-length: -1", b"x: \xff\xfe", b"set-cookie: a=b", b"content-type: a/b"),
        ]
    )
    answer = http(
        status,
        draw(st.just(as_json(table)) | DEEP.map(str.encode)),
        *draw(st.lists(header, max_size=2)),
    )
    return kind, draw(damaged(answer)) if draw(st.booleans()) else answer


def opening_of(message):
    """The end of a websocket's greeting, and a message."""
    frame = bytes([0x81, 127]) + struct.pack("!Q", len(message)) + message
    return b'\x81\x13{"session_id": "1"}' + frame


def enter_servers(value, folder):
    from probe.hosting import open_host
    from probe.hosting._loading import read_server
    from probe.remote import failure, read_response, read_saved, refusal

    kind, data = value
    if kind == "words":
        for words in (failure("http://x", data), refusal("http://x", "k", 418, data)):
            assert str(words).strip()
        return
    if kind == "saved":
        read_saved("http://x", data)
        return
    if kind == "response":
        try:
            read_response(data)
        except ValueError as error:  # what the caller knows as "not a response"
            raise ProbeError("not a response") from error
        return
    door = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answering, args=(door, data, kind), daemon=True).start()
    host = open_host(f"http://127.0.0.1:{door.getsockname()[1]}", timeout=2)
    host.timeout = 0.3
    try:
        if kind == "http":
            read_server(host, 0)
        else:
            host.run("model", {}, b"blob")
    finally:
        door.close()


def answering(door, data, kind):
    """Answer every connection with the same; of a job, greet first."""
    import base64
    import hashlib

    while True:
        try:
            connection, _ = door.accept()
        except OSError:
            return
        with connection:
            request = connection.recv(65536)
            greeting = b""
            if kind == "wire" and b"upgrade: websocket" in request.lower():
                lines = dict(
                    line.lower().split(b": ", 1)[:1] + line.split(b": ", 1)[1:]
                    for line in request.split(b"\r\n")
                    if b": " in line
                )
                magic = lines[b"sec-websocket-key"] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                told = base64.b64encode(hashlib.sha1(magic).digest())
                greeting = (
                    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
                    b"connection: Upgrade\r\nsec-websocket-accept: " + told + b"\r\n\r\n"
                )
            elif kind == "wire":
                connection.sendall(http(200, b"{}"))
                continue
            try:
                connection.sendall(greeting + data)
            except OSError:
                continue


# --- run folders


@functools.cache
def run_files():
    """A finished run, as it is written today: its files, and the report that it makes."""
    import tempfile

    from probe.report import build_report
    from probe.store import RunFolder

    old = RunFolder(OLD_RUN)
    record = old.read_record()
    names = [p.relative_to(OLD_RUN) for p in sorted(OLD_RUN.rglob("*")) if p.is_file()]
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        solved = {name.name: 0 for name in names if name.suffix == ".jsonl"}
        for name in names:
            path = folder.path / name
            path.parent.mkdir(exist_ok=True)
            if name.suffix == ".jsonl":
                solutions, _ = old.read_solutions(old.path / name)
                solved[name.name] = len(solutions)
                path.write_text("")
                folder.write_json("run.json", record | {"digests": True, "solved": solved})
                folder.write_solutions(path, solutions)
            elif name.suffix == ".safetensors":
                edges = old.read_edges(old.path / name)
                folder.write_edges(path, edges, edges.ids, "key")
            elif name.name != "run.json":
                folder.write_json(name.as_posix(), old.read_json(name.as_posix()))
        folder.write_clusters({})
        files = {
            path.relative_to(folder.path).as_posix(): path.read_bytes()
            for path in sorted(folder.path.rglob("*"))
            if path.is_file()
        }
        report = build_report(folder.path)
        assert not report.missing
        return files, said(report)


def said(report):
    return json.dumps([report.table, report.recipe.name], default=str, sort_keys=True)


@st.composite
def run_inputs(draw):
    files, _ = run_files()
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    if draw(st.integers(0, 9)) == 0:
        return name, None
    if name.endswith(".json") and draw(st.booleans()):
        return name, draw(mutated(json.loads(data)).map(as_json) | texts_of_json())
    if name.endswith(".jsonl") and draw(st.booleans()):
        lines = data.splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = draw(mutated(json.loads(lines[place])).map(as_json))
        return name, b"\n".join(lines) + b"\n"
    return name, draw(damaged(data))


def enter_runs(value, folder):
    from probe.report import FORMATS, build_report, render

    name, data = value
    run = folder / "run"
    for other, found in run_files()[0].items():
        (run / other).parent.mkdir(parents=True, exist_ok=True)
        (run / other).write_bytes(found)
    if data is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(data)
    report = build_report(run)
    for style in FORMATS:
        if style != "html":  # draws
            render(report, style).encode()
    if said(report) != run_files()[1]:
        assert report.missing, f"a wrong report: {name} is another, and nothing is said"


# --- all of them


class Door(NamedTuple):
    """A way in."""

    inputs: Callable[[], st.SearchStrategy]
    """What comes in."""

    enter: Callable[[object, Path], object]
    """Take one such input, with an empty folder to put it into."""

    share: float
    """How many of a hundred inputs go here."""


DOORS = {
    "recipes": Door(recipe_inputs, enter_recipe, 20),
    "problem files": Door(problem_inputs, enter_problems, 15),
    "solution files": Door(solution_inputs, enter_solutions, 20),
    "answers": Door(answer_inputs, enter_answers, 15),
    "comparisons of answers": Door(formula_inputs, enter_grading, 2),
    "model folders": Door(model_inputs, enter_models, 12),
    "answers of servers": Door(server_inputs, enter_servers, 12),
    "run folders": Door(run_inputs, enter_runs, 4),
}


def go_in(door: Door, value: object, folder: Path) -> bool:
    """Try one input: whether it was taken, or refused in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tried(lambda: door.enter(value, folder))


def environment() -> None:
    """What every try wants: no network, no threads."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    os.environ.pop("NDIF_API_KEY", None)
