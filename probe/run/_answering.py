"""Answers from servers: which model answers there, and whether it is the one that is scored.

How a server's model begins its answers to three prompts is kept in the run folder, and a run that
goes on asks that again. Attribution compares the model here with this and with some more of the
answers: models of one family begin answers to easy questions alike.

    >>> served = find_served(setup, asked, name, questions, on_event)
    >>> check_served(setup, model, on_event)
"""

from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

from probe.attribution import TokenSequence, mean_losses
from probe.models import Model, read_files
from probe.problems import Problem
from probe.recipe import Asked
from probe.remote import open_completions
from probe.run._parallel import Event, OnEvent
from probe.run._session import Setup
from probe.solutions import BEGINNING, Beginning, Served, find
from probe.store import Damaged, RunFolder, model_names

COLD = 1e-3
"""At this temperature a loss is by how much the likeliest token's logit is the larger one."""

GAP = 0.5
"""So many nats less likely may the beginning of an answer be than what the model here prefers,
token by token: rounding decides between tokens that are nearly alike."""

COMPARED = 32
"""How many answers are compared."""


def find_served(
    setup: Setup, asked: Asked, name: str, questions: Sequence[Problem], on_event: OnEvent
) -> Served:
    """Find a model on its server, and keep how it answers there.

    Args:
        setup: Recipe and run folder.
        asked: The model, and how it is asked.
        name: Its name in files.
        questions: What it is asked.
        on_event: Is told who answers, and where another model does than before.

    Raises:
        ProbeError: It is not there, or takes no request.
    """
    assert asked.server is not None
    others = {one.model for one in model_names(setup.recipe) if one.server == asked.server}
    served = find(
        open_completions(
            asked.server, setup.recipe.compute.timeout, lambda line: on_event(Event(text=line))
        ),
        read_files(asked.model),
        questions,
        asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        stop=asked.stop,
        seed=setup.recipe.solutions.seed,
        shared=len(others) > 1,
    )
    on_event(Event(text=served.account))
    known = {each.prompt: each for each in _kept(setup.folder, name)}
    if any(known.get(each.prompt, each) != each for each in served.beginnings):
        on_event(
            Event(
                text=f"{asked.server} answers for {name} otherwise than when this run began: "
                "it may have another model now; start over with --fresh if it has"
            )
        )
    known |= {each.prompt: each for each in served.beginnings}
    beginnings = [{"prompt": [*each.prompt], "answer": [*each.answer]} for each in known.values()]
    setup.folder.write_json(_file(name), served.table | {"beginnings": beginnings})
    return served


def check_served(setup: Setup, model: Model, on_event: OnEvent) -> None:
    """Say where a server answered for a model in another way than that model would here.

    Args:
        setup: Recipe and run folder.
        model: The model that is scored.
        on_event: Is told.
    """
    for asked, name in model_names(setup.recipe).items():
        kept = [each for each in _kept(setup.folder, name) if each.answer]
        if asked.model != model.reference or not kept:
            continue
        found = [*kept, *_some(setup, name)]
        gaps = beginning_gaps(model, found)
        if max(gaps) > GAP:
            worst, others = max(gaps), sum(gap > GAP for gap in gaps)
            on_event(
                Event(
                    text=f"{name}: a server wrote these answers, and {others} of {len(gaps)} "
                    f"begin otherwise than {model.reference} would begin here (by "
                    f"{worst:.1f} nats): it may be another model, or of another precision; "
                    f"{setup.folder.path / _file(name)} has its name there"
                )
            )


def beginning_gaps(model: Model, beginnings: Sequence[Beginning]) -> list[float]:
    """How much less likely beginnings are than what a model prefers, token by token.

    Args:
        model: The model.
        beginnings: Prompts, and how answers to them begin.

    Returns:
        For each the sum over its tokens of the largest log probability minus the token's, in nats;
        0 where each token is the model's own greedy choice.
    """
    sequences = [TokenSequence(each.prompt, each.answer) for each in beginnings]
    losses = mean_losses(model, sequences, [COLD], batch_size=1)[0] * COLD
    return [float(loss) * len(e.answer) for loss, e in zip(losses, beginnings, strict=True)]


def _some(setup: Setup, name: str) -> list[Beginning]:
    """How some of the answers in the folder begin, from all over the benchmarks."""
    benchmarks = [choice.name for choice in setup.recipe.benchmarks]
    files = [setup.folder.solutions_file(name, benchmark) for benchmark in benchmarks]
    found = [s for file in files for s in setup.folder.read_solutions(file)[0] if len(s.answer)]
    some = found[:: -(-len(found) // COMPARED) or 1]
    return [Beginning(tuple(s.prompt), tuple(s.answer[:BEGINNING])) for s in some]


def _kept(folder: RunFolder, name: str) -> list[Beginning]:
    """How answers began that a server wrote for a model; empty where nobody knows."""
    try:
        table: Mapping[str, object] = folder.read_json(_file(name)) or {}
        pairs = TypeAdapter(list[dict[str, list[int]]]).validate_python(table.get("beginnings", []))
        return [Beginning(tuple(each["prompt"]), tuple(each["answer"])) for each in pairs]
    except (Damaged, ValidationError, KeyError):
        return []


def _file(name: str) -> str:
    return f"solutions/{name}.server.json"
