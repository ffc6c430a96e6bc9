"""The command line: it parses, calls one function each, and prints.

`probe recipe tiny-math` is `probe.run_recipe("tiny-math")` and `probe.report.print_report`. Nothing
heavy is imported before a command needs it, so that `--help` answers at once.
"""

import os
import signal
import sys

import click

from probe.errors import ProbeError


class Group(click.Group):
    """A group of commands that ends on errors as this project does."""

    def invoke(self, context: click.Context) -> object:
        """Run a command; a user's mistake is one line and exit code 2, Ctrl-C is 130."""
        try:
            return super().invoke(context)
        except ProbeError as error:
            click.echo(f"probe: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("probe: stopped; the same command goes on from here", err=True)
            sys.stderr.flush()
            # Threads of libraries may still be busy; what is written is whole, so leave at once.
            os._exit(128 + signal.SIGINT)


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


remote_option = click.option(
    "--remote",
    is_flag=False,
    flag_value="ndif",
    metavar="[URL]",
    help="Run the models on an NDIF server: the hosted one, or http://host:port.",
)


@main.command()
@click.argument("name", metavar="NAME|PATH.toml")
@click.option("--output", type=click.Path(), help="Run folder [default: runs/NAME].")
@click.option("--limit", type=click.IntRange(1), help="Ask only N questions of each benchmark.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key.")
@click.option("--method", help="eap, eap-ig, relp or exact.")
@click.option("--device", help="auto, cpu, cuda, or several: cuda:0,cuda:1.")
@click.option("--dtype", help="float32, bfloat16, float16 or float64.")
@remote_option
@click.option("--jobs", type=click.IntRange(1), help="Batches under way there at once.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def recipe(
    name: str,
    output: str | None,
    limit: int | None,
    settings: tuple[str, ...],
    method: str | None,
    device: str | None,
    dtype: str | None,
    remote: str | None,
    jobs: int | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Run a recipe, or go on with a run that was stopped.

    \b
    Examples:
      probe recipe tiny-math
      probe recipe tiny-math --limit 200 --set selection.samples=50
      probe recipe my-recipe.toml --set pairs.0.before=my-folder --output runs/mine
      probe recipe tiny-math --remote http://localhost:8001
    """
    overrides: dict[str, str | int | float] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ProbeError(f"--set {setting}: write KEY=VALUE, as in selection.samples=50")
        overrides[key.strip()] = value.strip()
    for key, given in (
        ("solutions.questions", limit),
        ("attribution.method", method),
        ("compute.device", device),
        ("compute.dtype", dtype),
        ("compute.remote", remote),
        ("compute.jobs", jobs),
    ):
        if given is not None:
            overrides[key] = given

    from probe.recipe import read_recipe

    chosen = read_recipe(name, overrides)
    if dry_run:
        from rich.console import Console

        from probe.plan import make_plan, plan_view

        Console(highlight=False).print(plan_view(make_plan(chosen)))
        return
    from probe.rendering import print_report
    from probe.run import run_recipe

    print_report(run_recipe(chosen, output, fresh=fresh))


@main.command()
def recipes() -> None:
    """List the recipes that ship with probe, and what each must download.

    \b
    Example:
      probe recipes
    """
    from rich.console import Console

    from probe.plan import make_plan, recipes_view
    from probe.recipe import read_recipe, recipe_files

    plans = [make_plan(read_recipe(name)) for name in recipe_files()]
    Console(highlight=False).print(recipes_view(plans))


@main.command()
@click.argument("run", metavar="RUN|RECIPE")
@click.option("--edges", type=click.IntRange(1), help="Exact effects per model [default: 400].")
@click.option("--methods", help="What is compared [default: eap,eap-ig,relp].")
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
    """Compare the methods' scores with the exact effects of a sample of edges.

    Values and pictures go to RUN/faithfulness, and a measurement that was stopped goes on from
    there. A recipe is run first; its section `faithfulness` sets other defaults than those below.

    \b
    Examples:
      probe faithfulness runs/tiny-math
      probe faithfulness runs/tiny-math --edges 1000 --methods eap,relp
    """
    from probe.faithfulness import run_faithfulness
    from probe.rendering import print_faithfulness

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
@click.argument("server", metavar="[URL]", default="ndif")
def ndif(server: str) -> None:
    """Say whether an NDIF server can be used, and what could run there.

    Without an address it is the hosted NDIF. The key is read from NDIF_API_KEY and not shown.

    \b
    Examples:
      probe ndif
      probe ndif http://localhost:8001
    """
    from rich.console import Console

    from probe.hosting import server_view
    from probe.remote import open_host

    for part in server_view(open_host(server)):
        Console(highlight=False).print(part)


@main.command()
@click.argument("run", type=click.Path())
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
def report(run: str, style: str) -> None:
    """Print the report of a run again, finished or not.

    \b
    Examples:
      probe report runs/tiny-math
      probe report runs/tiny-math --format markdown > report.md
    """
    from pathlib import Path

    from probe.rendering import print_report
    from probe.report import build_report

    print_report(build_report(Path(run)), style)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
