"""The causal test of a finished run, into its folder.

>>> causal("runs/tiny-math")["sft-grpo.tiny-math"].sets[0].verdict
'no sign'
"""

import gc
import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from probe.attribution import TokenSequence, method_named
from probe.causes import INTERVENTIONS, Causes, causal_test
from probe.checkpoints import fingerprint
from probe.errors import ProbeError, check_count
from probe.escaping import PlainConsole
from probe.models import Model
from probe.recipe import Comparison
from probe.report import build_report, causal_from, keep_report
from probe.run._choosing import measured_on, read_sides
from probe.run._finished import check_unchanged, recorded
from probe.run._session import Run, recipe_host, running, said_on
from probe.stats import CausalTest
from probe.store import SCHEMA, Damaged, RunFolder, causal_file, edges_key, locked, run_path
from probe.vocabulary import Granularity


@dataclass(frozen=True)
class Options:
    """What is asked of the causal test."""

    measure: str
    """The method whose shares of |score| say how strong an edge is."""

    granularity: Granularity | None
    """That of the edges; None for heads, where an attention is a sum of them."""

    edges: int
    """How many edges make a set."""

    sets: int
    """How many matched sets stand beside each."""

    questions: int | None
    """How many questions are used at most, both halves together."""

    seed: int
    """Seed of everything."""


def causal(
    run: str | Path,
    *,
    measure: str = "eap",
    granularity: Granularity | None = None,
    edges: int = 10,
    sets: int = 500,
    questions: int | None = None,
    seed: int = 42,
    remote: str | None = None,
    console: Console | None = None,
) -> dict[str, CausalTest]:
    """Test whether the edges that each training of a run strengthened do more than others.

    Both models of a pair read the right answers of the model after, at the largest alpha. A test
    that was stopped goes on from there. See `probe.causes.causal_test`.

    Args:
        run: A run folder with solutions and selections.
        measure: The method whose shares of |score| say how strong an edge is; a name in
            `probe.attribution.METHODS`.
        granularity: That of the edges; `head` if not given, or the recipe's where an attention is
            no sum of its heads.
        edges: How many of the most strengthened and of the most weakened edges make a set.
        sets: How many random sets stand beside each.
        questions: How many questions are used, both halves together, at most.
        seed: Seed of the halves, draws and exchanges.
        remote: The server that runs it; as the recipe has it, where not given.
        console: Where progress goes; standard error if not given.

    Returns:
        The test of each pair on each benchmark, by its name in the run folder.

    Raises:
        ProbeError: No run folder, a run that has not got so far, an unknown method, a model that
            has changed since the run.
    """
    method_named(measure)
    counts = {"edges": edges, "sets": sets, "questions": 4 if questions is None else questions}
    for what, value in counts.items():
        check_count(what, value)
    options = Options(measure, granularity, edges, sets, questions, seed)
    folder = RunFolder(run_path(run))
    recipe, record = recorded(folder, remote)
    check_unchanged(folder, recipe, record)
    console = console or PlainConsole(stderr=True)
    texts = {
        side.comparison: side.sequences
        for side in read_sides(recipe, folder)
        if side.side == "after"
    }
    host = recipe_host(recipe, console)
    found: dict[str, CausalTest] = {}
    with locked(folder, said_on(console)) as held:
        held.open()
        with running(recipe, held, record, host, console) as session:
            for comparison in measured_on(recipe):
                name = f"{comparison.pair.name}.{comparison.benchmark}"
                if comparison.name not in texts:
                    session.say(f"{name}: left out, as no question of it was chosen")
                    continue
                found[name] = _test(session, comparison, texts[comparison.name], options)
                gc.collect()
        keep_report(held, record, build_report(held.path))
    return found


