"""Session: what every step of a run shares, and how it shows what it does.

A `Run` holds recipe, folder, server, devices, progress and record; each step is a function of it.
Work that may go to a process of its own gets a `Setup`, the part of it that is plain data.

    >>> with running(recipe, folder, record, host, console) as run:
    ...     attribute_all(run, sides)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from threading import Event as Flag
from threading import Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from probe.hosting import check_host, load_hosted, open_host
from probe.models import (
    Model,
    cpu_threads,
    load_model,
    read_config,
    resolve_devices,
    resolve_kernels,
)
from probe.recipe import Recipe
from probe.remote import Host
from probe.run._cluster import Cluster
from probe.run._kept_models import KeptModels
from probe.run._parallel import Event, Unit, Workers, devices_for, on_each
from probe.store import LOCK, RunFolder, timed
from probe.vocabulary import Kernels

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What a piece of work needs of a run: plain data, as long as no server is in it."""

    recipe: Recipe
    """What is run."""

    folder: RunFolder
    """Where everything is kept."""

    host: Host | None
    """The server that runs the models; None where they run here."""

    kept: KeptModels
    """The models that stay in this process."""

    def load(self, reference: str, device: str, kernels: Kernels = "eager") -> Model:
        """A model, on the server if there is one, or on a device here.

        Raises:
            ProbeError: See `load_model` and `load_hosted`.
        """
        options = self.recipe.compute
        if self.host is not None:
            return load_hosted(reference, self.host, options.dtype)
        # Phases that ask for these kernels by other names get one model.
        (first, *_), kind = resolve_devices(device), read_config(reference, whole=True).model_type
        kernels = resolve_kernels(kernels, first, kind)
        load = partial(load_model, reference, device, options.dtype, kernels, options.threads)
        return self.kept.get(reference, device, kernels, load)


@dataclass(frozen=True)
class Bar:
    """The bar of one phase."""

    progress: Progress
    """Where it is shown."""

    task: TaskID
    """Which one it is there."""

    def advance(self, count: int, speed: str = "") -> None:
        """Count what is done."""
        self.progress.update(self.task, advance=count, speed=speed)

    def resize(self, total: int) -> None:
        """Say how much there is to do, now that it is known better."""
        self.progress.update(self.task, total=total)


@dataclass(frozen=True)
class Run(Setup):
    """A run that is going on."""

    devices: Sequence[str]
    """Where models run, as `devices_for` gives them."""

    progress: Progress
    """Where it shows how far it is."""

    record: dict[str, object]
    """What run.json says; steps add to it."""

    cluster: Cluster | None = None
    """The cluster that does its units; None where its devices do."""

    workers: Workers | None = None
    """The processes of several devices; None where there is one, or a cluster."""

    @property
    def setup(self) -> Setup:
        """The part of it that work in another process gets."""
        folder = self.folder
        if self.cluster is not None:
            # On another machine a file system has another number: whoever does a unit there checks
            # the lock beforehand.
            folder = replace(folder, path=folder.path.absolute(), lock=None)
        return Setup(self.recipe, folder, self.host, self.kept)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time that is spent within to the record."""
        return timed(self.folder, self.record, name)

    def note(self, key: str, table: Mapping[str, object]) -> None:
        """Add entries to a table of the record."""
        old = self.record.get(key, {})
        assert isinstance(old, dict)
        self.record[key] = old | dict(table)

    def bar(self, name: str, total: int) -> Bar:
        """A bar for a phase."""
        return Bar(self.progress, self.progress.add_task(name, total=total))

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(line, soft_wrap=True)

    def on_each(self, units: Sequence[Unit[T]], name: str) -> list[T]:
        """Do all units on the devices, with a bar for their events; what they return, in order."""
        if self.cluster is not None:
            lock = self.folder.path.absolute() / LOCK
            return self.cluster.do(units, lock, self.progress, name)
        bar = self.bar(name, sum(unit.size for unit in units))

        def show(event: Event) -> None:
            if event.text:
                self.say(event.text)
            if event.advance:
                bar.advance(event.advance, event.speed)

        work = [unit.work for unit in units]
        if self.workers is not None and len(work) > 1:
            return self.workers.do(work, show)
        return on_each(work, self.devices[:1], show)


@contextmanager
def running(
    recipe: Recipe,
    folder: RunFolder,
    record: dict[str, object],
    host: Host | None,
    console: Console,
    cluster: Cluster | None = None,
) -> Iterator[Run]:
    """Make a run, and show its bars for as long as it goes on.

    What went to a server and came from it is in the record afterwards.

    Args:
        recipe: What is run.
        folder: An open run folder.
        record: Its record.
        host: The server that runs the models; None where they run here.
        console: Where progress goes.
        cluster: The cluster that does its units; None where they are done here.
    """
    devices = devices_for(recipe.models(), resolve_devices(recipe.compute.device_here))
    several = len(devices) > 1 and cluster is None
    with (
        progress_bar(console) as progress,
        cpu_threads(recipe.compute.threads),
        _jobs_shown(host, record, progress),
        Workers(devices) if several else nullcontext() as workers,
    ):
        yield Run(
            *(recipe, folder, host, KeptModels(), devices, progress, record, cluster, workers)
        )


def recipe_host(recipe: Recipe, console: Console) -> Host | None:
    """The server of a recipe, asked whether it can run it; None where it runs here.

    Raises:
        ProbeError: It cannot be reached, does not take the key, understands other versions only,
            or does not have a model of the recipe.
    """
    options = recipe.compute
    if not options.remote:
        return None
    say = said_on(console)
    host = open_host(options.remote, options.jobs, options.timeout, say)
    for line in check_host(host):
        say(line)
    for reference in recipe.models():
        load_hosted(reference, host, options.dtype)
    return host


def said_on(console: Console) -> Callable[[str], None]:
    """What prints a line to a console."""
    return partial(console.print, soft_wrap=True)


@contextmanager
def _jobs_shown(host: Host | None, record: dict[str, object], progress: Progress) -> Iterator[None]:
    """Show how many jobs are queued and running on a server, and record what went over the wire."""
    if host is None:
        yield
        return
    task = progress.add_task("jobs", total=None)

    def show(states: Mapping[str, int]) -> None:
        line = f"{states['queued']} queued, {states['running']} running"
        progress.update(task, description=line, completed=states["done"])

    try:
        with host.watched(show):
            yield
    finally:
        record["remote"] = host.table


class Speed(ProgressColumn):
    """What a task's `speed` says, where it says any."""

    def render(self, task: Task) -> Text:
        """Give the text."""
        return Text(task.fields.get("speed", ""))


class NotebookProgress(Progress):
    """Bars in a notebook: one output that is drawn anew. Those of rich need ipywidgets there."""

    def start(self) -> None:
        """Show them, and go on to."""
        from IPython.display import display

        self._shown, self._over = display(self, display_id=True), Flag()
        self._drawing = Thread(target=self._draw, daemon=True)
        self._drawing.start()

    def _draw(self) -> None:
        while not self._over.wait(0.25):
            self.refresh()

    def stop(self) -> None:
        """Show how it ended."""
        self._over.set()
        self._drawing.join()
        self.refresh()

    def refresh(self) -> None:
        """Draw them anew."""
        if shown := getattr(self, "_shown", None):
            shown.update(self)


def progress_bar(console: Console) -> Progress:
    """The bar that shows how far each phase is."""
    kind = NotebookProgress if console.is_jupyter else Progress
    return kind(
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Speed(),
        console=console,
    )
