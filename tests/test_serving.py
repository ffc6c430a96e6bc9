"""Against a real server that speaks OpenAI's API: `transformers serve`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import probe

pytestmark = pytest.mark.serving

# The Python of an environment with fastapi, uvicorn and openai beside transformers.
PYTHON = os.environ.get("PROBE_SERVING")
MODELS = Path(probe.__file__).parent / "data" / "tiny-math"
RECIPE = """
name = "served"
[[benchmarks]]
name = "tiny-math"
[[pairs]]
name = "sft-grpo"
before = "probe:tiny-math/sft"
after = "probe:tiny-math/grpo"
max_new_tokens = 64
[compute]
dtype = "float32"
[solutions]
questions = 60
[selection]
alpha = [0.5]
samples = 4
[attribution]
control = ["none"]
"""


@pytest.fixture(scope="module")
def url():
    """The address of a server that is up."""
    if not PYTHON:
        pytest.skip("PROBE_SERVING is not set; see .ci/run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (PYTHON, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1")
    options = ("--port", str(port), "--device", "cpu", "--dtype", "float32")
    server = subprocess.Popen((*command, *options), stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(240):
            assert server.poll() is None, "the server does not start"
            try:
                urllib.request.urlopen(f"{url}/models").close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.kill()
        server.wait()


def command(folder, *arguments):
    """What runs the recipe in a folder."""
    recipe = folder.parent / "served.toml"
    recipe.write_text(RECIPE)
    whole = (sys.executable, "-m", "probe.cli", "recipe", recipe, "--output", folder, *arguments)
    return [str(part) for part in whole]


def test_the_answers_of_a_real_server_are_those_of_the_engine_here(url, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run(command(here), check=True, capture_output=True, timeout=600)
    sides = (
        f"{side}={url}#{MODELS / name}" for side, name in (("before", "sft"), ("after", "grpo"))
    )
    served = command(there, "--answers", ",".join(sides))
    first = there / "solutions" / "tiny-math--sft.tiny-math.jsonl"
    run = subprocess.Popen(served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not first.exists() or len(first.read_bytes().splitlines()) < 10:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = len(first.read_bytes().splitlines())
    assert 10 <= left < 60
    ended = subprocess.run(served, check=True, capture_output=True, text=True, timeout=600)
    assert "prompts go there as text, token ids are derived again from the text" in ended.stderr
    assert "otherwise" not in ended.stderr
    files = sorted(here.glob("solutions/*.jsonl"))
    assert len(files) == 2
    for file in files:
        assert file.read_text() == (there / "solutions" / file.name).read_text()
