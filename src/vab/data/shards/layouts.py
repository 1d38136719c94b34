"""The arrays of a recording, whatever layout they were stored in, as (K, T) codes and (V, C) features that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vab.data.extract.cutting import check_segments, segment_starts
from vab.data.media.segments import SAME_TIME
from vab.data.shards.arrays import ArrayError, Arrays
from vab.data.shards.identity import CodecFacts
from vab.spec import UserError

_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Cut:
    """How a recording's arrays become segments."""

    segment_seconds: float
    """Length of a segment."""
    source_fps: float
    """Frames per second of the features that are there."""
    video_fps: float
    """Frames per second that are kept."""
    segments: str
    """``all``: one after the other; ``centre``: one from the middle of each recording."""
    hop_seconds: float
    """From the start of a segment to that of the next."""
    min_seconds: float
    """What a recording or a last segment must have; the rest is padded."""
    max_difference_seconds: float
    """By which a recording's codes and features may differ in length; more is taken for a wrong rate or pair."""
    without_video: str = "leave_out"
    """``keep``, or ``leave_out``: recordings that have codes alone."""

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UserError: Saying which.
        """
        check_segments(self.segments, self.segment_seconds, self.video_fps, self.hop_seconds, self.min_seconds)
        if not self.video_fps <= self.source_fps < float("inf"):
            raise UserError(
                f"--target_video_fps {self.video_fps:g} is more than the {self.source_fps:g} frames per second that"
                " there are: nothing to make the others from"
            )
        if not 0 <= self.max_difference_seconds < float("inf"):
            raise UserError(f"--max_difference_seconds must be 0 or more, got {self.max_difference_seconds:g}")

    def starts(self, end: float) -> Iterator[float]:
        """s: where segments start in a recording of so many seconds."""
        if self.segments == "centre":
            yield max(0.0, (end - self.segment_seconds) / 2)
            return
        yield from segment_starts(end, self.segment_seconds, self.hop_seconds, self.min_seconds)


@dataclass(frozen=True)
class Axes:
    """What all arrays of a data set have in common: which of their two axes is time, and the width of features."""

    codes: int
    """0: (T, K); 1: (K, T)."""
    features: int | None
    """0: (V, C); 1: (C, V); None where there are no features."""
    feature_dim: int
    """C."""


class ArrayReader:
    """Reads the arrays of one recording after the other and brings them to one layout.

    Args:
        codes: For each recording (K, T) or (T, K) of any integer type; axes of length 1 before, between or behind.
        features: Likewise (V, C) or (C, V), of any float type; None where there are none.
        codec: Of the codes.
        feature_dim: C; None to find out.
        cut: Rates and tolerances.

    Attributes:
        axes: Found by ``find_axes``; until then each array must tell for itself which of its axes is time.
    """

    def __init__(
        self, codes: Arrays, features: Arrays | None, codec: CodecFacts, feature_dim: int | None, cut: Cut
    ) -> None:
        self.codes, self.features, self.codec, self.cut = codes, features, codec, cut
        self.levels, self.size = codec.codebooks.shape[0], codec.codebooks.shape[1]
        self.feature_dim = feature_dim
        self.axes: Axes | None = None

    def find_axes(self, names: Iterable[str]) -> list[ArrayError]:
        """Take the layout of the first recording that is whole for that of all.

        Returns:
            What is wrong with the recordings before it, or with all of them; then ``axes`` stays None.
        """
        problems: list[ArrayError] = []
        for name in names:
            try:
                _, codes_axis, features, features_axis = self._read(name)
            except ArrayError as error:
                problems.append(error)
                continue
            width = self.feature_dim if features is None else features.shape[1]
            if width is not None and (features is not None or self.features is None):
                self.axes, self.feature_dim = Axes(codes_axis, features_axis, width), width
                break
            problems.append(ArrayError("no_features", "there are codes, but no features of this name"))
        return problems

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes (K, T) in [0, S) and features (V, C) float16 of a recording; None for one that has codes alone.

        Raises:
            ArrayError: Why the recording cannot be used.
        """
        codes, _, features, _ = self._read(name)
        return codes, features

    def _read(self, name: str) -> tuple[np.ndarray, int, np.ndarray | None, int | None]:
        has_features = self.features is not None and name in self.features
        if name not in self.codes:
            reason, what = ("no_codes", "features, but no codes") if has_features else ("missing", "no arrays")
            raise ArrayError(reason, f"there are {what} of this name")
        if not has_features and self.cut.without_video != "keep":
            raise ArrayError("no_features", "there are codes, but no features of this name")
        codes, codes_axis = self._codes(name)
        if not has_features:
            return codes, codes_axis, None, None
        sound = codes.shape[1] / self.codec.code_rate
        features, features_axis = self._features(name, sound)
        seen = len(features) / self.cut.source_fps
        if abs(sound - seen) > self.cut.max_difference_seconds + SAME_TIME:
            raise ArrayError(
                "lengths_differ",
                f"{codes.shape[1]} steps of codes last {sound:.2f} s, {len(features)} frames at "
                f"{self.cut.source_fps:g} per second {seen:.2f} s",
            )
        return codes, codes_axis, features, features_axis

    def _codes(self, name: str) -> tuple[np.ndarray, int]:
        """(K, T), and which axis of the array was time."""
        where = self.codes.where(name)
        array = _two_axes(self.codes.read(name), "bad_codes", where)
        if array.dtype.kind not in "iu":
            raise ArrayError("bad_codes", f"{where} must hold integers, got {array.dtype}")
        fits = [axis for axis in (0, 1) if array.shape[1 - axis] == self.levels]
        axis = _time_axis(fits, None if self.axes is None else self.axes.codes)
        if axis is None:
            rule = f"{self.codec.name} has {self.levels} levels, so that one axis must be {self.levels}"
            raise ArrayError("bad_codes", _odd_shape(where, array, fits, rule))
        codes = array if axis == 1 else array.T
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.size:
            odd = low if low < 0 else high
            raise ArrayError("bad_codes", f"{where} holds {odd}: codes of {self.codec.name} are 0 to {self.size - 1}")
        return codes, axis

    def _features(self, name: str, seconds: float) -> tuple[np.ndarray, int]:
        """(V, C) float16, and which axis of the array was time."""
        assert self.features is not None
        where = self.features.where(name)
        array = _two_axes(self.features.read(name), "bad_features", where)
        if array.dtype.kind != "f":
            raise ArrayError("bad_features", f"{where} must hold floats, got {array.dtype}")
        if self.feature_dim is not None:
            fits = [axis for axis in (0, 1) if array.shape[1 - axis] == self.feature_dim]
            rule = f"one axis must be the {self.feature_dim} channels"
        else:
            expected, most = seconds * self.cut.source_fps, self.cut.max_difference_seconds * self.cut.source_fps
            fits = [axis for axis in (0, 1) if abs(array.shape[axis] - expected) <= most + SAME_TIME]
            rule = (
                f"its codes last {seconds:.2f} s, which is {expected:.0f} frames at {self.cut.source_fps:g} per second;"
                " mend --video_fps, or say with --feature_dim how many channels there are"
            )
        axis = _time_axis(fits, None if self.axes is None else self.axes.features)
        if axis is None:
            raise ArrayError("bad_features", _odd_shape(where, array, fits, rule))
        features = array if axis == 0 else array.T
        with np.errstate(over="ignore"):  # said in words below
            half = features.astype(np.float16)
        if not np.isfinite(half).all():
            is_large = bool(np.isfinite(features).all())
            odd = f"a magnitude above {_FLOAT16_MAX:g}, the largest of float16" if is_large else "NaN or infinity"
            raise ArrayError("not_finite", f"{where} holds {odd}")
        return half, axis


def _two_axes(array: np.ndarray, reason: str, where: str) -> np.ndarray:
    """The array without axes of length 1 that are too many."""
    while array.ndim > 2 and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    if array.ndim != 2 or not array.size:
        raise ArrayError(reason, f"{where} must have two axes, got shape {array.shape}")
    return array


def _time_axis(fits: Sequence[int], known: int | None) -> int | None:
    """Which axis is time: of those that may be, the one of all other recordings, or the only one; else None."""
    if known is not None:
        return known if known in fits else None
    return fits[0] if len(fits) == 1 else None


def _odd_shape(where: str, array: np.ndarray, fits: Sequence[int], rule: str) -> str:
    if not fits:
        return f"{where} has shape {array.shape}: {rule}"
    if len(fits) == 2:
        return f"{where} has shape {array.shape}: which axis is time cannot be told"
    return f"{where} has shape {array.shape}: in the other recordings the other axis is time"
