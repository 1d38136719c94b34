"""The files of one part: a tar (none if it has no record), the rows of its index, and the JSON that marks it done."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    INDEX_COLUMNS,
    Left,
    index_dtype,
    json_lines,
    part_name,
    rows_name,
    save_array,
    shard_name,
)
from vab.data.shards.records import Packed
from vab.files import explain_full_disk, write_atomically
from vab.spec import SegmentSpec, UserError

_TAR_BLOCK = 512


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
