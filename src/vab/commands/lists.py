"""``vab lists``: what to extract of a data set that is there as it was published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vab.commands.files import check_files
from vab.data import official
from vab.data.format import write_atomically


def speech_commands(root: str, out: str, test_root: str | None = None, overwrite: bool = False) -> None:
    """Lists of Speech Commands v0.01 with the 12 classes of SUPERB's keyword spotting.

    Writes train.csv, val.csv, with ``test_root`` test.csv, and classes.txt into a folder. Seconds of background noise
    are the class of silence: each is in one of train and val. SUPERB draws its classes equally often, as
    ``--data.order class_balanced`` does.

    Args:
        root: Unpacked folder of speech_commands_v0.01.
        out: Folder for the lists.
        test_root: Unpacked folder of speech_commands_test_set_v0.01, beside ``root``.
        overwrite: Replace lists that are there.
    """
    test = None if test_root is None else Path(test_root)
    sets = official.speech_commands(Path(root), test)
    media = official.media_root(Path(root), test)
    names = Path(out) / "classes.txt"
    _check([names, *(Path(out) / f"{part}.csv" for part in sets)], overwrite)
    write_atomically(names, ("\n".join(official.KEYWORDS) + "\n").encode())
    how = f"--media_root {media} --vocabulary {names} --without_video keep --segment_seconds 1"
    for part, rows in sets.items():
        _write(Path(out) / f"{part}.csv", rows, how)


def audioset(list: str, media: str, out: str, whole_videos: bool = False, overwrite: bool = False) -> None:
    """The list of an AudioSet split, for the files that are there.

    Args:
        list: As published, such as balanced_train_segments.csv.
        media: Folder of the files, whose names begin with the YouTube id, or with Y and the id.
        out: The .csv file to write; ids without a file go to a .missing.txt beside it.
        whole_videos: The files are whole videos, of which the list's segments are parts.
        overwrite: Replace files that are there.
    """
    table = Path(out)
    check_files({"out": (out, ".csv")}, [list], overwrite)
    lost = table.with_suffix(".missing.txt")
    _check([lost], overwrite)
    rows, missing = official.audioset(Path(list), Path(media), whole_videos)
    _tell_missing(lost, missing)
    _write(table, rows, f"--media_root {media} --vocabulary class_labels_indices.csv")


def vggsound(list: str, media: str, out: str, overwrite: bool = False) -> None:
    """The lists of VGGSound's two splits, for the files that are there.

    Args:
        list: vggsound.csv as published.
        media: Folder of the files, called YTID_START.mp4 or the like.
        out: Folder for train.csv, test.csv and, for those without a file, missing.txt.
        overwrite: Replace files that are there.
    """
    folder = Path(out)
    sets, missing = official.vggsound(Path(list), Path(media))
    _check([folder / "missing.txt", *(folder / f"{part}.csv" for part in sets)], overwrite)
    _tell_missing(folder / "missing.txt", missing)
    for part, rows in sets.items():
        _write(folder / f"{part}.csv", rows, f"--media_root {media} --vocabulary class_labels_indices_vgg.csv")


def _check(paths: Sequence[Path], overwrite: bool) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_files({"out": (str(path), path.suffix)}, [], overwrite)


def _tell_missing(path: Path, missing: Sequence[str]) -> None:
    if missing:
        write_atomically(path, ("\n".join(missing) + "\n").encode())
        print(f"{len(missing)} that are listed have no file: {path}")
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, rows: Sequence[official.Row], how: str) -> None:
    write_atomically(path, official.rows_csv(rows).encode())
    print(f"{path}: {len(rows)} to extract, by vab extract --media {path} {how} --out SHARDS")
