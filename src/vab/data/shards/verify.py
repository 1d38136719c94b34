"""Reading whole tars: to compare a data set with its manifest, or to index tars that others have made."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vab.data.addresses import is_address
from vab.data.reading.dataset import ShardDataset
from vab.data.remote import local_copy
from vab.data.shards.data_set import Contents, Rows, write_data_set
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    CODE_TYPES,
    CODEBOOKS,
    FEATURE_TYPES,
    FIELDS,
    INDEX,
    INDEX_COLUMNS,
    KEY_PATTERN,
    LABEL_IDS,
    LABEL_STARTS,
    MANIFEST,
    SIDE_FILES,
    check_codebooks,
    index_dtype,
    library_versions,
    read_codebooks,
    read_manifest,
)
from vab.data.shards.records import check_values
from vab.files import sha256_of
from vab.spec import SegmentSpec, UserError


def verify(folder: str | Path) -> list[str]:
    """Read all of a data set again and compare it with its manifest and index.

    Returns:
        What is wrong, one line each; empty if nothing is.
    """
    copy = local_copy(folder)  # held until the end
    folder = copy.folder
    try:
        manifest = read_manifest(folder)[0]
        spec = SegmentSpec.from_dict(manifest["spec"])
    except UserError as error:
        return [str(error)]
    index, refused = None, None
    try:
        check_codebooks(ShardDataset(folder).codebooks, spec)
        index = _Index(folder)
    except UserError as error:
        refused = str(error)
    if index is not None and index.records != sum(shard["records"] for shard in manifest["shards"]):
        index = None  # reported below
    problems: list[str] = []
    listed = manifest["files"] | {shard["name"]: shard for shard in manifest["shards"]}
    problems += [line for name, entry in listed.items() for line in _compare_file(folder / name, entry)]
    problems += [f"{path} is not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    reader = TarReader(spec, manifest["labels"], manifest["dtypes"])
    keys: list[np.ndarray] = []  # of each tar
    first = 0
    for number, shard in enumerate(manifest["shards"]):
        if (folder / shard["name"]).is_file():  # else reported above
            try:
                found = reader.read(folder / shard["name"])
            except UserError as error:
                problems.append(str(error))
            else:
                rows = found.load()
                keys.append(rows["key"])
                rows["shard"] = number
                if len(rows) != shard["records"]:
                    problems.append(f"{shard['name']} holds {len(rows)} records, {shard['records']} were written")
                elif index is not None:
                    problems += index.compare(first, rows, found, shard["name"])
        first += shard["records"]
    if keys:
        names, counts = np.unique(np.concatenate(keys), return_counts=True)
        twice = counts > 1
        problems += [f"key {key.decode()} occurs {count} times"
                     for key, count in zip(names[twice], counts[twice], strict=True)]  # fmt: skip
    if first != manifest["counts"]["records"]:
        problems.append(f"the manifest counts {manifest['counts']['records']} records, its shards {first}")
    # The lines above say in more words why the data set cannot be opened, unless it is for another reason.
    return problems if problems or refused is None else [refused]


class _Index:
    """The index of a data set that can be opened."""

    def __init__(self, folder: Path) -> None:
        self._rows, self._label_starts, self._label_ids = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (INDEX, LABEL_STARTS, LABEL_IDS)
        )
        self.records = len(self._rows)

    def compare(self, first: int, rows: np.ndarray, found: Rows, tar: str) -> list[str]:
        """Differences between the index from row ``first`` on and what a tar holds, one line for each record."""
        stored = self._rows[first : first + len(rows)]
        wrong: dict[int, list[str]] = {}
        for column in stored.dtype.names:
            for place in np.flatnonzero(rows[column] != stored[column]).tolist():
                wrong.setdefault(place, []).append(column)
        ends = np.cumsum(found.label_counts).tolist()
        for place, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            starts = self._label_starts[first + place : first + place + 2]
            if sorted(self._label_ids[slice(*starts)].tolist()) != found.label_ids[begin:end].tolist():
                wrong.setdefault(place, []).append("labels")
        return [f"{tar}: index of record {rows['key'][place].decode()} is wrong in {columns}"
                for place, columns in sorted(wrong.items())]  # fmt: skip


def info(folder: str | Path) -> dict[str, Any]:
    """The numbers of a data set, as JSON values, for printing.

    Raises:
        UserError: If the folder holds no finished data set.
    """
    dataset = ShardDataset(folder)
    manifest, index = dataset.manifest, np.load(dataset.folder / INDEX, mmap_mode="r", allow_pickle=False)
    label_ids = np.load(dataset.folder / LABEL_IDS, mmap_mode="r", allow_pickle=False)
    occurrences = np.bincount(label_ids, minlength=len(dataset.labels))
    return {
        "folder": str(dataset.folder),
        "manifest_hash": dataset.manifest_hash,
        "records": len(dataset),
        "hours": round(float(index["steps"].sum(dtype=np.int64)) / dataset.spec.code_rate / 3600, 3),
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "shorter_than_segment": int((index["steps"] < dataset.spec.num_steps).sum()),
        "sources": manifest["counts"].get("sources"),
        "left_out": dict(Counter(entry["reason"] for entry in manifest["left_out"]).most_common()),
        "labels": {name: int(count) for name, count in zip(dataset.labels, occurrences, strict=False)},
        "spec": manifest["spec"],
        "dtypes": manifest["dtypes"],
        "extraction": manifest.get("extraction", {}),
        "versions": manifest.get("versions", {}),
    }


def index_folder(folder: str | Path, spec: str | Path | None = None, codebooks: Tensor | None = None) -> dict[str, Any]:
    """Make a data set of a folder of tars, by adding the index and the manifest; the tars stay as they are.

    The tars must be uncompressed and hold, for each key, ``codes.npy`` (K, T) of an integer type, ``features.npy``
    (V, C) float16 or float32, and ``json`` with, where they apply, ``steps``, ``frames`` (a whole segment where not
    given) and ``labels`` (names).

    Args:
        folder: With the tars; an existing manifest is taken over and brought up to date.
        spec: JSON file with the fields of ``SegmentSpec``, or the manifest of another data set. Needed where the folder
            has no manifest, or a damaged one, of which then nothing is taken over.
        codebooks: (K, S, code_dim) float. Where not given, ``codebooks.safetensors`` in the folder or beside ``spec``.

    Returns:
        The manifest.

    Raises:
        UserError: If there are no tars, no spec, no codebooks, or a record does not fit the spec.
    """
    if is_address(folder):
        raise UserError(f"{folder}: tars are indexed where they lie; give a folder of this machine, and upload it then")
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        packed = sorted(path.name for ending in ("*.tar.gz", "*.tgz", "*.tar.xz") for path in folder.glob(ending))
        hint = f"; {packed[0]} is compressed and cannot be read by offset, unpack it with gunzip" if packed else ""
        raise UserError(f"no .tar files in {folder}{hint}")
    old = _known_numbers(folder, None if spec is None else Path(spec))
    numbers = SegmentSpec.from_dict(old["spec"])
    if codebooks is None:
        places = [place / CODEBOOKS for place in (folder, Path(spec or folder / MANIFEST).parent)]
        if (found := next((place for place in places if place.is_file()), None)) is None:
            raise UserError(f"no {CODEBOOKS} in {folder}: copy it from another data set of the same codec")
        codebooks = read_codebooks(found)
    check_codebooks(codebooks, numbers)
    reader = TarReader(numbers, old.get("labels"))
    tables = []
    for tar in tars:
        rows = reader.read(tar)
        entry = {"name": tar.name, "records": rows.records, "bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
        tables.append(rows._replace(tars=[entry]))
    if not any(rows.records for rows in tables):
        raise UserError(f"the tars of {folder} hold no record")
    if "labels" not in old:  # the labels that occur, sorted: numbers are those of their first occurrence so far
        new = np.argsort(np.argsort(reader.labels)).astype(np.int32)
        tables = [rows._replace(label_ids=new[rows.label_ids]) for rows in tables]
    left_out = old.get("left_out", [])
    head = {
        "spec": numbers.to_dict(),
        "labels": old.get("labels", sorted(reader.labels)),
        "extraction": old.get("extraction", {}),
    }
    counts = {"records": sum(rows.records for rows in tables), "left_out": len(left_out)}
    further = {
        "dtypes": reader.types,
        "counts": old.get("counts", {}) | counts,
        "versions": old.get("versions", library_versions()),
    }
    out = OutFolder(folder)
    with out.work() as work:
        manifest = write_data_set(work, Contents(head, tables, codebooks, left_out, 0, further))
        out.publish(work, [*SIDE_FILES, MANIFEST])
    return manifest


class TarReader:
    """Reads tars from their first to their last record and checks every record. Memory is some bytes for each record.

    Args:
        spec: What each record must be.
        labels: Vocabulary; None to allow any label.
        types: Array types of codes and features; None for those of the first record.

    Attributes:
        types: Array types of codes and features, once a record was read.
    """

    def __init__(self, spec: SegmentSpec, labels: Sequence[str] | None, types: Mapping[str, str] | None = None) -> None:
        self._spec, self._is_open, self.types = spec, labels is None, dict(types or {})
        self._numbers = {name: number for number, name in enumerate(labels or ())}

    @property
    def labels(self) -> list[str]:
        """The vocabulary, or the labels that have occurred, in order of their first occurrence."""
        return list(self._numbers)

    def read(self, tar: Path) -> Rows:
        """The rows of the index for the records of a tar. They can be loaded once.

        Raises:
            UserError: At the first thing that is wrong.
        """
        keys, columns = list[str](), {name: array("Q") for name in INDEX_COLUMNS}
        label_counts, label_ids = array("i"), array("i")
        for key, members in _members(tar):
            row, names = self._check(f"{tar}: {key}", members)
            keys.append(key)
            for name, value in row.items():
                columns[name].append(value)
            ids = sorted({self._numbers.setdefault(name, len(self._numbers)) for name in names})
            label_counts.append(len(ids))
            label_ids.extend(ids)
        rows = np.zeros(len(keys), index_dtype(max(map(len, keys), default=1)))
        for column, values in {**columns, "key": keys}.items():
            rows[column] = values
        load = [rows].pop  # not to keep them in memory beside the joined index
        labels = np.asarray(label_counts), np.asarray(label_ids)
        return Rows(len(keys), rows.dtype["key"].itemsize, load, *labels, [])

    def _check(self, where: str, members: Mapping[str, tuple[int, bytes]]) -> tuple[dict[str, int], list[str]]:
        """The row of a record, without its key, and its labels."""
        if missing := [name for name in FIELDS if name not in members]:
            raise UserError(f"{where} lacks {', '.join(missing)} (a record's fields must lie side by side)")
        spec, row, arrays = self._spec, {"shard": 0}, {}
        for name, shape, allowed in (
            ("codes", (spec.num_codebooks, spec.num_steps), CODE_TYPES),
            ("features", (spec.num_frames, spec.feature_dim), FEATURE_TYPES),
        ):
            offset, content = members[f"{name}.npy"]
            arrays[name], skip = _read_array(content, shape, allowed, f"{where}: {name}.npy")
            row |= _place(name, offset + skip, memoryview(content)[skip:])
        offset, content = members["json"]
        row |= _place("json", offset, content)
        try:
            meta = json.loads(content)
        except ValueError as error:
            raise UserError(f"{where}: its description is not JSON ({error})") from error
        names = meta.setdefault("labels", []) if isinstance(meta, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: its description must be an object, its labels a list of names")
        meta = {"steps": spec.num_steps, "frames": spec.num_frames} | meta
        known = None if self._is_open else self._numbers
        check_values(where, arrays["codes"], arrays["features"], meta, spec, known)
        types = {name: values.dtype.str for name, values in arrays.items()}
        self.types = self.types or types
        if types != self.types:
            raise UserError(f"{where} holds {types}, others {self.types}")
        return row | {"steps": meta["steps"], "frames": meta["frames"]}, names


def _place(name: str, offset: int, content: bytes | memoryview) -> dict[str, int]:
    return {f"{name}_offset": offset, f"{name}_size": len(content), f"{name}_crc": zlib.crc32(content)}


def _members(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Key of each record of a tar, and of each of its members where it begins in the file, and its content.

    Raises:
        UserError: If the tar is damaged, or holds something else than records.
    """
    end = 0
    key, members = "", dict[str, tuple[int, bytes]]()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a kilobyte for each
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isdir():
                    continue
                before, (key, _, name) = key, member.name.removeprefix("./").partition(".")
                if not member.isreg() or not KEY_PATTERN.fullmatch(key):
                    raise UserError(f"{path}: {member.name}: keys must be of A-Z a-z 0-9 _ -, members plain files")
                if members and key != before:
                    yield before, members
                    members = {}
                if name not in FIELDS:
                    raise UserError(f"{path}: {key} has a field {name}; the fields are {', '.join(FIELDS)}")
                if name in members:
                    raise UserError(f"{path}: {key} has the field {name} twice")
                file.seek(member.offset_data)
                members[name] = member.offset_data, file.read(member.size)
        # An archive ends with two empty blocks; without them the rest was cut off between two members.
        if path.stat().st_size < end + 1024:
            raise UserError(f"{path} is cut: its end is missing")
        if members:
            yield key, members
    except tarfile.TarError as error:
        raise UserError(f"{path} is cut or damaged: {error}") from error


def _known_numbers(folder: Path, spec: Path | None) -> dict[str, Any]:
    """Manifest entries to start from: the folder's own manifest, or the spec that is given."""
    own = folder / MANIFEST
    if spec is None:
        if own.is_file():
            return read_manifest(folder)[0]
        raise UserError(
            f"{folder} has no {MANIFEST}: say what the tars hold, vab shards index {folder} --spec FILE.json"
        )
    if not spec.is_file():
        raise UserError(f"no file {spec}")
    try:
        given = json.loads(spec.read_bytes())
    except ValueError as error:
        raise UserError(f"{spec} is not JSON: {error}") from error
    if isinstance(given, dict) and "spec" in given:
        given = given["spec"]
    if not isinstance(given, dict):
        raise UserError(f"{spec} must hold the fields of a segment spec, or be the {MANIFEST} of a data set")
    return {"spec": given}


def _compare_file(path: Path, entry: Mapping[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if (size := path.stat().st_size) != entry["bytes"]:
        return [f"{path} has {size} bytes, {entry['bytes']} were written"]
    digest = sha256_of(path)
    return [] if digest == entry["sha256"] else [f"{path} has SHA-256 {digest}, {entry['sha256']} was written"]


def _read_array(content: bytes, shape: tuple[int, int], types: tuple[str, ...], label: str) -> tuple[np.ndarray, int]:
    """The array in a .npy file, and the length of its header."""
    stream = io.BytesIO(content)
    try:
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            np.lib.format.read_magic(stream)
        ]
        found, fortran, dtype = header(stream)
    except (ValueError, KeyError) as error:
        raise UserError(f"{label}: not a .npy file that can be read ({error})") from error
    skip = stream.tell()
    if found != shape or dtype.str not in types or fortran:
        layout = ", columns first" if fortran else ""
        raise UserError(f"{label}: must be {shape} of {' or '.join(types)}, got {found} of {dtype.str}{layout}")
    if len(content) - skip != dtype.itemsize * shape[0] * shape[1]:
        raise UserError(f"{label}: {len(content) - skip} bytes of data for {shape} of {dtype.str}")
    return np.frombuffer(content, dtype, offset=skip).reshape(shape), skip
