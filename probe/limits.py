"""Limits of this process: how much memory it may have, and how long it may run.

For processes that do what strangers wrote: formulas of models, chat templates of checkpoints.

    >>> limit_memory(2**31)
    >>> end_after(10)
"""

import signal


def limit_memory(most: int) -> None:
    """Let what needs more bytes fail with a MemoryError, where the system can do that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS and containers may refuse
        return


def end_after(seconds: int) -> None:
    """End this process after some seconds, wherever it is; 0 for never."""
    if hasattr(signal, "alarm"):  # Windows has none
        signal.alarm(seconds)
