"""A data set on disk: numbered tars of records, an index to read them by offset, a manifest that states the numbers.

This file holds the format. Writing is in ``vab.data.shards.writer``, reading in ``vab.data.reading.dataset``, checking
and the indexing of foreign tars in ``vab.data.shards.verify``.

A finished folder::

    manifest.json          format version, spec, label vocabulary, counts, what was left out, files and their hashes
    shard-000000.tar ...   <key>.codes.npy, <key>.features.npy, <key>.json, one record after the other
    index.npy              one row per record: where its arrays lie (``index_dtype``)
    label_starts.npy, label_ids.npy    labels of record i: label_ids[label_starts[i]:label_starts[i + 1]]
    codebooks.safetensors  "codebooks" (K, S, code_dim) float32

    parts/                 which parts are done, to resume or repeat an extraction; readers do not need it

``manifest.json`` is written last: a folder that has one is complete. A data set is written in parts, each of at most
one tar. ``parts/head.json`` holds what all parts share. ``parts/000000.json`` is written last of a part and lists its
sources. After a kill the writer skips the parts that are done.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vab.spec import NOT_STATED, SegmentSpec, UserError

FORMAT = "vab-shards"
FORMAT_VERSION = 1
MANIFEST, INDEX, CODEBOOKS = "manifest.json", "index.npy", "codebooks.safetensors"
LABEL_STARTS, LABEL_IDS = "label_starts.npy", "label_ids.npy"
PARTS = "parts"
HEAD = f"{PARTS}/head.json"
SIDE_FILES = (INDEX, LABEL_STARTS, LABEL_IDS, CODEBOOKS)
"""The files that are written once all tars exist, except the manifest."""
FIELDS = ("codes.npy", "features.npy", "json")
"""The only members that a record may have. Others are refused: nothing in a shard can run code."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
# A tar header of the plain kind (ustar) holds names of 100 characters; ".features.npy" is the longest field.
MAX_KEY_LENGTH = 100 - len(".features.npy")

_FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+")
"""Names that a manifest may list: files of its own folder. A manifest of others must not make vab read elsewhere."""

KEY_SECONDS = 0.001
"""s. Resolution of the start time in a key."""

INDEX_COLUMNS = {
    "shard": "<u4",
    "codes_offset": "<u8",
    "codes_size": "<u4",
    "codes_crc": "<u4",
    "features_offset": "<u8",
    "features_size": "<u4",
    "features_crc": "<u4",
    "json_offset": "<u8",
    "json_size": "<u4",
    "json_crc": "<u4",
    "steps": "<u4",
    "frames": "<u4",
}

CODE_TYPES, FEATURE_TYPES = ("|u1", "<u2", "<i4", "<i8"), ("<f2", "<f4")
"""Array types that can be read. The writer uses "<u2" and "<f2"; the others occur in tars made elsewhere."""

_MANIFEST_ENTRIES = ("spec", "dtypes", "labels", "counts", "files", "shards", "left_out")


def index_dtype(key_length: int) -> np.dtype[Any]:
    """Type of one row of ``index.npy``.

    ``<field>_offset`` and ``<field>_size`` (bytes) span the array's data in the tar, past the npy header (for json:
    the whole text); ``<field>_crc`` is the CRC-32 of those bytes. ``steps`` and ``frames`` are the valid lengths.

    Args:
        key_length: Length of the longest key of the data set.
    """
    return np.dtype([*INDEX_COLUMNS.items(), ("key", f"S{key_length}")])


def shard_name(number: int, version: int = 0) -> str:
    """File name of shard ``number``. A shard that is written again has a higher ``version``."""
    return f"shard-{number:06d}{f'-{version}' if version else ''}.tar"


def part_name(number: int) -> str:
    """Name of the file that marks a part done."""
    return f"{PARTS}/{number:06d}.json"


def rows_name(number: int, version: int) -> str:
    """Name of the file with a part's rows of the index."""
    return f"{PARTS}/{shard_name(number, version).removeprefix('shard-').removesuffix('.tar')}.npy"


def make_key(record_id: str, start_seconds: float) -> str:
    """A key that tar, webdataset and people can read, for the excerpt of ``record_id`` that starts there.

    webdataset cuts a name at its first dot, so that ``yt_0.5`` and ``yt_0.7`` would become one record: other
    characters than letters, digits, ``_`` and ``-`` become ``_``, and a hash of the id is added so that two ids never
    share a key. The start is in milliseconds.

    Args:
        record_id: Name of the source, as the user knows it.
        start_seconds: Where the excerpt starts in it, s, 0 or more.

    Raises:
        ValueError: If the start is negative or not finite.
    """
    if not 0 <= start_seconds < float("inf"):
        raise ValueError(f"start of an excerpt must be 0 s or later, got {start_seconds}")
    suffix = f"_{round(start_seconds * 1000):08d}"
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", record_id)
    room = MAX_KEY_LENGTH - len(suffix)
    if clean != record_id or len(clean) > room or not clean:
        mark = "-" + hashlib.sha256(record_id.encode("utf-8", "surrogateescape")).hexdigest()[:10]
        clean = clean[: room - len(mark)] + mark
    return clean + suffix


