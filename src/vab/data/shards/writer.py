"""Writing a data set: records in, tars with an index and a manifest out, whole even if the writer is killed.

What the files hold is said in ``vab.data.shards.format``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import webdataset
from torch import Tensor

from vab.data.shards.format import (
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    INDEX_COLUMNS,
    KEY_PATTERN,
    LABEL_IDS,
    LABEL_STARTS,
    MAX_KEY_LENGTH,
    SIDE_FILES,
    Left,
    check_codebooks,
    head_differences,
    index_dtype,
    is_complete,
    json_lines,
    library_versions,
    make_key,
    read_json_lines,
    read_manifest,
    save_array,
    shard_name,
    write_manifest,
    write_side_files,
)
from vab.files import TEMPORARY_SUFFIX, Lock, explain_full_disk, sync_folder, write_atomically
from vab.spec import SegmentSpec, UserError

__all__ = ["ShardWriter", "explain_full_disk", "is_complete", "make_key", "sync_folder", "write_atomically"]

_TAR_BLOCK = 512
_JOURNAL_SUFFIX, _LOCK = ".journal.json", "writing.lock"
_SHARD = "shard-" + 6 * "[0-9]" + "*"
"""Names of shards begin like this (there may be more than a million)."""


class _HashedFile:
    """A file being written, and the SHA-256 of what went into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        # tarfile flushes its buffer when it is garbage collected; after a failed write there is no file to flush to.
        if self._file is not None:
            self._file.write(data)
            self._hash.update(data)
            self.size += len(data)
        return len(data)

    def finish(self) -> str:
        """Bring the file to disk; answer its hash."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Forget the file."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            # Closing flushes what the full disk did not take.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        finally:
            self.path.unlink(missing_ok=True)


class _OpenShard:
    """A tar under its temporary name and the columns of its journal."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / shard_name(number)
        self.file = _HashedFile(self.path.with_name(self.path.name + TEMPORARY_SUFFIX))
        # Fixed owner, mode and time: the same input gives the same bytes.
        self.tar = webdataset.TarWriter(self.file, user="vab", group="vab", mode=0o444, mtime=0, encoder=False)
        self.offset = 0
        self.columns: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS if name != "shard"}
        self.columns |= {"key": [], "labels": []}

    def __len__(self) -> int:
        return len(self.columns["key"])

    def add(self, key: str, members: Mapping[str, bytes], headers: Mapping[str, int], row: Mapping[str, Any]) -> None:
        self.tar.write({"__key__": key, **members})
        for field in sorted(members):  # the order in which TarWriter writes them
            content, skip = members[field], headers[field]
            name = field.removesuffix(".npy")
            self.columns[f"{name}_offset"].append(self.offset + _TAR_BLOCK + skip)
            self.columns[f"{name}_size"].append(len(content) - skip)
            self.columns[f"{name}_crc"].append(zlib.crc32(memoryview(content)[skip:]))
            self.offset += _TAR_BLOCK + -(-len(content) // _TAR_BLOCK) * _TAR_BLOCK
        for name, value in {"key": key, **row}.items():
            self.columns[name].append(value)


@dataclass(frozen=True)
class _Committed:
    """What is remembered of a shard; the rest is in its journal."""

    records: int
    sources: int
    bytes: int
    sha256: str
    longest_key: int

    @classmethod
    def of(cls, journal: Mapping[str, Any]) -> _Committed:
        keys = journal["columns"]["key"]
        sizes = journal["records"], len(journal["sources"]), journal["bytes"], journal["sha256"]
        return cls(*sizes, max(map(len, keys)))


@dataclass(frozen=True)
class _Finished:
    """A finished data set that shards are appended to."""

    manifest: dict[str, Any]
    left_out: list[Left]
    """As in the manifest."""
    index: np.ndarray
    """(records,)."""
    label_counts: np.ndarray
    """(records,) int64."""
    label_ids: np.ndarray
    """(labels of all records,) int."""

    @classmethod
    def of(cls, folder: Path) -> _Finished:
        """Read it. What a writer that was killed as it ended has put into the side files since is passed over.

        Raises:
            UserError: If a side file is not as it was written.
        """
        manifest, _ = read_manifest(folder)
        count = manifest["counts"]["records"]
        arrays = {name: np.load(folder / name, allow_pickle=False) for name in (INDEX, LABEL_STARTS, LABEL_IDS)}
        index, starts = arrays[INDEX][:count], arrays[LABEL_STARTS][: count + 1]
        index = index.astype(index_dtype(max(map(len, index["key"].tolist()))))
        ids = arrays[LABEL_IDS][: starts[-1]]
        for name, values in ((INDEX, index), (LABEL_STARTS, starts), (LABEL_IDS, ids)):
            if hashlib.sha256(save_array(values)).hexdigest() != manifest["files"][name]["sha256"]:
                raise UserError(f"{folder / name} is damaged: to make it again, type vab shards index {folder}")
        return cls(manifest, [Left.of(entry) for entry in manifest["left_out"]], index, np.diff(starts), ids)


class ShardWriter:
    """Writes a data set so that a kill at any moment loses no finished shard and doubles no record.

    Records are held back until their source is finished, then written to the open tar; a full tar is committed:
    tar on disk, journal in place, tar renamed. A writer opened on the folder of a killed one goes on after the last
    committed shard: ``is_done`` says what to skip. The context manager drops what is not committed. After a
    method has raised, only ``close`` makes sense.

    Sources that were left out for a reason that may be gone (``Left.may_pass``) are not done: they are to be tried
    again. With ``append`` this holds for a finished data set, too. Its shards stay as they are, records of such sources
    go into further shards behind them, and the manifest that names these replaces the old one at the very end; until
    then the folder is the old data set, and a killed writer's shards are taken over by the next one.

    Args:
        folder: Made if absent.
        spec: The numbers that each record is checked against.
        labels: Vocabulary; a record's labels are names from it.
        records_per_shard: A tar is closed at the end of the source with which it reaches this number.
        extraction: Further JSON values for the manifest: how the records were made (vision preprocessing, loudness
            rule, ...). A killed extraction resumes only with equal ones.
        append: Add to the finished data set that the folder holds; its spec, labels and extraction must be these.

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
        append: bool = False,
    ) -> None:
        if records_per_shard < 1:
            raise UserError(f"records_per_shard must be 1 or more, got {records_per_shard}")
        if len(set(labels)) != len(labels):
            raise UserError("label vocabulary: a name occurs twice")
        if spec.codebook_size > 2**16:
            raise UserError(f"codes are stored as uint16: a codebook of {spec.codebook_size} entries does not fit")
        self.folder = Path(folder)
        self.spec = spec
        self.labels = tuple(labels)
        self.records_per_shard = records_per_shard
        # Through JSON, so that a tuple given now equals the list read back from a journal.
        self.extraction = json.loads(json.dumps(dict(extraction or {})))
        self._done: set[int] = set()  # hashes of the names of finished sources, of which there can be millions
        self._unread = array("q")  # likewise, of sources left out by this writer that are to be tried again
        self._reopened = False  # whether sources that were left out before are not done any more
        self._label_numbers = {name: number for number, name in enumerate(self.labels)}
        self._keys: set[int] = set()  # hashes, likewise
        self._waiting: dict[str, list[tuple[str, dict[str, bytes], dict[str, int], dict[str, Any]]]] = {}
        self._waiting_left_out: dict[str, list[Left]] = {}
        self._sources: list[str] = []  # finished since the last commit
        self._left_out: list[Left] = []  # likewise
        self._committed: dict[int, _Committed] = {}
        self._committed_records = 0
        self._shard: _OpenShard | None = None
        if is_complete(self.folder) and not append:
            raise UserError(f"{self.folder} already holds a finished data set: give another folder, or delete this one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; give another folder") from error
        try:
            self.finished = _Finished.of(self.folder) if append else None
            """The data set that is appended to, as it was."""
            self._to_retry: set[int] = set()  # hashes of sources that the finished data set lacks
            if self.finished is not None:
                self._committed_records = len(self.finished.index)
                self._to_retry = {hash(entry.source) for entry in self.finished.left_out if entry.may_pass}
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_records(self) -> int:
        """Records of finished sources so far, those of committed shards of an earlier, killed run included."""
        return self._committed_records + (len(self._shard) if self._shard else 0)

    @property
    def num_done(self) -> int:
        """Sources that are finished or left out for good; after a resume, those of the committed shards at first."""
        return len(self._done)

    def is_done(self, source: str) -> bool:
        """Whether a source is finished or left out for good."""
        number = hash(source)
        return number in self._done or (self.finished is not None and number not in self._to_retry)

    def are_unread(self, sources: Iterable[str]) -> np.ndarray:
        """(sources,) bool: which this writer left out for a reason that may be gone when the command is typed again."""
        return np.isin(np.fromiter(map(hash, sources), np.int64), np.asarray(self._unread, np.int64))

    def committed_sources(self) -> Iterator[str]:
        """Names of all sources of committed shards, read from their journals."""
        for number in sorted(self._committed):
            yield from self._journal(number, sources=str, left_out=None)["sources"]

    @property
    def num_uncommitted(self) -> int:
        """Finished sources that are not in a committed shard: what a kill now would lose."""
        return len(self._sources)

    def write(self, key: str, codes: np.ndarray, features: np.ndarray, meta: Mapping[str, Any]) -> None:
        """Add one record; it goes to disk with ``finish_source(meta["source"])``.

        Args:
            key: From ``make_key``.
            codes: (K, T) of any integer type, in [0, S), stored as uint16. Steps from ``meta["steps"]`` on are padding.
            features: (V, C) float, finite as float16. Frames from ``meta["frames"]`` on are padding.
            meta: JSON values, stored with the record. Needed: ``id`` (str), ``source`` (str), ``start_seconds`` (s),
                ``steps`` (1..T), ``frames`` (1..V, or 0 without video), ``labels`` (names of the vocabulary).

        Raises:
            UserError: If a value contradicts the spec or the vocabulary, or the key is bad or taken.
        """
        codes, features = np.asarray(codes), np.asarray(features)
        row = self._check(key, codes, features, meta)
        with np.errstate(over="ignore"):  # said in words below
            half = features.astype("<f2", order="C")
        if not np.isfinite(half).all():
            raise UserError(f"record {key}: features must be finite as float16, got NaN or a magnitude above 65504")
        # Row after row, however they lie in memory: that is how they are read back.
        arrays = {"codes.npy": codes.astype("<u2", order="C"), "features.npy": half}
        members = {name: save_array(array) for name, array in arrays.items()}
        headers = {name: len(members[name]) - array.nbytes for name, array in arrays.items()} | {"json": 0}
        members["json"] = json.dumps(dict(meta), sort_keys=True, allow_nan=False).encode()
        self._keys.add(hash(key))
        self._waiting.setdefault(meta["source"], []).append((key, members, headers, row))

    def finish_source(self, source: str) -> None:
        """All records of the source are given: write them, and commit the shard if it is full.

        Raises:
            UserError: If the disk is full; the open shard is dropped, committed ones stay.
            ValueError: If the source has neither a record nor a left-out excerpt, or is done already.
        """
        records, left_out = self._waiting.pop(source, []), self._waiting_left_out.pop(source, [])
        if not records and not left_out:
            raise ValueError(f"source {source!r} ends with no record and no reason: use leave_out")
        self._close_source(source)
        self._left_out.extend(left_out)
        if records:
            self._append(records)

    def leave_out(self, source: str, reason: str, detail: str = "", start_seconds: float | None = None) -> None:
        """Record in the manifest that something is not in the data set, and why.

        Args:
            source: As in ``meta["source"]``.
            reason: One word, by which they are counted.
            detail: For people, one line.
            start_seconds: The excerpt that is left out; the source goes on and must be finished. Without it, the
                whole source: its records given so far are dropped and it is done.

        Raises:
            ValueError: If the source is done already.
        """
        entry = Left(source, sys.intern(reason), sys.intern(detail), start_seconds)
        if start_seconds is not None:
            self._waiting_left_out.setdefault(source, []).append(entry)
            return
        self._close_source(source)
        self._keys.difference_update(hash(record[0]) for record in self._waiting.pop(source, []))
        self._waiting_left_out.pop(source, None)
        self._left_out.append(entry)
        if entry.may_pass:
            self._unread.append(hash(source))

    def commit(self) -> None:
        """Make all finished sources last through a kill: close the open shard, full or not.

        Raises:
            UserError: If the disk is full.
        """
        shard = self._shard
        if shard is None:
            return
        journal = {
            "head": self._head(),
            "records": len(shard),
            "columns": shard.columns,
            "sources": self._sources,
            "left_out": self._left_out,
        }
        try:
            shard.tar.close()
            journal |= {"sha256": shard.file.finish(), "bytes": shard.file.size}
            # The journal first: a tar under its final name is a committed one, so no tar is ever deleted.
            write_atomically(_journal_path(shard.path), json_lines(journal, "sources", "left_out"))
            shard.file.path.replace(shard.path)
            sync_folder(self.folder)
        except OSError as error:
            self._drop_shard()
            raise explain_full_disk(error, self.folder, shard.offset) from error
        except UserError:
            self._drop_shard()
            raise
        self._remember(shard.path, journal)
        self._shard, self._sources, self._left_out = None, [], []

    def finish(
        self,
        codebooks: Tensor,
        inputs: str | None = None,
        further: Mapping[str, Any] | None = None,
        sources: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Commit what is open, write index, labels, codebooks and at last the manifest, which is returned.

        Args:
            codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads.
            inputs: Fingerprint of what the records were made from, for the manifest.
            further: Entries for the manifest that it has not by itself.
            sources: All of them, in order; what is left out is listed in this order, however often it was tried.

        Raises:
            UserError: If there is no record, the codebooks do not fit the spec, or the disk is full.
            ValueError: If a source is still open.
        """
        if unfinished := sorted({*self._waiting, *self._waiting_left_out}):
            raise ValueError(f"sources not finished: {unfinished[:5]}")
        check_codebooks(codebooks, self.spec)
        self.commit()
        numbers, finished = sorted(self._committed), self.finished
        if not numbers and finished is None:
            reasons = sorted({entry.reason for entry in self._left_out})
            raise UserError(f"nothing to write to {self.folder}: no record was made; left out because: {reasons}")
        self._done, self._keys = set(), set()  # a tenth of a gigabyte each for a million, and not asked for any more
        longest = max((shard.longest_key for shard in self._committed.values()), default=1)
        left_out: list[Left] = []
        label_ids, shards = array("i"), list[dict[str, Any]]()
        begin = num_sources = 0
        if finished is not None:
            longest = max(longest, finished.index.dtype["key"].itemsize)
            begin, shards = len(finished.index), [*finished.manifest["shards"]]
            left_out = [entry for entry in finished.left_out if not entry.may_pass]
            num_sources = finished.manifest["counts"]["sources"] - len(self._to_retry)
            label_ids.extend(finished.label_ids.tolist())
        index = np.zeros(self.num_records, index_dtype(longest))
        label_counts = np.zeros(len(index), np.int64)
        if finished is not None:
            index[:begin], label_counts[:begin] = finished.index, finished.label_counts
        for place, number in enumerate(numbers, len(shards)):  # one journal at a time: together larger than the index
            journal = self._journal(number, sources=None, left_out=Left.of)
            rows = index[begin : begin + journal["records"]]
            rows["shard"] = place
            for name, values in journal["columns"].items():
                if name != "labels":
                    rows[name] = values
            for ids in journal["columns"]["labels"]:
                label_ids.extend(ids)
            label_counts[begin : begin + len(rows)] = [len(ids) for ids in journal["columns"]["labels"]]
            left_out += journal["left_out"]
            begin += len(rows)
        left_out += self._left_out
        if finished is not None and not numbers and _same_reasons(left_out, finished.left_out):
            self.close()
            return finished.manifest
        if self._reopened or finished is not None:
            names = {entry.source for entry in left_out}
            order = {name: number for number, name in enumerate(sources) if name in names}
            left_out.sort(key=lambda entry: order.get(entry.source, -1))
        shards += [
            {"name": shard_name(number), "records": shard.records, "bytes": shard.bytes, "sha256": shard.sha256}
            for number, shard in sorted(self._committed.items())
        ]
        num_sources += sum(shard.sources for shard in self._committed.values()) + len(self._sources)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "dtypes": {"codes": "<u2", "features": "<f2"},
            "labels": list(self.labels),
            "counts": {"records": len(index), "sources": num_sources, "left_out": len(left_out)},
            "extraction": self.extraction | ({} if inputs is None else {"inputs": inputs}),
            "versions": library_versions(),
            "files": write_side_files(self.folder, index, label_counts, np.array(label_ids), codebooks),
            "shards": shards,
            **(further or {}),
            "left_out": left_out,
        }
        if finished is not None and finished.manifest["versions"] != manifest["versions"]:
            manifest = {**manifest, "versions": finished.manifest["versions"], "appended": manifest["versions"]}
            manifest["left_out"] = manifest.pop("left_out")  # last
        write_manifest(self.folder, manifest)
        for number in self._committed:
            _journal_path(self.folder / shard_name(number)).unlink()
        self.close()
        return manifest

    def close(self) -> None:
        """Drop what is not committed and let other processes write to the folder. Harmless after ``finish``."""
        self._drop_shard()
        self._lock.close()

    def _check(self, key: str, codes: np.ndarray, features: np.ndarray, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse what the spec does not allow; answer the record's values for the index."""
        spec, where = self.spec, f"record {key}"
        if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
            raise UserError(f"key {key!r} must be 1 to {MAX_KEY_LENGTH} of A-Z a-z 0-9 _ -: make it with make_key")
        if hash(key) in self._keys:
            raise UserError(f"key {key} occurs twice: is the same file listed twice?")
        if missing := [
            name for name in ("id", "source", "start_seconds", "steps", "frames", "labels") if name not in meta
        ]:
            raise UserError(f"{where}: its description lacks {missing}")
        if self.is_done(meta["source"]):
            raise ValueError(f"{where}: source {meta['source']!r} is finished already")
        for name, values, shape, kind in (
            ("codes", codes, (spec.num_codebooks, spec.num_steps), "integer"),
            ("features", features, (spec.num_frames, spec.feature_dim), "floating"),
        ):
            if values.shape != shape or not np.issubdtype(values.dtype, getattr(np, kind)):
                raise UserError(f"{where}: {name} must be {kind} of shape {shape}, got {values.dtype} {values.shape}")
        if codes.min() < 0 or codes.max() >= spec.codebook_size:
            got = f"{codes.min()}..{codes.max()}"
            raise UserError(f"{where}: codes must be in 0..{spec.codebook_size - 1}, got {got}")
        for name, least, limit in (("steps", 1, spec.num_steps), ("frames", 0, spec.num_frames)):
            if not least <= meta[name] <= limit:
                raise UserError(f"{where}: {name} must be in {least}..{limit}, got {meta[name]}")
        if unknown := [name for name in meta["labels"] if name not in self._label_numbers]:
            raise UserError(f"{where}: labels {unknown} are not in the data set's vocabulary")
        numbers = sorted({self._label_numbers[name] for name in meta["labels"]})
        return {"steps": int(meta["steps"]), "frames": int(meta["frames"]), "labels": numbers}

    def _close_source(self, source: str) -> None:
        if self.is_done(source):
            raise ValueError(f"source {source!r} is finished already")
        self._done.add(hash(source))
        self._sources.append(source)

    def _append(self, records: Iterable[tuple[str, dict[str, bytes], dict[str, int], dict[str, Any]]]) -> None:
        try:
            if self._shard is None:
                self._shard = _OpenShard(self.folder, self._next_number())
            for record in records:
                self._shard.add(*record)
        except OSError as error:
            needed = self._shard.offset if self._shard else 0
            needed = max(needed, needed // max(1, len(self._shard or ())) * self.records_per_shard)
            self._drop_shard()
            raise explain_full_disk(error, self.folder, needed) from error
        if len(self._shard) >= self.records_per_shard:
            self.commit()

    def _next_number(self) -> int:
        """Of a shard that is begun: after those that are there."""
        named = [] if self.finished is None else [entry["name"] for entry in self.finished.manifest["shards"]]
        return max([*self._committed, *map(_shard_number, map(Path, named))], default=-1) + 1

    def _drop_shard(self) -> None:
        if self._shard is not None:
            self._shard.file.discard()
            self._shard = None

    def _head(self) -> dict[str, Any]:
        """What all shards of a data set share."""
        return {"spec": self.spec.to_dict(), "labels": list(self.labels), "extraction": self.extraction}

    def _recover(self) -> None:
        """Take over the committed shards of a killed writer and sweep away the rest."""
        for path in self.folder.glob(f"{_SHARD}.tar{TEMPORARY_SUFFIX}"):
            path.unlink()
        tars = {path.name for path in self.folder.glob("*.tar")}
        if self.finished is not None:
            own = {entry["name"] for entry in self.finished.manifest["shards"]}
            tars -= own
            for name in own:  # of a writer that was killed as it ended
                _journal_path(self.folder / name).unlink(missing_ok=True)
        for path in sorted(self.folder.glob(f"{_SHARD}{_JOURNAL_SUFFIX}")):
            tar = self.folder / (path.name.removesuffix(_JOURNAL_SUFFIX) + ".tar")
            if tar.name not in tars:
                path.unlink()  # killed between the journal and the tar's renaming: its sources are done again
                continue
            tars.remove(tar.name)
            journal = read_json_lines(path, sources=hash, left_out=Left.of)
            self._check_head(journal["head"])
            if any(entry.may_pass for entry in journal["left_out"]):
                journal = self._reopen(path)
            if tar.stat().st_size != journal["bytes"]:
                raise UserError(
                    f"{tar} has {tar.stat().st_size} bytes, {journal['bytes']} were written: delete it, then run again"
                )
            self._remember(tar, journal)
            self._keys.update(map(hash, journal["columns"]["key"]))
            self._done.update(journal["sources"])
        if tars:
            raise UserError(
                f"{self.folder} holds tars that no extraction here left behind ({sorted(tars)[0]}, ...):"
                " give another folder; to use these, type: vab shards index"
            )
        # A killed writer leaves these only beside its shards.
        written = self._committed or self.finished is not None
        others = [name for name in SIDE_FILES if (self.folder / name).exists() and not written]
        if others:
            raise UserError(
                f"{self.folder} holds a file that no extraction here left behind and that would be replaced"
                f" ({', '.join(others)}): give another folder, or take it elsewhere"
            )

    def _reopen(self, path: Path) -> dict[str, Any]:
        """Take what is to be tried again out of a journal, so that it is not done; the journal as it is then."""
        journal = read_json_lines(path, sources=str, left_out=Left.of)
        again = {entry.source for entry in journal["left_out"] if entry.may_pass}
        journal["sources"] = [name for name in journal["sources"] if name not in again]
        journal["left_out"] = [entry for entry in journal["left_out"] if entry.source not in again]
        write_atomically(path, json_lines(journal, "sources", "left_out"))
        self._reopened = True
        return {**journal, "sources": [hash(name) for name in journal["sources"]]}

    def _remember(self, tar: Path, journal: Mapping[str, Any]) -> None:
        self._committed[_shard_number(tar)] = committed = _Committed.of(journal)
        self._committed_records += committed.records

    def _journal(self, number: int, **lists: Callable[[Any], Any] | None) -> dict[str, Any]:
        """What was noted of a committed shard, of its long lists as ``read_json_lines`` says."""
        return read_json_lines(_journal_path(self.folder / shard_name(number)), **lists)

    def _check_head(self, head: Mapping[str, Any]) -> None:
        if differences := head_differences(dict(head), self._head()):
            raise UserError(
                f"{self.folder} was begun with other settings ({'; '.join(differences)}):"
                " use the same ones to go on, or give another folder"
            )

    def _take_lock(self) -> Lock:
        path = self.folder / _LOCK
        if path.exists() and path.stat().st_size:
            raise UserError(f"{path} is none of an extraction's, whose are empty: give another folder")
        try:
            return Lock(path, wait=False, required=False, temporary=True)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {self.folder}: wait for it, or give another folder"
            ) from error


def _same_reasons(some: Iterable[Left], others: Iterable[Left]) -> bool:
    """Whether the same is left out, for the same reasons, in whatever words."""
    return {entry[:2] + entry[3:] for entry in some} == {entry[:2] + entry[3:] for entry in others}


def _shard_number(tar: Path) -> int:
    return int(tar.stem.removeprefix("shard-"))


def _journal_path(tar: Path) -> Path:
    return tar.with_name(tar.stem + _JOURNAL_SUFFIX)
