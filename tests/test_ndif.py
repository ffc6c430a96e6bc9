"""Against a real NDIF server: the same numbers as here, and what happens when things break."""

import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import DATA, save_random_model
from remote_server.client import Client
from remote_server.server import URL, Server, only_loopback
from safetensors.torch import load_file

pytestmark = pytest.mark.ndif

SMALL = (
    *("--limit", 40, "--set", "solutions.batch_size=40"),
    *("--set", "selection.samples=4", "--set", "selection.alpha=[0.1]"),
    *("--set", "attribution.batch_size=2", "--set", "attribution.control=none"),
)
WHOLE = ("tiny-math", "--set", "selection.samples=100", "--set", "attribution.control=none")


# The Python of an environment with ndif and ray, and that of one with this package as a wheel.
SERVER, CLIENT = os.environ.get("PROBE_NDIF_SERVER"), os.environ.get("PROBE_NDIF_CLIENT")
SCRIPTS = Path(__file__).parent / "remote_server"


@pytest.fixture(scope="module")
def server():
    """The server, up."""
    if not SERVER or not CLIENT:
        pytest.skip("PROBE_NDIF_SERVER and PROBE_NDIF_CLIENT are not set; see .ci/run")
    if not shutil.which("redis-server"):
        pytest.skip("there is no redis-server")
    if not only_loopback():
        pytest.skip("not in a network namespace of its own: Ray listens to whoever asks")
    # Not pytest's own folder: sockets lie in there, whose names must be short.
    with tempfile.TemporaryDirectory(prefix="ndif-", ignore_cleanup_errors=True) as state:
        server = Server(SERVER, state)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def client(server):
    """The installed command, with the key that the server knows."""
    client = Client(CLIENT, server.key)
    assert "site-packages" in client.package  # not the working tree
    return client


def there(folder, *arguments):
    return ("recipe", "tiny-math", *SMALL, "--output", folder, "--remote", URL, *arguments)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where all run folders of these tests are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def small(client, folders):
    """The report of the small run, made here."""
    code, _, errors = client("recipe", "tiny-math", *SMALL, "--output", folders / "small")
    assert code == 0, errors
    return report_of(folders / "small")


@pytest.fixture
def folder(folders):
    return folders / uuid.uuid4().hex


def test_before_anything_is_up(client, server):
    code, output, errors = client("ndif", URL)
    assert code == 0, errors
    assert f"{URL}: reachable" in output
    assert output.count("0.8.1") == 2  # nnsight, on both sides
    assert "key: taken" in output
    assert "No model is up" in output
    wrong = str(uuid.uuid4())
    for key in (wrong, "my-secret-word"):
        code, output, _ = client("ndif", URL, NDIF_API_KEY=key)
        assert code == 0
        assert "key: does not take the key in NDIF_API_KEY" in output
        assert key not in output


def test_the_whole_tiny_recipe_there_and_here(client, folders):
    begun = time.monotonic()
    code, _, errors = client("recipe", *WHOLE, "--output", folders / "here")
    assert code == 0, errors
    print(f"here: {time.monotonic() - begun:.1f} s")
    begun = time.monotonic()
    code, _, errors = client("recipe", *WHOLE, "--output", folders / "there", "--remote", URL)
    assert code == 0, errors
    print(f"there: {time.monotonic() - begun:.1f} s")
    assert "is not up yet; asking for it" in errors
    here, away = folders / "here", folders / "there"
    for path in sorted((here / "solutions").iterdir()):
        assert path.read_text() == (away / "solutions" / path.name).read_text()
    edges = sorted((here / "edges").iterdir())
    assert len(edges) == 16
    for path in edges:
        one, other = load_file(path), load_file(away / "edges" / path.name)
        largest = one["scores"].abs().max()
        assert (one["scores"] - other["scores"]).abs().max() <= 1e-6 * largest
        torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-6, atol=1e-6)
    assert report_of(here) == report_of(away)
    record = json.loads((away / "run.json").read_text())["remote"]
    assert record["host"] == URL
    assert 0 < record["jobs"] <= 150  # a job a batch
    print(record)


def test_a_control_there_and_here(client, folders):
    options = ("tiny-math", *SMALL[:-1], "attribution.control=loss-matched")
    for name, where in (("near", ()), ("far", ("--remote", URL))):
        code, _, errors = client("recipe", *options, "--output", folders / name, *where)
        assert code == 0, errors
    here, away = (report_of(folders / name) for name in ("near", "far"))
    assert here == away
    rows = [cell for cell in here["cells"] if cell["control"] == "equal loss"]
    assert rows
    assert all(cell["change"] is not None for cell in rows)


