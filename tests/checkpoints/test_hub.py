"""Revisions and folders of the hub, against a hub of our own on loopback, and trainers' folders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import save_random_model

from probe.checkpoints import (
    PACKAGE_DATA,
    HubName,
    checkpoints_in,
    fetch_checkpoint,
    find_checkpoint,
    local_folder,
    weight_files,
)
from probe.errors import ProbeError

SFT = PACKAGE_DATA / "tiny-math" / "sft"
COMMITS = {"main": "a" * 40, "step_100": "b" * 40, "refs/pr/1": "c" * 40}


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API a download asks for."""

    def do_HEAD(self):
        """The same as a file, without it."""
        self.do_GET()

    def do_GET(self):
        """Answer."""
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path.startswith("/api/models/me/steps/"):
            what, _, revision = path.removeprefix("/api/models/me/steps/").partition("/")
            if revision not in COMMITS and revision not in COMMITS.values():
                return self.send(json.dumps({"error": "Invalid rev id"}), 404)
            names = sorted(self.server.files)
            if what == "tree":
                sizes = {name: len(self.server.files[name]) for name in names}
                return self.send(
                    json.dumps(
                        [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in names]
                    )
                )
            commit = COMMITS.get(revision, revision)
            siblings = [{"rfilename": name} for name in names]
            return self.send(json.dumps({"id": "me/steps", "sha": commit, "siblings": siblings}))
        if path.startswith("/me/steps/resolve/"):
            rest = path.removeprefix("/me/steps/resolve/")
            for revision, commit in COMMITS.items():
                for begin in (revision, commit):
                    if rest.startswith(f"{begin}/"):
                        name = rest.removeprefix(f"{begin}/")
                        self.server.asked.append((revision, name))
                        return self.send(self.server.files[name], commit=commit)
        return self.send("", 200 if path == "/" else 404)

    def send(self, body, status=200, commit=None):
        """Send an answer."""
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(tmp_path):
    """A hub with one repository: a model, two folders with models, and things beside them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {path.name: path.read_bytes() for path in SFT.iterdir()}
    other = {p.name: p.read_bytes() for p in (PACKAGE_DATA / "tiny-math" / "grpo").iterdir()}
    for name in ("config.json", "model.safetensors"):
        files[f"steps/step_2/{name}"] = other[name]
        files[f"steps/step_10/{name}"] = files[name]
    files["README.md"] = files["steps/step_2/optimizer.pt"] = b"of no use"
    server.files, server.asked = files, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    yield server
    server.shutdown()


LOAD = """
import sys, torch, probe
from probe.checkpoints import find_checkpoint, weight_files
assert find_checkpoint(sys.argv[1]) is None
model = probe.load_model(sys.argv[1])
found = find_checkpoint(sys.argv[1])
print(found.folder)
print(found.tokenizer)
print(float(sum(p.double().abs().sum() for p in model.network._module.parameters())))
"""


def load(hub, reference):
    """Load a model in a process that has that hub, and no cache yet."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, reference], env=hub.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_folder_of_a_revision_is_fetched_alone(hub):
    folder, tokenizer, size = load(hub, "me/steps/steps/step_2@step_100")
    assert folder.endswith(f"snapshots/{'b' * 40}/steps/step_2")
    assert tokenizer.endswith(f"snapshots/{'b' * 40}")
    assert float(size) == pytest.approx(total(PACKAGE_DATA / "tiny-math" / "grpo"))
    revisions = {revision for revision, _ in hub.asked}
    names = {name for _, name in hub.asked}
    assert revisions == {"step_100"}
    assert {name for name in names if name.startswith("steps/")} == {
        "steps/step_2/config.json",
        "steps/step_2/model.safetensors",
    }
    assert "model.safetensors" not in names
    assert "README.md" not in names


def test_a_revision_of_the_whole(hub):
    folder, tokenizer, size = load(hub, "me/steps@refs/pr/1")
    assert folder == tokenizer
    assert folder.endswith(f"snapshots/{'c' * 40}")
    assert float(size) == pytest.approx(total(SFT))
    assert not any(name.startswith("steps/") for _, name in hub.asked)


