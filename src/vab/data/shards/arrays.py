"""Arrays that others have extracted: one for each recording, read from .npy, .npz or hdf5, brought to one layout.

Reading runs no code: pickled arrays are refused, and links from a file to another file are not followed.
"""

from __future__ import annotations

import io
import os
import threading
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vab.data.extract.cutting import check_segments, segment_starts
from vab.data.inputs.listing import files_below
from vab.data.media.tracks import SAME_TIME
from vab.extras import install_hint
from vab.spec import UserError

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_NO_FEATURES = "there are codes, but no features of this name"
_PICKLED = "is pickled, and reading it could run code: save it as a plain array, numpy.save(path, array)"
_HDF5 = (".h5", ".hdf5")
_SUFFIXES = (".npy", ".npz", *_HDF5)
_NPY_HEAD, _ZIP_HEAD, _PICKLE_HEAD = b"\x93NUMPY", b"PK\x03\x04", b"\x80"
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError),
    *(SyntaxError, tokenize.TokenError),  # numpy reads a header as Python's text
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged file can raise."""
_PARSING = threading.Lock()
"""Held while numpy parses a header as Python's text: Python 3.11 fails if two threads parse at once (gh-106905)."""


class ArrayError(Exception):
    """Why a recording's array cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Arrays:
    """Arrays by the names of their recordings: a file's path without the suffix, or a dataset's path in the hdf5 file.

    Args:
        place: The folder, searched with its subfolders (hidden ones left out), or the hdf5 file.
        kind: What the arrays are, ``codes`` or ``features``, as the command line calls them.
        key: Name of the array in each file, or in each recording's group of the one hdf5 file; None where there is one
            only.

    Attributes:
        suffixes: Of the file of each name; empty in one hdf5 file.
        form: How the arrays are stored, in words.
        uses_hdf5: Whether any of it is read with h5py.

    Raises:
        UserError: If there is no such place, it has no arrays, two files have one name, or h5py is needed and not
            installed.
    """

    def __init__(self, place: str | Path, kind: str, key: str | None = None) -> None:
        self.place, self.kind, self.key = Path(place), kind, key
        self.suffixes: dict[str, str] = {}
        self._flag = f"--{kind} {place}"
        self._file: Any = None  # the one hdf5 file
        is_folder = self.place.is_dir()
        if is_folder:
            self._list_files()
        elif not self.place.is_file() or self.place.suffix.lower() not in _HDF5:
            expected = f"expected a folder of {', '.join(_SUFFIXES)} files, or one .h5 file"
            raise UserError(f"{self._flag}: {expected if self.place.exists() else 'there is no such folder or file'}")
        suffixes = sorted({*self.suffixes.values()}) if is_folder else [self.place.suffix]
        self.form = f"{', '.join(suffixes)} files" if is_folder else f"one {suffixes[0]} file"
        self.form += "" if key is None else f", {key}"
        self.uses_hdf5 = any(suffix.lower() in _HDF5 for suffix in suffixes)
        if self.uses_hdf5:
            try:
                import h5py
            except ImportError as error:
                raise UserError(f"{place}: hdf5 files need a package ({error}): {install_hint('hdf5')}") from error
            self._open_hdf5 = h5py.File
        if not is_folder:
            self._list_datasets()

    def where(self, name: str) -> str:
        """What an array is called in messages."""
        return f"{self.place.name}/{name}{self.suffixes[name]}"

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of the files of these names, None where there is none; of one hdf5 file for all, its own size."""

        def size(name: str) -> int | None:
            if name not in self.suffixes:
                return None
            return os.stat(self.place if self._file is not None else self._path(name)).st_size

        with ThreadPoolExecutor(16) as threads:  # for the sake of slow disks
            starts = range(0, len(names), 4096)
            parts = threads.map(lambda start: [size(name) for name in names[start : start + 4096]], starts)
            return [one for part in parts for one in part]

    def read(self, name: str) -> np.ndarray:
        """The array of a name, as it is stored. Several threads may read.

        Raises:
            ArrayError: If it is pickled, damaged, or not the only one of its file and no key says which.
        """
        try:
            if self._file is not None:
                return _dataset(self._file[name if self.key is None else f"{name}/{self.key}"])
            if self.suffixes[name].lower() not in _HDF5:
                return self._read_numpy(self._path(name))
            with self._open_hdf5(self._path(name), "r") as file:
                return _dataset(file[self._choose(_datasets(file))])
        except ArrayError as error:
            raise ArrayError(error.reason, f"{self.where(name)} {error.detail}") from error
        except _DAMAGE as error:
            if "allow_pickle" in str(error):
                raise ArrayError("pickled", f"{self.where(name)} {_PICKLED}") from error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            raise ArrayError("unreadable", f"{self.where(name)} cannot be read: {reason}") from error

    def _path(self, name: str) -> Path:
        return self.place / f"{name}{self.suffixes[name]}"

    def _read_numpy(self, path: Path) -> np.ndarray:
        with path.open("rb") as file:
            head = file.read(len(_NPY_HEAD))
            if head.startswith(_PICKLE_HEAD):
                raise ArrayError("pickled", _PICKLED)
            if not head.startswith((_NPY_HEAD, _ZIP_HEAD)):
                raise ArrayError("unreadable", "is not a .npy or .npz file")
            file.seek(0)
            # A whole array is read before the lock is taken; of a .npz file only the one that is chosen is read.
            content = io.BytesIO(file.read()) if head.startswith(_NPY_HEAD) else file
            with _PARSING:
                loaded = np.load(content, allow_pickle=False)
                value = loaded if isinstance(loaded, np.ndarray) else loaded[self._choose(loaded.files)]
        if not isinstance(value, np.ndarray):
            raise ArrayError("unreadable", "holds something that is no array")
        return value

    def _choose(self, names: Sequence[str]) -> str:
        """Which of a file's arrays is wanted."""
        if self.key is not None:
            if self.key not in names:
                raise ArrayError("no_array", f"has no array {self.key!r}, it has {_some(names)}")
            return self.key
        if len(names) != 1:
            raise ArrayError("no_array", f"has {len(names)} arrays ({_some(names)}): say which with --{self.kind}_key")
        return names[0]

    def _list_files(self) -> None:
        for file in files_below(self.place, frozenset(_SUFFIXES)):
            name, suffix = os.path.splitext(file)
            if other := self.suffixes.get(name):
                raise UserError(f"{self._flag} has {name}{other} and {name}{suffix}: leave one of them")
            self.suffixes[name] = suffix
        if not self.suffixes:
            others = Counter(path.suffix for path in self.place.rglob("*") if path.is_file()).most_common(1)
            has = f"; it has {others[0][1]} {others[0][0] or 'other'} files" if others else ""
            if others and others[0][0] in (".pt", ".pth", ".pkl", ".pickle"):
                has += ", which can run code when they are read: save the arrays with numpy.save"
            raise UserError(f"{self._flag}: no {', '.join(_SUFFIXES)} file in it{has}")

    def _list_datasets(self) -> None:
        try:
            self._file = self._open_hdf5(self.place, "r")
        except OSError as error:
            reason = str(error).strip().partition("\n")[0][:150]
            raise UserError(f"{self._flag} cannot be read as hdf5: {reason}") from error
        names, ending = _datasets(self._file), "" if self.key is None else f"/{self.key}"
        self.suffixes = {name.removesuffix(ending): "" for name in names if name.endswith(ending)}
        if not self.suffixes:
            hint = f": --{self.kind}_key is the name in each recording's group; leave it out where each has one dataset"
            raise UserError(
                f"{self._flag}: no dataset NAME{ending} in it, it has {_some(names)}{hint if ending else ''}"
            )


