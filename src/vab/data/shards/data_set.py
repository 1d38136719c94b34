"""The files of a whole data set: what its parts share, its index joined from theirs, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
from torch import Tensor

from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    CODEBOOKS,
    FORMAT,
    FORMAT_VERSION,
    HEAD,
    INDEX,
    LABEL_IDS,
    LABEL_STARTS,
    MANIFEST,
    PARTS,
    SIDE_FILES,
    Left,
    array_pieces,
    check_codebooks,
    head_differences,
    index_dtype,
    json_lines,
    library_versions,
    part_name,
    rows_name,
)
from vab.data.shards.part_files import read_part, read_rows
from vab.files import sha256_of, write_atomically
from vab.spec import SegmentSpec, UserError


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


class Contents(NamedTuple):
    """What a data set holds, besides its tars."""

    head: Mapping[str, Any]
    """``spec``, ``labels`` and ``extraction``."""
    tables: Sequence[Rows]
    """All rows of the index."""
    codebooks: Tensor
    """(K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads."""
    left_out: Sequence[Left | Mapping[str, Any]]
    """What is not in the data set, and why."""
    num_sources: int
    """Inputs, those left out included."""
    further: Mapping[str, Any]
    """Entries of the manifest to add or to replace."""


def publish_data_set(out: OutFolder, contents: Contents) -> dict[str, Any]:
    """Write index, labels, codebooks and at last the manifest, which is returned.

    Raises:
        UserError: As ``write_data_set`` does.
    """
    with out.work() as work:
        manifest = write_data_set(work, contents)
        out.refresh()
        if out.has(MANIFEST):
            # Another process may have joined the same parts; one that joined others may have replaced its files since.
            names = (*SIDE_FILES, MANIFEST)
            if all(out.has(name) and sha256_of(out.path(name)) == sha256_of(work / name) for name in names):
                return manifest
            out.remove(MANIFEST)  # killed here, the folder is unfinished, not wrong
        out.publish(work, [*SIDE_FILES, MANIFEST])
    return manifest


def write_data_set(folder: Path, contents: Contents) -> dict[str, Any]:
    """Write all files of a data set but its tars into a folder; returns the manifest.

    Raises:
        UserError: If the codebooks do not fit the spec, two records have one key, or the disk is full.
    """
    head, tables = contents.head, contents.tables
    check_codebooks(contents.codebooks, SegmentSpec.from_dict(head["spec"]))
    index = concatenate(tables)
    label_counts = np.concatenate([np.zeros(0, np.int64), *(rows.label_counts for rows in tables)])
    label_ids = np.concatenate([np.zeros(0, np.int32), *(rows.label_ids for rows in tables)])
    arrays: dict[str, list[bytes | memoryview]] = {
        INDEX: array_pieces(index),
        LABEL_STARTS: array_pieces(np.concatenate([[0], np.cumsum(label_counts, dtype=np.int64)]).astype("<i8")),
        LABEL_IDS: array_pieces(label_ids.astype("<i4")),
        CODEBOOKS: [safetensors.torch.save({"codebooks": contents.codebooks.detach().cpu().float().contiguous()})],
    }
    files = {}
    for name, pieces in arrays.items():
        write_atomically(folder / name, pieces)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": head["spec"],
        "dtypes": {"codes": "<u2", "features": "<f2"},
        "labels": head["labels"],
        "counts": {"records": len(index), "sources": contents.num_sources, "left_out": len(contents.left_out)},
        "extraction": head["extraction"],
        "versions": library_versions(),
        "files": files,
        "shards": [tar for rows in tables for tar in rows.tars],
        **contents.further,
        "left_out": contents.left_out,
    }
    write_atomically(folder / MANIFEST, json_lines(manifest, "left_out"))
    return manifest
