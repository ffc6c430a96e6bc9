"""A server that sends too much, too slowly, or nonsense: one line, soon, and little memory."""

import io
import json
import resource
import shutil
import socket
import struct
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import zstandard
from nnsight.schema.response import ResponseModel, Status
from test_cli import call

from probe.errors import ProbeError
from probe.hosting import check_host, open_host
from probe.hosting._loading import read_server
from probe.recipe import recipe_files
from probe.remote import Host
from probe.remote import _limits as limits
from probe.remote import _wire as wire

OLD_RUN = Path(__file__).parents[1] / "data" / "old-run"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def answer(text, head=HEAD):
    data = text if isinstance(text, bytes) else text.encode()
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


@pytest.fixture
def serve(monkeypatch):
    """Start a server that answers every connection with what a function gives, piece by piece."""
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    doors = []

    def start(pieces):
        door = socket.create_server(("127.0.0.1", 0))
        doors.append(door)

        def talk(connection):
            with connection:
                request = connection.recv(65536)
                try:
                    for piece in pieces(request):
                        connection.sendall(piece)
                except OSError:  # it hung up, as it should
                    return

        def listen():
            while True:
                try:
                    connection, _ = door.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        return f"http://127.0.0.1:{door.getsockname()[1]}"

    yield start
    for door in doors:
        door.close()


def endless(_):
    yield HEAD + b"transfer-encoding: chunked\r\n\r\n"
    while True:
        yield b"100000\r\n" + b" " * 2**20 + b"\r\n"


def drip(begin, byte):
    def pieces(_):
        yield begin
        while True:
            time.sleep(0.2)
            yield byte

    return pieces


GZIP = HEAD + b"content-encoding: gzip\r\n"


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (endless, "sends an answer of more than 16 MiB"),
        (drip(HEAD, b"x-more: 1\r\n"), "no answer"),
        (drip(HEAD + b"content-length: 1000\r\n\r\n", b" "), "no answer"),
        (lambda _: [answer("{}", GZIP)], "sends an answer that is packed"),
        (lambda _: [answer("[" * 100_000)], "not as an NDIF server does"),
        (lambda _: [answer("9" * 5000)], "not as an NDIF server does"),
        (lambda _: [answer("x")], "not as an NDIF server does"),
        (lambda _: [answer("")], "not as an NDIF server does"),
        (
            lambda _: [answer('{"detail": "[/red] lacks"}', b"HTTP/1.1 422 No\r\n")],
            r"refuses \(422\): \[/red\] lacks",
        ),
        (
            lambda _: [answer("[" * 100_000, b"HTTP/1.1 400 No\r\n")],
            r"refuses \(400\): No",
        ),
        (
            lambda _: [b"HTTP/1.1 302 Go\r\nlocation: http://127.0.0.1:9/\r\n\r\n"],
            r"refuses \(302\)",
        ),
    ],
)
def test_plain_answers(serve, pieces, message):
    host = Host(serve(pieces), timeout=1)
    start = time.monotonic()
    with pytest.raises(ProbeError, match=message):
        host.ask("/env")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "table",
    [
        {"packages": {"torch": 3}, "python_version": "3.12"},
        {"packages": {"nnsight": ["0.8"]}, "python_version": "3.12"},
        {"packages": [], "python_version": "3.12"},
        {"packages": {}, "python_version": ""},
        {"packages": {}, "python_version": "3.12", "deployments": {"a": 3}},
        {
            "packages": {},
            "python_version": "3.12",
            "deployments": {
                "a": {
                    "application_state": "RUNNING",
                    "deployment_level": "HOT",
                    "model_key": "k",
                    "repo_id": "r",
                    "config": "[" * 100_000,
                }
            },
        },
    ],
)
def test_what_a_server_says_of_itself(serve, table):
    host = open_host(serve(lambda _: [answer(json.dumps(table))]))
    with pytest.raises(ProbeError, match="answers, but not as an NDIF server does"):
        read_server(host)
    with pytest.raises(ProbeError, match="127.0.0.1"):
        check_host(host)


