"""Retrieval metrics of any system's paired embeddings, on a gallery that is written down."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vab import __version__
from vab.data.reading.labels import first_of, read_keys, refuse_duplicates
from vab.files import as_utf8, check_files, sha256_of, write_atomically
from vab.metrics.recall import CUTS, chance_table, match_ranks, retrieval_table
from vab.spec import UserError

By = Literal["recording", "segment"]
TIES = "count against: rank is the number of wrong items at least as similar"
WAYS = {"a2v": ("audio", "video"), "v2a": ("video", "audio")}
BY = {
    "recording": "right: every segment of the query's recording; the most similar of them has the rank",
    "segment": "right: the query's own segment alone",
}


@dataclass(frozen=True)
class Embeddings:
    """One side, as its file has it."""

    path: str
    rows: np.ndarray
    """(N, E) float."""
    keys: tuple[str, ...] | None
    """N different names, or None where rows are paired by their order."""
    recordings: tuple[str, ...] | None = None
    """Of each the name of the recording that it is cut from, where known."""


def recall(
    audio: str,
    video: str,
    out: str | None = None,
    keys: str | None = None,
    key_column: str | None = None,
    class_column: str | None = None,
    per_class: int | None = None,
    expected: int | None = None,
    on_missing: Literal["stop", "skip"] = "stop",
    by: By = "recording",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10, median rank and mean reciprocal rank of paired embeddings of any system, both ways.

    A .npz file holds the array keys (N names) and one array (N, E) of embeddings: sides are paired by key, in any
    order. It may hold the array recordings: of each key the name of the recording that it is a segment of. A .npy file
    holds (N, E) alone: sides are paired row by row. Similarity is the cosine; ties count against.

    Args:
        audio: .npz or .npy with the audio embeddings.
        video: The same with the video embeddings.
        out: A .json file for the figures and what they are of; none is written without it.
        keys: A list of the keys that make the gallery: text with one a line, .csv, or .json (a list, or {"data": list},
            of keys or of tables). Keys of the files that it does not name are not used.
        key_column: Where the keys are in a .csv (a name from its first line, or a number from 0 for one without such a
            line) or in the tables of a .json. May be left out where one is called key or video_id, or the only one id
            or file.
        class_column: Where the classes are in the list.
        per_class: How many keys of each class the list must have.
        expected: How many keys the gallery must have.
        on_missing: What to do with a key that one side lacks. stop: refuse; skip: leave it out and count it.
        by: What counts as found. recording: any segment of the query's recording, where recordings are known; segment:
            the query's own segment alone. The same where each recording has one segment.
        overwrite: Replace the file that is there.
    """
    check_files({"out": (out, ".json")}, [path for path in (audio, video, keys) if path is not None], overwrite)
    check_list_flags(keys, key_column, class_column, per_class)
    wanted = None if keys is None else read_keys(keys, key_column, class_column, per_class)
    sides = {"audio": read_embeddings(audio, "audio"), "video": read_embeddings(video, "video")}
    report = measure(sides, wanted, keys, per_class, expected, on_missing, by)
    report["embeddings"] = {
        name: {"file": side.path, "sha256": sha256_of(Path(side.path)), "width": side.rows.shape[1]}
        for name, side in sides.items()
    }
    if out is not None:
        write_atomically(Path(out), (json.dumps(report, indent=2) + "\n").encode())
    show(report)
    return report


def check_list_flags(keys: str | None, key_column: str | None, class_column: str | None, per_class: int | None) -> None:
    """Refuse flags about a list of keys that go without the one that they are about.

    Raises:
        UserError: Naming it.
    """
    if per_class is not None and class_column is None:
        raise UserError("--per_class needs --class_column, which says where the list has its classes")
    if keys is None and (key_column is not None or class_column is not None):
        raise UserError("--key_column and --class_column are of the list of keys: give it as --keys FILE")