def test_faithfulness_there_and_here(client, folders):
    options = ("--edges", 60, "--sequences", 2, "--methods", "eap,relp")
    copy = shutil.copytree(folders / "there", folders / "copy")
    code, here, errors = client("faithfulness", folders / "here", *options)
    assert code == 0, errors
    code, away, errors = client("faithfulness", copy, *options, "--remote", URL)
    assert code == 0, errors
    assert here == away


def test_every_intervention_there_and_here(client):
    output = client.script(
        SCRIPTS / "intervenes.py", URL, "probe:tiny-math/sft", "probe:tiny-math/grpo"
    )
    print(output)
    found = [line.split() for line in output.splitlines()]
    assert {do for do, _ in found} == {"remove", "keep", "scale", "patch", "swap", "add"}
    assert all(float(error) <= 1e-5 for _, error in found)


def test_the_causal_test_there_and_here(client, folders):
    """Of every single edge, as far apart as losses in float32 are."""
    options = ("--questions", 6, "--sets", 5, "--edges", 2)
    copy = shutil.copytree(folders / "there", folders / "causes")
    tables = []
    for folder, way in ((folders / "here", ()), (copy, ("--remote", URL))):
        code, _, errors = client("causal", folder, *options, *way)
        assert code == 0, errors
        files = sorted((folder / "causal").glob("*.json"))
        assert len(files) == 2
        tables.append([json.loads(path.read_text())["every_edge"] for path in files])
    for here, away in zip(*tables, strict=True):
        for one, two in zip(here, away, strict=True):
            assert (one["source"], one["target"]) == (two["source"], two["target"])
            assert one["damage"] == pytest.approx(two["damage"], abs=1e-5)


def test_now_the_recipe_could_run(client):
    code, output, _ = client("ndif", URL)
    assert code == 0
    assert output.count("float32") == 3
    row = next(line for line in output.splitlines() if "tiny-math " in line)
    assert "yes" in row


def test_a_sequence_is_kilobytes(client, folders):
    """With 32 layers, and as wide as it needs to be: what comes home does not depend on that."""
    model = save_random_model(folders / "deep", num_hidden_layers=32)
    output = client.script(SCRIPTS / "counts_bytes.py", URL, model)
    received, overhead, sources, targets = map(float, output.split())
    assert (sources, targets) == (65, 129)
    assert received <= 64 * 1024
    print(f"{received:.0f} bytes received per sequence, {overhead:.3f} s more per job")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 31}))
    recipe = there(folders / "none", *pairs(model))
    assert "has layers 32 there, 31 by its config here" in client.refused(*recipe)[0]


def pairs(model):
    """Arguments that put a model into every place of the recipe."""
    places = [f"pairs.{number}.{side}={model}" for number in (0, 1) for side in ("before", "after")]
    return [part for place in places for part in ("--set", place)]


def test_nothing_is_left_on_a_model(client):
    output = client.script(SCRIPTS / "leaves_nothing.py", URL, "probe:tiny-math/sft")
    assert output.split() == ["alike", "unchanged"]


def test_another_precision(client, folder):
    line, _ = client.refused(*there(folder, "--dtype", "bfloat16"))
    assert "serves probe:tiny-math/sft in float32, and bfloat16 was asked for" in line
    assert not folder.exists()


@pytest.mark.parametrize("key", [str(uuid.uuid4()), "my-secret-word"], ids=["unknown", "malformed"])
def test_a_wrong_key(client, folder, key):
    line, seconds = client.refused(*there(folder), NDIF_API_KEY=key)
    assert line == f"probe: {URL} does not take the key in NDIF_API_KEY"
    assert seconds < 90
    assert not folder.exists()
    assert key not in "".join(client.said)


def test_no_key(client, folder):
    line, _ = client.refused(*there(folder), NDIF_API_KEY="")
    assert line == f"probe: {URL} asks for a key; set NDIF_API_KEY"


def test_an_unknown_model(client, folder, folders):
    """The client has its config and tokenizer in the hub's cache; the server has nothing of it."""
    hub = folders / "hub"
    place = hub / "hub" / "models--nobody--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123456789")
    files = shutil.ignore_patterns("*.safetensors")
    model = DATA / "oracle" / "llama" / "model"
    shutil.copytree(model, place / "snapshots" / "0123456789", ignore=files)
    line, seconds = client.refused(*there(folder, *pairs("nobody/tiny")), HF_HOME=str(hub))
    assert "Could not deploy this model" in line
    assert seconds < 90
    assert not folder.exists()