def _test(
    run: Run, comparison: Comparison, sequences: Sequence[TokenSequence], options: Options
) -> CausalTest:
    """Test one pair on one benchmark, or go on with it."""
    recipe, folder, pair = run.recipe, run.folder, comparison.pair
    file = causal_file(pair, comparison.benchmark)
    sequences = sequences[: options.questions]
    clusters = folder.read_clusters(comparison.benchmark)
    settings = (
        *("causal", *map(str, asdict(options).values()), *map(str, INTERVENTIONS.items())),
        *(recipe.attribution.ablation, str(recipe.attribution.ig_steps), recipe.compute.dtype),
        *(clusters.get(sequence.id, "") for sequence in sequences),
    )
    weights = " ".join(map(fingerprint, (pair.before, pair.after)))
    parts = _Parts(folder, file, edges_key(weights, settings, sequences))
    known = parts.finished(run)
    if known is not None:
        return known
    before = run.load(pair.before, run.devices[0])
    after = run.load(pair.after, run.devices[-1])
    granularity = options.granularity or _finest(run, after)
    bar = run.bar(f"causal {pair.name}", 0)

    def advance(count: int, total: int) -> None:
        bar.resize(total)
        bar.advance(count)

    try:
        causes = causal_test(
            before,
            after,
            sequences,
            measure=options.measure,
            granularity=granularity,
            edges=options.edges,
            sets=options.sets,
            ablation=recipe.attribution.ablation,
            ig_steps=recipe.attribution.ig_steps,
            clusters=clusters,
            seed=options.seed,
            kept=parts,
            progress=advance,
        )
    except ProbeError as error:
        raise ProbeError(f"{comparison.name}: {error}") from error
    header = {
        **{"schema": SCHEMA, "key": parts.key, "cell": comparison.name},
        **{"before": pair.before, "after": pair.after},
        **asdict(options),
        **{"granularity": granularity, "ablation": recipe.attribution.ablation},
    }
    folder.write_json(file, header | _table(causes))
    parts.remove()
    return causes.test


def _finest(run: Run, model: Model) -> Granularity:
    """Heads, where an attention is a sum of them; else what the run has, and that is said."""
    try:
        model.graph("head")
    except ProbeError as error:
        found = run.recipe.attribution.granularity
        run.say(f"edges are of {found}, not of heads: {error}")
        return found
    return "head"


def _table(causes: Causes) -> dict[str, object]:
    """A test as its file has it, with every edge."""
    graph = causes.graph
    damages = {name: values.tolist() for name, values in causes.damages.items()}
    edges = [
        {
            "source": graph.sources[source],
            "target": graph.targets[target],
            "level": float(causes.levels[place]),
            "strengthening": float(causes.strengthening[place]),
            "damage": {
                name: None if values[place] != values[place] else values[place]
                for name, values in damages.items()
            },
        }
        for place, (source, target) in enumerate(graph.mask.nonzero().tolist())
    ]
    return {
        "ranked_on": causes.ranked_on,
        "measured_on": causes.measured_on,
        "loss": causes.loss,
        "right": causes.right,
        **asdict(causes.test),
        "treated": causes.treated,
        "every_edge": edges,
    }


@dataclass(frozen=True)
class _Parts:
    """What a test has measured so far, beside where its file will be."""

    folder: RunFolder
    """The run."""

    file: str
    """The test's file."""

    key: str
    """What it is computed from."""

    def finished(self, run: Run) -> CausalTest | None:
        """The test, if it is there already."""
        try:
            table = self.folder.read_json(self.file)
            if table is None or table.get("key") != self.key:
                return None
            return causal_from(table)
        except Damaged as damage:
            run.say(f"{self.folder.path / self.file}: {damage}; computing it again")
            return None

    def read(self, name: str) -> torch.Tensor | None:
        """A measurement from before."""
        try:
            table = self.folder.read_json(self._part(name)) or {}
        except Damaged:  # a kill tears none, but others may
            return None
        if table.get("key") != self.key:
            return None
        return torch.tensor(table["values"], dtype=torch.float64)

    def write(self, name: str, values: torch.Tensor) -> None:
        """Keep a measurement."""
        self.folder.write_json(self._part(name), {"key": self.key, "values": values.tolist()})

    def remove(self) -> None:
        """Throw all of them away."""
        stem = glob.escape(self.file.removesuffix(".json"))
        for path in self.folder.path.glob(f"{stem}.part-*.json"):
            self.folder.remove(path)

    def _part(self, name: str) -> str:
        return f"{self.file.removesuffix('.json')}.part-{name.replace(' ', '-')}.json"
