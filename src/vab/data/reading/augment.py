"""Augmentation of stored training records: splice two segments, or roll one.

Both cut sound and picture at the same whole second, so that they stay in sync: a frame begins at that second, and the
nearest codec step begins at most half a step away (5.8 ms for DAC at 44.1 kHz). What happens to a record depends only
on the seed, the epoch and its position in the epoch's order, not on the batch, rank or worker.

Source: the data loading of VATT, by the authors of VAB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vab.data.reading.batch import PackedBatch
from vab.data.reading.mixed import Records
from vab.data.reading.order import CHANGES, Changes
from vab.spec import SegmentSpec, UserError

_TOLERANCE = 1e-6
"""How far a number of frames may be from an integer: rates such as 1 / 3 are not exact."""


def cut_seconds(spec: SegmentSpec) -> np.ndarray:
    """Whole seconds inside a segment at which a frame begins.

    Returns:
        (n,) int64, ascending; possibly empty.
    """
    seconds = np.arange(1, int(np.ceil(spec.segment_seconds)))
    steps, frames = spec.code_rate * seconds, spec.video_fps * seconds
    whole = np.abs(frames - np.round(frames)) < _TOLERANCE
    inside = (np.round(steps) >= 1) & (np.round(steps) < spec.num_steps) & (np.round(frames) < spec.num_frames)
    return seconds[whole & inside].astype(np.int64)


class Augmentation:
    """Which records are changed, and how.

    Args:
        spec: Spec of the records.
        seed: Seed of the order of records.
        splice: Probability in [0, 1] that a segment changes to that of another record at a whole second.
        roll: Probability in [0, 1] that a segment is shifted by whole seconds, its end wrapping around to its start.

    Raises:
        UserError: If a probability is not in [0, 1], no frame begins at a whole second inside the segment, or the
            segment's steps and frames end a step or more apart.
    """

    def __init__(self, spec: SegmentSpec, seed: int, splice: float, roll: float) -> None:
        for name, probability in (("splice", splice), ("roll", roll)):
            if not 0 <= probability <= 1:
                raise UserError(f"data.{name} must be a probability from 0 to 1, got {probability}")
        self.seed, self.splice, self.roll = seed, splice, roll
        self.seconds = cut_seconds(spec)
        asked = " and ".join(f"data.{name}" for name, wanted in (("splice", splice), ("roll", roll)) if wanted)
        if asked and not len(self.seconds):
            raise UserError(
                f"{asked} must be 0 here: no second of a segment of {spec.segment_seconds} s is the beginning of a "
                f"frame ({spec.video_fps} per second)"
            )
        sound, picture = spec.num_steps / spec.code_rate, spec.num_frames / spec.video_fps
        if roll and abs(sound - picture) * spec.code_rate > 1 - _TOLERANCE:
            raise UserError(
                f"data.roll must be 0 here: in a segment the steps last {sound:g} s and the frames {picture:g} s, so "
                "sound and picture would not stay in sync"
            )

    @property
    def on(self) -> bool:
        """Whether any record may be changed."""
        return self.splice > 0 or self.roll > 0

    def changes(self, epoch: int, places: np.ndarray, order: np.ndarray) -> Changes:
        """How the records at some positions of an epoch are augmented.

        The partner of a record is drawn uniformly from the other positions of the epoch. So it follows the mixture of
        data sets, or the class balance, of the epoch.

        Args:
            epoch: From 0.
            places: (B,) int64: consecutive positions in ``order``.
            order: (n,) int64: the record numbers of the whole epoch.
        """
        key = np.random.SeedSequence([self.seed, epoch, CHANGES]).generate_state(2, np.uint64)
        # Philox makes four words per counter value, and each position has its own counter value.
        words = np.random.Philox(key=key, counter=int(places[0])).random_raw(4 * len(places)).reshape(-1, 4)
        chance = (words >> np.uint64(32)).astype(np.float64) * 2.0**-32  # [0, 1)
        choice = (words & np.uint64(0xFFFFFFFF)).astype(np.int64)
        ahead = choice[:, 1] % max(1, len(order) - 1) + 1  # positions to the partner's, wrapping around
        partners = order[(places + ahead) % len(order)]
        spliced = (chance[:, 0] < self.splice) & (partners != order[places])
        number = max(1, len(self.seconds))
        cuts, shifts = (np.append(self.seconds, 0)[choice[:, column] % number] for column in (0, 2))
        return Changes(spliced, partners, cuts, np.where(chance[:, 2] < self.roll, shifts, 0))


def augment(packed: PackedBatch, dataset: Records, changes: Changes) -> None:
    """Splice and roll the records of a batch, in place.

    Records that are shorter than the segment or have no picture are neither changed nor used as partners. A spliced
    record has the labels of both; its ``index`` and ``source`` are those of the first.

    Args:
        packed: The batch.
        dataset: The data set of the batch and of the partners.
        changes: One entry for each record.
    """
    arrays, spec = packed.arrays(), dataset.spec
    whole = _whole(arrays, spec)
    spliced = np.flatnonzero(changes.spliced & whole)
    if len(spliced):
        tails = dataset.gather(changes.partners[spliced]).arrays()
        fits = _whole(tails, spec)
        for row, tail in zip(spliced[fits].tolist(), np.flatnonzero(fits).tolist(), strict=True):
            step, frame = _at(spec, int(changes.cuts[row]))
            arrays["codes"][row, :, step:] = tails["codes"][tail, :, step:]
            arrays["features"][row, frame:] = tails["features"][tail, frame:]
        arrays["labels"][spliced[fits]] = np.maximum(arrays["labels"][spliced[fits]], tails["labels"][fits])
    for row in np.flatnonzero((changes.shifts > 0) & whole).tolist():
        second = int(changes.shifts[row])
        arrays["codes"][row] = _rolled(arrays["codes"][row], spec, second)
        arrays["features"][row] = np.roll(arrays["features"][row], _at(spec, second)[1], axis=0)


def _whole(arrays: Mapping[str, np.ndarray], spec: SegmentSpec) -> np.ndarray:
    """(B,) bool: which records fill the segment."""
    return (arrays["steps"] == spec.num_steps) & (arrays["frames"] == spec.num_frames)


def _at(spec: SegmentSpec, second: int) -> tuple[int, int]:
    """The codec step that begins nearest to a second, and the frame that begins at it."""
    return round(second * spec.code_rate), round(second * spec.video_fps)


def _rolled(codes: np.ndarray, spec: SegmentSpec, second: int) -> np.ndarray:
    """(K, T) codes shifted by ``second`` seconds; the end of the picture and its sound wrap around to the start.

    The steps of a segment may last up to a step longer than its frames: the last step may then be dropped.
    """
    step = _at(spec, second)[0]
    begin = min(round((spec.num_frames / spec.video_fps - second) * spec.code_rate), spec.num_steps - step)
    return np.concatenate([codes[:, begin : begin + step], codes[:, : spec.num_steps - step]], axis=1)
