"""The command line: it parses, calls one function each, and prints.

`probe recipe tiny-math` is `probe.run_recipe("tiny-math")` and `probe.report.print_report`. Nothing
heavy is imported before a command needs it, so that `--help` answers at once.
"""

import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from probe.errors import ProbeError

if TYPE_CHECKING:
    from pathlib import Path

    from probe.recipe import Recipe
    from probe.vocabulary import Grading


_OF_THE_MACHINE = {
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EFBIG),
}


class Group(click.Group):
    """A group of commands that ends on errors as this project does."""

    def invoke(self, context: click.Context) -> object:
        """Run a command; a user's mistake is one line and exit code 2, Ctrl-C is 130."""
        try:
            return super().invoke(context)
        except (ProbeError, OSError) as error:
            said = str(error)
            if isinstance(error, OSError):
                # The machine's, not a bug of ours: a full disk, a name that is too long.
                if error.errno not in _OF_THE_MACHINE:
                    raise
                said = f"{error.filename}: " * bool(error.filename) + str(error.strerror)
            click.echo(f"probe: {_plain(said)}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("probe: stopped; the same command goes on from here", err=True)
            sys.stderr.flush()
            # Threads of libraries may still be busy; what is written is whole, so leave at once.
            os._exit(128 + signal.SIGINT)


def _recipe_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What a shell offers for a recipe: names, and files where none fits."""
    del context, parameter
    from probe.recipe import recipe_files

    return _or_files(recipe_files(), incomplete)


def _references(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What a shell offers for a model: those of the shipped recipes, and files where none fits."""
    del context, parameter
    from probe.recipe import shipped_models

    return _or_files(shipped_models(), incomplete)


def _or_files(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Those names that begin so, and files where none does."""
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def _completing(
    table: str, name: str
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What a shell offers where one name of a table is asked, or several with commas between.

    Args:
        table: The package that holds the table, imported only when a shell asks.
        name: The table's name there.
    """

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del context, parameter
        before, comma, last = incomplete.rpartition(",")
        known = getattr(import_module(table), name)
        fitting = [each for each in known if each.startswith(last)]
        items = [CompletionItem(before + comma + each) for each in fitting]
        return items or [CompletionItem(incomplete, type="file")]

    return complete


_benchmark_names = _completing("probe.problems", "BENCHMARKS")
_control_names = _completing("probe.stats", "CONTROLS")
_method_names = _completing("probe.attribution", "METHODS")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="circuit-probe", prog_name="probe")
def main() -> None:
    """What post-training did to the inside of a language model.

    \b
    Example:
      probe recipe tiny-math
    """
    # Libraries below have bars and notices of their own, which would tear ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where in the code a warning comes from is of no use to who types commands.
    warnings.formatwarning = lambda message, *_, **__: f"{_plain(str(message))}\n"


def _plain(text: str) -> str:
    from probe.escaping import one_line

    return one_line(text)


remote_option = click.option(
    "--remote",
    is_flag=False,
    flag_value="ndif",
    metavar="[URL]",
    help="Run the models on an NDIF server: the hosted one, or http://host:port.",
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that runs a recipe."""
    options = (
        click.option("--output", type=click.Path(), help="Run folder [default: runs/NAME]."),
        click.option("--limit", type=click.IntRange(1), help="Ask only N questions of each."),
        click.option(
            "--benchmark-path",
            "paths",
            multiple=True,
            metavar="[NAME=]PATH",
            help="A local file or folder with a benchmark's problems.",
        ),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key."),
        click.option(
            "--solutions", metavar="before=FILE,after=FILE", help="Solutions made elsewhere."
        ),
        click.option(
            "--answers",
            metavar="URL|before=URL,after=URL",
            help="Let servers with OpenAI's API write them.",
        ),
        click.option("--method", help="eap, eap-ig, relp or exact.", shell_complete=_method_names),
        click.option(
            "--control",
            multiple=True,
            shell_complete=_control_names,
            callback=lambda _context, _option, names: ",".join(names) or None,
            help="sharpness, loss-matched, margin, cross-text, random-text; or none.",
        ),
        click.option("--device", help="auto, cpu, cuda, or several: cuda:0,cuda:1."),
        click.option("--dtype", help="float32, bfloat16, float16 or float64."),
        click.option("--kernels", help="auto, eager, or liger: fused kernels on a GPU."),
        remote_option,
        click.option(
            "--cluster", metavar="WHERE", help="A Ray cluster: auto, local or ray://host:port."
        ),
        click.option("--jobs", type=click.IntRange(1), help="Batches under way there at once."),
        click.option("--fresh", is_flag=True, help="Start over instead of going on."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
    )
    for option in reversed(options):
        command = option(command)
    return command


KEYS = {
    "answers": "solutions.server",
    "limit": "solutions.questions",
    "method": "attribution.method",
    "control": "attribution.control",
    "device": "compute.device",
    "dtype": "compute.dtype",
    "kernels": "compute.kernels",
    "cluster": "compute.cluster",
    "remote": "compute.remote",
    "jobs": "compute.jobs",
}
"""The options that stand for one key of the recipe."""


def _overrides(
    settings: tuple[str, ...], solutions: str | None, keys: dict[str, str | int | None]
) -> dict[str, str | int | float]:
    overrides: dict[str, str | int | float] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ProbeError(f"--set {setting}: write KEY=VALUE, as in selection.samples=50")
        overrides[key.strip()] = value.strip()
    answers = keys.get("answers")
    if isinstance(answers, str) and re.match("(before|after)=", answers):
        overrides |= solution_files("--answers", answers)
        keys = {**keys, "answers": None}
    overrides |= {KEYS[name]: given for name, given in keys.items() if given is not None}
    if solutions is not None:
        overrides |= solution_files("--solutions", solutions)
    return overrides


def _run(chosen: "Recipe", output: "str | Path | None", fresh: bool, dry_run: bool) -> None:
    if dry_run:
        from pathlib import Path

        from probe.escaping import PlainConsole
        from probe.run import check_here, check_output, make_plan, plan_view, time_line

        check_here(chosen)
        check_output(chosen, Path(output or f"runs/{chosen.name}"), fresh)
        plan = make_plan(chosen)
        PlainConsole().print(plan_view(plan))
        line = time_line(plan)
        if line:
            PlainConsole().print(line)
        return
    from probe.report import print_report
    from probe.run import run_recipe

    print_report(run_recipe(chosen, output, fresh=fresh))


def solution_files(option: str, text: str) -> dict[str, str | int | float]:
    """The keys that `before=FILE,after=FILE` of an option sets; one side alone will do."""
    overrides: dict[str, str | int | float] = {}
    for part in re.split(r",(?=(?:before|after)=)", text):
        side, equals, file = part.partition("=")
        if side not in ("before", "after") or not equals or not file:
            what = "URL" if option == "--answers" else "FILE"
            raise ProbeError(f"{option} {text}: write before={what},after={what}, or one of them")
        overrides[f"pairs.0.solutions.{side}"] = file
    return overrides


@main.command()
@click.argument("name", metavar="NAME|PATH.toml", shell_complete=_recipe_names)
@run_options
def recipe(
    name: str,
    output: str | None,
    paths: tuple[str, ...],
    settings: tuple[str, ...],
    solutions: str | None,
    fresh: bool,
    dry_run: bool,
    **keys: str | int | None,
) -> None:
    """Run a recipe, or go on with a run that was stopped.

    \b
    Examples:
      probe recipe tiny-math
      probe recipe tiny-math --limit 200 --set selection.samples=50
      probe recipe mistral-math --set pairs.0.before=my-folder --benchmark-path gsm8k=test.jsonl
    """
    from probe.recipe import place_benchmarks, read_recipe

    overrides = _overrides(settings, solutions, keys)
    chosen = place_benchmarks(read_recipe(name, overrides), paths)
    answers = keys.get("answers")
    for option, given in (("--solutions", solutions), ("--answers before=...", answers)):
        whole = given is answers and "solutions.server" in overrides
        if given is not None and not whole and len(chosen.pairs) > 1:
            raise ProbeError(
                f"{option} is for one pair, and {chosen.name} has {len(chosen.pairs)}; "
                "use --set pairs.0.solutions.before=..."
            )
    _run(chosen, output, fresh, dry_run)


@main.command()
@click.argument("before", shell_complete=_references)
@click.argument("after", shell_complete=_references)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="NAME|PATH",
    shell_complete=_benchmark_names,
    help="A benchmark, or a file of one's own; may be repeated [default: gsm8k].",
)
@click.option(
    "--grading",
    type=click.Choice(["math", "exact"]),
    help="How answers are compared; a file of one's own needs it.",
)
@click.option("--alpha", type=float, multiple=True, help="Likewise [default: 0.03, 0.1, 0.3, 0.5].")
@click.option(
    "--prompt",
    metavar="TEXT|chat",
    help="Text with {question} in it (\\n breaks the line), or the tokenizer's chat template "
    "[default: chat, or {question} where there is no template].",
)
@click.option("--save-recipe", type=click.Path(), help="Write the recipe that this is to a file.")
@run_options
def compare(
    before: str,
    after: str,
    benchmarks: tuple[str, ...],
    grading: "Grading | None",
    alpha: tuple[float, ...],
    prompt: str | None,
    save_recipe: str | None,
    output: str | None,
    paths: tuple[str, ...],
    settings: tuple[str, ...],
    solutions: str | None,
    fresh: bool,
    dry_run: bool,
    **keys: str | int | None,
) -> None:
    """Compare two models, without writing a recipe.

    BEFORE and AFTER, of one architecture, are folders or hub ids; a PEFT adapter stands for its
    base with the adapter.

    \b
    Examples:
      probe compare Qwen/Qwen2.5-0.5B-Instruct ./my-grpo-checkpoint --benchmark gsm8k --limit 200
      probe compare ./base ./adapter --benchmark questions.jsonl --grading exact
      probe compare ./base ./adapter --prompt "Q: {question} A:" --save-recipe mine.toml
    """
    from pathlib import Path

    from probe.recipe import write_recipe
    from probe.run import compare_recipe, default_folder

    chosen = compare_recipe(
        before,
        after,
        benchmarks,
        alpha=alpha,
        # A shell has no easy way to write a line break.
        prompt=prompt and prompt.replace("\\n", "\n"),
        grading=grading,
        benchmark_paths=paths,
        overrides=_overrides(settings, solutions, keys),
        download=not dry_run,
        say=lambda line: click.echo(_plain(line), err=True),
    )
    if save_recipe:
        write_recipe(chosen, Path(save_recipe))
    _run(chosen, output or default_folder(chosen), fresh, dry_run)


@main.command()
@click.argument("folder", type=click.Path(), metavar="FOLDER")
@click.argument("name", metavar="NAME|PATH.toml", shell_complete=_recipe_names)
@click.option("--output", type=click.Path(), help="Run folder [default: FOLDER/probe].")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key.")
def watch(folder: str, name: str, output: str | None, settings: tuple[str, ...]) -> None:
    """Score each checkpoint of a training run as it is written.

    FOLDER is the trainer's, with folders checkpoint-N, or FOLDER#PATTERN. Each is compared with the
    model before of the recipe, in one run folder, and is a line when it is done. This ends behind
    the last step of the training, where the trainer writes which one that is, or with Ctrl-C; the
    same command goes on.

    \b
    Examples:
      probe watch runs/grpo mine.toml --set solutions.questions=200
      probe watch "runs/verl#global_step_*/actor/huggingface" mine.toml
    """
    from probe.run import watch as scored_ones

    for scored in scored_ones(folder, name, output, overrides=_overrides(settings, None, {})):
        click.echo(_plain(scored.line))


@main.command()
def recipes() -> None:
    """List the recipes that ship, and what each would download.

    \b
    Example:
      probe recipes
    """
    from probe.escaping import PlainConsole
    from probe.recipe import read_recipe, recipe_files
    from probe.run import make_plan, recipes_view

    plans = [make_plan(read_recipe(name)) for name in recipe_files()]
    PlainConsole().print(recipes_view(plans))


@main.command()
@click.argument("run", metavar="RUN|RECIPE", shell_complete=_recipe_names)
@click.option("--edges", type=click.IntRange(1), help="Exact effects per model [default: 400].")
@click.option(
    "--methods",
    help="What is compared [default: eap,eap-ig,relp].",
    shell_complete=_method_names,
)
@click.option("--sequences", type=click.IntRange(1), help="Sequences per model [default: 8].")
@click.option("--seed", type=click.IntRange(0), help="Seed of the draw [default: 42].")
@click.option("--device", help="auto, cpu, cuda, or several: cuda:0,cuda:1.")
@remote_option
def faithfulness(
    run: str,
    edges: int | None,
    methods: str | None,
    sequences: int | None,
    seed: int | None,
    device: str | None,
    remote: str | None,
) -> None:
    """Compare fast scores with the exact effects of some edges.

    Values and pictures go to RUN/faithfulness, and a measurement that was stopped goes on from
    there. A recipe is run first; its section `faithfulness` sets other defaults than those below.

    \b
    Examples:
      probe faithfulness runs/tiny-math
      probe faithfulness runs/tiny-math --edges 1000 --methods eap,relp
    """
    from probe.report import print_faithfulness
    from probe.run import run_faithfulness

    names = methods and [name.strip() for name in methods.split(",")]
    found = run_faithfulness(
        run,
        edges=edges,
        methods=names or None,
        sequences=sequences,
        seed=seed,
        device=device,
        remote=remote,
    )
    print_faithfulness(found)


@main.command()
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option(
    "--methods",
    help="What ranks the edges [default: eap,eap-ig,relp,exact].",
    shell_complete=_method_names,
)
@click.option("--greedy", is_flag=True, help="Let circuits grow from the logits back.")
@click.option(
    "--questions", type=click.IntRange(4), default=100, help="Questions per model [default: 100]."
)
@remote_option
def circuit(
    run: str, methods: str | None, greedy: bool, questions: int, remote: str | None
) -> None:
    """Measure how much of each model its strongest edges do alone.

    Edges are ranked on half of the questions; on the other half circuits of growing size are kept
    and all other edges removed, beside random circuits. Values and pictures go to RUN/circuits.

    \b
    Example:
      probe circuit runs/tiny-math --methods eap,relp
    """
    from probe.escaping import PlainConsole
    from probe.report import curves_table
    from probe.run import run_circuits

    names = methods and [name.strip() for name in methods.split(",")]
    found = run_circuits(
        run, methods=names or None, greedy=greedy, questions=questions, remote=remote
    )
    PlainConsole().print(curves_table(found))


@main.command()
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option(
    "--measure", default="eap", help="Whose shares of |score| rank the edges [default: eap]."
)
@click.option("--edges", type=click.IntRange(1), default=10, help="Edges of a set [default: 10].")
@click.option(
    "--sets", type=click.IntRange(1), default=500, help="Matched sets beside it [default: 500]."
)
@click.option("--questions", type=click.IntRange(4), help="Questions per pair [default: all].")
@remote_option
def causal(
    run: str, measure: str, edges: int, sets: int, questions: int | None, remote: str | None
) -> None:
    """Test if edges that training changed do more than others.

    On half of a pair's questions edges are ranked by how much training strengthened them; on the
    other half they are scaled, removed, and given what the model before writes, beside random sets
    of edges like them. Everything goes to RUN/causal, and a test that was stopped goes on from
    there.

    \b
    Example:
      probe causal runs/tiny-math --edges 20
    """
    from probe.report import print_causal
    from probe.run import causal as test

    test(run, measure=measure, edges=edges, sets=sets, questions=questions, remote=remote)
    print_causal(run)


@main.command()
@click.argument("before", metavar="MODEL", shell_complete=_references)
@click.argument("after", metavar="[MODEL]", required=False, shell_complete=_references)
def doctor(before: str, after: str | None) -> None:
    """Say what one or two models are, and what a run refuses.

    Each is a folder or a hub id. All of its files are looked through, its numbers too. The exit
    code is 2 where a run would refuse a model or the pair.

    \b
    Examples:
      probe doctor ./my-grpo-checkpoint
      probe doctor Qwen/Qwen2.5-0.5B-Instruct ./my-grpo-checkpoint
    """
    from probe.escaping import PlainConsole
    from probe.models import diagnosis_lines
    from probe.models import doctor as examine

    found = examine(before, after)
    for line in diagnosis_lines(found):
        PlainConsole().print(line, soft_wrap=True)
    if not found.sound:
        sys.exit(2)


@main.command()
@click.argument("model", shell_complete=_references)
def check(model: str) -> None:
    """Say whether a model's architecture is understood.

    MODEL is a folder or a hub id. It is run on a few tokens, at every granularity and with every
    method, and edges are held against finite differences. A folder without weights is enough: its
    config is then built small, with random weights. If the architecture has no row, those of the
    table are tried, and one that fits is printed. The exit code is 2 where nothing can be done.

    \b
    Examples:
      probe check ./my-checkpoint
      probe check ./folder-with-a-config
    """
    from probe.attribution import check as examine
    from probe.attribution import check_lines
    from probe.escaping import PlainConsole

    found = examine(model)
    for line in check_lines(found):
        PlainConsole().print(line, soft_wrap=True)
    if not found.sound:
        sys.exit(2)


@main.command()
@click.argument("server", metavar="[URL]", default="ndif")
def ndif(server: str) -> None:
    """Say whether an NDIF server can be used.

    It says also what could run there. Without an address it is the hosted NDIF. The key is read
    from NDIF_API_KEY and not shown.

    \b
    Examples:
      probe ndif
      probe ndif http://localhost:8001
    """
    from probe.escaping import PlainConsole
    from probe.hosting import open_host, server_view

    for part in server_view(open_host(server)):
        PlainConsole().print(part)


@main.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown", "latex", "html", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
@click.option("--output", type=click.Path(), help="Write it to a file instead.")
def report(runs: tuple[str, ...], style: str, output: str | None) -> None:
    """Print the report of a run; of several, side by side.

    RUN is a run folder, or a file in it. A run need not be finished; what is missing is named.

    \b
    Examples:
      probe report runs/tiny-math
      probe report runs/tiny-math --format html --output report.html
      probe report runs/fast runs/exact
    """
    from pathlib import Path

    from probe.report import print_report, read_report, write_report

    reports = [read_report(run) for run in runs]
    if output is None:
        print_report(reports, style)
    else:
        write_report(reports, style, Path(output))


@main.command()
@click.argument("run", type=click.Path(), metavar="RUN")
@click.argument("ids", nargs=-1, metavar="[QUESTION...]")
def problems(run: str, ids: tuple[str, ...]) -> None:
    """List a run's questions by who solves them, or show some.

    Those that only one of the two models solves come first. Of a question that is named, both
    answers are shown with what differs, and the edges that changed most.

    \b
    Examples:
      probe problems runs/tiny-math
      probe problems runs/tiny-math 17 190
    """
    from probe.escaping import PlainConsole
    from probe.report import open_run, problem_list, problem_view

    found = open_run(run).compared
    console = PlainConsole(width=None if sys.stdout.isatty() else 100)
    console.print(problem_view(found, ids) if ids else problem_list(found))


@main.command()
@click.argument("run", type=click.Path(), metavar="RUN")
@click.argument("file", type=click.Path(), metavar="FILE")
def export(run: str, file: str) -> None:
    """Write a run's edges for other tools.

    FILE's suffix is the format: .parquet has both models' score of every edge and question, for
    pandas and polars; .dot the edges that changed most, for Graphviz. Without a suffix it is a
    folder, for the viewers of circuit-tracer and Neuronpedia.

    \b
    Examples:
      probe export runs/tiny-math edges.parquet
      probe export runs/tiny-math edges.dot
      probe export runs/tiny-math graphs
    """
    from pathlib import Path

    from probe.report import export_run

    export_run(run, Path(file))


@main.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN...")
@click.option("--output", type=click.Path(), help="Folder for them [default: RUN/figures].")
def plot(runs: tuple[str, ...], output: str | None) -> None:
    """Draw the figures of a run as PNG and PDF.

    Of several runs, one picture holds all.

    \b
    Examples:
      probe plot runs/tiny-math
      probe plot runs/mistral-math runs/deepseek-math --output figures
    """
    from pathlib import Path

    from probe.escaping import PlainConsole
    from probe.report import read_report, write_figures
    from probe.run import progress_bar
    from probe.store import RunFolder

    if output is None and len(runs) > 1:
        raise ProbeError("figures of several runs need a place: give --output FOLDER")
    reports = [read_report(run) for run in runs]
    folder = Path(output) if output else RunFolder(reports[0].path).figures()
    with progress_bar(PlainConsole(stderr=True)) as progress:
        files = write_figures(reports, folder, progress)
    PlainConsole().print(f"{len(files)} files in {folder}", soft_wrap=True)


@main.command()
@click.argument("folder", type=click.Path(), default="runs", metavar="[RUN|FOLDER]")
def view(folder: str) -> None:
    """Show runs in the browser, and follow those that go on.

    The page is on this machine alone, at the address that is printed, until Ctrl-C.

    \b
    Examples:
      probe view
      probe view runs/tiny-math
    """
    from pathlib import Path

    from probe.report import Viewer

    with Viewer(Path(folder)) as viewer:
        click.echo(f"{viewer.address}\nCtrl-C ends it")
        try:
            viewer.serve_forever()
        except KeyboardInterrupt:
            click.echo("")


if __name__ == "__main__":
    main()
