"""Writing a data set: records in, tars with an index and a manifest out. A kill leaves nothing half written.

``vab.data.shards.format`` describes the files. A data set is written part by part. A part is one tar (none if it has no
record), the rows of its index (``parts/000000.npy``), and ``parts/000000.json``, which is written last and marks the
part done. ``concatenate`` joins the rows of all parts to the index of the data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import webdataset
from torch import Tensor

from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    CODEBOOKS,
    FORMAT,
    FORMAT_VERSION,
    HEAD,
    INDEX,
    INDEX_COLUMNS,
    KEY_PATTERN,
    LABEL_IDS,
    LABEL_STARTS,
    MANIFEST,
    MAX_KEY_LENGTH,
    PARTS,
    SIDE_FILES,
    Left,
    array_pieces,
    check_codebooks,
    head_differences,
    index_dtype,
    is_complete,
    json_lines,
    library_versions,
    part_name,
    rows_name,
    save_array,
    shard_name,
)
from vab.files import Lock, explain_full_disk, sha256_of, write_atomically
from vab.spec import SegmentSpec, UserError

_TAR_BLOCK = 512
_LOCK = "writing.lock"

Record = tuple[str, np.ndarray, np.ndarray, Mapping[str, Any]]
"""Key, codes, features and description: the arguments of ``RecordPacker.pack``."""


class Packed(NamedTuple):
    """A record as it goes into a tar."""

    key: str
    """From ``make_key``."""
    members: dict[str, bytes]
    """Contents of its files, by field."""
    skips: dict[str, int]
    """Bytes of each that come before the data: the headers of arrays."""
    steps: int
    """Valid steps of the codes."""
    frames: int
    """Valid frames of the features."""
    labels: list[int]
    """Numbers in the vocabulary, sorted."""


class RecordPacker:
    """Checks records against a spec and a vocabulary, and packs them.

    Args:
        spec: The numbers that each record is checked against.
        labels: Vocabulary; a record's labels are names from it.

    Raises:
        UserError: If the format cannot hold such records.
    """

    def __init__(self, spec: SegmentSpec, labels: Sequence[str] = ()) -> None:
        if len(set(labels)) != len(labels):
            raise UserError("label vocabulary: a name occurs twice")
        if spec.codebook_size > 2**16:
            raise UserError(f"codes are stored as uint16: a codebook of {spec.codebook_size} entries does not fit")
        self.spec = spec
        self._numbers = {name: number for number, name in enumerate(labels)}

    def pack(self, key: str, codes: np.ndarray, features: np.ndarray, meta: Mapping[str, Any]) -> Packed:
        """Pack one record.

        Args:
            key: From ``make_key``.
            codes: (K, T) of any integer type, in [0, S), stored as uint16. Steps from ``meta["steps"]`` on are padding.
            features: (V, C) float, finite as float16. Frames from ``meta["frames"]`` on are padding.
            meta: JSON values, stored with the record. Needed: ``id`` (str), ``source`` (str), ``start_seconds`` (s),
                ``steps`` (1..T), ``frames`` (1..V, or 0 without video), ``labels`` (names of the vocabulary).

        Raises:
            UserError: If a value contradicts the spec or the vocabulary, or the key is not allowed.
        """
        spec, where, codes, features = self.spec, f"record {key}", np.asarray(codes), np.asarray(features)
        if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
            raise UserError(f"key {key!r} must be 1 to {MAX_KEY_LENGTH} of A-Z a-z 0-9 _ -: make it with make_key")
        if missing := [
            name for name in ("id", "source", "start_seconds", "steps", "frames", "labels") if name not in meta
        ]:
            raise UserError(f"{where}: its description lacks {missing}")
        for name, values, shape, kind in (
            ("codes", codes, (spec.num_codebooks, spec.num_steps), "integer"),
            ("features", features, (spec.num_frames, spec.feature_dim), "floating"),
        ):
            if values.shape != shape or not np.issubdtype(values.dtype, getattr(np, kind)):
                raise UserError(f"{where}: {name} must be {kind} of shape {shape}, got {values.dtype} {values.shape}")
        with np.errstate(over="ignore"):  # check_values reports infinities
            half = features.astype("<f2", order="C")
        check_values(where, codes, half, meta, spec, self._numbers)
        # C order, in whatever order the arrays lie in memory: records are read back in C order.
        arrays = {"codes.npy": codes.astype("<u2", order="C"), "features.npy": half}
        members = {name: save_array(values) for name, values in arrays.items()}
        skips = {name: len(members[name]) - values.nbytes for name, values in arrays.items()} | {"json": 0}
        members["json"] = json.dumps(dict(meta), sort_keys=True, allow_nan=False).encode()
        labels = sorted({self._numbers[name] for name in meta["labels"]})
        return Packed(key, members, skips, int(meta["steps"]), int(meta["frames"]), labels)


def check_values(
    where: str,
    codes: np.ndarray,
    features: np.ndarray,
    meta: Mapping[str, Any],
    spec: SegmentSpec,
    labels: Container[str] | None,
) -> None:
    """Refuse a record whose values contradict the spec.

    Args:
        where: The record's name in messages.
        codes: (K, T) integers.
        features: (V, C) floats.
        meta: Its description, with ``steps``, ``frames`` and ``labels``.
        spec: Of the data set.
        labels: The vocabulary; None allows any label.

    Raises:
        UserError: At the first value that does not fit.
    """
    if codes.min() < 0 or codes.max() >= spec.codebook_size:
        got = f"{codes.min()}..{codes.max()}"
        raise UserError(f"{where}: codes must be in 0..{spec.codebook_size - 1}, got {got}")
    if not np.isfinite(features).all():
        largest = f"{np.finfo(features.dtype).max:g}"
        raise UserError(f"{where}: features must be finite as {features.dtype}, got NaN or a value above {largest}")
    for name, least, limit in (("steps", 1, spec.num_steps), ("frames", 0, spec.num_frames)):
        if not isinstance(meta[name], int) or not least <= meta[name] <= limit:
            raise UserError(f"{where}: {name} must be in {least}..{limit}, got {meta[name]}")
    if labels is not None and (unknown := [name for name in meta["labels"] if name not in labels]):
        raise UserError(f"{where}: labels {unknown} are not in the data set's vocabulary")


class _HashedFile:
    """A file being written, and the SHA-256 of its content."""

    def __init__(self, path: Path) -> None:
        # The kernel caches what is written at once in large pages, from which records are read a quarter faster.
        self._file = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        if not self._file.closed:  # tarfile flushes its buffer when it is garbage collected, also after a failed write
            self._file.write(data)
            self._hash.update(data)
            self.size += len(data)
        return len(data)

    def finish(self) -> str:
        """Bring the file to disk; return its hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Write no more."""
        with suppress(OSError):  # closing flushes what a full disk did not take
            self._file.close()


class PartWriter:
    """Writes a part in a work folder, then publishes it.

    Args:
        out: Where it is published.
        work: From ``out.work()``.
        number: Of the part.
        version: 0, or more where the part is written again beside the one that is there.
    """

    def __init__(self, out: OutFolder, work: Path, number: int, version: int = 0) -> None:
        self.out, self.work, self.number, self.version = out, work, number, version
        self._file: _HashedFile | None = None
        self._tar: webdataset.TarWriter | None = None
        self._columns: dict[str, list[Any]] = {name: [] for name in (*INDEX_COLUMNS, "key")}
        self._labels: list[list[int]] = []
        self._offset = 0

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, record: Packed) -> None:
        """Write a record to the tar.

        Raises:
            UserError: If the disk is full.
        """
        try:
            if self._tar is None:
                self._file = _HashedFile(self.work / shard_name(self.number, self.version))
                # Fixed owner, mode and time: the same input gives the same bytes.
                self._tar = webdataset.TarWriter(
                    self._file, user="vab", group="vab", mode=0o444, mtime=0, encoder=False
                )
            self._tar.write({"__key__": record.key, **record.members})
        except OSError as error:
            raise self._full(error) from error
        for field in sorted(record.members):  # the order in which TarWriter writes them
            content, skip, name = record.members[field], record.skips[field], field.removesuffix(".npy")
            self._columns[f"{name}_offset"].append(self._offset + _TAR_BLOCK + skip)
            self._columns[f"{name}_size"].append(len(content) - skip)
            self._columns[f"{name}_crc"].append(zlib.crc32(memoryview(content)[skip:]))
            self._offset += _TAR_BLOCK + -(-len(content) // _TAR_BLOCK) * _TAR_BLOCK
        for name, value in (("key", record.key), ("steps", record.steps), ("frames", record.frames), ("shard", 0)):
            self._columns[name].append(value)
        self._labels.append(record.labels)

    def publish(self, sources: Sequence[str], left_out: Sequence[Left], further: Mapping[str, Any]) -> None:
        """Finish the part and move its files to the data set's folder.

        Args:
            sources: Names of its inputs.
            left_out: What of them is left out.
            further: Other JSON values of the part.

        Raises:
            UserError: If the disk is full.
        """
        names, tar = [], None
        try:
            if self._tar is not None and self._file is not None:
                self._tar.close()
                name = shard_name(self.number, self.version)
                sha256, size = self._file.finish(), self._file.size
                tar = {"name": name, "records": len(self), "bytes": size, "sha256": sha256}
                longest = max(map(len, self._columns["key"]))
                rows = np.zeros(len(self), index_dtype(longest))
                for column, values in self._columns.items():
                    rows[column] = values
                names = [name, rows_name(self.number, self.version)]
                write_atomically(self.work / names[1], save_array(rows))
            names.append(part_name(self.number))
            part = {"tar": tar, "version": self.version, **further}
            part |= {"sources": sources, "labels": self._labels, "left_out": left_out}
            write_atomically(self.work / names[-1], json_lines(part, "sources", "labels", "left_out"))
            self.out.publish(self.work, names)
        except OSError as error:
            raise self._full(error) from error
        except UserError as error:
            raise self.out.explain(error, self.work) from error

    def discard(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.discard()

    def _full(self, error: OSError) -> OSError | UserError:
        self.discard()
        return explain_full_disk(error, self.out.scratch(), self._offset)


def read_part(out: OutFolder, number: int) -> dict[str, Any]:
    """The JSON values that ``PartWriter.publish`` wrote, with ``sources``, ``labels`` and ``left_out``.

    Raises:
        UserError: If its tar is not there, or not whole.
    """
    part: dict[str, Any] = json.loads(out.path(part_name(number)).read_bytes())
    part["left_out"] = [*map(Left.of, part["left_out"])]
    tar = part["tar"]
    if tar is not None and (size := out.size(tar["name"])) != tar["bytes"]:
        raise UserError(
            f"{out}/{tar['name']} {'is missing' if size is None else f'has {size} bytes'}, {tar['bytes']} were"
            f" written: delete {out}/{part_name(number)}, then run again"
        )
    return part


def read_rows(out: OutFolder, number: int, part: Mapping[str, Any]) -> np.ndarray:
    """The rows of a part's index."""
    rows: np.ndarray = np.load(out.path(rows_name(number, part["version"])), allow_pickle=False)
    return rows


