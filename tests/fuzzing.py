"""Hypothesis strategies for what comes in from outside, and what may come of it.

A door is a function that reads such input. It may give a result or a `ProbeError` of one line, and
nothing else: no other exception, no wait, no heap of memory.
"""

import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from probe.errors import ProbeError

SECONDS = 30
"""The longest that a door may take."""

GIBIBYTES = 2
"""The most memory that one may add to the process."""

# CI takes a minute for all doors; a long run by hand, PROBE_FUZZ=20000 pytest tests/test_fuzz.py
EXAMPLES = int(os.environ.get("PROBE_FUZZ", "60"))


def examples(share: float = 1.0):
    """Settings for a door: this share of the usual number of inputs."""
    return settings(
        max_examples=max(5, int(EXAMPLES * share)),
        deadline=None,
        derandomize="PROBE_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@contextmanager
def limits():
    """Raise where a door hangs or takes much memory."""

    def late(number, frame):
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GIBIBYTES * 2**20, f"it takes {grown / 2**20:.1f} GiB"


def door(call: Callable[[], object]) -> object:
    """Go through a door: its result, or None where it refuses in one line."""
    with limits():
        try:
            return call()
        except ProbeError as error:
            text = str(error)
            assert text.strip(), "a refusal without a reason"
            assert len(text.splitlines()) == 1, text
            assert len(text) < 4000, text
            text.encode()
            return None


ODD_TEXTS = st.sampled_from(
    [
        *("", " ", "\n", "\x00", "\ud800", "\u202e", "[/b]", "%s", "../../x", "~", "a" * 400),
        *("9" * 5000, "1e999", "nan", "{question}", "{", "}", "{{", "\\boxed{", "<think>", "####"),
        *("hub/a%b", "/dev/zero", "-", "1/0", "2^{10^{10}}", "\\frac{1}{0}", "[" * 500, "é́"),
    ]
)
TEXTS = ODD_TEXTS | st.text(max_size=30)
NUMBERS = st.sampled_from(
    [0, 1, -1, 2**63, 10**400, 0.1, -0.0, 1e308, float("nan"), float("inf"), True, False]
)
SCALARS = st.none() | NUMBERS | TEXTS | st.integers() | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
DEEP = st.sampled_from([100, 2000, 60000]).map(lambda depth: "[" * depth + "]" * depth)


@st.composite
def mutated(draw, table):
    """A copy of plain data with one to three values changed, dropped or added, somewhere."""
    copy = json.loads(json.dumps(table))
    for _ in range(draw(st.integers(1, 3))):
        place = copy
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["change", "change", "change", "drop", "add"]))
            if action == "drop":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(TEXTS)] = draw(VALUES)
            else:
                place[key] = draw(VALUES)
            break
    return copy


@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, cut out, doubled, or all of them gone."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "truncate"]))
        if kind == "flip" and start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[start : start + length]
        elif kind == "insert":
            found[start:start] = draw(st.binary(max_size=length))
        elif kind == "double":
            found[start:start] = found[start : start + length]
        else:
            del found[start:]
    return bytes(found)