MAY_PASS = frozenset(("missing", "unreadable", "error"))
"""Reasons for leaving an input out that may be gone in the next run: a disk that was not mounted, a decoder that was
killed or hung, a version of a library. All other reasons lie in the input itself."""


class Left(NamedTuple):
    """Something that is not in a data set."""

    source: str
    """Name of the input."""
    reason: str
    """One word. Reports count by it."""
    detail: str = ""
    """One line for people."""
    start_seconds: float | None = None
    """s, of the excerpt that is left out; None for the whole input."""
    traceback: str = ""
    """Of an unexpected exception."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Left:
        """From a JSON value. Equal texts become one object, as there can be millions."""
        reason, detail = entry["reason"], entry.get("detail", "")
        return cls(entry["source"], sys.intern(reason), sys.intern(detail), entry.get("start_seconds"),
                   entry.get("traceback", ""))  # fmt: skip

    @property
    def may_pass(self) -> bool:
        """Whether it is a whole input, left out for a reason that may be gone later."""
        return self.start_seconds is None and self.reason in MAY_PASS

    def to_json(self) -> dict[str, Any]:
        """As a JSON value, without empty fields."""
        return {name: value for name, value in self._asdict().items() if value not in ("", None)}


def json_lines(values: Mapping[str, Any], *long: str) -> Iterator[bytes]:
    """JSON text, piece by piece, with a line for each entry of some lists, which may have millions.

    Args:
        values: JSON values by name.
        long: Names of the lists, whose entries may also be ``Left``; they come last.
    """
    rest = {name: value for name, value in values.items() if name not in long}
    yield json.dumps(rest, indent=1).removesuffix("\n}").encode()
    for name in long:
        yield f',\n "{name}": ['.encode()
        for number, entry in enumerate(values[name]):
            entry = entry.to_json() if isinstance(entry, Left) else entry
            yield f"{',' if number else ''}\n  {json.dumps(entry)}".encode()
        yield b"\n ]"
    yield b"\n}\n"


def read_json_lines(path: Path, name: str, make: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Read what ``json_lines`` wrote, entry by entry of its last list.

    Args:
        path: Of the file.
        name: Name of the last list.
        make: What to make of each of its entries; None to skip them all.

    Raises:
        ValueError: If the file is not JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head = "".join(itertools.takewhile(lambda line: line != f' "{name}": [\n', file))
            entries = [make(json.loads(line.rstrip(",\n"))) for line in file if make and line.startswith("  ")]
        values: dict[str, Any] = json.loads(head.rstrip(",\n") + "}")
    except ValueError:  # another program has written the file again, with other line breaks
        values = json.loads(path.read_bytes())
        entries = [*map(make, values.get(name, ()))] if make else []
    return values | {name: entries}


def array_pieces(array: np.ndarray) -> list[bytes | memoryview]:
    """An array as a .npy file: its header, and its own memory."""
    array, stream = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return [stream.getvalue(), array.reshape(-1).view(np.uint8).data]


def save_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    return b"".join(array_pieces(array))


def library_versions(further: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the packages that determine a data set's bytes, for the manifest.

    Args:
        further: More distributions, such as ``Frozen.packages`` of a codec. The version is ``NOT_STATED`` for one that
            is installed under another name, as forks are.
    """
    versions = {name: version(name) for name in ("vab", "torch", "numpy", "webdataset", "av", "soxr")}
    for name in further:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = NOT_STATED
    return versions


def is_complete(folder: str | Path) -> bool:
    """Whether the folder holds a finished data set."""
    return (Path(folder) / MANIFEST).is_file()


def check_codebooks(codebooks: Tensor, spec: SegmentSpec) -> None:
    """Refuse codebooks that are not (K, S, code_dim) of the spec, or not finite.

    Raises:
        UserError: Saying both shapes.
    """
    expected = (spec.num_codebooks, spec.codebook_size, spec.code_dim)
    if tuple(codebooks.shape) != expected or not bool(torch.isfinite(codebooks).all()):
        raise UserError(f"codebooks of {spec.codec} must be finite, of shape {expected}; got {tuple(codebooks.shape)}")


