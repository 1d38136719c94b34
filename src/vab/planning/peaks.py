"""Peak memory of a network of any depth and batch, from rehearsals of shallow ones.

The tensors that are alive at a moment of a step are those of its blocks, and each block of a kind has the same. So the
peak of a situation is linear in the number of blocks of each kind and, at a given depth, in the batch. Six rehearsals
give the coefficients: three depths at two batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vab.planning.rehearsal import PrecisionName, Rehearsal, rehearse
from vab.tasks.base import BaseTask

TRAINING = ("whole", "ragged, logged")
_FEWEST = 1
"""Blocks of each kind in the shallowest rehearsal."""


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
    make: Callable[[int, int], BaseTask],
    depth: tuple[int, int],
    batch_size: int,
    precision: PrecisionName,
    **settings: Any,
) -> Peaks:
    """Rehearse shallow networks, and extrapolate to the depth of the real one.

    Args:
        make: Makes the task with so many modality and joint blocks.
        depth: Modality and joint blocks of the real network.
        batch_size: Records in its training batch.
        precision: The trainer's.
        **settings: Of `rehearse`.
    """
    base = (min(_FEWEST, depth[0]), min(_FEWEST, depth[1]))
    steps = [(base[0] + 1, base[1])] if depth[0] > base[0] else []
    steps += [(base[0], base[1] + 1)] if depth[1] > base[1] else []
    every = (base, *steps)
    once = [rehearse(lambda: make(*blocks), batch_size, precision, **settings) for blocks in every]  # noqa: B023
    only_training = settings | {"val_batch_size": 0, "generated": 0}
    twice = [rehearse(lambda: make(*blocks), 2 * batch_size, precision, **only_training) for blocks in every]  # noqa: B023

    def extrapolated(values: list[float]) -> float:
        total = values[0]
        for value, blocks in zip(values[1:], steps, strict=True):
            axis = 0 if blocks[0] > base[0] else 1
            total += (value - values[0]) * (depth[axis] - base[axis])
        return total

    def peak(runs: list[Rehearsal], name: str) -> float:
        return extrapolated([run.peaks[name] for run in runs])

    return Peaks(
        at_rest=extrapolated([run.at_rest for run in once]),
        at_batch={name: peak(once, name) for name in once[0].peaks if name != "first"},
        per_record={name: (peak(twice, name) - peak(once, name)) / batch_size for name in TRAINING},
        batch_size=batch_size,
    )
