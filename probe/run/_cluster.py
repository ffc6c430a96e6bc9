"""A cluster: units of a run's work, each placed by Ray on a node that has room for it.

A unit is one model on one benchmark: its answers first, and once those of both models of a pair are
there, its scores. Whatever it computes goes to the run folder, batch by batch, which every node
must see at the same place; so a unit whose worker is lost goes on from there with another one.

    >>> with cluster_of(recipe, say) as cluster:
    ...     cluster.do(units, folder, bar)
"""

import os
import secrets
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rich.progress import Progress, TaskID

from probe.checkpoints import fetch_checkpoint, fingerprint
from probe.errors import ProbeError, install, reason
from probe.recipe import Recipe
from probe.run._parallel import Event, Unit
from probe.store import versions

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_R = TypeVar("_R")

RETRIES = 5
"""How often a unit is begun again whose worker was lost."""

SECONDS = 0.3
"""How often is looked for what workers say."""

ANSWERS = 20
"""Within how many seconds a cluster answers."""

LOOPBACK = "127.0.0.1"
"""The only address that a cluster on this machine listens on."""


class Task(NamedTuple):
    """A unit as it is sent to a worker."""

    unit: Unit[object]
    """What is to be done."""

    phase: str
    """A name for the units that are done together."""

    number: int
    """Which of them it is."""

    weights: str
    """The fingerprint of its model here."""

    lock: Path | None
    """The lock of the run folder; None where it is not begun yet."""

    inode: int
    """The lock's number on the shared file system, by which a worker knows it."""

    here: str
    """The folder that relative names of models start from."""

    versions: dict[str, str]
    """The versions here."""


class Said(NamedTuple):
    """What a worker says of a unit."""

    phase: str
    """With which others the unit is done: what is late is of no use to the next ones."""

    number: int
    """Which unit."""

    attempt: str
    """A name for this worker's attempt at it."""

    node: str
    """The address of its node."""

    event: Event
    """What happens."""


