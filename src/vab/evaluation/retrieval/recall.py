"""Recall, median rank and mean reciprocal rank of a gallery, both ways, and what these numbers are of."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vab import __version__
from vab.console import print_table
from vab.data.reading.labels import first_of
from vab.evaluation.retrieval.gallery import Gallery
from vab.files import as_utf8, sha256_of
from vab.metrics.recall import CUTS, chance_table, match_ranks, retrieval_table
from vab.spec import UserError

By = Literal["recording", "segment"]
_TIES = "count against: rank is the number of wrong items at least as similar"
_BY = {
    "recording": "right: every segment of the query's recording; the most similar of them has the rank",
    "segment": "right: the query's own segment alone",
}


def measure(
    audio: Gallery,
    video: Gallery,
    wanted: tuple[str, ...] | None = None,
    keys: str | None = None,
    per_class: int | None = None,
    expected: int | None = None,
    on_error: str = "stop",
    by: By = "recording",
) -> dict[str, Any]:
    """Compute the metrics of paired embeddings, and describe them in plain JSON.

    Args:
        audio: Has the audio embeddings.
        video: Has the video embeddings; the same gallery, or another that is paired by key, or by order without keys.
        wanted: Keys that make the gallery; all if None.
        keys: File that lists them, for the report.
        per_class: How many keys of each class the file was checked for, for the report.
        expected: Required size of the gallery.
        on_error: ``stop`` at a key that a side lacks, or ``skip`` it and count it.
        by: What is right, as in ``vab retrieve``.

    Raises:
        UserError: If the sides do not fit, keys are missing, or the gallery is not of the size expected.
    """
    sides = {"audio": audio, "video": video}
    widths = {side: gallery.embeddings[side].shape[1] for side, gallery in sides.items()}
    if widths["audio"] != widths["video"]:
        words = " and ".join(f"{sides[side].path} has {width}" for side, width in widths.items())
        raise UserError(f"the two sides need embeddings of one width: {words}")
    chosen, missing, rows = _pair(sides, wanted, on_error)
    count = len(rows["audio"])
    if count < 2:
        raise UserError(f"a gallery needs at least 2 items, got {count}")
    if expected is not None and count != expected:
        raise UserError(f"the gallery has {count} items, --expected {expected}: figures would not compare")
    recordings = _recordings(sides, chosen)
    by = by if recordings is not None else "segment"
    names = list(range(count)) if recordings is None or by == "segment" else recordings
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([number[name] for name in names])
    ways = itertools.permutations((rows["audio"], rows["video"]))
    ranks = [match_ranks(queries, gallery, groups=groups) for queries, gallery in ways]
    chance = chance_table(groups)
    table = {name: float(value) for name, value in retrieval_table(*ranks).items()}
    sure = {name for name, value in chance.items() if name.startswith("recall") and value == 1}  # whatever is ranked
    return {
        "figures": {name: value for name, value in table.items() if name[: -len("_a2v")] not in sure},
        "chance": {name: value for name, value in chance.items() if name not in sure},
        "N": count,
        "by": by,
        "right": _BY[by],
        "recordings": len(set(recordings)) if recordings is not None else None,
        "gallery_sha256": None if chosen is None else hashlib.sha256(as_utf8("\n".join(chosen))).hexdigest(),
        "paired": "row by row" if chosen is None else "by key",
        "similarity": "cosine",
        "ties": _TIES,
        "missing": missing,
        "on_missing": on_error,
        "list": None if keys is None else {"file": keys, "sha256": sha256_of(Path(keys))},
        "per_class": per_class,
        "vab": __version__,
    }


def _pair(
    sides: dict[str, Gallery], wanted: tuple[str, ...] | None, on_error: str
) -> tuple[list[str] | None, int, dict[str, Tensor]]:
    """The gallery's keys in order (None without keys), how many are missing, and the rows of both sides."""
    bare = [gallery.path for gallery in sides.values() if gallery.keys is None]
    if bare and wanted is not None:
        raise UserError(f"{bare[0]} has no keys to find those of --keys by: save a .npz with an array keys")
    if len(bare) == 1:
        raise UserError(f"{bare[0]} has no keys and the other side has: give both as .npz with keys, or both as .npy")
    if bare:
        counts = {gallery.path: len(gallery.embeddings[side]) for side, gallery in sides.items()}
        if len(set(counts.values())) > 1:
            words = " and ".join(f"{path} has {count}" for path, count in counts.items())
            raise UserError(f"rows are paired in order and must be equally many: {words}")
        return None, 0, {side: _rows(gallery, side, range(min(counts.values()))) for side, gallery in sides.items()}
    places = {side: {key: row for row, key in enumerate(gallery.keys or ())} for side, gallery in sides.items()}
    asked = sorted(wanted if wanted is not None else {key for rows in places.values() for key in rows})
    found = [key for key in asked if all(key in rows for rows in places.values())]
    if len(found) < len(asked) and on_error == "stop":
        lacking = [
            f"{sides[side].path} lacks {len(lost)} ({first_of(lost)})"
            for side, rows in places.items()
            if (lost := [key for key in asked if key not in rows])
        ]
        raise UserError(
            f"of {len(asked)} keys {len(asked) - len(found)} are missing: {'; '.join(lacking)}; "
            f"--on_error skip leaves them out and counts them"
        )
    rows = {side: _rows(gallery, side, [places[side][key] for key in found]) for side, gallery in sides.items()}
    return found, len(asked) - len(found), rows


