"""Answers over OpenAI's API, from a small server; `test_serving` has a real one."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

import probe
from probe.errors import ProbeError
from probe.models import read_files
from probe.problems import load_problems
from probe.recipe import read_recipe
from probe.remote import open_completions
from probe.solutions import ask, find, generate, solve
from probe.store import RunFolder

SFT = "probe:tiny-math/sft"
STANDARD = {"model", "prompt", "max_tokens", "stop", "seed", "temperature", "top_p"}
STANDARD |= {"presence_penalty", "frequency_penalty"}
ASKED = {"prompt": "{question}", "max_new_tokens": 24}


class Server(ThreadingHTTPServer):
    """Greedy answers of the models that it has, in the dialect that it speaks."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, models, dialect="token_ids"):
        """Begin to answer."""
        self.models, self.dialect = models, dialect
        self.lock, self.requests, self.keys = threading.Lock(), [], []
        self.faults, self.key, self.added = [], "", 0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """What it does with a request."""

    def log_message(self, *_):
        pass

    def send(self, table, status=200):
        body = json.dumps(table).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            key = self.headers.get("authorization", "")
            server.keys.append(key)
            if server.key and key != f"Bearer {server.key}":
                return self.send({"error": {"message": f"no such key: {key}"}}, 401)
            if server.faults:
                return self.send({"error": {"message": "busy"}}, server.faults.pop())
            if server.dialect == "text" and (set(asked) - STANDARD or asked["prompt"] == ""):
                return self.send({"detail": "unexpected fields"}, 422)
            if server.dialect == "text" and not isinstance(asked["prompt"], str):
                return self.send({"detail": "prompt must be a string"}, 400)
            server.requests.append(asked)
            return self.send(self.answer(asked))

    def answer(self, asked):
        server = self.server
        model = server.models[asked["model"]]
        prompt, limit = asked["prompt"], asked["max_tokens"]
        if isinstance(prompt, str):
            prompt = model.tokenizer(prompt)["input_ids"]
        [[(_, tokens)]] = generate(model, [prompt], [limit], engine="static")
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        ended = tokens[-1] == model.tokenizer.eos_token_id
        choice = {"text": text, "finish_reason": "stop" if ended else "length"}
        without_end = tokens[: len(tokens) - ended]
        if server.dialect == "token_ids" and asked.get("return_token_ids"):
            choice["token_ids"] = tokens
        if server.dialect == "named" and "logprobs" in asked:
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in tokens]}
        if server.dialect == "llama.cpp" and "logprobs" in asked:
            choice["logprobs"] = {"content": [{"id": token} for token in without_end]}
        usage = {"prompt_tokens": len(prompt) + server.added, "completion_tokens": len(tokens)}
        return {"choices": [choice], "usage": usage}


@pytest.fixture
def server(tiny):
    with Server({SFT: tiny}) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def problems():
    return load_problems("tiny-math", questions=12)


def answered(server, problems, **options):
    """All solutions, and how the model was found."""
    opened = open_completions(server.url, **options)
    served = find(opened, read_files(SFT), problems, **ASKED)
    found = [s for some in ask(served, problems, **ASKED, at_once=4) for s in some]
    return served, {solution.id: solution for solution in found}


@pytest.mark.parametrize(
    ("dialect", "prompts", "whose"),
    [
        ("token_ids", "tokens", "the server's"),
        ("named", "tokens", "the server's"),
        ("llama.cpp", "tokens", "the server's"),
        ("silent", "tokens", "derived again from the text"),
        ("text", "text", "derived again from the text"),
    ],
)
def test_every_dialect_gives_the_answers_of_the_model(
    server, tiny, problems, dialect, prompts, whose
):
    server.dialect = dialect
    served, found = answered(server, problems)
    here = [s for some in solve(tiny, problems, **ASKED, engine="static") for s in some]
    assert {s.id: s for s in here} == found
    assert {len(s.answer) == 24 for s in here} == {True, False}  # some end, some are cut off
    assert served.table["prompts"] == prompts
    assert served.table["token_ids"] == whose
    assert {request["temperature"] for request in server.requests} == {0}
    assert [len(each.answer) for each in served.beginnings] == [
        min(16, len(found[problem.id].answer)) for problem in problems[:3]
    ]