def read_records(tar: Path, rows: np.ndarray, spec: SegmentSpec) -> Iterator[tuple[str, np.ndarray, np.ndarray, Any]]:
    """Records of a tar that a ``PartWriter`` wrote: key, codes, features and description, as they were given."""
    with tar.open("rb") as file:
        for row in rows:
            found = []
            for field in ("codes", "features", "json"):
                file.seek(int(row[f"{field}_offset"]))
                found.append(file.read(int(row[f"{field}_size"])))
            codes = np.frombuffer(found[0], "<u2").reshape(spec.num_codebooks, spec.num_steps)
            features = np.frombuffer(found[1], "<f2").reshape(spec.num_frames, spec.feature_dim)
            yield row["key"].decode(), codes, features, json.loads(found[2])


class Rows(NamedTuple):
    """Rows of an index, of one tar or of several."""

    records: int
    """How many."""
    key_length: int
    """Of the longest key."""
    load: Callable[[], np.ndarray]
    """Reads them; their column ``shard`` counts from 0."""
    label_counts: np.ndarray
    """(records,) int, labels of each."""
    label_ids: np.ndarray
    """(labels of all,) int, their numbers in the vocabulary."""
    tars: Sequence[Mapping[str, Any]]
    """Entries of the tars for the manifest."""