def test_a_refused_connection(client, folder):
    line, seconds = client.refused(*there(folder)[:-1], "http://127.0.0.1:9")
    assert line.startswith("probe: http://127.0.0.1:9: connection refused for 15 s")
    assert seconds < 90


def test_a_server_that_never_answers(client, folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line, seconds = client.refused(*there(folder)[:-1], url, "--set", "compute.timeout=5")
        assert line.startswith(f"probe: {url}: no answer")
        assert seconds < 90


def test_what_is_no_ndif_server(client, folder, dull):
    line, _ = client.refused(*there(folder)[:-1], dull)
    assert line == f"probe: {dull} answers, but it is no NDIF server (404)"


@pytest.fixture
def dull(tmp_path):
    """A web server."""
    import functools
    import http.server
    import threading

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def started(client, server, folder, *arguments):
    """A small run that has got as far as its first solutions, and has jobs under way."""
    server.slow(1.5)
    process = client.start(*there(folder, *arguments))
    end = time.monotonic() + 90
    while not list((folder / "solutions").glob("*.jsonl")):
        assert process.poll() is None, client.end(process)
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    return process


def goes_on(client, server, folder, small):
    """Run the command again: it ends in the report of a run that nothing happened to."""
    server.slow(0)
    code, _, errors = client(*there(folder))
    assert code == 0, errors
    assert report_of(folder) == small


def ends_well(client, process, folder, small):
    """A run that tried again ends in the report of a run that nothing happened to."""
    code, _, errors = client.end(process)
    assert code == 0, errors
    assert "trying again in" in errors
    assert report_of(folder) == small


def test_the_api_stops_and_starts_again(client, server, folder, small):
    process = started(client, server, folder)
    server.kill("api")
    time.sleep(2)
    server.slow(0)
    server.start_api()
    ends_well(client, process, folder, small)


def test_a_model_is_killed(client, server, folder, small):
    process = started(client, server, folder)
    assert server.kill_models() >= 3
    server.slow(0)
    ends_well(client, process, folder, small)


def test_the_execution_timeout(client, server, folder, small):
    process = started(client, server, folder)
    server.slow(60)
    line, seconds = client.ends_refused(process)
    assert "Your job exceeded the execution timeout of 15.0s. take smaller batches" in line
    assert "the same command goes on from here" in line
    assert seconds < 90
    goes_on(client, server, folder, small)


def test_more_than_fits_into_a_response(client, server, folder, small):
    # The soft limit alone: what ndif puts into a response ends there, but Redis closes connections
    # only after an hour of it, so that the server's word on the failed job comes home.
    limit = "pubsub 33554432 512 3600"
    assert server.redis("config", "set", "client-output-buffer-limit", limit)
    server.kill_models()  # they ask Redis for its limit once
    try:
        line, _ = client.refused(*there(folder))
        assert "more than the server can send without an object store" in line
    finally:
        limit = "pubsub 33554432 8388608 60"
        assert server.redis("config", "set", "client-output-buffer-limit", limit)
        server.kill_models()
    goes_on(client, server, folder, small)


def test_jobs_that_nobody_takes(client, server, folder, small):
    """The API lives and says that it is connected, but what hands jobs on is dead."""
    process = started(client, server, folder, "--set", "compute.timeout=5")
    assert server.kill_dispatcher() == 1
    try:
        line, seconds = client.ends_refused(process)
        # The first by a job that was under way, the second by the status before the next model.
        assert "no sign of life from a job for 5 s" in line or "no answer for 5 s" in line
        assert seconds < 90
    finally:
        server.kill("api")
        server.start_api()
    goes_on(client, server, folder, small)


def test_redis_is_down(client, server, folder, small):
    process = started(client, server, folder, "--set", "compute.timeout=6")
    server.kill("redis")
    try:
        line, seconds = client.ends_refused(process)
        assert line.startswith(f"probe: {URL}: ")
        assert "the same command goes on from here" in line
        assert seconds < 90
    finally:
        server.kill("api")
        server.start_redis()
        server.start_api()
    goes_on(client, server, folder, small)


def test_the_key_is_nowhere(client, server, folder, folders):
    code, _, errors = client(*there(folder))
    assert code == 0, errors
    assert server.key not in "".join(client.said)
    files = [path for path in folders.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert server.key.encode() not in path.read_bytes()
