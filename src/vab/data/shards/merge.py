"""Joining finished data sets into one, without decoding or encoding anything again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vab.data.remote import local_copy
from vab.data.shards.data_set import Contents, Rows, begin_folder, publish_data_set
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    CODEBOOKS,
    INDEX,
    LABEL_IDS,
    LABEL_STARTS,
    MANIFEST,
    Left,
    head_differences,
    read_codebooks,
    read_manifest,
    shard_name,
)
from vab.files import explain_full_disk
from vab.spec import UserError


def merge(folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Join finished data sets of one spec and one set of rules into a new one; returns its manifest.

    Tars are linked where the file system allows it, else copied. The vocabulary has the labels of the first data set,
    then the new ones of the others.

    Args:
        folders: The data sets, two or more: folders, or addresses, which are fetched into the cache.
        out: Folder to write, or an address.

    Raises:
        UserError: If their spec, rules or codebooks differ, two records have one key, the folder is taken, or the disk
            is full.
    """
    target = OutFolder.at(out)
    if len(folders) < 2:
        raise UserError("give two or more folders to merge: vab shards merge DIR DIR --out DIR")
    copies = [local_copy(folder) for folder in folders]  # held until the end
    places = [copy.folder for copy in copies]
    manifests = [read_manifest(place)[0] for place in places]
    first, heads = manifests[0], [_head(manifest) for manifest in manifests]
    for folder, manifest, head in zip(folders, manifests, heads, strict=True):
        differences = head_differences(heads[0] | {"labels": []}, head | {"labels": []})
        if manifest["dtypes"] != first["dtypes"]:
            differences.append(f"array types: {first['dtypes']} != {manifest['dtypes']}")
        if manifest["files"][CODEBOOKS]["sha256"] != first["files"][CODEBOOKS]["sha256"]:
            differences.append("their codebooks differ")
        if differences:
            raise UserError(f"{folders[0]} and {folder} cannot be merged ({'; '.join(differences)})")
    labels = list(dict.fromkeys(label for manifest in manifests for label in manifest["labels"]))
    if target.has(MANIFEST):
        raise UserError(f"{out} already holds a finished data set: give another folder, or delete this one")
    inputs = [str(manifest["extraction"].get("inputs")) for manifest in manifests]
    head = heads[0] | {"labels": labels}
    begin_folder(target, {**head, "merged": [str(folder) for folder in folders]})
    tables, left_out, count = list[Rows](), list[Left](), 0
    for place, manifest in zip(places, manifests, strict=True):
        tars = [tar | {"name": shard_name(number)} for number, tar in enumerate(manifest["shards"], count)]
        count += len(tars)
        with target.work() as work:
            for tar, new in zip(manifest["shards"], tars, strict=True):
                _link(place / tar["name"], work / new["name"], target.scratch())
                target.publish(work, [new["name"]])
        tables.append(_rows(place, manifest, tars, labels))
        left_out += map(Left.of, manifest["left_out"])
    further: dict[str, Any] = {"versions": first["versions"]}
    if others := [manifest["versions"] for manifest in manifests[1:] if manifest["versions"] != first["versions"]]:
        further["merged_versions"] = others
    if duplicates := {own: of for manifest in manifests for own, of in manifest.get("duplicates", {}).items()}:
        further["duplicates"] = duplicates
    num_sources = sum(manifest["counts"]["sources"] for manifest in manifests)
    mark = f"{num_sources} sha256:{hashlib.sha256(' '.join(inputs).encode()).hexdigest()}"
    head["extraction"] = head["extraction"] | {"inputs": mark}
    codebooks = read_codebooks(places[0] / CODEBOOKS)
    merged = publish_data_set(target, Contents(head, tables, codebooks, left_out, num_sources, further))
    target.remove_parts()
    return merged


def _head(manifest: dict[str, Any]) -> dict[str, Any]:
    rules = {name: value for name, value in manifest["extraction"].items() if name != "inputs"}
    return {"spec": manifest["spec"], "labels": manifest["labels"], "extraction": rules}


def _rows(folder: Path, manifest: dict[str, Any], tars: list[dict[str, Any]], labels: list[str]) -> Rows:
    index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False)
    starts, ids = np.load(folder / LABEL_STARTS), np.load(folder / LABEL_IDS)
    numbers = {label: number for number, label in enumerate(labels)}
    new = np.array([numbers[label] for label in manifest["labels"]], np.int32)
    counts = np.diff(starts)
    ids = new[ids] if len(ids) else ids
    ids = ids[np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))]  # of each record in order
    load = partial(np.load, folder / INDEX, mmap_mode="r", allow_pickle=False)
    return Rows(len(index), index.dtype["key"].itemsize, load, counts, ids, tars)


def _link(old: Path, new: Path, out: Path) -> None:
    try:
        os.link(old.resolve(), new)
    except OSError:  # another file system, or one without links
        try:
            with old.open("rb") as source, new.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        except OSError as error:
            raise explain_full_disk(error, out, old.stat().st_size) from error
