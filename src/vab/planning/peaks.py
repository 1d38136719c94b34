"""Peak memory of training by batch size: a line through two rehearsals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vab.planning.rehearsal import PrecisionName, rehearse
from vab.tasks.base import BaseTask

TRAINING = ("whole", "ragged, logged")


@dataclass(frozen=True)
class Peaks:
    """Bytes on one device, without gradient buckets, context and fragmentation."""

    at_rest: float
    """Between steps: weights, gradients, the optimizer's state, the moving average."""
    at_batch: dict[str, float]
    """By situation, at ``batch_size``."""
    per_record: dict[str, float]
    """What each further record of a training batch adds, by situation of training."""
    batch_size: int
    rehearsed: tuple[int, int]
    """The two batch sizes that were rehearsed."""

    def at(self, situation: str, batch_size: int) -> float:
        """The peak of a situation of training at another batch size."""
        return self.at_batch[situation] + (batch_size - self.batch_size) * self.per_record[situation]

    def largest_batch(self, room: float) -> int:
        """The most records whose steps, of any kind, fit into so many bytes; 0 if none does."""
        further = min((room - self.at_batch[name]) // self.per_record[name] for name in TRAINING)
        return max(0, self.batch_size + int(further))


def find_peaks(
    make: Callable[[], BaseTask],
    batch_size: int,
    precision: PrecisionName,
    *,
    at_once: int | None = None,
    callbacks: Any,
    **settings: Any,
) -> Peaks:
    """Rehearse two batch sizes.

    Args:
        make: Makes the task, as for `rehearse`.
        batch_size: Records in a training batch.
        precision: The trainer's.
        at_once: Records that the task sends through the network at once, if fewer than a batch. Two and three times as
            many are rehearsed: each further part adds the same memory, and dozens of parts would take minutes.
        callbacks: Makes the trainer's callbacks.
        **settings: Of the first rehearsal: validation, generation, clipping.
    """
    size, larger = (2 * at_once, 3 * at_once) if at_once and batch_size > 3 * at_once else (batch_size, 2 * batch_size)
    first = rehearse(make, size, precision, callbacks=callbacks, **settings)
    second = rehearse(make, larger, precision, callbacks=callbacks)
    per_record = {name: (second.peaks[name] - first.peaks[name]) / (larger - size) for name in TRAINING}
    return Peaks(
        at_rest=first.at_rest,
        at_batch={
            name: peak + (batch_size - size) * per_record.get(name, 0)
            for name, peak in first.peaks.items()
            if name != "first"
        },
        per_record=per_record,
        batch_size=batch_size,
        rehearsed=(size, larger),
    )
