"""Augmentation of training records as they are stored: two segments spliced, a segment rolled.

Both change sound and picture at the same whole second, so that what is seen is still what is heard: a frame begins at
that second, and the codec step that begins nearest is at most half a step away (5.8 ms for DAC of 44.1 kHz). What
happens to a record follows from the seed, the epoch and its place in the epoch's order alone, not from the batch, rank
or worker that it comes to.

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
"""How far a number of frames may be from a whole one: rates such as 1 / 3 are not exact."""


def cut_seconds(spec: SegmentSpec) -> np.ndarray:
    """Whole seconds inside a segment at which a frame begins.

    Returns:
        (n,) int64, ascending; empty if there is none.
    """
    seconds = np.arange(1, int(np.ceil(spec.segment_seconds)))
    steps, frames = spec.code_rate * seconds, spec.video_fps * seconds
    whole = np.abs(frames - np.round(frames)) < _TOLERANCE
    inside = (np.round(steps) >= 1) & (np.round(steps) < spec.num_steps) & (np.round(frames) < spec.num_frames)
    return seconds[whole & inside].astype(np.int64)


class Augmentation:
    """Which records are changed, and how.

    Args:
        spec: Of the records.
        seed: Of the order of records.
        splice: Probability in [0, 1] that at a whole second a segment changes to another record's.
        roll: Probability in [0, 1] that a segment is moved on by a whole number of seconds, its end coming round to
            its beginning.

    Raises:
        UserError: If a probability is none, or the segment has no second at which a frame begins, or its steps and its
            frames end a step or more apart.
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
                f"data.roll must be 0 here: of a segment the steps last {sound:g} s and the frames {picture:g} s, and "
                "what comes round would not be in time"
            )

    @property
    def on(self) -> bool:
        """Whether anything is changed at all."""
        return self.splice > 0 or self.roll > 0

    def changes(self, epoch: int, places: np.ndarray, order: np.ndarray) -> Changes:
        """What happens to the records at some places of an epoch.

        A partner is the record at another place of the epoch, each with the same chance: it comes from the mixture,
        or the draws by class, that the epoch is.

        Args:
            epoch: From 0.
            places: (B,) int64, one after the other, of ``order``.
            order: (n,) int64: the record numbers of the whole epoch.
        """
        key = np.random.SeedSequence([self.seed, epoch, CHANGES]).generate_state(2, np.uint64)
        # A counter of Philox gives four words: the record at each place has a counter of its own.
        words = np.random.Philox(key=key, counter=int(places[0])).random_raw(4 * len(places)).reshape(-1, 4)
        chance = (words >> np.uint64(32)).astype(np.float64) * 2.0**-32  # [0, 1)
        choice = (words & np.uint64(0xFFFFFFFF)).astype(np.int64)
        ahead = choice[:, 1] % max(1, len(order) - 1) + 1  # places to the partner's, going round
        partners = order[(places + ahead) % len(order)]
        spliced = (chance[:, 0] < self.splice) & (partners != order[places])
        number = max(1, len(self.seconds))
        cuts, shifts = (np.append(self.seconds, 0)[choice[:, column] % number] for column in (0, 2))
        return Changes(spliced, partners, cuts, np.where(chance[:, 2] < self.roll, shifts, 0))


def augment(packed: PackedBatch, dataset: Records, changes: Changes) -> None:
    """Splice and roll the records of a batch, in place.

    Only whole records take part: one that is shorter than the segment, or has no picture, stays as it is, and none is
    continued with such a one. A spliced record has the labels of both; number and ``source`` are those of the first.

    Args:
        packed: As gathered.
        dataset: That it was gathered from, and partners are.
        changes: One for each record.
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
    """The step that begins nearest to a second, and the frame that begins at it."""
    return round(second * spec.code_rate), round(second * spec.video_fps)


def _rolled(codes: np.ndarray, spec: SegmentSpec, second: int) -> np.ndarray:
    """(K, T) moved on by a second; the end of the picture comes round to its beginning, and so does its sound.

    A segment's steps may last longer than its picture, by less than a step: the last step may then be left out.
    """
    step = _at(spec, second)[0]
    begin = min(round((spec.num_frames / spec.video_fps - second) * spec.code_rate), spec.num_steps - step)
    return np.concatenate([codes[:, begin : begin + step], codes[:, : spec.num_steps - step]], axis=1)