def frame(data, kind=2, length=None):
    """A websocket's frame; its length may be a lie."""
    size = len(data) if length is None else length
    return bytes([0x80 | kind, 127]) + struct.pack("!Q", size) + data


def opening(request):
    import base64
    import hashlib

    key = next(
        line.split(b": ")[1]
        for line in request.split(b"\r\n")
        if line.lower().startswith(b"sec-websocket-key")
    )
    told = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    yield (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: " + told + b"\r\n\r\n"
    )
    yield frame(b'{"session_id": "1"}', 1)


def job(*then):
    """A server that takes a job and then sends these pieces; a function gives them one by one."""

    def pieces(request):
        if not request.startswith(b"GET /subscribe"):
            yield answer("{}")
            return
        yield from opening(request)
        for piece in then:
            yield from piece() if callable(piece) else [piece]
        time.sleep(5)

    return pieces


def finished(data, **fields):
    response = ResponseModel(id="1", status=Status.COMPLETED, data=data, **fields)
    return frame(response.pickle())


def packed(saved):
    with io.BytesIO() as file:
        torch.save(saved, file)
        return zstandard.compress(file.getvalue())


def bomb():
    """A small archive with a lot in it."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(6):
                archive.writestr(f"archive/data/{number}", bytes(100 * 2**20))
        return file.getvalue()


def much():
    """Messages without an end, in one frame."""
    yield frame(b"", length=3 * 2**30)
    for _ in range(3 * 2**10):
        yield bytes(2**20)


def flood():
    """News without an end."""
    for _ in range(10**6):
        yield frame(b'{"id": "1", "session_id": "1", "status": "RUNNING"}', 1) * 100


def memory_of_a_pickle():
    """A few bytes that would have C's unpickler remember two billion values."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}r" + struct.pack("<I", 2**30) + b".")
        return file.getvalue()