def concatenate(tables: Sequence[Rows]) -> np.ndarray:
    """The index of a data set, (records,) of ``index_dtype``.

    Raises:
        UserError: If two records have one key.
    """
    key_length = max((rows.key_length for rows in tables), default=1)
    index = np.zeros(sum(rows.records for rows in tables), index_dtype(key_length))
    begin = num_tars = 0
    for rows in tables:
        own, loaded = index[begin : begin + rows.records], rows.load()
        for name in loaded.dtype.names or ():
            own[name] = loaded[name]
        own["shard"] += num_tars
        begin, num_tars = begin + rows.records, num_tars + len(rows.tars)
    keys = np.sort(index["key"])
    if len(twice := keys[1:][keys[1:] == keys[:-1]]):
        tars = [tar["name"] for rows in tables for tar in rows.tars]
        some = " and ".join(tars[shard] for shard in index["shard"][index["key"] == twice[0]][:2])
        raise UserError(f"key {twice[0].decode()} occurs twice, in {some}: is the same file listed twice?")
    return index


def rows_of_part(out: OutFolder, number: int, part: Mapping[str, Any] | None = None) -> Rows | None:
    """The rows of a part; None if it has no record. ``part`` is as ``read_part`` gives it."""
    part = read_part(out, number) if part is None else part
    if part["tar"] is None:
        return None
    load = partial(read_rows, out, number, {"version": part["version"]})
    length = np.load(out.path(rows_name(number, part["version"])), mmap_mode="r").dtype["key"].itemsize
    counts = np.array([len(labels) for labels in part["labels"]], np.int64)
    ids = np.fromiter((label for labels in part["labels"] for label in labels), np.int32)
    return Rows(part["tar"]["records"], length, load, counts, ids, [part["tar"]])


