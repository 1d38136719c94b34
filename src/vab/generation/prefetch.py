"""Compute the next result in a thread while the caller uses the last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def prefetch(
    function: Callable[[T, threading.Event], R], items: Sequence[T], patience: float = 5.0
) -> Iterator[Iterator[R]]:
    """The results of a function for each item; the next one is computed in a thread while the caller uses the last.

    On leaving the context, the event that the function gets is set.

    Args:
        function: Gets an item and the event.
        items: In order.
        patience: s. A call that has not ended so long after the event is abandoned; it ends with the process.
    """
    stopped = threading.Event()
    threads: list[threading.Thread] = []

    def start(item: T) -> Future[R]:
        future: Future[R] = Future()

        def run() -> None:
            try:
                future.set_result(function(item, stopped))
            except BaseException as error:  # raised by the caller
                future.set_exception(error)

        # No thread of a pool: Python waits for those when it exits, also for a file that takes minutes to read.
        threads[:] = [threading.Thread(target=run, daemon=True)]
        threads[0].start()
        return future

    def results() -> Iterator[R]:
        coming = [start(item) for item in items[:1]]
        for item in items[1:]:
            result = coming.pop().result()
            coming.append(start(item))
            yield result
        for last in coming:
            yield last.result()

    try:
        yield results()
    finally:
        stopped.set()
        for thread in threads:
            thread.join(patience)