def _datasets(file: Any) -> list[str]:
    """Names of an hdf5 file's datasets, those in groups included; links to other files are not followed."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


def _dataset(dataset: Any) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
        raise ArrayError("unreadable", "takes its values from other files")
    value = None if dataset.shape is None else dataset[()]
    if not isinstance(value, np.ndarray):
        raise ArrayError("unreadable", "holds no array")
    return value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"


@dataclass(frozen=True)
class CodecInfo:
    """What shards need of the codec that made their codes."""

    name: str
    """As ``load_codec`` takes it."""
    weight_hash: str
    """SHA-256 of its weights, or ``NOT_STATED``."""
    sample_rate: int
    """Hz."""
    code_rate: float
    """Steps per second."""
    codebooks: Tensor
    """(K, S, code_dim) float32."""

    def steps_for(self, seconds: float) -> int:
        """T of so many seconds: like all codecs here, a step for every hop, the last one begun included."""
        samples = round(seconds * self.sample_rate)
        return -(-samples // round(self.sample_rate / self.code_rate))


@dataclass(frozen=True)
class Cut:
    """How the arrays of a recording are cut into segments."""

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
    """Least length of a recording and of a last segment, which is padded to a whole one."""
    max_difference_seconds: float
    """How much a recording's codes and features may differ in length. More means a wrong rate or a wrong pair."""
    without_video: str = "leave_out"
    """``keep``, or ``leave_out``: recordings that have codes alone."""

    def check(self, code_rate: float) -> None:
        """Refuse numbers that make no sense.

        Args:
            code_rate: Steps per second.

        Raises:
            UserError: Saying which.
        """
        check_segments(self.segments, self.segment_seconds, self.video_fps, self.hop_seconds, self.min_seconds)
        if not self.video_fps <= self.source_fps < float("inf"):
            raise UserError(
                f"--target_video_fps {self.video_fps:g} is more than the {self.source_fps:g} frames per second that"
                " there are: give at most that many"
            )
        if not 0 <= self.max_difference_seconds < float("inf"):
            raise UserError(f"--max_difference_seconds must be 0 or more, got {self.max_difference_seconds:g}")
        if self.segments == "all" and self.hop_seconds * code_rate < 1:
            raise UserError(
                f"--hop_seconds must be a step of the codes or more, {1 / code_rate:g} s, got {self.hop_seconds:g}:"
                " two segments would start at one step"
            )

    def starts(self, end: float) -> Iterator[float]:
        """s: where segments start in a recording of so many seconds."""
        if self.segments == "centre":
            yield max(0.0, (end - self.segment_seconds) / 2)
            return
        yield from segment_starts(end, self.segment_seconds, self.hop_seconds, self.min_seconds)