def publish_data_set(
    out: OutFolder,
    head: Mapping[str, Any],
    tables: Sequence[Rows],
    codebooks: Tensor,
    left_out: Sequence[Left | Mapping[str, Any]],
    num_sources: int,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Write index, labels, codebooks and at last the manifest, which is returned.

    Arguments and errors are those of ``write_data_set``.
    """
    with out.work() as work:
        manifest = write_data_set(work, head, tables, codebooks, left_out, num_sources, further)
        out.refresh()
        if out.has(MANIFEST):
            # Another process may have joined the same parts; one that joined others may have replaced its files since.
            names = (*SIDE_FILES, MANIFEST)
            if all(out.has(name) and sha256_of(out.path(name)) == sha256_of(work / name) for name in names):
                return manifest
            out.remove(MANIFEST)  # killed here, the folder is unfinished, not wrong
        out.publish(work, [*SIDE_FILES, MANIFEST])
    return manifest


def write_data_set(
    folder: Path,
    head: Mapping[str, Any],
    tables: Sequence[Rows],
    codebooks: Tensor,
    left_out: Sequence[Left | Mapping[str, Any]],
    num_sources: int,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Write all files of a data set but its tars; returns the manifest.

    Args:
        folder: Where to write them.
        head: ``spec``, ``labels`` and ``extraction``.
        tables: All rows of the index.
        codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads.
        left_out: What is not in the data set, and why.
        num_sources: Inputs, those left out included.
        further: Entries of the manifest to add or to replace.

    Raises:
        UserError: If the codebooks do not fit the spec, two records have one key, or the disk is full.
    """
    check_codebooks(codebooks, SegmentSpec.from_dict(head["spec"]))
    index = concatenate(tables)
    label_counts = np.concatenate([np.zeros(0, np.int64), *(rows.label_counts for rows in tables)])
    label_ids = np.concatenate([np.zeros(0, np.int32), *(rows.label_ids for rows in tables)])
    contents: dict[str, list[bytes | memoryview]] = {
        INDEX: array_pieces(index),
        LABEL_STARTS: array_pieces(np.concatenate([[0], np.cumsum(label_counts, dtype=np.int64)]).astype("<i8")),
        LABEL_IDS: array_pieces(label_ids.astype("<i4")),
        CODEBOOKS: [safetensors.torch.save({"codebooks": codebooks.detach().cpu().float().contiguous()})],
    }
    files = {}
    for name, pieces in contents.items():
        write_atomically(folder / name, pieces)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": head["spec"],
        "dtypes": {"codes": "<u2", "features": "<f2"},
        "labels": head["labels"],
        "counts": {"records": len(index), "sources": num_sources, "left_out": len(left_out)},
        "extraction": head["extraction"],
        "versions": library_versions(),
        "files": files,
        "shards": [tar for rows in tables for tar in rows.tars],
        **further,
        "left_out": left_out,
    }
    write_atomically(folder / MANIFEST, json_lines(manifest, "left_out"))
    return manifest


