"""Write a data set source by source. A kill leaves nothing half-written.

``vab.data.shards.format`` describes the files. A data set is written part by part. A part is one tar, the rows of its
index (``parts/000000.npy``), and ``parts/000000.json``, which is written last and marks the part done. The index of the
data set is the join of the rows of all parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from vab.data.shards.data_set import Contents, begin_folder, publish_data_set, rows_of_part
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    Left,
    is_complete,
)
from vab.data.shards.part_files import PartWriter, read_part
from vab.data.shards.records import Record, RecordPacker
from vab.files import Lock
from vab.spec import SegmentSpec, UserError

_LOCK = "writing.lock"


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
        contents = Contents(head, tables, codebooks, self.left_out, self._num_sources, further or {})
        manifest = publish_data_set(self.out, contents)
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
