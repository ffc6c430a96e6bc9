"""Reading: weights are read whole once, for broken numbers and a digest; a cluster's nodes do it.

One machine reads two hundred models of 15 GB in an hour or two, and its models run for minutes.

    >>> read_models(recipe.models(), known, cluster, console)
"""

from collections.abc import Container, Sequence
from functools import partial

from rich.console import Console

from probe.checkpoints import input_entries, keep_entries, unread_inputs
from probe.models import check_numbers
from probe.run._cluster import Cluster
from probe.run._parallel import Event, OnEvent, Unit
from probe.run._session import progress_bar

LITTLE = 2**24
"""Bytes that are read here: small files always are."""


def read_models(
    references: Sequence[str], known: Container[str], cluster: Cluster, console: Console
) -> None:
    """Read models on a cluster's nodes; their digests are known here afterwards.

    A file that is another one here than there, as by other times, is read here when it is needed.

    Args:
        references: The models.
        known: Those whose numbers an earlier run has looked through.
        cluster: Whose nodes read.
        console: Where progress goes.

    Raises:
        ProbeError: A model holds a number that is NaN or infinite, or a node cannot read it.
    """
    units = [
        Unit(f"weights of {reference}", reference, 1, partial(_read, reference))
        for reference in references
        if reference not in known or unread_inputs(reference) > LITTLE
    ]
    if not units:
        return
    with progress_bar(console) as progress:
        for entries in cluster.do(units, None, progress, "weights", on_gpus=False):
            keep_entries(entries)


def _read(reference: str, *, device: str, on_event: OnEvent) -> dict[str, list[object]]:
    """Read one model, on a node."""
    del device
    check_numbers(reference)
    entries = input_entries(reference)
    on_event(Event(1))
    return entries
