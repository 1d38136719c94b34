"""MSR-VTT: excerpts of videos, each with a category, and captions, which are not read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vab import UserError
from vab.data.inputs.published.rows import Listing, Row, by_stem
from vab.data.inputs.tables import read_columns

CATEGORIES = (
    "music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy",
    "animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family",
    "documentary", "food/drink", "cooking", "beauty/fashion", "advertisement",
)  # fmt: skip
"""By number, as in the data set's category.txt."""


def msrvtt(table: Path, media: Path, files: Iterable[str], split: str | None = None) -> Listing:
    """The videos of a split that are there, as the part ``all``, labelled by category if the list has categories.

    Args:
        table: As published: .json with ``videos`` (video_id, category, split), or a .csv of one split with a column
            ``video_id``, such as 1k-A's ``MSRVTT_JSFUSION_test.csv``, which has no categories.
        media: Folder of the files, for messages.
        files: Its files, as paths with ``/``, named ``video7010.mp4`` or the like.
        split: Split of a .json: train, validate or test; None if it has one only.

    Raises:
        UserError: If the list has another form, it has no such split, or there is no file.
    """
    videos = _from_csv(table, split) if table.suffix.lower() == ".csv" else _from_json(table, split)
    there = by_stem(files, videos)
    rows = [Row(there[video], labels, id=video) for video, labels in videos.items() if video in there]
    return Listing({"all": rows}, [video for video in videos if video not in there]).checked(table, media)


def _from_csv(table: Path, split: str | None) -> dict[str, tuple[str, ...]]:
    if split is not None:
        raise UserError(f"{table} is the list of one split: leave --split out")
    return {cells["video_id"]: () for _, cells in read_columns(table, "video_id")}


def _from_json(table: Path, split: str | None) -> dict[str, tuple[str, ...]]:
    try:
        content = json.loads(table.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{table}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{table} cannot be read as JSON, and is not called .csv: {error}") from error
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list) or not all(isinstance(video, dict) and "video_id" in video for video in videos):
        raise UserError(f"{table} is not MSR-VTT's: it has no list 'videos' of tables with a 'video_id'")
    splits = sorted({str(video.get("split")) for video in videos})
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        got = "none was asked for" if split is None else f"got {split!r}"
        raise UserError(f"{table} has the splits {', '.join(splits)}: give one of them as --split, {got}")
    return {str(video["video_id"]): _category(video, table) for video in videos if str(video.get("split")) == split}


def _category(video: dict[str, object], table: Path) -> tuple[str, ...]:
    number = video.get("category")
    if isinstance(number, str) and number.isdecimal():  # some copies of the list have numbers in quotes
        number = int(number)
    if number is None:
        return ()
    if not isinstance(number, int) or not 0 <= number < len(CATEGORIES):
        raise UserError(f"{table}: {video['video_id']} has category {number!r}, there are 0 to {len(CATEGORIES) - 1}")
    return (CATEGORIES[number],)