def measure(
    sides: dict[str, Embeddings],
    wanted: tuple[str, ...] | None = None,
    keys: str | None = None,
    per_class: int | None = None,
    expected: int | None = None,
    on_missing: str = "stop",
    by: By = "recording",
) -> dict[str, Any]:
    """The figures of paired embeddings, and what they are of, in plain JSON.

    Args:
        sides: ``audio`` and ``video``.
        wanted: Keys that make the gallery; all if None.
        keys: File that named them.
        per_class: How many of each class it was checked for.
        expected: As in ``recall``.
        on_missing: As in ``recall``.
        by: As in ``recall``.

    Raises:
        UserError: If the sides do not fit, keys are missing, or the gallery is not of the size expected.
    """
    if sides["audio"].rows.shape[1] != sides["video"].rows.shape[1]:
        widths = " and ".join(f"{side.path} has {side.rows.shape[1]}" for side in sides.values())
        raise UserError(f"the two sides need embeddings of one width: {widths}")
    gallery, missing, rows = _pair(sides, wanted, on_missing)
    count = len(rows["audio"])
    if count < 2:
        raise UserError(f"a gallery needs at least 2 items, got {count}")
    if expected is not None and count != expected:
        raise UserError(f"the gallery has {count} items, --expected {expected}: figures would not compare")
    recordings = _recordings(sides, gallery)
    by = by if recordings is not None else "segment"
    names = list(range(count)) if recordings is None or by == "segment" else recordings
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([number[name] for name in names])
    ranks = [match_ranks(rows[one], rows[other], groups=groups) for one, other in (WAYS["a2v"], WAYS["v2a"])]
    chance = chance_table(groups)
    table = {name: float(value) for name, value in retrieval_table(*ranks).items()}
    sure = {name for name, value in chance.items() if name.startswith("recall") and value == 1}  # whatever is ranked
    return {
        "figures": {name: value for name, value in table.items() if name[: -len("_a2v")] not in sure},
        "chance": {name: value for name, value in chance.items() if name not in sure},
        "N": count,
        "by": by,
        "right": BY[by],
        "recordings": len(set(recordings)) if recordings is not None else None,
        "gallery_sha256": None if gallery is None else hashlib.sha256(as_utf8("\n".join(gallery))).hexdigest(),
        "paired": "row by row" if gallery is None else "by key",
        "similarity": "cosine",
        "ties": TIES,
        "missing": missing,
        "on_missing": on_missing,
        "list": None if keys is None else {"file": keys, "sha256": sha256_of(Path(keys))},
        "per_class": per_class,
        "vab": __version__,
    }


def read_embeddings(path: str, side: str) -> Embeddings:
    """One side's embeddings.

    Args:
        path: .npz with the array keys, perhaps recordings, and one other (N, E), or one called ``side``; or .npy with
            (N, E).
        side: ``audio`` or ``video``.

    Raises:
        UserError: If it is none of these, a key is there twice, or an embedding has no direction.
    """
    keys: tuple[str, ...] | None = None
    recordings: tuple[str, ...] | None = None
    try:
        content = np.load(path, allow_pickle=False)  # pickles can run code
        if isinstance(content, np.ndarray):
            rows = content
        else:
            with content:
                others = [name for name in content.files if name not in ("keys", "about", "recordings")]
                others = [side] if side in others else others
                if "keys" not in content.files or len(others) != 1:
                    held = ", ".join(content.files) or "nothing"
                    raise UserError(f"{path} must hold the array keys and one array of embeddings, it holds {held}")
                rows, keys = content[others[0]], _names(path, "keys", content["keys"])
                refuse_duplicates(path, keys)
                if "recordings" in content.files:
                    recordings = _names(path, "recordings", content["recordings"])
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: there is no such file") from error
        reason = (
            "; arrays of objects are not read, save keys as np.array(keys, dtype=str)" if "pickle" in str(error) else ""
        )
        raise UserError(f"{path} cannot be read as .npz or .npy{reason}") from error
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "fiu":
        raise UserError(f"{path}: embeddings are (N, E) numbers, got {rows.dtype} {rows.shape}")
    if keys is not None and len(keys) != len(rows):
        raise UserError(f"{path} has {len(keys)} keys and {len(rows)} embeddings")
    if recordings is not None and len(recordings) != len(rows):
        raise UserError(f"{path} has {len(recordings)} recordings and {len(rows)} embeddings")
    return Embeddings(path, rows.astype(np.float64), keys, recordings)


def _names(path: str, what: str, array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        raise UserError(f"{path}: {what} are (N,) strings or whole numbers, got {array.dtype} {array.shape}")
    try:
        return tuple(key.decode() if isinstance(key, bytes) else str(key) for key in array.tolist())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} are not UTF-8") from error


