"""Doing the next piece of work while the last one is being used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

_PATIENCE_SECONDS = 5.0
"""For the thread at the end; a piece of work that takes longer is given up with the process."""

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_ahead(function: Callable[[T, threading.Event], R], items: Sequence[T]) -> Iterator[Iterator[R]]:
    """Results of a function for each item, worked out in a thread while the caller is busy with the one before.

    Not more than two are there at a time. Leaving the context early sets the event that the function was given.
    """
    stopped = threading.Event()
    threads: list[threading.Thread] = []

    def start(item: T) -> Future[R]:
        future: Future[R] = Future()

        def run() -> None:
            try:
                future.set_result(function(item, stopped))
            except BaseException as error:  # the caller's to deal with
                future.set_exception(error)

        # Not of a pool: Python waits for a pool's threads at its end, for a file that takes minutes too.
        threads[:] = [threading.Thread(target=run, daemon=True)]
        threads[0].start()
        return future

    def results() -> Iterator[R]:
        if items:
            coming = start(items[0])
            for item in items[1:]:
                result = coming.result()
                coming = start(item)
                yield result
            yield coming.result()

    try:
        yield results()
    finally:
        stopped.set()
        for thread in threads:
            thread.join(_PATIENCE_SECONDS)