def begin_folder(out: OutFolder, head: Mapping[str, Any]) -> None:
    """Write down what all parts of a data set share, or check that existing parts were made with the same.

    Args:
        out: The data set's folder.
        head: ``spec``, ``labels`` and ``extraction``, and other JSON values. ``versions`` may differ.

    Raises:
        UserError: If the folder holds parts of another data set, or files of another maker that would be replaced.
    """
    mine: dict[str, Any] = json.loads(json.dumps(head))
    if out.has(HEAD):
        try:
            theirs = json.loads(out.path(HEAD).read_bytes())
            differences = head_differences(theirs, mine)
        except UserError:  # that it cannot be fetched
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out}/{HEAD} was not written by vab and would be replaced: give another folder, or move the file"
            ) from error
        names = sorted({*theirs, *mine} - {"spec", "labels", "extraction", "versions"})
        differences += [f"{name}: {theirs.get(name)} != {mine.get(name)}" for name in names
                        if theirs.get(name) != mine.get(name)]  # fmt: skip
        if differences:
            raise UserError(
                f"{out} was begun with other settings ({'; '.join(differences)}):"
                " use the same ones to resume, or give another folder"
            )
        return
    if tars := out.foreign_tars():
        raise UserError(
            f"{out} holds tars that vab did not write ({tars[0]}, ...): give another folder;"
            f" to use these tars, type: vab shards index {out}"
        )
    others = [name for name in SIDE_FILES if out.has(name)]
    if others := others + ([PARTS] if out.is_file(PARTS) else [part_name(number) for number in out.parts()][:1]):
        raise UserError(
            f"{out} holds files that vab did not write and would replace ({', '.join(others)}):"
            " give another folder, or move them"
        )
    with out.work() as work:
        write_atomically(work / HEAD, json.dumps(mine).encode())
        out.publish(work, [HEAD])


