"""Ray places the units of a run: the same numbers as of one process, whatever is lost meanwhile.

What is marked needs Ray, in a network namespace of its own; .ci/run has both.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from remote_server.server import only_loopback
from rich.console import Console
from safetensors.torch import load_file, save_file

import probe
from probe.checkpoints import PACKAGE_DATA, unread_inputs
from probe.errors import ProbeError
from probe.recipe import read_recipe

TINY = PACKAGE_DATA / "tiny-math"
STEPS = range(1, 13)
RECIPE = """
name = "steps"
{pairs}
[[benchmarks]]
name = "tiny-math"
[compute]
dtype = "float32"
[solutions]
questions = 20
[selection]
alpha = [0.3]
[attribution]
batch_size = 5
control = []
[report]
resamples = 0
extra = []
"""
PAIR = """
[[pairs]]
name = "step-{step}"
before = "probe:tiny-math/sft"
after = "{folder}/step-{step}"
max_new_tokens = 64
"""
TRAJECTORY = """
[[trajectories]]
name = "grpo"
base = "probe:tiny-math/sft"
checkpoints = {checkpoints}
max_new_tokens = 64
"""
COMMAND = "import sys; from probe.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of twelve checkpoints on the way from SFT to GRPO."""
    folder = tmp_path_factory.mktemp("checkpoints")
    before, after = (load_file(TINY / name / "model.safetensors") for name in ("sft", "grpo"))
    for step in STEPS:
        place = folder / f"step-{step}"
        shutil.copytree(TINY / "grpo", place)
        mixed = {name: before[name].lerp(after[name], step / 12) for name in before}
        save_file(mixed, place / "model.safetensors", {"format": "pt"})
    checkpoints = json.dumps([f"{folder}/step-{step}" for step in STEPS])
    file = folder / "steps.toml"
    file.write_text(RECIPE.format(pairs=TRAJECTORY.format(checkpoints=checkpoints)))
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Ray where nobody else reaches it, and with nothing of this machine's home."""
    if not only_loopback():
        pytest.skip("not in a network namespace of its own")
    # Before Ray is imported, which reads them then.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PROBE_CACHE", str(tmp_path_factory.mktemp("of-nodes")))
        pytest.importorskip("ray", reason="there is no Ray; .ci/run has it")
        yield


@pytest.fixture(scope="module")
def cluster(alone):
    """Two nodes with one core each."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=options)
    made.second = made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def run(recipe, folder, **compute):
    said = Console(file=StringIO(), record=True, width=300)
    keys = {f"compute.{key}": value for key, value in compute.items()}
    report = probe.run_recipe(recipe, folder, overrides=keys, console=said)
    return report, said.export_text()


def command(*line, **environment):
    """The command, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, line)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(cluster):
    """The processes of the cluster that do a unit now."""
    raylets = {
        made.process.pid
        for node in cluster.list_all_nodes()
        for made in node.all_processes.get("raylet", ())
    }
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            title = (place / "cmdline").read_bytes()
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent in raylets and title.startswith(b"ray::probe unit"):
            found.append(int(place.name))
    return found


