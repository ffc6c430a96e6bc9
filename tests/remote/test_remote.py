"""What goes wrong on the way to a server, without one; `test_ndif` has a real one."""

import io
import os
import socket
import threading
import time

import pytest
import torch
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel, Status

from probe.concurrency import in_flight
from probe.errors import ProbeError
from probe.hosting import open_host
from probe.remote import Host, PassingError, failure, read_response, refusal

KEY = "5f0c6c1e-0f7c-4b53-9d0e-8d6f3b1a2c4d"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)


@pytest.mark.parametrize(
    ("remote", "message"),
    [
        ("localhost:8001", "give ndif or an address"),
        ("ftp://host", "give ndif or an address"),
        ("http://", "give ndif or an address"),
        ("http://[::1", "give ndif or an address"),
        ("http://host:99999", "give ndif or an address"),
        ("http://host:port", "give ndif or an address"),
        ("http://host?a=1", "give ndif or an address"),
        ("http://ho\nst", "give ndif or an address"),
        ("http://me:word@host", "leave name and password out"),
        ("ndif", "asks for a key: set NDIF_API_KEY"),
    ],
)
def test_addresses(remote, message):
    with pytest.raises(ProbeError, match=message):
        open_host(remote)


def test_the_hosted_server_and_its_key(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", "https://api.example.org")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "stored")
    host = open_host("ndif")
    assert (host.url, host.key, host.deploys) == ("https://api.example.org", "stored", False)
    own = open_host("http://localhost:8001/")
    assert (own.url, own.key, own.deploys) == ("http://localhost:8001", "", True)
    assert open_host("HTTP://localhost:8001").url == own.url
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    assert open_host("ndif").key == open_host("http://localhost:8001").key == KEY


@pytest.mark.parametrize("key", ["two\nlines", "two words", "schlüssel"])
def test_a_damaged_key_is_not_repeated(monkeypatch, key):
    monkeypatch.setenv("NDIF_API_KEY", key)
    with pytest.raises(ProbeError, match="characters that no key has") as caught:
        open_host("http://localhost:8001")
    assert key not in str(caught.value)


def test_the_key_is_in_no_text():
    host = Host("http://localhost:8001", KEY)
    assert KEY not in repr(host)
    assert KEY not in str(host.table)
    refused = refusal(host.url, host.key, 400, f"Invalid API key format: '{KEY}'.")
    assert str(refused) == "http://localhost:8001 does not take the key in NDIF_API_KEY"
    assert host.clean(f"a server's words: {KEY}!") == "a server's words: ***!"


@pytest.mark.parametrize(
    ("status", "detail", "kind", "message"),
    [
        (401, "Missing or invalid API key.", ProbeError, "asks for a key; set NDIF_API_KEY"),
        (404, "Not Found", ProbeError, "no NDIF server"),
        (400, "Client nnsight version 0.7 is below 0.8", ProbeError, "below 0.8"),
        (503, "compute backend is reconnecting", PassingError, "reconnecting"),
        (429, "slow down", PassingError, "429"),
    ],
)
def test_refusals(status, detail, kind, message):
    error = refusal("http://localhost:8001", "", status, detail)
    assert type(error) is kind
    assert message in str(error)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "Error submitting request to model deployment. Please try again later. Sorry.",
            PassingError,
            "Error submitting request to model deployment.",
        ),
        ("Your job exceeded the execution timeout of 5s.", ProbeError, "take smaller batches"),
        (
            "Could not deploy this model. No such repository\nTraceback ...\nand more",
            ProbeError,
            "No such repository",
        ),
        ("Request cancelled by operator.", ProbeError, "cancelled by operator"),
        ("Traceback ...\ntorch.OutOfMemoryError: CUDA", torch.OutOfMemoryError, "ran out of mem"),
        ("Traceback ...\nEndpointConnectionError: no", ProbeError, "without an object store"),
        ("Traceback ...\nZeroDivisionError: no", RuntimeError, "ZeroDivisionError"),
        ("", ProbeError, "does not say why"),
    ],
)
def test_failed_jobs(text, kind, message):
    error = failure("http://localhost:8001", text)
    assert type(error) is kind
    assert message in str(error)


def test_a_silent_server_is_not_waited_for():
    said = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        host = Host(url, timeout=1, say=said.append)
        begun = time.monotonic()
        with pytest.raises(ProbeError, match="no answer$"):
            host.ask("/status")
        with pytest.raises(ProbeError, match="no sign of life from a job for 1 s"):
            host.run("a key", {}, b"")
        assert time.monotonic() - begun < 30
    assert all(url in line for line in said)
    assert +host.states == {}


def test_a_refused_connection_is_tried_again():
    said = []
    host = Host("http://127.0.0.1:9", timeout=2, say=said.append)
    with pytest.raises(ProbeError, match="connection refused for 2 s; nothing is lost"):
        host.run("a key", {}, b"")
    assert said == ["http://127.0.0.1:9: connection refused; trying again in 1 s"]


def test_in_flight_keeps_the_order_and_the_number():
    running, most, lock = 0, 0, threading.Lock()

    def call(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 * (number % 3))
        with lock:
            running -= 1
        return number

    calls = (lambda n=n: call(n) for n in range(20))
    assert list(in_flight(calls, 3)) == list(range(20))
    assert most == 3


@pytest.mark.parametrize("jobs", [1, 3])
def test_in_flight_gives_out_what_is_done_before_it_fails(jobs):
    begun = []

    def call(number):
        begun.append(number)
        if number == 4:
            raise ProbeError("no")
        time.sleep(0.05)
        return number

    def take():
        for result in in_flight((lambda n=n: call(n) for n in range(20)), jobs):
            found.append(result)

    found = []
    with pytest.raises(ProbeError, match="no"):
        take()
    assert found == [number for number in begun if number != 4]
    assert max(begun) < 4 + jobs


def test_responses_are_read_without_running_anything():
    finished = ResponseModel(id="1", status=Status.COMPLETED, data=b"tensors", meta={"runtime": 2})
    assert read_response(finished.pickle()) == finished
    assert read_response(finished.model_copy(update={"data": "url"}).model_dump_json()).data

    class Evil:
        def __reduce__(self):
            return os.system, ("false",)

    with io.BytesIO() as file:
        torch.save({"id": "1", "status": Evil()}, file, pickle_protocol=4)
        with pytest.raises(ValueError, match="not a response"):
            read_response(file.getvalue())
    with pytest.raises(ValueError, match="not a response"):
        read_response(b"no archive")


def test_results_are_read_without_running_anything():
    import zstandard

    class Evil:
        def __reduce__(self):
            return os.system, ("false",)

    host = Host("http://localhost:8001")
    for saved, readable in (({"scores": torch.ones(2)}, True), ({"scores": Evil()}, False)):
        with io.BytesIO() as file:
            torch.save(saved, file)
            data = zstandard.ZstdCompressor().compress(file.getvalue())
        response = ResponseModel(id="1", status=Status.COMPLETED, data=data, meta={"runtime": 2})
        if readable:
            assert torch.equal(host._saved(response)["scores"], torch.ones(2))
        else:
            with pytest.raises(ProbeError, match="more than plain tensors"):
                host._saved(response)