RUN = """
import json, sys
from pathlib import Path
from probe.checkpoints import fetch_checkpoint
from probe.recipe import read_recipe
from probe.store import RunFolder, open_record
sft, grpo, folder = sys.argv[1:]
fetch_checkpoint(sft), fetch_checkpoint(grpo)
models = {"pairs.0.before": sft, "pairs.0.after": grpo, "pairs.1.before": sft}
recipe = read_recipe("tiny-math", models)
open_record(RunFolder(Path(folder)), recipe, fresh=False)
"""


def test_a_run_records_the_commit_that_each_name_stood_for(hub, tmp_path):
    names = ["me/steps", "me/steps/steps/step_2@step_100"]
    command = [sys.executable, "-c", RUN, *names, str(tmp_path / "run")]
    done = subprocess.run(command, env=hub.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["commits"] == dict(zip(names, ("a" * 40, "b" * 40), strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("me/steps@step_7", "cannot download the model 'me/steps@step_7'"),
        ("me/steps/nothing", "'nothing'; models are in steps/step_10, steps/step_2"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, wrong, said):
    done = subprocess.run(
        [sys.executable, "-m", "probe.cli", "doctor", wrong],
        env=hub.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())


def total(folder):
    from safetensors.torch import load_file

    return float(
        sum(x.double().abs().sum() for x in load_file(folder / "model.safetensors").values())
    )


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("org/model", ("org/model", "", None)),
        ("org/model@step_100", ("org/model", "", "step_100")),
        ("org/model/a/b-1", ("org/model", "a/b-1", None)),
        ("org/model/a@refs/pr/1", ("org/model", "a", "refs/pr/1")),
    ],
)
def test_names_of_the_hub(reference, parts):
    assert HubName.parse(reference) == parts
    assert str(HubName.parse(reference)) == reference
    assert local_folder(reference) is None


@pytest.mark.parametrize(
    "reference",
    [
        *("org/model@", "org/model/../other", "org/model/.", "org/model//a", "org/model/a b"),
        *("org/model@a..b/../c", "org/model@/x", "org/model@x y", "org/mo%2e", "a@b"),
    ],
)
def test_what_is_no_name(reference):
    with pytest.raises(ProbeError, match=r"neither a folder here nor a hub id|does not exist"):
        local_folder(reference)


def test_a_checkpoint_in_a_trainers_folder(tmp_path):
    """Its tokenizer is that of the folder around it, where it has none."""
    run = tmp_path / "grpo"
    for step in (20, 100, 9):
        save_random_model(run / f"checkpoint-{step}", seed=step)
    (run / "runs").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SFT / name, run / name)
        for step in (20, 100, 9):
            (run / f"checkpoint-{step}" / name).unlink(missing_ok=True)
    assert [path.split("-")[-1] for path in checkpoints_in(f"{run}#checkpoint-*")] == [
        "9",
        "20",
        "100",
    ]
    reference = f"{run}#checkpoint-20"
    assert local_folder(reference) == run / "checkpoint-20"
    assert find_checkpoint(reference).tokenizer == run
    assert fetch_checkpoint(reference).tokenizer == run
    assert weight_files(reference) == [run / "checkpoint-20" / "model.safetensors"]
    with pytest.raises(ProbeError, match=r"names 3 checkpoints; name one of them, as .*-100$"):
        local_folder(f"{run}#checkpoint-*")
    with pytest.raises(ProbeError, match="holds no checkpoint-7; it holds checkpoint-9, "):
        local_folder(f"{run}#checkpoint-7")
    with pytest.raises(ProbeError, match="does not exist, so it holds no"):
        local_folder(f"{tmp_path}/none#checkpoint-7")
    for wrong in ("", "/etc", "../x"):
        with pytest.raises(ProbeError, match="stands a folder in it"):
            local_folder(f"{run}#{wrong}")
    odd = save_random_model(tmp_path / "run#3")
    assert local_folder(str(odd)) == odd
