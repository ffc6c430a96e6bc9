"""The local page: what it shows, and whom it refuses."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from threading import Thread
from urllib.parse import urlsplit

import pytest

from probe.errors import ProbeError
from probe.report import Viewer, build_report, render, run_folders, run_state
from probe.solutions import Solution
from probe.store import locked

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def viewing(root, kind=Viewer):
    with kind(root) as viewer:
        thread = Thread(target=viewer.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield viewer
        finally:
            viewer.shutdown()
            thread.join()


def get(viewer, path, **headers):
    """Status, headers and body of a request as it is, with no path made straight."""
    connection = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=30)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return found


def test_it_lists_and_opens_what_format_html_writes(half_run):
    with viewing(half_run.path.parent) as viewer:
        assert viewer.server_address[0] == "127.0.0.1"
        start = urlsplit(viewer.address).path
        code, headers, body = get(viewer, start)
        assert code == 200
        assert b"<title>probe: runs</title>" in body
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        code, _, body = get(viewer, f"{start}runs.json")
        (row,) = json.loads(body)
        assert (code, row["name"], row["recipe"], row["state"]) == (
            200,
            "run",
            "tiny-math",
            "stopped",
        )
        assert (row["scored"], row["to_score"]) == (2, 8)
        code, _, body = get(viewer, f"{start}{row['link']}?{row['stamp']}")
        assert code == 200
        assert body.decode() == render(build_report(half_run.path), "html")


def test_who_has_no_token_or_names_another_host_is_refused(half_run):
    with viewing(half_run.path) as viewer:
        start = urlsplit(viewer.address).path
        port = viewer.server_port
        wrong = start[:-2] + ("a" if start[-2] != "a" else "b") + "/"
        for path in (
            "/",
            "/runs.json",
            "/run/run",
            wrong,
            f"{wrong}runs.json",
            "//",
            "runs.json",
            "/é/",
        ):
            code, _, body = get(
                viewer, path.encode().decode("latin-1").encode("ascii", "ignore").decode()
            )
            assert code == 403, path
            assert viewer.token.encode() not in body
        for host in ("evil.test", f"evil.test:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
            assert get(viewer, f"{start}runs.json", Host=host)[0] == 403, host
        assert get(viewer, f"http://127.0.0.1:{port}{start}")[0] == 403
        for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
            assert get(viewer, f"{start}runs.json", Host=host)[0] == 200
    other = Viewer(half_run.path)
    other.server_close()
    assert other.token != viewer.token


def test_nothing_outside_is_shown(half_run, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(half_run.path, outside / "secret")
    inside = tmp_path / "inside"
    shutil.copytree(half_run.path, inside / "a" / "deep run")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)
    assert list(run_folders(inside)) == ["a/deep run"]
    with viewing(inside) as viewer:
        start = urlsplit(viewer.address).path
        (row,) = json.loads(get(viewer, f"{start}runs.json")[2])
        assert get(viewer, start + row["link"])[0] == 200
        for name in (
            *("../outside/secret", "..%2Foutside%2Fsecret", "%2e%2e/outside/secret", "link"),
            *("folder%2Fsecret", str(outside / "secret").replace("/", "%2F"), "a", "", "run.json"),
            *("a%2Fdeep%20run/run.json", "a%2Fdeep%20run%00"),
        ):
            assert get(viewer, f"{start}run/{name}")[0] == 404, name


def test_how_far_a_run_is(half_run):
    path = half_run.path
    half_run.write_json("questions.json", {"tiny-math": dict.fromkeys("abcde", "digest")})
    first = run_state("run", path)
    assert (first.solved, first.to_solve, first.state) == (0, 15, "stopped")
    with locked(half_run, print):
        assert run_state("run", path).state == "running"
    rows = [Solution(name, [1], [2], True) for name in "abc"]
    half_run.write_solutions(half_run.solutions_file("tiny-math--sft", "tiny-math"), rows)
    second = run_state("run", path)
    assert second.solved == 3
    assert second.stamp == first.stamp  # half of a file changes nothing in a report
    half_run.write_json("run.json", half_run.read_record() | {"solved": {"x": 3}})
    assert run_state("run", path).stamp != first.stamp
    half_run.write_json("run.json", half_run.read_record() | {"finished": "2026-01-01"})
    assert run_state("run", path).state == "finished"
    assert run_state("run", path).stamp != second.stamp
    assert run_state("run", path) == run_state("run", path)
    (path / "run.json").write_text("{")
    assert run_state("run", path).state == "damaged"
    with viewing(path.parent) as viewer:
        start = urlsplit(viewer.address).path
        (row,) = json.loads(get(viewer, f"{start}runs.json")[2])
        assert row["state"] == "damaged"
        code, _, body = get(viewer, start + row["link"])
        assert code == 200
        assert b"run.json" in body


def test_no_folder(tmp_path):
    with pytest.raises(ProbeError, match="no folder .*nowhere"):
        Viewer(tmp_path / "nowhere")


def test_the_command_prints_an_address_and_ends(half_run):
    command = [sys.executable, "-m", "probe.cli", "view", str(half_run.path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        address = urlsplit(process.stdout.readline().strip())
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        connection.request("GET", f"{address.path}runs.json")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""  # no token in a log


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (in Debian: apt install chromium)")
def test_a_browser_follows_a_run(half_run, tmp_path):
    half_run.write_json("questions.json", {"tiny-math": dict.fromkeys("abcde", "digest")})
    asked = []

    class Goes(Viewer):
        """A server whose run gets on once it has been looked at."""

        def states(self):
            asked.append(time.monotonic())
            if len(asked) == 2:
                rows = [Solution(name, [1], [2], True) for name in "abc"]
                path = half_run.solutions_file("tiny-math--sft", "tiny-math")
                half_run.write_solutions(path, rows)
                half_run.write_json("run.json", half_run.read_record() | {"finished": "now"})
            return super().states()

    first = run_state("run", half_run.path).stamp
    with viewing(half_run.path.parent, Goes) as viewer:
        done = subprocess.run(
            [
                CHROMIUM,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--virtual-time-budget=9000", "--enable-logging=stderr"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", viewer.address),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert "CONSOLE" not in done.stderr
    assert len(asked) > 2
    assert "<td>finished</td>" in done.stdout
    assert "3 of 15" in done.stdout
    (source,) = re.findall(r'<iframe [^>]*src="([^"]*)"', done.stdout)
    last = run_state("run", half_run.path).stamp
    assert source == f"run/run?{last}"
    assert last != first
