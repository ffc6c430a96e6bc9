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
    from probe.attribution import attribute as attribute
    from probe.attribution import exact_effects as exact_effects
    from probe.comparison import compare as compare
    from probe.edges import Edge as Edge
    from probe.edges import EdgeScores as EdgeScores
    from probe.errors import ProbeError as ProbeError
    from probe.faithfulness import run_faithfulness as run_faithfulness
    from probe.graph import Graph as Graph
    from probe.hosting import load_hosted as load_hosted
    from probe.hosting import open_host as open_host
    from probe.models import Model as Model
    from probe.models import load_model as load_model
    from probe.run import run_recipe as run_recipe
    from probe.selection import Selection as Selection
    from probe.selection import Solution as Solution
    from probe.selection import select as select
    from probe.sequences import TokenSequence as Sequence
    from probe.sequences import TokenSequence as TokenSequence

__version__ = "0.1.0"

_MODULES = {
    "attribute": "attribution",
    "exact_effects": "attribution",
    "compare": "comparison",
    "run_faithfulness": "faithfulness",
    "Edge": "edges",
    "EdgeScores": "edges",
    "ProbeError": "errors",
    "Graph": "graph",
    "Model": "models",
    "load_hosted": "hosting",
    "load_model": "models",
    "open_host": "hosting",
    "run_recipe": "run",
    "Selection": "selection",
    "Solution": "selection",
    "select": "selection",
    "TokenSequence": "sequences",
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