def read_codebooks(path: Path) -> Tensor:
    """(K, S, code_dim) float32: codebooks from a .npy file, or from a .safetensors file.

    In a .safetensors file with several tensors it is the one called ``codebooks``.

    Raises:
        UserError: If the file cannot be read, or holds something else.
    """
    if path.suffix not in (".npy", ".safetensors"):
        raise UserError(f"codebooks {path} must be a .npy or .safetensors file, or the folder of a data set")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                table = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            tensors = safetensors.torch.load_file(path)
            table = next(iter(tensors.values())) if len(tensors) == 1 else tensors["codebooks"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, safetensors.SafetensorError) as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0][:150]
        raise UserError(f"codebooks {path} cannot be read: {reason}") from error
    if table.ndim != 3 or not table.is_floating_point() or not bool(torch.isfinite(table).all()):
        raise UserError(
            f"codebooks {path} must be finite floats (K, S, code_dim), got {table.dtype} {tuple(table.shape)}"
        )
    return table.float()


def read_manifest(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The manifest of a data set, and the SHA-256 of its text, which names the data set.

    Raises:
        UserError: If there is none, or one of another format or version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(f"no folder {folder}: to make a data set, type: vab extract --media DIR --out {folder}")
        if (path.parent / PARTS).is_dir():
            raise UserError(f"{folder} is not finished: run the same command again, it resumes from there")
        raise UserError(
            f"{folder} has no {MANIFEST}: to make a data set, type: vab extract --media DIR --out {folder};"
            f" for tars made elsewhere: vab shards index {folder}"
        )
    text = path.read_bytes()
    return parse_manifest(text, folder), hashlib.sha256(text).hexdigest()


def parse_manifest(text: bytes | Path, folder: str | Path) -> dict[str, Any]:
    """The manifest of a data set.

    Args:
        text: Of the file. Or its path: then it is read line by line, as a million inputs may be left out, and
            ``left_out`` are ``Left``.
        folder: Where it lies, or the address there, for messages.

    Raises:
        UserError: If it is none, or one of another format or version.
    """
    path = f"{folder}/{MANIFEST}"
    remedy = (
        "upload it again"
        if "://" in str(folder)
        else (
            f"restore it from a copy; or, with the {MANIFEST} of another data set of the same settings, type:"
            f" vab shards index {folder} --spec OTHER/{MANIFEST}"
        )
    )
    try:
        manifest = json.loads(text) if isinstance(text, bytes) else read_json_lines(text, "left_out", Left.of)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a vab data set")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this vab reads {FORMAT_VERSION}:"
            " install the vab that wrote it, or extract again"
        )
    if missing := [name for name in _MANIFEST_ENTRIES if name not in manifest]:
        raise UserError(f"{path} lacks {missing}: {remedy}")
    try:
        names = [*manifest["files"].keys(), *(shard["name"] for shard in manifest["shards"])]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its {MANIFEST} does not list files with bytes and sha256: {error!r}") from error
    if not isinstance(manifest["dtypes"], dict) or {"codes", "features"} - {*manifest["dtypes"]}:
        raise UserError(f"{path} does not give the dtypes of codes and features: {remedy}")
    for name in names:
        if not isinstance(name, str) or name in (".", "..") or not _FILE_NAME.fullmatch(name):
            raise UserError(f"{folder}: its {MANIFEST} lists a file {name!r}, which is no name of a file in a folder")
    return manifest


def head_differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Differences between two heads (``spec``, ``extraction``, ``labels``), in words."""
    found = SegmentSpec.from_dict(theirs["spec"]).differences(SegmentSpec.from_dict(mine["spec"]))
    rules = sorted({*theirs["extraction"], *mine["extraction"]})
    pairs = [(name, theirs["extraction"].get(name), mine["extraction"].get(name)) for name in rules]
    found += [f"{name}: {their} != {my}" for name, their, my in pairs if their != my]
    if theirs["labels"] != mine["labels"]:
        found.append(f"labels: {_vocabulary_difference(theirs['labels'], mine['labels'])}")
    return found


def _vocabulary_difference(theirs: list[str], mine: list[str]) -> str:
    """Two lists of labels that differ, in a few words: there can be hundreds of labels."""
    lost, new = sorted({*theirs} - {*mine}), sorted({*mine} - {*theirs})
    parts = [f"{len(names)} {word} ({names[0]!r}{', ...' if len(names) > 1 else ''})"
             for word, names in (("not there now", lost), ("new", new)) if names]  # fmt: skip
    return f"{len(theirs)} != {len(mine)}, {' and '.join(parts) or 'in another order'}"
