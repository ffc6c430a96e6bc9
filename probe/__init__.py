"""probe: what post-training did to the inside of a language model.

The public names below are all a script needs; they load on first use, so that `import probe`
and `probe --help` cost nothing.

    >>> import probe
    >>> model = probe.load_model("probe:tiny-math/sft")
    >>> sequence = probe.TokenSequence(prompt=[5, 16, 4], answer=[5, 16, 4, 17])
    >>> edges = probe.attribute(model, [sequence])
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe import metrics as metrics
    from probe.architectures import ARCHITECTURES as ARCHITECTURES
    from probe.architectures import Architecture as Architecture
    from probe.attribution import attribute as attribute
    from probe.attribution import exact_effects as exact_effects
    from probe.comparison import compare as compare
    from probe.diagnosis import doctor as doctor
    from probe.edges import Edge as Edge
    from probe.edges import EdgeScores as EdgeScores
    from probe.errors import ProbeError as ProbeError
    from probe.extras import EXTRAS as EXTRAS
    from probe.extras import Extra as Extra
    from probe.finished import run_faithfulness as run_faithfulness
    from probe.graph import Graph as Graph
    from probe.hosting import load_hosted as load_hosted
    from probe.hosting import open_host as open_host
    from probe.methods import METHODS as METHODS
    from probe.methods import Method as Method
    from probe.metrics import METRICS as METRICS
    from probe.metrics import Metric as Metric
    from probe.models import Model as Model
    from probe.models import load_model as load_model
    from probe.opened import OpenRun as OpenRun
    from probe.opened import open_run as open_run
    from probe.problems import BENCHMARKS as BENCHMARKS
    from probe.problems import Benchmark as Benchmark
    from probe.problems import Problem as Problem
    from probe.run import run_recipe as run_recipe
    from probe.selection import Selection as Selection
    from probe.selection import Solution as Solution
    from probe.selection import select as select
    from probe.sequences import TokenSequence as Sequence
    from probe.sequences import TokenSequence as TokenSequence
    from probe.targets import TARGETS as TARGETS
    from probe.targets import Target as Target
    from probe.temperature import matched_temperature as matched_temperature

__version__ = "0.1.0"

_MODULES = {
    "ARCHITECTURES": "architectures",
    "Architecture": "architectures",
    "METHODS": "methods",
    "Method": "methods",
    "attribute": "attribution",
    "exact_effects": "attribution",
    "compare": "comparison",
    "Edge": "edges",
    "EdgeScores": "edges",
    "ProbeError": "errors",
    "EXTRAS": "extras",
    "Extra": "extras",
    "run_faithfulness": "finished",
    "Graph": "graph",
    "load_hosted": "hosting",
    "open_host": "hosting",
    "METRICS": "metrics",
    "Metric": "metrics",
    "Model": "models",
    "doctor": "diagnosis",
    "load_model": "models",
    "OpenRun": "opened",
    "open_run": "opened",
    "BENCHMARKS": "problems",
    "Benchmark": "problems",
    "Problem": "problems",
    "run_recipe": "run",
    "Selection": "selection",
    "Solution": "selection",
    "select": "selection",
    "TARGETS": "targets",
    "Target": "targets",
    "TokenSequence": "sequences",
    "matched_temperature": "temperature",
}

__all__ = [*_MODULES, "Sequence", "__version__", "metrics"]


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name == "metrics":
        return import_module("probe.metrics")
    if name == "Sequence":  # what TokenSequence was called first
        name = "TokenSequence"
    if name in _MODULES:
        return getattr(import_module(f"probe.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name."""
    return sorted(__all__)