def slow():
    """A message that comes a byte now and then."""
    for byte in frame(bytes(1000)):
        time.sleep(0.2)
        yield bytes([byte])


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ([much], "sends messages of more than 512 MiB"),
        ([slow], "no sign of life"),
        ([frame(b"[" * 100_000, 1)], "not as an NDIF server does"),
        ([frame(b'{"id": "1"}', 1)], "not as an NDIF server does"),
        ([frame(bomb())], "unpacks to more than 512 MiB"),
        ([flood], "sends more than 10,000 messages for a job"),
        ([frame(memory_of_a_pickle())], "not as an NDIF server does"),
        ([finished(None)], "not as an NDIF server does"),
        ([finished("file:///etc/passwd")], "not as an NDIF server does"),
        ([finished("/env")], "not as an NDIF server does"),
        ([finished(b"nothing packed")], "cannot be unpacked"),
        ([finished(zstandard.compress(b"no tensors"))], "cannot be unpacked"),
        ([finished(zstandard.compress(bytes(2**30)))], "unpacks to more than 512 MiB"),
        ([finished(zstandard.compress(bomb()))], "unpacks to more than 512 MiB"),
        (
            [finished(packed({"scores": torch.zeros(1).expand(2**40)}))],
            "sends tensors of more than 512 MiB",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_jobs(serve, then, message):
    host = Host(serve(job(*then)), timeout=1 if message == "no sign of life" else 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(ProbeError, match=message):
        host.run("model", {}, b"blob")
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB


def test_a_job_that_is_as_it_should_be(serve):
    host = Host(serve(job(finished(packed({"scores": torch.ones(3)})))))
    assert torch.equal(host.run("model", {}, b"blob")["scores"], torch.ones(3))
    assert host.table["jobs"] == 1


def test_a_key_that_comes_back_is_not_shown(serve):
    table = {"packages": {"torch": "k3y"}, "python_version": "k3y k3y", "deployments": {}}
    host = Host(serve(lambda _: [answer(json.dumps(table))]), "k3y")
    server = read_server(host)
    assert "k3y" not in str(server)
    assert server.python == "***"


@pytest.mark.parametrize("told", [float("inf"), float("nan"), -1, 10**400, "1", [], None, True])
def test_a_time_that_is_none(serve, told):
    """It goes into a record that holds no infinite number."""
    host = Host(serve(job(finished(packed({"a": torch.ones(1)}), meta={"runtime": told}))))
    host.run("model", {}, b"blob")
    assert json.loads(json.dumps(host.table, allow_nan=False))["seconds_there"] in (0, 1)


def test_a_traceback_of_a_server_is_no_command(serve):
    words = "Traceback\n\x1b]0;owned\x07\x9b31m\u202eError: no"
    response = ResponseModel(id="1", status=Status.ERROR, description=words)
    host = Host(serve(job(frame(response.pickle()))))
    with pytest.raises(RuntimeError, match="Error: no") as caught:
        host.run("model", {}, b"blob")
    assert str(caught.value).replace("\n", "").isprintable()


def test_no_key_follows_a_redirection(serve):
    seen = []

    def other(request):
        seen.append(request)
        yield answer("{}")

    there = serve(other)
    where = there.encode()
    host = Host(
        serve(lambda _: [b"HTTP/1.1 307 Go\r\nlocation: " + where + b"\r\n\r\n"]),
        "secret",
        timeout=1,
    )
    with pytest.raises(ProbeError, match=r"refuses \(307\)"):
        host.ask("/env")
    with pytest.raises(ProbeError):
        host.run("model", {}, b"blob")
    assert seen == []


def test_a_result_behind_a_link_is_fetched_without_the_key(serve):
    seen = []

    def store(request):
        seen.append(request)
        yield answer(packed({"scores": torch.ones(2)}))

    link = serve(store) + "/object"
    host = Host(serve(job(finished(link))), "secret")
    assert torch.equal(host.run("model", {}, b"blob")["scores"], torch.ones(2))
    assert len(seen) == 1
    assert b"secret" not in seen[0]


def test_limits_by_themselves():
    assert limits.unpack(zstandard.compress(b"x" * 100), 100) == b"x" * 100
    with pytest.raises(limits.TooLargeError):
        limits.unpack(zstandard.compress(b"x" * 101), 100)
    loop: list[object] = []
    loop.append(loop)
    limits.check_tensors({"a": loop})
    with pytest.raises(limits.TooLargeError):
        limits.check_tensors({"a": [(torch.zeros(26),)]}, 100)
    assert isinstance(wire.too_large("u", limits.TooLargeError("much")), ProbeError)


def test_a_file_cannot_take_the_key_somewhere(serve, tmp_path, monkeypatch):
    """Neither a recipe nor the record of somebody's run; what the user says on the line can."""
    seen = []

    def thief(request):
        seen.append(request)
        yield answer("{}")

    url = serve(thief)
    monkeypatch.setenv("NDIF_API_KEY", "secret")
    text = recipe_files()["tiny-math"].read_text()
    assert "[compute]" in text
    recipe = tmp_path / "stolen.toml"
    recipe.write_text(text.replace("[compute]", f'[compute]\nremote = "{url}"'))
    run = ("--output", str(tmp_path / "run"))
    for more in ((), ("--dry-run",), ("--limit", "5")):
        result = call("recipe", recipe, *run, *more)
        assert result.exit_code == 2
        assert f"ask for it: --remote {url}" in result.stderr
    assert not (tmp_path / "run").exists()
    shutil.copytree(OLD_RUN, tmp_path / "theirs")
    record = json.loads((tmp_path / "theirs" / "run.json").read_text())
    record["recipe"]["compute"]["remote"] = url
    (tmp_path / "theirs" / "run.json").write_text(json.dumps(record))
    for command in ("faithfulness", "circuit"):
        result = call(command, tmp_path / "theirs")
        assert result.exit_code == 2
        assert f"ask for it: --remote {url}" in result.stderr
    assert seen == []
    result = call("recipe", recipe, *run, "--remote", url)
    assert result.exit_code == 2  # it is no NDIF server
    assert any(b"secret" in request for request in seen)
