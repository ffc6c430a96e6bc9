"""Several devices: each works through its share of the models in a process of its own.

Two checkpoints of a pair know nothing of each other, so a machine with two GPUs runs both at once.
It takes processes, since Python gives the launches of one GPU no time beside those of another. What
a process has to say travels to the one that shows it; what it computes is in the run folder, batch
by batch, and a result that is small comes back. With one device all is done in this process.

    >>> on_each([partial(attribute_with, ...)], ["cuda:0", "cuda:1"], print)
"""

import gc
import importlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from probe.checkpoints import weight_files

Result = TypeVar("Result", covariant=True)
_R = TypeVar("_R")


class Event(NamedTuple):
    """What a piece of work says while it runs."""

    advance: int = 0
    """How many more things are done."""

    text: str = ""
    """A line for the reader."""

    speed: str = ""
    """How fast it goes."""


OnEvent = Callable[[Event], None]
"""What is called with each event."""


class Work(Protocol[Result]):
    """A piece of work on one model."""

    def __call__(self, *, device: str, on_event: OnEvent) -> Result:
        """Do it on a device, or on several joined by commas."""
        ...


_Share = Sequence[tuple[int, Work[object]]]
"""Work for one device, with its number in the whole."""

_Said = Event | tuple[int, object] | BaseException
"""What a process says: an event, a result with its number, or what went wrong."""

_NEEDED = ("transformers", "nnsight", "probe.run._solving", "probe.run._attributing")
"""What takes time to import."""


class Unit(NamedTuple, Generic[Result]):
    """A piece of work, as tables name it."""

    name: str
    """What it is called."""

    model: str
    """The reference of its model."""

    size: int
    """How many things there are to do."""

    work: Work[Result]
    """What does it."""


def devices_for(references: Sequence[str], devices: Sequence[torch.device]) -> list[str]:
    """Where models run: each device on its own, or all as one where a model does not fit on one."""
    names = [str(device) for device in devices]
    cards = [device for device in devices if device.type == "cuda"]
    if len(cards) < 2:
        return names
    largest = max(sum(f.stat().st_size for f in weight_files(r)) for r in references)
    smallest = min(torch.cuda.get_device_properties(card).total_memory for card in cards)
    return [",".join(names)] if largest > 0.9 * smallest else names


def on_each(work: Sequence[Work[_R]], devices: Sequence[str], on_event: OnEvent) -> list[_R]:
    """Do all work: in turn on one device, or at once on several.

    Args:
        work: What is to be done; the devices take it in turn, so that the two models of a pair are
            apart. To be sent to a process, it must be made of functions of modules and plain data.
        devices: As `devices_for` gives them.
        on_event: Called with what the work says, in this process.

    Raises:
        RuntimeError: A process ended without a word. What work raises is raised here, and ends the
            other processes.
    """
    if len(devices) == 1 or len(work) == 1:
        return [part(device=devices[0], on_event=on_event) for part in work]
    with Workers(devices[: len(work)]) as workers:
        return workers.do(work, on_event)


class Workers:
    """A process for each of several devices, from the first work on for as long as they are needed.

    Started before, they import what work needs and begin to use their devices meanwhile.

        >>> with Workers(["cuda:0", "cuda:1"]) as workers:
        ...     workers.do([partial(attribute_with, ...)], print)
    """

    def __init__(self, devices: Sequence[str]) -> None:
        """Say on which devices."""
        context = multiprocessing.get_context("spawn")
        self._said: multiprocessing.Queue[_Said] = context.Queue()
        self._tasks: list[multiprocessing.Queue[_Share]] = [context.Queue() for _ in devices]
        self._processes = [
            context.Process(target=_serve, args=(device, tasks, self._said), daemon=True)
            for device, tasks in zip(devices, self._tasks, strict=True)
        ]

    def start(self) -> None:
        """Start those that have not been."""
        for process in self._processes:
            if process.pid is None:
                process.start()

    def __enter__(self) -> "Workers":
        """These."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them, whatever they do."""
        for process in self._processes:
            if process.pid is not None:
                process.terminate()
                process.join()

    def do(self, work: Sequence[Work[_R]], on_event: OnEvent) -> list[_R]:
        """Do all work at once, as `on_each`; after an error they can only be ended."""
        self.start()
        for start, tasks in enumerate(self._tasks):
            tasks.put(list(enumerate(work))[start :: len(self._tasks)])
        results: dict[int, object] = {}
        while len(results) < len(work):
            try:
                message = self._said.get(timeout=0.2)
            except queue.Empty:
                for process in self._processes:
                    if process.exitcode:
                        raise RuntimeError(
                            f"a process of this run ended with code {process.exitcode}"
                        ) from None
                continue
            if isinstance(message, Event):
                on_event(message)
            elif isinstance(message, BaseException):
                raise message
            else:
                results[message[0]] = message[1]
        return [results[number] for number in range(len(work))]  # type: ignore[misc]


def _serve(
    device: str, tasks: "multiprocessing.Queue[_Share]", said: "multiprocessing.Queue[_Said]"
) -> None:
    """Do one device's shares of the work; this is the main function of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        for name in _NEEDED:
            importlib.import_module(name)
        for place in device.split(","):
            if place.startswith("cuda"):
                torch.empty(1, device=place)
        while True:
            for number, part in tasks.get():
                said.put((number, part(device=device, on_event=said.put)))
            # What comes next may be somebody else's.
            gc.collect()
            torch.cuda.empty_cache()
    except Exception as error:
        said.put(error)