class ShardWriter:
    """Writes a data set source by source, so that a kill at any moment loses no finished tar and doubles no record.

    A tar is finished with the source that fills it. A writer that is opened on the folder of a killed one resumes after
    the last finished tar: skip the sources in ``done``. The context manager deletes what is in no finished tar. After a
    method has raised, only ``close`` makes sense.

    Args:
        folder: Made if absent.
        spec: The numbers that each record is checked against.
        labels: Vocabulary; a record's labels are names from it.
        records_per_shard: A tar is closed at the end of the source with which it reaches this number.
        extraction: Further JSON values for the manifest: how the records were made. A killed writer's folder is resumed
            only with equal ones.

    Attributes:
        done: Names of the sources in finished tars and those added since. Sources that an earlier writer left out for
            a reason that may pass (``Left.may_pass``) are not among them: they are to be tried again.
        num_records: Records of these sources.
        left_out: What is left out of the data set so far.

    Raises:
        UserError: If the folder holds a finished data set, tars of another maker, a half-made data set with another
            spec, vocabulary or extraction, or is being written by another process.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: SegmentSpec,
        labels: Sequence[str] = (),
        records_per_shard: int = 4096,
        extraction: Mapping[str, Any] | None = None,
    ) -> None:
        if records_per_shard < 1:
            raise UserError(f"records_per_shard must be 1 or more, got {records_per_shard}")
        if is_complete(folder):
            raise UserError(f"{folder} already holds a finished data set: give another folder, or delete this one")
        self._packer = RecordPacker(spec, labels)
        self.folder, self.out, self.records_per_shard = Path(folder), OutFolder(folder), records_per_shard
        self._head: dict[str, Any] = {
            "spec": spec.to_dict(), "labels": list(labels), "extraction": dict(extraction or {})
        }  # fmt: skip
        self.done: set[str] = set()
        self.num_records, self._num_sources = 0, 0
        self.left_out: list[Left] = []
        self._part: PartWriter | None = None
        self._sources: list[str] = []  # since the last finished tar
        self._part_left_out: list[Left] = []  # of these
        self._open = ExitStack()
        self._lock = self._take_lock()
        try:
            begin_folder(self.out, self._head)
            self.out.sweep()
            for number in sorted(self.out.parts()):
                part = read_part(self.out, number)
                again = {entry.source for entry in part["left_out"] if entry.may_pass}
                finished = [name for name in part["sources"] if name not in again]
                self.done.update(finished)
                self._num_sources += len(finished)
                self.left_out += [entry for entry in part["left_out"] if entry.source not in again]
                self.num_records += part["tar"]["records"] if part["tar"] is not None else 0
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, source: str, records: Iterable[Record], left_out: Sequence[Left] = ()) -> None:
        """Write all records of a source.

        Args:
            source: As in the records' ``meta["source"]``.
            records: Arguments of ``RecordPacker.pack``, for each record.
            left_out: What of the source is left out; all of it where there is no record.

        Raises:
            UserError: If a record contradicts the spec or the vocabulary, or the disk is full; the open tar is then
                lost, finished ones stay.
            ValueError: If the source has neither a record nor a reason, or was added before.
        """
        packed = [self._packer.pack(*record) for record in records]
        if not packed and not left_out:
            raise ValueError(f"source {source!r} has no record and no reason for it")
        if source in self.done:
            raise ValueError(f"source {source!r} was added before")
        if packed and self._part is None:
            number = max(self.out.parts(), default=-1) + 1
            self._part = PartWriter(self.out, self._open.enter_context(self.out.work()), number)
        for record in packed:
            assert self._part is not None
            self._part.add(record)
        self.done.add(source)
        self.num_records, self._num_sources = self.num_records + len(packed), self._num_sources + 1
        self._sources.append(source)
        self._part_left_out += left_out
        self.left_out += left_out
        if len(self._part or ()) >= self.records_per_shard:
            self.commit()

    def commit(self) -> None:
        """Finish the open tar, full or not: a kill loses nothing that was added before.

        Raises:
            UserError: If the disk is full.
        """
        if self._part is not None:
            self._part.publish(self._sources, self._part_left_out, {})
            self._drop_part()
            self._sources, self._part_left_out = [], []

    def finish(
        self,
        codebooks: Tensor,
        inputs: str | None = None,
        further: Mapping[str, Any] | None = None,
        sources: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Finish the open tar, write index, labels, codebooks and at last the manifest, which is returned.

        Args:
            codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads.
            inputs: Fingerprint of what the records were made from, for the manifest.
            further: Entries of the manifest to add or to replace.
            sources: All of them, in order; what is left out is listed in this order.

        Raises:
            UserError: If there is no record, two have one key, the codebooks do not fit the spec, or the disk is full.
        """
        self.commit()
        if not self.num_records:
            reasons = sorted({entry.reason for entry in self.left_out})
            raise UserError(f"nothing to write to {self.folder}: no record was made; left out because: {reasons}")
        named = {entry.source for entry in self.left_out}
        order = {name: number for number, name in enumerate(sources) if name in named}
        self.left_out.sort(key=lambda entry: order.get(entry.source, -1))
        head = dict(self._head)
        if inputs is not None:
            head["extraction"] = {**head["extraction"], "inputs": inputs}
        tables = [rows for number in sorted(self.out.parts()) if (rows := rows_of_part(self.out, number)) is not None]
        manifest = publish_data_set(self.out, head, tables, codebooks, self.left_out, self._num_sources, further or {})
        self.out.remove_parts()
        self.close()
        return manifest

    def close(self) -> None:
        """Delete what is in no finished tar and let other processes write to the folder. Harmless after ``finish``."""
        self._drop_part()
        self._lock.close()

    def _drop_part(self) -> None:
        if self._part is not None:
            self._part.discard()
            self._part = None
        self._open.close()

    def _take_lock(self) -> Lock:
        path = self.folder / _LOCK
        if path.is_file() and path.stat().st_size:
            raise UserError(f"{path} is not empty, so vab did not write it: give another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Lock(path, wait=False, required=False, temporary=True)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {self.folder}: wait for it, or give another folder"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; give another folder") from error