class Box:
    """Where workers leave what they say; an actor on the cluster."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._said: list[Said] = []

    def put(self, said: Said) -> None:
        """Leave something."""
        self._said.append(said)

    def take(self) -> list[Said]:
        """All that was left since the last time."""
        found, self._said = self._said, []
        return found


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to."""

    gpus: int
    """How many GPUs a unit gets."""

    cpus: int
    """How many CPU cores a unit gets."""

    box: "ActorHandle[Box]"
    """Where its workers leave what they say."""

    say: Callable[[str], object]
    """Is told a line for the reader."""

    @property
    def nodes(self) -> list[str]:
        """Its nodes, each in words."""
        import ray

        found = []
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                gpus, cpus = (int(has.get(kind, 0)) for kind in ("GPU", "CPU"))
                found.append(f"{node['NodeManagerAddress']} ({gpus} GPUs, {cpus} cores)")
        return found

    def do(
        self,
        units: Sequence[Unit[_R]],
        lock: Path | None,
        progress: Progress,
        name: str,
        on_gpus: bool = True,
    ) -> list[_R]:
        """Do units, as many at once as the cluster has room for; what they return, in order.

        Args:
            units: To be sent to a process, their work must be made of functions of modules and
                plain data.
            lock: The lock of the run folder; None for units that need no folder.
            progress: Where the units that run are shown.
            name: What is done with them.
            on_gpus: Whether they need GPUs, where units do.

        Raises:
            ProbeError: A unit has lost its worker too often, or a node does not see the folder.
                What work raises is raised here, and ends the others.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        work = ray.remote(_do).options(
            num_gpus=self.gpus if on_gpus else 0,
            num_cpus=self.cpus,
            max_retries=RETRIES,
            name="probe unit",
        )
        inode = lock.stat().st_ino if lock else 0
        weights = {model: fingerprint(model) for model in {unit.model for unit in units}}
        here = (lock, inode, os.getcwd(), versions())
        waiting: dict[ObjectRef[_R], int] = {}
        phase = uuid.uuid4().hex
        table = _Table(progress, units, name, self.say)
        results: dict[int, _R] = {}
        try:
            for number, unit in enumerate(units):
                task = Task(unit, phase, number, weights[unit.model], *here)
                waiting[work.remote(task, self.box)] = number
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=SECONDS)
                over = {waiting[ref] for ref in done}
                for said in ray.get(self.box.take.remote()):
                    if said.phase == phase:
                        table.show(said, runs=said.number not in over)
                for ref in done:
                    number = waiting[ref]
                    results[number] = ray.get(ref)
                    del waiting[ref]
                    table.finish(number)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise ProbeError(
                f"the cluster: {reason(error)}; what is done is kept, and the same command goes on"
            ) from error
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)
            table.close()
        return [results[number] for number in range(len(units))]


class _Table:
    """The live table: a bar of all units, and one of each that runs, with its node."""

    def __init__(
        self,
        progress: Progress,
        units: Sequence[Unit[object]],
        name: str,
        say: Callable[[str], object],
    ) -> None:
        self._progress, self._units, self._say = progress, units, say
        self._all = progress.add_task(name, total=sum(unit.size for unit in units))
        self._rows: dict[int, TaskID] = {}
        self._attempts: dict[int, Said] = {}
        self._done: dict[int, int] = {}
        self._finished = 0

    def show(self, said: Said, runs: bool) -> None:
        """Show what a worker says; of a unit that was begun again, only the last worker counts.

        One that is over by now gets no row: drawing all of them takes long where units are many.
        """
        unit, before = self._units[said.number], self._attempts.get(said.number)
        if before is None or before.attempt != said.attempt:
            if before is not None:
                self._say(f"{unit.name}: {before.node} was lost; {said.node} goes on with it")
            self._count(said.number, -self._done.get(said.number, 0))
            self._attempts[said.number] = said
            self._remove(said.number)
            if runs:
                self._rows[said.number] = self._progress.add_task(
                    f"{unit.name} ({said.node})", total=unit.size
                )
        if said.event.text:
            self._say(said.event.text)
        self._count(said.number, said.event.advance)
        if said.number in self._rows:
            self._progress.update(
                self._rows[said.number], advance=said.event.advance, speed=said.event.speed
            )

    def finish(self, number: int) -> None:
        """Take the row of a unit away that is done."""
        self._count(number, self._units[number].size - self._done.get(number, 0))
        self._finished += 1
        self._remove(number)
        if not self._progress.console.is_terminal and number in self._attempts:
            count = f"{self._finished} of {len(self._units)}"
            self._say(f"{self._units[number].name}: done by {self._attempts[number].node}, {count}")

    def close(self) -> None:
        """Take all rows away."""
        for number in list(self._rows):
            self._remove(number)

    def _count(self, number: int, more: int) -> None:
        self._done[number] = self._done.get(number, 0) + more
        self._progress.update(self._all, advance=more)

    def _remove(self, number: int) -> None:
        if number in self._rows:
            self._progress.remove_task(self._rows.pop(number))


def _do(task: Task, box: "ActorHandle[Box]") -> object:
    """Do a unit on the node that Ray has chosen."""
    import ray

    attempt, node = uuid.uuid4().hex, ray.util.get_node_ip_address()

    def on_event(event: Event) -> None:
        box.put.remote(Said(task.phase, task.number, attempt, node, event))

    on_event(Event())
    _check_versions(task, node)
    _check_shared(task, node)
    unit = task.unit
    fetch_checkpoint(unit.model)
    if fingerprint(unit.model) != task.weights:
        raise ProbeError(f"{unit.model} has other weights on the node {node} than where this began")
    devices = ",".join(f"cuda:{number}" for number in range(len(ray.get_gpu_ids())))
    return unit.work(device=devices or "cpu", on_event=on_event)


def _check_versions(task: Task, node: str) -> None:
    """Check that a node computes with what this began with, but for how that was built.

    Raises:
        ProbeError: It has another version.
    """
    for name, here in versions().items():
        ours = task.versions[name]
        # Ray sees to Python itself.
        if name != "python" and here.partition("+")[0] != ours.partition("+")[0]:
            raise ProbeError(
                f"the node {node} has {name} {here} where this began with {ours}; install the "
                "same there"
            )


def _check_shared(task: Task, node: str) -> None:
    """Go to the folder that the run was begun in, and check that its folder is there, too.

    Raises:
        ProbeError: The node does not see the run folder, or has another one there.
    """
    if Path(task.here).is_dir():
        os.chdir(task.here)
    if task.lock is None:
        return
    try:
        found = task.lock.stat().st_ino
    except OSError:
        found = None
    if found != task.inode:
        raise ProbeError(
            f"the node {node} does not see the run folder {task.lock.parent}; give --output on a "
            "file system that all nodes have at the same place"
        )


@contextmanager
def cluster_of(recipe: Recipe, say: Callable[[str], object]) -> Iterator[Cluster | None]:
    """Connect to the cluster of a recipe; None where it has none.

    Args:
        recipe: The recipe.
        say: Is told a line for the reader.

    Raises:
        ProbeError: Ray is not installed, or no cluster answers.
    """
    compute = recipe.compute
    if not compute.cluster:
        yield None
        return
    own = _connect(compute.cluster)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        # One for all phases, as it takes a process that is there already; and on no node that may
        # be lost while this goes on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        box = ray.remote(Box).options(num_cpus=0, scheduling_strategy=here).remote()
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0) > 0) if compute.gpus == "auto" else compute.gpus
        cluster = Cluster(gpus, compute.threads or 1, box, say)
        fits = any(
            node["Alive"] and node["Resources"].get("GPU", 0) >= gpus for node in ray.nodes()
        )
        say(f"cluster: {', '.join(cluster.nodes)}; {gpus} GPUs a unit")
        if not fits:
            say(f"no node has {gpus} GPUs now; this waits for one (compute.gpus)")
        yield cluster
    finally:
        if own:
            ray.shutdown()


def _connect(address: str) -> bool:
    """Connect to a cluster, or start one on this machine; False where this process was connected.

    Raises:
        ProbeError: Ray is not installed, no cluster answers, or it would listen to other machines.
    """
    # Nothing of a run leaves the cluster.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone = address == "local"
    if alone:
        # Whoever reaches Ray can run code. By default it listens on every interface, and leaves a
        # token at home that would bind clusters started later: here it has a token of its own, and
        # with the first variable (read at import) no address but loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise ProbeError(
            f"compute.cluster needs Ray; in a checkout of probe: {install('cluster')}"
        ) from error
    if ray.is_initialized():
        return False
    try:
        asked = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        host, _, port = asked.removeprefix("ray://").rpartition(":")
        if host:  # Ray would ask for ten minutes
            socket.create_connection((host, int(port)), timeout=ANSWERS).close()
        options = {"include_dashboard": False} if alone else {}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ProbeError(
            f"no Ray cluster at {address!r}: {reason(error)}; start one (`ray start --head`), "
            "set RAY_AUTH_TOKEN where it asks for one, or take this machine alone: --cluster local"
        ) from error
    if alone and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise ProbeError(
            "the cluster would listen to other machines, as ray was imported before; import it "
            "after the run, or start one (`ray start --head`) and take --cluster auto"
        )
    return True
