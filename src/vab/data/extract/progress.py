"""The progress bar of an extraction or an import."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vab.console import ProgressBar
from vab.data.extract.parts import Watch


@contextmanager
def files_progress(words: str, total: int, show: bool = True) -> Iterator[Watch]:
    """A progress bar with the rate of this run and the hours of sound; gives the function that moves it."""
    began = time.monotonic()
    with ProgressBar(words, total, show=show) as bar:

        def watch(done: int, here: int, seconds: float) -> None:
            rate = here / max(time.monotonic() - began, 1e-9)
            bar.update(done, note=f"{rate:.1f} files/s, {seconds / 3600:.2f} h of sound")

        yield watch
