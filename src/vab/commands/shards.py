"""Looking after folders of shards: ``vab shards verify``, ``index`` and ``info``."""

from __future__ import annotations

import json
import sys

from vab.data import indexing
from vab.data.records import ShardDataset
from vab.spec import UserError


def verify_shards(folder: str) -> None:
    """Read every record of a folder of shards again and compare it with the manifest, hash by hash.

    Args:
        folder: The folder of shards.
    """
    problems = indexing.verify(folder)
    if problems:
        raise UserError(f"{folder}: {len(problems)} problems\n" + "\n".join(problems))
    print(f"{folder}: {len(ShardDataset(folder))} records, all as the manifest says")


def index_shards(folder: str, spec: str | None = None) -> None:
    """Index a folder of WebDataset tars made elsewhere, so that vab can read them.

    Args:
        folder: Holds the tars; their records have the fields codes.npy, features.npy and json.
        spec: A JSON file with the segment spec, where the folder has no manifest.json.
    """
    indexing.index_folder(folder, spec)


def show_shards(folder: str) -> None:
    """Print what a folder of shards holds.

    Args:
        folder: The folder of shards.
    """
    json.dump(indexing.info(folder), sys.stdout, indent=2)
    print()
