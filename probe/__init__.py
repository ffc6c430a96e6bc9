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
    from probe.attribution import METHODS as METHODS
    from probe.attribution import Edge as Edge
    from probe.attribution import EdgeScores as EdgeScores
    from probe.attribution import Method as Method
    from probe.attribution import TokenSequence as Sequence
    from probe.attribution import TokenSequence as TokenSequence
    from probe.attribution import attribute as attribute
    from probe.attribution import attribute_positions as attribute_positions
    from probe.attribution import exact_effects as exact_effects
    from probe.attribution import matched_temperature as matched_temperature
    from probe.attribution import matched_temperatures as matched_temperatures
    from probe.causes import Circuit as Circuit
    from probe.causes import Outcomes as Outcomes
    from probe.causes import answers_under as answers_under
    from probe.causes import causal_test as causal_test
    from probe.causes import faithfulness_curves as faithfulness_curves
    from probe.causes import graft as graft
    from probe.causes import intervene as intervene
    from probe.errors import ProbeError as ProbeError
    from probe.hosting import load_hosted as load_hosted
    from probe.hosting import open_host as open_host
    from probe.metrics import METRICS as METRICS
    from probe.metrics import Metric as Metric
    from probe.models import ARCHITECTURES as ARCHITECTURES
    from probe.models import Architecture as Architecture
    from probe.models import Graph as Graph
    from probe.models import Model as Model
    from probe.models import doctor as doctor
    from probe.models import load_model as load_model
    from probe.problems import BENCHMARKS as BENCHMARKS
    from probe.problems import Benchmark as Benchmark
    from probe.problems import Problem as Problem
    from probe.report import EXTRAS as EXTRAS
    from probe.report import Extra as Extra
    from probe.report import OpenRun as OpenRun
    from probe.report import open_run as open_run
    from probe.run import causal as causal
    from probe.run import compare as compare
    from probe.run import run_circuits as run_circuits
    from probe.run import run_faithfulness as run_faithfulness
    from probe.run import run_recipe as run_recipe
    from probe.run import watch as watch
    from probe.solutions import Selection as Selection
    from probe.solutions import Solution as Solution
    from probe.solutions import select as select
    from probe.tracing import TARGETS as TARGETS
    from probe.tracing import Target as Target

__version__ = "0.1.0"

_MODULES = {
    "ARCHITECTURES": "models",
    "Architecture": "models",
    "METHODS": "attribution",
    "Method": "attribution",
    "attribute": "attribution",
    "attribute_positions": "attribution",
    "exact_effects": "attribution",
    "Circuit": "causes",
    "faithfulness_curves": "causes",
    "Outcomes": "causes",
    "answers_under": "causes",
    "causal_test": "causes",
    "graft": "causes",
    "intervene": "causes",
    "run_circuits": "run",
    "causal": "run",
    "compare": "run",
    "Edge": "attribution",
    "EdgeScores": "attribution",
    "ProbeError": "errors",
    "EXTRAS": "report",
    "Extra": "report",
    "run_faithfulness": "run",
    "Graph": "models",
    "load_hosted": "hosting",
    "open_host": "hosting",
    "METRICS": "metrics",
    "Metric": "metrics",
    "Model": "models",
    "doctor": "models",
    "load_model": "models",
    "OpenRun": "report",
    "open_run": "report",
    "BENCHMARKS": "problems",
    "Benchmark": "problems",
    "Problem": "problems",
    "run_recipe": "run",
    "watch": "run",
    "Selection": "solutions",
    "Solution": "solutions",
    "select": "solutions",
    "TARGETS": "tracing",
    "Target": "tracing",
    "TokenSequence": "attribution",
    "matched_temperature": "attribution",
    "matched_temperatures": "attribution",
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
