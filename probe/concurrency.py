"""Concurrency: some calls under way at once, and their results in order or as they come.

>>> list(in_flight([lambda: 1, lambda: 2], jobs=2))
[1, 2]
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def in_flight(calls: Iterable[Callable[[], T]], jobs: int) -> Iterator[T]:
    """What calls return, in their order, with some of them under way at once.

    After an error nothing new is begun, but what is under way is waited for and given out, so that
    whoever keeps results loses none.

    Args:
        calls: What to call.
        jobs: How many may be under way; with one, nothing is called before it is asked for.
    """
    if jobs == 1:
        yield from (call() for call in calls)
        return
    waiting: deque[Future[T]] = deque()
    error: Exception | None = None
    left = iter(calls)
    pool = ThreadPoolExecutor(jobs)
    try:
        while True:
            begun = list(itertools.islice(left, jobs - len(waiting))) if error is None else []
            waiting.extend(pool.submit(call) for call in begun)
            if not waiting:
                break
            try:
                result = waiting.popleft().result()
            except Exception as failure:
                error = error or failure
            else:
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if error is not None:
        raise error


def as_finished(calls: Iterable[Callable[[], T]], jobs: int) -> Generator[list[T], None, None]:
    """What calls return, some at a time, as they finish; a late one holds up no other.

    After an error nothing new is begun, as in `in_flight`.

    Args:
        calls: What to call.
        jobs: How many may be under way.
    """
    waiting: set[Future[T]] = set()
    error: BaseException | None = None
    left = iter(calls)
    pool = ThreadPoolExecutor(jobs)
    try:
        while True:
            begun = list(itertools.islice(left, jobs - len(waiting))) if error is None else []
            waiting |= {pool.submit(call) for call in begun}
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            error = error or next((call.exception() for call in done if call.exception()), None)
            results = [call.result() for call in done if call.exception() is None]
            if results:
                yield results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if error is not None:
        raise error
