"""Peak memory of a training by batch size, from two rehearsals: at a given batch, it is a line."""

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
    """By situation, at the batch sizes that were rehearsed."""
    per_record: dict[str, float]
    """What each further record of a training batch adds, by situation of training."""
    batch_size: int

    def at(self, situation: str, batch_size: int) -> float:
        """The peak of a situation of training at another batch size."""
        return self.at_batch[situation] + (batch_size - self.batch_size) * self.per_record[situation]

    def largest_batch(self, room: float) -> int:
        """The most records whose steps, of any kind, fit into so many bytes; 0 if none does."""
        further = min((room - self.at_batch[name]) // self.per_record[name] for name in TRAINING)
        return max(0, self.batch_size + int(further))


def find_peaks(
    make: Callable[[], BaseTask], batch_size: int, precision: PrecisionName, *, callbacks: Any, **settings: Any
) -> Peaks:
    """Rehearse a batch and one of twice its size.

    Args:
        make: Makes the task, as for `rehearse`.
        batch_size: Records in a training batch.
        precision: The trainer's.
        callbacks: Makes the trainer's callbacks.
        **settings: Of the first rehearsal: validation, generation, clipping.
    """
    once = rehearse(make, batch_size, precision, callbacks=callbacks, **settings)
    twice = rehearse(make, 2 * batch_size, precision, callbacks=callbacks)
    return Peaks(
        at_rest=once.at_rest,
        at_batch={name: peak for name, peak in once.peaks.items() if name != "first"},
        per_record={name: (twice.peaks[name] - once.peaks[name]) / batch_size for name in TRAINING},
        batch_size=batch_size,
    )
