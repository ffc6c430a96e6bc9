"""Halves of questions: one to choose edges on, the other to see what they do.

>>> ranked, held_out = halves(sequences, seed=42)
"""

import random
from collections.abc import Mapping, Sequence

from probe.attribution import TokenSequence
from probe.errors import ProbeError


def halves(
    sequences: Sequence[TokenSequence], seed: int, clusters: Mapping[str, str] | None = None
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Two halves of some questions, drawn by their ids; a cluster is never divided.

    Args:
        sequences: The questions.
        seed: Seed of the draw.
        clusters: The cluster of each question that has one, by its id.

    Raises:
        ProbeError: There are fewer than four, or they are all of one cluster.
    """
    if len(sequences) < 4:
        raise ProbeError(f"{len(sequences)} questions cannot be halved; at least 4 are needed")
    groups: dict[tuple[str, str], list[TokenSequence]] = {}
    for sequence in sorted(sequences, key=lambda sequence: sequence.id):
        cluster = (clusters or {}).get(sequence.id)
        key = ("question", sequence.id) if cluster is None else ("cluster", cluster)
        groups.setdefault(key, []).append(sequence)
    if len(groups) < 2:
        raise ProbeError("all questions are of one cluster, so they cannot be halved")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    first: list[TokenSequence] = []
    while len(first) + len(order[0]) <= len(sequences) // 2 or not first:
        first += order.pop(0)
    return first, [sequence for group in order for sequence in group]
