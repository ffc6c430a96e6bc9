"""How the package hangs together."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "nnsight", "rich", "matplotlib", "datasets")


@pytest.mark.parametrize("module", ["probe", "probe.cli", "probe.recipe", "probe.vocabulary"])
def test_the_ground_floor_is_light(module):
    """Importing it loads no engine, and takes less than 0.3 s of a processor."""
    program = (
        "import json, sys, time\nstart = time.process_time()\n"
        f"import {module}\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        seconds, modules = json.loads(done.stdout)
        assert not set(HEAVY) & set(modules)
        took.append(seconds)
    assert min(took) < 0.3