def until(condition):
    """Wait until something holds, and give it."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def when(condition, act):
    """Do something in a thread of its own once a condition holds."""
    thread = threading.Thread(target=lambda: act(until(condition)))
    thread.start()
    return thread


@pytest.mark.cluster
def test_twelve_checkpoints_on_two_nodes_with_losses(recipe, cluster, tmp_path, monkeypatch):
    """Who began it is killed, a worker while it writes answers, a node while edges are scored."""
    folder, lost = tmp_path / "cluster", []
    monkeypatch.setenv("PROBE_CACHE", str(tmp_path / "cache"))

    def solved(count):
        return len(list(folder.glob("solutions/*.jsonl"))) >= count

    first = command("recipe", recipe, "--output", folder, "--cluster", cluster.address)
    until(lambda: solved(3))
    first.kill()
    said, _ = first.communicate()
    assert "weights of " in said
    # The nodes have read the weights; small files are read each time.
    assert all(unread_inputs(name) < 500_000 for name in read_recipe(recipe).models())
    assert first.returncode == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    begun = {file.name: file.read_text() for file in folder.glob("solutions/*.jsonl")}

    def kill(found):
        os.kill(found[0], signal.SIGKILL)
        lost.append("worker")

    def unplug(_):
        cluster.remove_node(cluster.second, allow_graceful=False)
        lost.append("node")

    threads = [
        when(lambda: solved(len(begun) + 2) and workers(cluster), kill),
        when(lambda: len(list(folder.glob("edges/*.before.safetensors"))) >= 3, unplug),
    ]
    report, said = run(recipe, folder, cluster=cluster.address)
    for thread in threads:
        thread.join()
    assert lost == ["worker", "node"]
    assert said.count("was lost; 127.0.0.1 goes on with it") >= 1
    # What was there of the first is still there, and was gone on with.
    for name, text in begun.items():
        assert set(text.splitlines()) <= set((folder / "solutions" / name).read_text().splitlines())
    assert report.missing == ()
    one, _ = run(recipe, tmp_path / "one", device="cpu")
    assert report.table == one.table
    assert len(report.table["cells"]) == 12 * 6
    assert "Along the training" in json.dumps(report.table)

    # All of it is there, so it takes no worker to say it again.
    again, said = run(recipe, folder, device="cpu")
    assert again.table == report.table
    assert "lost" not in said


@pytest.mark.cluster
def test_what_a_unit_raises_is_one_line(cluster, tmp_path):
    keys = {"solutions.questions": 4, "compute.cluster": cluster.address, "compute.gpus": 0}
    broken = tmp_path / "broken"
    shutil.copytree(TINY / "grpo", broken)
    keys |= {"pairs.1.after": str(broken), "attribution.granularity": "expert"}
    with pytest.raises(ProbeError, match="expert") as caught:
        probe.run_recipe("tiny-math", tmp_path / "run", overrides=keys)
    assert "\n" not in str(caught.value)


@pytest.mark.cluster
def test_a_broken_number_is_found_by_a_node(cluster, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(TINY / "grpo", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    file = tmp_path / "one.toml"
    pair = PAIR.format(step=1, folder="x").replace("x/step-1", str(broken))
    file.write_text(RECIPE.format(pairs=pair))
    with pytest.raises(ProbeError, match=r"model.norm.weight in .* is NaN or infinite"):
        run(file, tmp_path / "run", cluster=cluster.address)
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_this_machine_alone_leaves_nothing_at_home_and_listens_to_nobody_else(alone, tmp_path):
    """With a token there that another cluster has left."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    pair = PAIR.format(step=1, folder="x").replace("x/step-1", "probe:tiny-math/grpo")
    file = tmp_path / "one.toml"
    file.write_text(RECIPE.format(pairs=pair))
    line = ("recipe", file, "--output", tmp_path / "run", "--limit", "4", "--cluster", "local")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE")
        patch.delenv("RAY_AUTH_TOKEN")
        process = command(*line, HOME=str(tmp_path))
    until(lambda: list(tmp_path.glob("run/solutions/*.jsonl")))
    found = listening()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "cluster: 127.0.0.1 (" in output
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and as IPv6
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    assert token.read_text() == "0" * 64


def listening():
    """The addresses that anything in this network namespace listens on, as the kernel has them."""
    rows = [
        line.split()
        for file in ("tcp", "tcp6")
        for line in Path("/proc/net", file).read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A"}


@pytest.mark.cluster
def test_no_cluster_is_one_line_and_leaves_nothing(alone, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    for where in ("127.0.0.1:9", "ray://127.0.0.1:9", "auto"):
        with pytest.raises(ProbeError, match=f"no Ray cluster at '{where}': .*--cluster local"):
            run("tiny-math", tmp_path / "run", cluster=where)
    assert not (tmp_path / "run").exists()


def test_a_server_and_a_cluster_are_one_too_many(tmp_path):
    with pytest.raises(ProbeError, match="take --remote or --cluster away"):
        run("tiny-math", tmp_path / "run", cluster="auto", remote="http://127.0.0.1:9")
    assert not (tmp_path / "run").exists()


def test_without_ray_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ProbeError, match=r"needs Ray; .* pip install -e .*cluster"):
        run("tiny-math", tmp_path / "run", cluster="auto")
    assert not (tmp_path / "run").exists()


def test_a_file_names_no_cluster_elsewhere(tmp_path):
    file = tmp_path / "mine.toml"
    text = '[compute]\ncluster = "ray://example.org:10001"\n'
    file.write_text(
        RECIPE.format(pairs=PAIR.format(step=1, folder="x")).replace("[compute]\n", text)
    )
    with pytest.raises(ProbeError, match="if you trust that cluster, ask for it: --cluster ray://"):
        read_recipe(file)
    read_recipe(file, {"compute.cluster": "ray://example.org:10001"})
