"""Patience: what may pass is tried again, with growing pauses, and not for ever.

>>> insist(lambda: 1, "http://localhost:8001", patience=10, say=print)
1
"""

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

from probe.errors import ProbeError
from probe.remote._wire import PassingError

_LONGEST_PAUSE = 30.0

T = TypeVar("T")


def insist(
    call: Callable[[], T], url: str, patience: float, say: Callable[[str], object], hint: str = ""
) -> T:
    """Call until no passing fault is in the way, or they have not passed for too long.

    Args:
        call: What to call.
        url: The server, for complaints.
        patience: For how many seconds faults are tried again.
        say: Is told of faults that are tried again.
        hint: What to say behind the last of them.

    Raises:
        ProbeError: The last of them.
    """
    first: float | None = None
    for pause in itertools.chain((1.0, 2.0, 4.0, 8.0, 16.0), itertools.repeat(_LONGEST_PAUSE)):
        try:
            return call()
        except PassingError as fault:
            first = first or time.monotonic()
            if time.monotonic() + pause - first > patience:
                after = f" for {patience:.0f} s" if patience else ""
                raise ProbeError(f"{url}: {fault}{after}{hint}") from None
            say(f"{url}: {fault}; trying again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError
