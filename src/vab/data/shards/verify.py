"""Reading whole tars: to check a data set against its manifest, or to index tars that were made elsewhere."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from vab.data.reading.dataset import ShardDataset
from vab.data.remote import is_address, local_copy
from vab.data.shards.format import (
    CODE_TYPES,
    CODEBOOKS,
    FEATURE_TYPES,
    FIELDS,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    INDEX_COLUMNS,
    KEY_PATTERN,
    LABEL_IDS,
    MANIFEST,
    check_codebooks,
    index_dtype,
    library_versions,
    read_manifest,
    write_manifest,
    write_side_files,
)
from vab.files import sha256_of
from vab.spec import SegmentSpec, UserError


@dataclass
class _Record:
    """One record as found in a tar."""

    key: str
    row: dict[str, Any] = field(default_factory=dict)
    """Values of its row in the index, without shard and key."""
    types: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


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
    dataset, refused = None, None
    try:
        dataset = ShardDataset(folder)
        check_codebooks(dataset.codebooks, spec)
    except UserError as error:
        refused = str(error)
    problems: list[str] = []
    listed = manifest["files"] | {shard["name"]: shard for shard in manifest["shards"]}
    problems += [line for name, entry in listed.items() for line in _compare_file(folder / name, entry)]
    problems += [f"{path} is not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    keys: list[np.ndarray] = []  # of each tar
    first = 0
    for number, shard in enumerate(manifest["shards"]):
        if not (folder / shard["name"]).is_file():  # reported above
            first += shard["records"]
            continue
        count, names = 0, list[str]()
        try:
            for record in _read_tar(folder / shard["name"], spec, manifest["labels"]):
                names.append(record.key)
                if dataset is not None and count < shard["records"]:
                    problems += _compare_record(dataset, first + count, number, record, shard["name"])
                if record.types != manifest["dtypes"]:
                    problems.append(f"{shard['name']}: {record.key} holds {record.types}, not {manifest['dtypes']}")
                count += 1
            if count != shard["records"]:
                problems.append(f"{shard['name']} holds {count} records, {shard['records']} were written")
        except UserError as error:
            problems.append(str(error))
        keys.append(np.array(names, "S"))
        first += shard["records"]
    if keys:
        problems += [f"key {key} occurs {count} times" for key, count in _repeated(np.concatenate(keys))]
    if first != manifest["counts"]["records"]:
        problems.append(f"the manifest counts {manifest['counts']['records']} records, its shards {first}")
    # Where reading is refused, the lines above say why in more words, unless it is for a reason of its own.
    return problems if problems or refused is None else [refused]


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
        codebooks = _find_codebooks(folder, None if spec is None else Path(spec).parent)
    check_codebooks(codebooks, numbers)
    found = _Found(old.get("labels"))
    shards = []
    for tar in tars:
        count = found.add(tar, numbers)
        shards.append({"name": tar.name, "records": count, "bytes": tar.stat().st_size, "sha256": sha256_of(tar)})
    index, label_counts, label_ids = found.join(tars)
    left_out = old.get("left_out", [])
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": numbers.to_dict(),
        "dtypes": found.types,
        "labels": found.labels,
        "counts": {**old.get("counts", {}), "records": len(index), "left_out": len(left_out)},
        "extraction": old.get("extraction", {}),
        "versions": old.get("versions", library_versions()),
        "files": write_side_files(folder, index, label_counts, label_ids, codebooks),
        "shards": shards,
        "left_out": left_out,
    }
    write_manifest(folder, manifest)
    return manifest


class _Found:
    """The records of tars that are indexed, as arrays: there can be millions.

    Args:
        labels: Vocabulary; None for the labels that occur, sorted.
    """

    def __init__(self, labels: list[str] | None) -> None:
        self._vocabulary, self.labels = labels, list(labels or ())
        self._numbers = {name: number for number, name in enumerate(self.labels)}
        self._rows: list[np.ndarray] = []  # of each tar
        self._label_counts, self._label_ids = array("i"), array("i")
        self.types: dict[str, str] = {}

    def add(self, tar: Path, spec: SegmentSpec) -> int:
        """Read a tar; return how many records it holds."""
        keys, columns = list[str](), {name: array("Q") for name in INDEX_COLUMNS}
        for record in _read_tar(tar, spec, self._vocabulary):
            self.types = self.types or record.types
            if record.types != self.types:
                raise UserError(f"{tar}: {record.key} holds {record.types}, others {self.types}")
            keys.append(record.key)
            for name, value in {"shard": len(self._rows), **record.row}.items():
                columns[name].append(value)
            ids = {self._numbers.setdefault(name, len(self._numbers)) for name in record.meta["labels"]}
            self._label_counts.append(len(ids))
            self._label_ids.extend(sorted(ids))
        rows = np.zeros(len(keys), index_dtype(max(map(len, keys), default=1)))
        for name, values in {**columns, "key": keys}.items():
            rows[name] = values
        self._rows.append(rows)
        return len(keys)

    def join(self, tars: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index, number of labels of each record, and label numbers, of all tars; this object is then empty.

        Raises:
            UserError: If there is no record, or two have one key.
        """
        longest = max(rows.dtype["key"].itemsize for rows in self._rows)
        index = np.zeros(sum(map(len, self._rows)), index_dtype(longest))
        if not len(index):
            raise UserError(f"the tars of {tars[0].parent} hold no record")
        end = len(index)
        while self._rows:  # from the last on, so that there are never two of everything
            rows = self._rows.pop()
            index[end - len(rows) : end] = rows
            end -= len(rows)
        for key, _ in _repeated(index["key"]):
            first, second = index["shard"][index["key"] == key.encode()][:2]
            raise UserError(f"{tars[second]}: key {key} is in {tars[first].name}, too")
        ids = np.asarray(self._label_ids)
        if self._vocabulary is None:
            self.labels = sorted(self._numbers)
            new = np.argsort(np.argsort(list(self._numbers)))  # number of each label in the sorted list
            ids = new[ids]
        return index, np.asarray(self._label_counts), ids


