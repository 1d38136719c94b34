"""Read records by their offsets in the tars, a whole batch at once. Nothing is streamed or unpacked."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vab.data.reading.batch import PackedBatch
from vab.data.reading.labels import Vocabulary
from vab.data.reading.tars import Tars, broken_file
from vab.data.remote import Cache, local_copy
from vab.data.shards.format import (
    CODE_TYPES,
    CODEBOOKS,
    FEATURE_TYPES,
    INDEX,
    INDEX_COLUMNS,
    LABEL_IDS,
    LABEL_STARTS,
    check_codebooks,
    make_key,
    read_codebooks,
    read_manifest,
)
from vab.files import sha256_of
from vab.spec import Batch, SegmentSpec, UserError

_ROWS = 16384
_BETWEEN = 65536
"""Up to this many bytes between codes and features are read and dropped: one system call is faster than two."""
_START_LENGTH = len("_00000000")
"""Length of the start time that ``make_key`` appends to a recording's name."""


class BatchDataset(Dataset[Batch]):
    """A map-style dataset that reads a whole batch of records at once."""

    spec: SegmentSpec
    labels: tuple[str, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def stored_types(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Array types of codes and features in the tars."""
        raise NotImplementedError

    def fill(self, arrays: Mapping[str, np.ndarray], numbers: np.ndarray) -> bool:
        """Read records into a batch, all arrays but ``index``, ``valid`` and ``draw``. True if a record is short."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Batch:
        """Record ``number`` as a batch of one."""
        return self.read([number])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these records. ``DataLoader`` calls it with a list; there is nothing left to collate."""
        return self.read(numbers)

    def read(self, numbers: Sequence[int] | np.ndarray, valid: np.ndarray | None = None) -> Batch:
        """The batch of these records, in this order.

        Args:
            numbers: Record numbers, 0 to ``len(self) - 1``.
            valid: (B,) bool, copied into the batch; True by default.

        Raises:
            IndexError: If a number is out of range.
            UserError: If a code is not below the codebook's size, or if ``check_crc`` is set and a CRC-32 differs.
        """
        return self.gather(numbers, valid).unpack().widened()

    def gather(self, numbers: Sequence[int] | np.ndarray, valid: np.ndarray | None = None) -> PackedBatch:
        """Like ``read``, in the stored types and in one buffer, as workers return it."""
        index = as_numbers(numbers, len(self))
        packed = PackedBatch.of_records(len(index), self.spec, len(self.labels), *self.stored_types)
        arrays = packed.arrays()
        arrays["index"][:], arrays["valid"][:], arrays["draw"][:] = index, True if valid is None else valid, 0
        packed.ragged = self.fill(arrays, index)
        return packed


class ShardDataset(BatchDataset):
    """The records of a finished data set, in the order in which they were written.

    Opening reads the manifest and maps the index into memory. Each process opens a tar when it first reads from it, so
    forked and spawned workers can share the object.

    Args:
        folder: Written by ``vab extract`` or ``vab shards index``, or an address such as ``s3://bucket/train``, which
            is downloaded once.
        check_crc: Compare each array with its CRC-32. Reading then takes about twice as long.
        levels: Read only the first ``levels`` codebooks of each record, for a coarse model; all by default.
        cache: Where copies of remote data sets are kept; the default cache if not given.

    Attributes:
        folder: Local folder of the data set.
        spec: The numbers of every record as it is read: ``num_codebooks`` is ``levels``.
        labels: Vocabulary; empty if the data set has no labels.
        manifest: Content of ``manifest.json``.
        manifest_hash: SHA-256 of that file and of the chosen records; identifies the data set in checkpoints.

    Raises:
        UserError: If the folder is not a finished data set, has another format version, lacks files or holds truncated
            ones, has fewer than ``levels`` codebooks, or cannot be downloaded.
    """

    def __init__(
        self, folder: str | Path, check_crc: bool = False, levels: int | None = None, cache: Cache | None = None
    ) -> None:
        self._copy = local_copy(folder, cache)
        self.folder = self._copy.folder
        self.check_crc = check_crc
        self.manifest, self.manifest_hash = read_manifest(self.folder)
        self._stored_spec = stored = SegmentSpec.from_dict(self.manifest["spec"])
        if levels is not None and not 1 <= levels <= stored.num_codebooks:
            raise UserError(f"levels must be 1 to {stored.num_codebooks}, the codebooks of {folder}; got {levels}")
        self.spec = stored if levels is None else replace(stored, num_codebooks=levels)
        self.labels: tuple[str, ...] = tuple(self.manifest["labels"])
        types = self.manifest["dtypes"]
        if types["codes"] not in CODE_TYPES or types["features"] not in FEATURE_TYPES:
            raise UserError(f"{folder}: codes {types['codes']}, features {types['features']} cannot be read")
        self._layouts = {
            "codes": (np.dtype(types["codes"]), (stored.num_codebooks, stored.num_steps)),
            "features": (np.dtype(types["features"]), (stored.num_frames, stored.feature_dim)),
        }
        self._chosen: np.ndarray | None = None  # (records,) int64, rows of the index; None for all of them
        self._renamed: np.ndarray | None = None  # (labels stored,) int64, their numbers in ``labels``
        self._check_files()
        self._open()
        self._check_index()
        self._keys_have_starts = self._keys_are_ours()

    def __len__(self) -> int:
        return len(self._index) if self._chosen is None else len(self._chosen)

    def choose(self, numbers: Sequence[int] | np.ndarray) -> None:
        """Keep only these records, in this order: they become records 0, 1, ...

        Args:
            numbers: Current record numbers.

        Raises:
            UserError: If there are no numbers.
        """
        if not len(numbers):
            raise UserError(f"no record of {self.folder} was chosen")
        self._chosen = self._rows(numbers)
        text = self.manifest_hash.encode() + self._chosen.astype("<i8").tobytes()
        self.manifest_hash = hashlib.sha256(text).hexdigest()

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Number the labels as in a vocabulary, which must contain all of them and may contain more.

        Raises:
            UserError: If the vocabulary lacks a label of the data set.
        """
        try:
            numbers = [vocabulary.number(label) for label in self.manifest["labels"]]
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error
        self.labels, self._renamed = vocabulary.names, np.array(numbers, dtype=np.int64)

    @property
    def stored_types(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Array types of codes and features in the tars."""
        return self._layouts["codes"][0], self._layouts["features"][0]

    def fill(self, arrays: Mapping[str, np.ndarray], numbers: np.ndarray, places: np.ndarray | None = None) -> bool:
        """Read records into a batch, all arrays but ``index``, ``valid`` and ``draw``, which the caller fills.

        Args:
            arrays: Arrays of a ``PackedBatch``, in the stored types or wider ones.
            numbers: (n,) int64 record numbers.
            places: (n,) int64 positions in the batch; 0 to n - 1 by default.

        Returns:
            Whether a record is shorter than the segment.
        """
        numbers = self._rows(numbers)
        rows = self._index[numbers]
        if places is None:
            places = np.arange(len(rows))
        if all(arrays[name].dtype == dtype for name, (dtype, _) in self._layouts.items()):
            self._gather(rows, arrays, places)
        else:
            stored = {
                name: np.empty((len(rows), *arrays[name].shape[1:]), dtype)
                for name, (dtype, _) in self._layouts.items()
            }
            self._gather(rows, stored, np.arange(len(rows)))
            for name, array in stored.items():
                arrays[name][places] = array
        self._check_range(rows, arrays["codes"], places)
        arrays["labels"][places] = self._label_table(numbers)
        arrays["steps"][places], arrays["frames"][places] = rows["steps"], rows["frames"]
        arrays["source"][places] = self._sources[numbers]
        return bool((rows["steps"] < self.spec.num_steps).any() or (rows["frames"] < self.spec.num_frames).any())

    def sources(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,) int64: number of each record's recording, as in ``Batch.source``."""
        return self._sources[self._rows(numbers)]

    def key(self, number: int) -> str:
        """The key of record ``number``."""
        return bytes(self._index["key"][self._row(number)]).decode()

    def record(self, number: int) -> dict[str, Any]:
        """The metadata of record ``number``: id, source, start second, labels, valid lengths."""
        row = self._index[self._row(number)]
        text = self._tars.read(int(row["shard"]), int(row["json_offset"]), int(row["json_size"]))
        if zlib.crc32(text) != row["json_crc"]:
            raise self._damaged(row, "json")
        meta: dict[str, Any] = json.loads(text)
        return meta

    def record_id(self, number: int) -> str:
        """The id of record ``number``, or its key if it has none, as in shards made by other programs."""
        return str(self.record(number).get("id", self.key(number)))

    def label_names(self, number: int) -> list[str]:
        """The labels of record ``number``."""
        row = self._row(number)
        ids = self._label_ids[self._label_starts[row] : self._label_starts[row + 1]]
        return [self.labels[label] for label in self._named(ids).tolist()]

    def label_counts(self) -> np.ndarray:
        """(L,) int64: how many records have each label."""
        return sum(
            (self._label_table(rows).sum(0, dtype=np.int64) for rows in self._in_parts()),
            np.zeros(len(self.labels), dtype=np.int64),
        )

    def labels_per_record(self) -> np.ndarray:
        """(records,) int64: how many labels each record has."""
        return np.diff(self._label_starts)[self._rows(np.arange(len(self)))]

    def class_weights(self) -> np.ndarray:
        """(records,) float64: the sum over a record's labels of 1 / how many records have the label.

        If every record has one label, drawing by these weights gives each class equally often, as AST and CAV-MAE do.

        Raises:
            UserError: If no record has a label.
        """
        share = 1.0 / np.maximum(self.label_counts(), 1)
        weights = np.concatenate([self._label_table(rows) @ share for rows in self._in_parts()])
        if not weights.any():
            raise UserError(f"no record of {self.folder} has a label: there are no classes to balance")
        return weights

    def frames(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,) int64: number of valid frames of these records; 0 for a record without video."""
        return self._index["frames"][self._rows(numbers)].astype(np.int64)

    def without_video(self) -> int:
        """Number of records without video."""
        return int((self.frames(np.arange(len(self))) == 0).sum())

    def has_short_records(self) -> bool:
        """Whether a record has fewer steps or frames than the segment."""
        rows, spec = self._rows(np.arange(len(self))), self.spec
        return any(
            bool((self._index[name][rows] < whole).any())
            for name, whole in (("steps", spec.num_steps), ("frames", spec.num_frames))
        )

    def index_row(self, number: int) -> dict[str, Any]:
        """Row of the index for record ``number``: the columns of ``index_dtype``."""
        row = self._index[self._row(number)]
        return {name: row[name].item() for name in INDEX_COLUMNS} | {"key": self.key(number)}

    @property
    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32: the vectors whose sum over levels the codec's decoder reads."""
        codebooks = read_codebooks(self.folder / CODEBOOKS)
        check_codebooks(codebooks, self._stored_spec)
        return codebooks[: self.spec.num_codebooks]

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens its own files; pickling a memory map would copy the file.
        maps = ("_index", "_label_starts", "_label_ids", "_tars", "_between", "_sources")
        return {name: value for name, value in self.__dict__.items() if name not in maps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _keys_are_ours(self) -> bool:
        """Whether ``make_key`` made the keys, which need not be so in shards that another program wrote."""
        try:
            first = self.record(0)
            return make_key(first["id"], first["start_seconds"]) == self.key(0)
        except (KeyError, TypeError, ValueError):  # damage is reported when the record is read
            return False

    def _check_files(self) -> None:
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        sizes |= {shard["name"]: shard["bytes"] for shard in self.manifest["shards"]}
        for name, size in sizes.items():
            path = self.folder / name
            got = path.stat().st_size if path.is_file() else None
            if got != size:
                found = "is missing" if got is None else f"has {got} bytes instead of {size}"
                raise broken_file(self.folder, name, found)
        for name, entry in self.manifest["files"].items() if self.check_crc else ():
            if sha256_of(self.folder / name) != entry["sha256"]:
                raise broken_file(self.folder, name, "is not what was written")

    def _open(self) -> None:
        try:
            arrays = [
                np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
                for name in (INDEX, LABEL_STARTS, LABEL_IDS)
            ]
        except ValueError as error:
            raise UserError(f"index of {self.folder} is damaged: type: vab shards index {self.folder}") from error
        # Plain views: numpy's memmap subclass makes each slice several times slower.
        self._index, self._label_starts, self._label_ids = (array.view(np.ndarray) for array in arrays)
        self._tars = Tars(self.folder, self.manifest["shards"])
        self._between = memoryview(bytearray(_BETWEEN))  # bytes that are read and dropped

    def _check_index(self) -> None:
        """Refuse an index that points beyond a tar. ``vab shards verify`` checks the content of the tars."""
        index, ends, count = self._index, self._label_starts, self.manifest["counts"]["records"]
        names = (*INDEX_COLUMNS, "key")
        problem = None
        if index.dtype.names != names:
            problem = f"columns {index.dtype.names} instead of {names}"
        elif len(index) != count or len(ends) != count + 1:
            problem = f"{len(index)} records instead of {count}"
        elif count and index["shard"].max() >= len(self.manifest["shards"]):
            problem = f"shard {index['shard'].max()} of {len(self.manifest['shards'])}"
        elif len(self._label_ids) and not 0 <= self._label_ids.min() <= self._label_ids.max() < len(self.labels):
            problem = f"labels {self._label_ids.min()} to {self._label_ids.max()} of {len(self.labels)}"
        elif (ends[0], ends[-1]) != (0, len(self._label_ids)) or (ends[1:] < ends[:-1]).any():
            problem = f"{LABEL_STARTS} does not rise from 0 to {len(self._label_ids)}"
        else:
            limits = np.array([shard["bytes"] for shard in self.manifest["shards"]], dtype=np.uint64)[index["shard"]]
            for name in ("codes", "features", "json"):
                if (index[f"{name}_offset"] + index[f"{name}_size"] > limits).any():
                    problem = f"{name} beyond the end of a tar"
            for name, (dtype, shape) in self._layouts.items():
                if (index[f"{name}_size"] != dtype.itemsize * shape[0] * shape[1]).any():
                    problem = f"{name} of another size than {shape} {dtype}"
        if problem:
            raise UserError(f"index of {self.folder} is wrong ({problem}): type: vab shards index {self.folder}")

    def _gather(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray], places: np.ndarray) -> None:
        """Read codes and features of these rows to these positions of ``arrays`` (B, ...), and check their CRC-32.

        Of the codes as many levels are read as ``arrays`` has room for.
        """
        codes, features = (arrays[name].view(np.uint8).reshape(len(arrays[name]), -1) for name in self._layouts)
        width, height = codes.shape[1], features.shape[1]
        starts = rows["codes_offset"].astype(np.int64)
        # Headers and levels that are not wanted lie between codes and features.
        gaps = (rows["features_offset"].astype(np.int64) - starts - width).tolist()
        between = {gap: self._between[:gap] for gap in set(gaps) if 0 <= gap <= _BETWEEN}
        read = self._tars.read_into
        for place, shard, start, gap in zip(
            places.tolist(), rows["shard"].tolist(), starts.tolist(), gaps, strict=True
        ):
            if gap in between:
                read(shard, start, [codes[place], between[gap], features[place]], width + gap + height)
            else:  # shards of another program may have another order
                read(shard, start, [codes[place]], width)
                read(shard, start + width + gap, [features[place]], height)
        for name, bytes_of in (("codes", codes), ("features", features)) if self.check_crc else ():
            for row, array in zip(rows, bytes_of[places], strict=True):
                size, start = int(row[f"{name}_size"]), int(row[f"{name}_offset"])
                rest = self._tars.read(int(row["shard"]), start + array.size, size - array.size)
                if zlib.crc32(rest, zlib.crc32(array)) != row[f"{name}_crc"]:
                    raise self._damaged(row, name)

    def _check_range(self, rows: np.ndarray, codes: np.ndarray, places: np.ndarray) -> None:
        """Refuse codes beyond the codebook: in the network they would fail without naming the file."""
        size = self.spec.codebook_size
        codes = codes.view(f"u{codes.itemsize}")  # as unsigned numbers, negative codes are too large as well
        own = codes if len(places) == len(codes) else codes[places]
        if own.max(initial=0) >= size:
            wrong = (codes[places].reshape(len(places), -1) >= size).any(1)
            raise self._damaged(rows[wrong.argmax()], "codes")

    def _label_table(self, rows: np.ndarray) -> np.ndarray:
        """(B, L) float32 of 0 and 1: labels of these rows of the index."""
        table = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        if self.labels:
            starts = self._label_starts[rows]
            counts = self._label_starts[rows + 1] - starts
            # All label positions of the batch in one array: a run of counts[i] numbers from starts[i] for each record.
            places = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
            table[np.repeat(np.arange(len(rows)), counts), self._named(self._label_ids[places])] = 1
        return table

    def _named(self, stored: np.ndarray) -> np.ndarray:
        """Stored label numbers as positions in ``labels``."""
        return stored if self._renamed is None else self._renamed[stored]

    def _rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of these records in the index."""
        index = as_numbers(numbers, len(self))
        return index if self._chosen is None else self._chosen[index]

    def _row(self, number: int) -> int:
        return int(self._rows([number])[0])

    def _in_parts(self) -> Iterator[np.ndarray]:
        """Rows of all records, in parts small enough for a table of their labels."""
        for start in range(0, len(self), _ROWS):
            yield self._rows(np.arange(start, min(start + _ROWS, len(self))))

    @cached_property
    def _sources(self) -> np.ndarray:
        """(rows of the index,) int64: ``Batch.source`` of each. Computed once: 0.25 s for a million rows."""
        keys = self._index["key"]
        parts = (keys[start : start + _ROWS] for start in range(0, len(keys), _ROWS))
        return np.concatenate([sources_of(part, self._keys_have_starts) for part in parts])

    def _damaged(self, row: np.void, name: str) -> UserError:
        tar = self.manifest["shards"][int(row["shard"])]["name"]
        what = f"{tar}: {name} of record {bytes(row['key']).decode()}"
        return broken_file(self.folder, what, "is not what was written")


def as_numbers(numbers: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """(B,) int64 numbers of records of a data set that has ``count`` records.

    Raises:
        IndexError: If there are none, or one is out of range.
        TypeError: If they are not integers, such as a boolean mask, whose True would mean record 1.
    """
    index = np.asarray(numbers)
    if len(index) and index.dtype.kind not in "iu":
        raise TypeError(
            f"record numbers must be whole numbers, got {index.dtype}: of a mask, give np.flatnonzero(mask)"
        )
    if not len(index) or index.min() < 0 or index.max() >= count:
        raise IndexError(f"record numbers must be in 0..{count - 1}, got {index[:8].tolist()}")
    return index.astype(np.int64, copy=False)


def sources_of(keys: np.ndarray, with_starts: bool = True) -> np.ndarray:
    """A number for the recording of each record: a 64-bit hash of its key without the start time.

    Args:
        keys: (B,) bytes (``S``) of any length.
        with_starts: Whether keys end with a start time, as those of ``make_key`` do. Other keys may end with a number.

    Returns:
        (B,) int64; equal for keys of one recording, whatever the length of the longest key.
    """
    length = -(-keys.dtype.itemsize // 8) * 8
    letters = keys.astype(f"S{length}").view(np.uint8).reshape(len(keys), length)
    ends = np.count_nonzero(letters, axis=1)
    tails = letters[np.arange(len(keys))[:, None], np.maximum(ends[:, None] + np.arange(-_START_LENGTH, 0), 0)]
    digits = tails[:, 1:] - np.uint8(ord("0")) < 10  # characters below "0" wrap around
    has_start = (ends > _START_LENGTH) & (tails[:, 0] == ord("_")) & digits.all(1)
    kept = ends - _START_LENGTH * (has_start & with_starts)
    words = (letters * (np.arange(length) < kept[:, None])).view(np.uint64)  # (B, length / 8)
    # Multiply each word by a factor of its position, then apply the finaliser of splitmix64. It maps 0 to 0, so padding
    # does not change the sum.
    words = words * (2 * np.arange(words.shape[1], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words.sum(1, dtype=np.uint64).view(np.int64)