class ArrayReader:
    """Reads the arrays of recordings and brings them to one layout.

    Args:
        codes: For each recording (K, T) or (T, K) of any integer type; axes of length 1 before, between or behind.
        features: Likewise (V, C) or (C, V), of any float type; None where there are none.
        codec: Of the codes.
        feature_dim: C; None to find out.
        cut: Rates and tolerances.

    Attributes:
        is_ready: Whether ``find_axes`` has found a usable recording. Its axes are those of all others, and
            ``feature_dim`` is known. Until then the shape of each array must tell which of its axes is time.
        codes_axis: Time is axis 0: (T, K); 1: (K, T).
        features_axis: Time is axis 0: (V, C); 1: (C, V); None where there are no features.
    """

    def __init__(
        self, codes: Arrays, features: Arrays | None, codec: CodecInfo, feature_dim: int | None, cut: Cut
    ) -> None:
        self.codes, self.features, self.codec, self.cut = codes, features, codec, cut
        self.feature_dim = feature_dim
        self.is_ready = False
        self.codes_axis: int | None = None
        self.features_axis: int | None = None

    def find_axes(self, names: Iterable[str]) -> list[ArrayError]:
        """Find the layout of the first usable recording; all others must have it, too.

        Returns:
            What is wrong with the recordings before it, or with all of them if none is usable.
        """
        problems: list[ArrayError] = []
        for name in names:
            try:
                _, features, codes_axis, features_axis = self._read(name)
                if features is None and self.features is not None:
                    raise ArrayError("no_features", _NO_FEATURES)
            except ArrayError as error:
                problems.append(error)
                continue
            self.feature_dim = self.feature_dim if features is None else features.shape[1]
            self.is_ready, self.codes_axis, self.features_axis = True, codes_axis, features_axis
            break
        return problems

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes (K, T) in [0, S) and features (V, C) float16 of a recording; None for one that has codes alone.

        Raises:
            ArrayError: Why the recording cannot be used.
        """
        return self._read(name)[:2]

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray | None, int, int | None]:
        """Codes, features, and which axis of each was time."""
        has_features = self.features is not None and name in self.features.suffixes
        if name not in self.codes.suffixes:
            reason, what = ("no_codes", "features, but no codes") if has_features else ("missing", "no arrays")
            raise ArrayError(reason, f"there are {what} of this name")
        if not has_features and self.cut.without_video != "keep":
            raise ArrayError("no_features", _NO_FEATURES)
        codes, codes_axis = self._read_codes(name)
        if self.features is None or not has_features:
            return codes, None, codes_axis, None
        sound = codes.shape[1] / self.codec.code_rate
        features, features_axis = self._read_features(self.features, name, sound)
        seen = len(features) / self.cut.source_fps
        if abs(sound - seen) > self.cut.max_difference_seconds + SAME_TIME:
            raise ArrayError(
                "lengths_differ",
                f"{codes.shape[1]} steps of codes last {sound:.2f} s, {len(features)} frames at "
                f"{self.cut.source_fps:g} per second {seen:.2f} s",
            )
        return codes, features, codes_axis, features_axis

    def _read_codes(self, name: str) -> tuple[np.ndarray, int]:
        """(K, T), and which axis of the array was time."""
        levels, size = self.codec.codebooks.shape[:2]
        array = _two_axes(self.codes, name, "iu", "integers")
        fits = [axis for axis in (0, 1) if array.shape[1 - axis] == levels]
        rule = f"{self.codec.name} has {levels} levels, so that one axis must be {levels}"
        axis = _time_axis(self.codes, name, array, fits, self.codes_axis, rule)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= size:
            odd = low if low < 0 else high
            raise ArrayError(
                "bad_codes", f"{self.codes.where(name)} holds {odd}: codes of {self.codec.name} are 0 to {size - 1}"
            )
        return array if axis == 1 else array.T, axis

    def _read_features(self, arrays: Arrays, name: str, seconds: float) -> tuple[np.ndarray, int]:
        """(V, C) float16, and which axis of the array was time."""
        array = _two_axes(arrays, name, "f", "floats")
        if self.feature_dim is not None:
            fits = [axis for axis in (0, 1) if array.shape[1 - axis] == self.feature_dim]
            rule = f"one axis must be the {self.feature_dim} channels"
        else:
            expected, most = seconds * self.cut.source_fps, self.cut.max_difference_seconds * self.cut.source_fps
            fits = [axis for axis in (0, 1) if abs(array.shape[axis] - expected) <= most + SAME_TIME]
            rule = (
                f"its codes last {seconds:.2f} s, which is {expected:.0f} frames at {self.cut.source_fps:g} per second;"
                " correct --video_fps, or give the number of channels with --feature_dim"
            )
        axis = _time_axis(arrays, name, array, fits, self.features_axis, rule)
        with np.errstate(over="ignore"):  # reported below
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            is_large = bool(np.isfinite(array).all())
            odd = f"a magnitude above {_FLOAT16_MAX:g}, the largest of float16" if is_large else "NaN or infinity"
            raise ArrayError("not_finite", f"{arrays.where(name)} holds {odd}")
        return half if axis == 0 else half.T, axis


def _two_axes(arrays: Arrays, name: str, kinds: str, words: str) -> np.ndarray:
    """An array with two axes and a type of these kinds; further axes of length 1 are removed."""
    array = arrays.read(name)
    while array.ndim > 2 and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    if array.ndim != 2 or not array.size:
        raise ArrayError(f"bad_{arrays.kind}", f"{arrays.where(name)} must have two axes, got shape {array.shape}")
    if array.dtype.kind not in kinds:
        raise ArrayError(f"bad_{arrays.kind}", f"{arrays.where(name)} must hold {words}, got {array.dtype}")
    return array


def _time_axis(arrays: Arrays, name: str, array: np.ndarray, fits: Sequence[int], known: int | None, rule: str) -> int:
    """Which axis is time: the one known from other recordings if it fits, else the only one that fits."""
    possible = [axis for axis in fits if known in (None, axis)]
    if len(possible) == 1:
        return possible[0]
    if len(fits) == 1:
        rule = "in the other recordings the other axis is time"
    problem = "which axis is time cannot be told" if len(fits) == 2 else rule
    raise ArrayError(f"bad_{arrays.kind}", f"{arrays.where(name)} has shape {array.shape}: {problem}")