def _repeated(keys: np.ndarray) -> list[tuple[str, int]]:
    """Keys that occur more than once, and how often."""
    names, counts = np.unique(keys, return_counts=True)
    return [(name.decode(), int(count)) for name, count in zip(names[counts > 1], counts[counts > 1], strict=True)]


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


def _find_codebooks(*folders: Path | None) -> Tensor:
    for folder in folders:
        if folder is not None and (folder / CODEBOOKS).is_file():
            try:
                return safetensors.torch.load_file(folder / CODEBOOKS)["codebooks"]
            except (safetensors.SafetensorError, KeyError) as error:
                raise UserError(f"{folder / CODEBOOKS} is damaged: {error}") from error
    raise UserError(f"no {CODEBOOKS} in {folders[0]}: copy it from another data set of the same codec")


def _compare_file(path: Path, entry: Mapping[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if (size := path.stat().st_size) != entry["bytes"]:
        return [f"{path} has {size} bytes, {entry['bytes']} were written"]
    digest = sha256_of(path)
    return [] if digest == entry["sha256"] else [f"{path} has SHA-256 {digest}, {entry['sha256']} was written"]


def _compare_record(dataset: ShardDataset, number: int, shard: int, record: _Record, name: str) -> list[str]:
    """Differences between a record and what the index says of it."""
    row = dataset.index_row(number)
    found = {**record.row, "shard": shard, "key": record.key}
    wrong = [column for column, value in found.items() if row[column] != value]
    labels = sorted(dataset.label_names(number))
    if labels != sorted(set(record.meta["labels"])):
        wrong.append("labels")
    return [f"{name}: index of record {record.key} is wrong in {wrong}"] if wrong else []


def _read_tar(path: Path, spec: SegmentSpec, labels: list[str] | None) -> Iterator[_Record]:
    """The records of a tar, each checked against the spec.

    Args:
        path: Of the tar.
        spec: What arrays must be.
        labels: Vocabulary; any name is allowed if None.

    Raises:
        UserError: Naming the file, at the first thing that is wrong.
    """
    end = 0
    record: _Record | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a kilobyte for each
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isdir():
                    continue
                key, _, name = member.name.removeprefix("./").partition(".")
                if not member.isreg() or not KEY_PATTERN.fullmatch(key):
                    raise UserError(f"{path}: {member.name}: keys must be of A-Z a-z 0-9 _ -, members plain files")
                if record is None or record.key != key:
                    if record is not None:
                        yield _whole(record, path)
                    record = _Record(key)
                if name not in FIELDS:
                    raise UserError(f"{path}: {key} has a field {name}; the fields are {', '.join(FIELDS)}")
                if f"{name.removesuffix('.npy')}_offset" in record.row:
                    raise UserError(f"{path}: {key} has the field {name} twice")
                file.seek(member.offset_data)
                _take(record, name, file.read(member.size), member.offset_data, (path, spec, labels))
        # An archive ends with two empty blocks; without them the rest was cut off between two members.
        if path.stat().st_size < end + 1024:
            raise UserError(f"{path} is cut: its end is missing")
        if record is not None:
            yield _whole(record, path)
    except tarfile.TarError as error:
        raise UserError(f"{path} is cut or damaged: {error}") from error


def _whole(record: _Record, path: Path) -> _Record:
    if missing := [name for name in FIELDS if f"{name.removesuffix('.npy')}_offset" not in record.row]:
        raise UserError(f"{path}: {record.key} lacks {', '.join(missing)} (a record's fields must lie side by side)")
    return record


def _take(
    record: _Record, name: str, content: bytes, offset: int, where: tuple[Path, SegmentSpec, list[str] | None]
) -> None:
    """Check one member and note where its data lie."""
    path, spec, labels = where
    label = f"{path}: {name} of {record.key}"
    short, skip = name.removesuffix(".npy"), 0
    if name == "json":
        record.meta, lengths = _read_meta(content, spec, labels, label)
        record.row |= lengths
    else:
        expected, types = {
            "codes": ((spec.num_codebooks, spec.num_steps), CODE_TYPES),
            "features": ((spec.num_frames, spec.feature_dim), FEATURE_TYPES),
        }[short]
        array, skip = _read_array(content, expected, types, label)
        if short == "codes" and (array.min() < 0 or array.max() >= spec.codebook_size):
            got = f"{array.min()}..{array.max()}"
            raise UserError(f"{label}: codes must be in 0..{spec.codebook_size - 1}, got {got}")
        if short == "features" and not np.isfinite(array).all():
            raise UserError(f"{label}: not finite")
        record.types[short] = array.dtype.str
    record.row |= {
        f"{short}_offset": offset + skip,
        f"{short}_size": len(content) - skip,
        f"{short}_crc": zlib.crc32(memoryview(content)[skip:]),
    }


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


def _read_meta(
    content: bytes, spec: SegmentSpec, labels: list[str] | None, label: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The description of a record, with its labels as a list, and its valid lengths."""
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise UserError(f"{label}: not JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("labels", []), list):
        raise UserError(f"{label}: must be an object, its labels a list of names")
    meta.setdefault("labels", [])
    lengths = {"steps": meta.get("steps", spec.num_steps), "frames": meta.get("frames", spec.num_frames)}
    for name, least, limit in (("steps", 1, spec.num_steps), ("frames", 0, spec.num_frames)):
        if not isinstance(lengths[name], int) or not least <= lengths[name] <= limit:
            raise UserError(f"{label}: {name} must be in {least}..{limit}, got {lengths[name]}")
    if labels is not None and (unknown := [name for name in meta["labels"] if name not in labels]):
        raise UserError(f"{label}: labels {unknown} are not in the data set's vocabulary")
    return meta, lengths