def _recordings(sides: dict[str, Embeddings], gallery: list[str] | None) -> list[str] | None:
    """Of each item of the gallery the name of its recording; None where no side says it."""
    told = []
    for side in sides.values():
        if gallery is not None and side.keys is not None and side.recordings is not None:
            by_key = dict(zip(side.keys, side.recordings, strict=True))
            told.append([by_key[key] for key in gallery])
    if not told:
        return None
    if told[0] != told[-1]:
        paths = " and ".join(side.path for side in sides.values())
        raise UserError(f"{paths} name different recordings for one key")
    return told[0]


def _pair(
    sides: dict[str, Embeddings], wanted: tuple[str, ...] | None, on_missing: str
) -> tuple[list[str] | None, int, dict[str, Tensor]]:
    """The gallery's keys in order (None where there are none), how many are missing, and the rows of both sides."""
    for side in sides.values():
        if side.keys is None and wanted is not None:
            raise UserError(f"{side.path} has no keys to find those of --keys by: save a .npz with an array keys")
    if (sides["audio"].keys is None) != (sides["video"].keys is None):
        bare = next(side.path for side in sides.values() if side.keys is None)
        raise UserError(f"{bare} has no keys and the other side has: give both as .npz with keys, or both as .npy")
    lengths = {side.path: len(side.rows) for side in sides.values()}
    if sides["audio"].keys is None:
        if len(set(lengths.values())) > 1:
            counts = " and ".join(f"{path} has {number}" for path, number in lengths.items())
            raise UserError(f"rows are paired in order and must be equally many: {counts}")
        return None, 0, {name: _tensor(side, np.arange(len(side.rows))) for name, side in sides.items()}
    places = {name: {key: row for row, key in enumerate(side.keys or ())} for name, side in sides.items()}
    asked = sorted(wanted if wanted is not None else {key for side in places.values() for key in side})
    found = [key for key in asked if all(key in side for side in places.values())]
    if len(found) < len(asked) and on_missing == "stop":
        lacking = [
            f"{sides[name].path} lacks {len(lost)} ({first_of(lost)})"
            for name, side in places.items()
            if (lost := [key for key in asked if key not in side])
        ]
        raise UserError(
            f"of {len(asked)} keys {len(asked) - len(found)} are missing: {'; '.join(lacking)}; "
            f"--on_missing skip leaves them out and counts them"
        )
    rows = {name: np.array([side[key] for key in found], dtype=np.int64) for name, side in places.items()}
    return found, len(asked) - len(found), {name: _tensor(side, rows[name]) for name, side in sides.items()}


def _tensor(side: Embeddings, rows: np.ndarray) -> Tensor:
    """(N, E) float64: these rows, each with a direction."""
    chosen = side.rows[rows]
    for words, bad in (
        ("numbers that are not finite", ~np.isfinite(chosen).all(1)),
        ("zeros only, which have no direction", ~chosen.any(1)),
    ):
        if bad.any():
            names = [side.keys[row] if side.keys else f"row {row}" for row in rows[bad]]
            raise UserError(f"{side.path}: {len(names)} embeddings have {words} ({first_of(names)})")
    return torch.from_numpy(chosen)


def show(report: dict[str, Any]) -> None:
    """Print the table of a report."""
    console = Console(width=None if Console().is_terminal else 110)
    table = Table(title=f"retrieval among {report['N']}", title_justify="left")
    table.add_column("")
    chance = report["chance"]
    cuts = [cut for cut in CUTS if f"recall_at_{cut}" in chance]
    for heading in (*(f"R@{cut}" for cut in cuts), "median rank", "MRR"):
        table.add_column(heading, justify="right")
    figures = report["figures"]
    for way, words in (("a2v", "audio to video"), ("v2a", "video to audio")):
        recalls = [f"{100 * figures[f'recall_at_{cut}_{way}']:.1f}" for cut in cuts]
        table.add_row(words, *recalls, f"{figures[f'median_rank_{way}']:g}", f"{figures[f'mrr_{way}']:.3f}")
    recalls = [f"{100 * chance[f'recall_at_{cut}']:.1f}" for cut in cuts]
    table.add_row("chance", *recalls, f"{chance['median_rank']:g}", f"{chance['mrr']:.3f}")
    console.print(table)
    gallery = f"gallery {report['gallery_sha256'][:12]}" if report["gallery_sha256"] else "paired row by row"
    missing = f"; {report['missing']} keys missing and left out" if report["missing"] else ""
    known = "recordings not known" if report["recordings"] is None else f"{report['recordings']} recordings"
    console.print(
        f"R@k in %, by {report['by']} ({known}); cosine; ties count against; {gallery}{missing}",
        style="dim",
        highlight=False,
        markup=False,
    )