def test_faults_pass_and_are_told(server, problems, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    said = []
    server.faults = [429, 503]
    _, found = answered(server, problems, timeout=60, say=said.append)
    assert len(found) == len(problems)
    assert "answers 503 (busy); trying again in 1 s" in said[0]


def test_faults_that_do_not_pass_end_it(server, problems):
    server.faults = [503] * 50
    with pytest.raises(ProbeError, match=r"answers 503 \(busy\) for 0 s; nothing is lost"):
        answered(server, problems, timeout=0.5)
    server.shutdown()
    server.server_close()
    with pytest.raises(ProbeError, match="refused"):
        answered(server, problems, timeout=0.5)


def test_a_key_goes_to_its_own_host_only(server, problems, monkeypatch):
    server.key = "my-secret-word"
    monkeypatch.setenv("OPENAI_API_KEY", "my-secret-word")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ProbeError, match="asks for a key") as error:
        answered(server, problems)
    assert set(server.keys) == {""}
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert len(answered(server, problems)[1]) == len(problems)
    monkeypatch.setenv("OPENAI_API_KEY", "another-word")
    with pytest.raises(ProbeError, match="does not take the key") as error:
        answered(server, problems)
    assert "another-word" not in str(error.value)


def test_a_server_with_another_tokenizer_is_refused(server, problems):
    server.added = 1
    with pytest.raises(ProbeError, match="its tokenizer is another one"):
        answered(server, problems)


def test_what_is_no_such_server(server, problems):
    server.url = server.url.replace("/v1", "?a=1")
    with pytest.raises(ProbeError, match="give an address"):
        answered(server, problems)


@pytest.mark.parametrize(
    ("names", "reference", "shared", "name"),
    [
        (["anything"], "org/model", False, "anything"),
        (["anything"], "org/model", True, None),
        (["org/model", "other/model"], "org/model", True, "org/model"),
        (["base", "/models/step_100"], "runs/step_100/", True, "/models/step_100"),
        (["a", "b"], "org/model", False, None),
        ([], "org/model", False, None),
    ],
)
def test_which_model_is_meant(server, names, reference, shared, name):
    server.models = dict.fromkeys(names)
    opened = open_completions(server.url)
    if name is not None:
        assert opened.model_named(reference, shared) == name
        return
    with pytest.raises(ProbeError, match=r"not clear; say it behind a #: .*#NAME"):
        opened.model_named(reference, shared)
    assert open_completions(f"{server.url}#mine%231").model_named(reference) == "mine#1"


def test_only_what_the_command_line_names_is_asked(tmp_path):
    text = '[[benchmarks]]\nname = "tiny-math"\n[[pairs]]\nname = "a"\nbefore = "x"\nafter = "y"\n'
    file, url = tmp_path / "a.toml", "http://host:8000/v1"
    for way in (f'[solutions]\nserver = "{url}"\n', f'solutions = {{ after = "{url}" }}\n'):
        whole = way + text if way.startswith("[") else text + way
        file.write_text('name = "a"\n' + whole)
        with pytest.raises(ProbeError, match="would send the questions to 'http://host:8000/v1'"):
            read_recipe(file)
        with pytest.raises(ProbeError, match="would send the questions"):
            read_recipe(file, {"pairs.0.solutions.before": "http://other:8000/v1"})
        chosen = read_recipe(file, {"solutions.server": url})
        assert {asked.server for asked in chosen.pairs[0].asked()} == {url}


def test_a_run_says_where_another_model_answered(tmp_path, tiny):
    recipe = tmp_path / "one.toml"
    recipe.write_text(
        'name = "one"\n[[benchmarks]]\nname = "tiny-math"\n[[pairs]]\nname = "sft-grpo"\n'
        'before = "probe:tiny-math/sft"\nafter = "probe:tiny-math/grpo"\nmax_new_tokens = 24\n'
    )
    keys = {"solutions.questions": 30, "selection.samples": 2, "selection.alpha": "[0.1]"}
    keys |= {"attribution.control": "none", "compute.dtype": "float32"}
    grpo = probe.load_model("probe:tiny-math/grpo")

    def run(folder, **more):
        console = Console(file=io.StringIO(), record=True, width=300)
        overrides = keys | {"solutions.server": server.url} | more
        probe.run_recipe(recipe, folder, overrides=overrides, console=console)
        return console.export_text()

    with Server({"sft": tiny, "grpo": grpo}) as server:
        said = run(tmp_path / "right")
        assert "token ids are the server's" in said
        assert "begin otherwise" not in said
        folder, kept = RunFolder(tmp_path / "right"), "solutions/tiny-math--sft.server.json"
        table = folder.read_json(kept)
        table["beginnings"][0]["answer"].reverse()
        folder.write_json(kept, table)
        said = run(tmp_path / "right", **{"solutions.questions": 31})
        assert "answers for tiny-math--sft otherwise than when this run began" in said
        assert "answers for tiny-math--grpo otherwise" not in said
        server.models = {"sft": grpo, "grpo": tiny}
        said = run(tmp_path / "swapped")
        assert "tiny-math--sft: a server wrote these answers, and" in said
        assert "tiny-math--grpo: a server wrote these answers, and" in said
        server.shutdown()