def _rows(gallery: Gallery, side: str, numbers: Sequence[int]) -> Tensor:
    """(N, E) float64: these rows, each with a direction."""
    rows = gallery.embeddings[side][torch.tensor(numbers, dtype=torch.int64)].double()
    for words, bad in (
        ("numbers that are not finite", ~rows.isfinite().all(1)),
        ("zeros only, which have no direction", ~rows.any(1)),
    ):
        if bad.any():
            chosen = [numbers[place] for place in bad.nonzero()[:, 0].tolist()]
            names = [gallery.keys[number] if gallery.keys else f"row {number}" for number in chosen]
            raise UserError(f"{gallery.path}: {len(names)} embeddings have {words} ({first_of(names)})")
    return rows


def _recordings(sides: dict[str, Gallery], keys: list[str] | None) -> list[str] | None:
    """The recording of each item of the gallery; None if no side knows it."""
    known = []
    for gallery in sides.values():
        if keys is not None and gallery.keys is not None and gallery.recordings is not None:
            by_key = dict(zip(gallery.keys, gallery.recordings, strict=True))
            known.append([by_key[key] for key in keys])
    if known and known[0] != known[-1]:
        paths = " and ".join(gallery.path for gallery in sides.values())
        raise UserError(f"{paths} name different recordings for one key")
    return known[0] if known else None


def print_recall(report: dict[str, Any]) -> None:
    """Print the table of a report."""
    figures, chance = report["figures"], report["chance"]
    cuts = [cut for cut in CUTS if f"recall_at_{cut}" in chance]
    rows = []
    for words, values, way in (
        ("audio to video", figures, "_a2v"),
        ("video to audio", figures, "_v2a"),
        ("chance", chance, ""),
    ):
        recalls = [f"{100 * values[f'recall_at_{cut}{way}']:.1f}" for cut in cuts]
        rows.append([words, *recalls, f"{values[f'median_rank{way}']:g}", f"{values[f'mrr{way}']:.3f}"])
    gallery = f"gallery {report['gallery_sha256'][:12]}" if report["gallery_sha256"] else "paired row by row"
    missing = f"; {report['missing']} keys missing and left out" if report["missing"] else ""
    known = "recordings not known" if report["recordings"] is None else f"{report['recordings']} recordings"
    print_table(
        f"retrieval among {report['N']}",
        ["", *(f"R@{cut}" for cut in cuts), "median rank", "MRR"],
        rows,
        notes=[f"R@k in %, by {report['by']} ({known}); cosine; ties count against; {gallery}{missing}"],
    )
