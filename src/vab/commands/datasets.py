"""``vab datasets``: list which files of a published data set to extract, given those that are on the disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vab import UserError
from vab.files import check_files, fitting_name, write_atomically

if TYPE_CHECKING:
    from vab.data.inputs.published.rows import Listing, Row

_PAPER = "configs/extract/paper.yaml"
_CHANGES = "configs/extract/tweak"


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
    from vab.data.inputs.published import keywords

    test = None if test_root is None else Path(test_root)
    found = keywords.speech_commands(Path(root), test)
    folder, media = Path(out), keywords.media_root(Path(root), test)
    _check([folder / "classes.txt", *(folder / f"{part}.csv" for part in found.rows)], [], overwrite)
    how = _with_classes(folder, found.classes)
    for part, rows in found.rows.items():
        _write(folder / f"{part}.csv", rows, media, "speech_commands", how)


def audioset(
    list: str,
    media: str,
    out: str,
    whole_videos: bool = False,
    val_share: float | None = None,
    overwrite: bool = False,
) -> None:
    """The list of an AudioSet split, for the files that are there.

    Args:
        list: As published, such as balanced_train_segments.csv.
        media: Folder of the files, with subfolders, called by the YouTube id, alone or with the start or the start and
            the end of the segment, in seconds or milliseconds: ID.mp4, YID.wav, ID_000030.mp4, ID_30_40.mkv,
            YID_30.000_40.000.wav, ID_30000_40000.mp4.
        out: The .csv file to write; ids without a file go to a .missing.txt beside it.
        whole_videos: Files called by the id alone are whole videos, of which the list's segments are parts.
        val_share: Share of the recordings, such as 0.02, to validate on instead of training on them. They go to val.csv
            beside train.csv, balanced_val.csv beside balanced_train.csv. A hash of its id decides where a recording
            goes, with all of its segments: to the same side in every list, whatever files are there.
        overwrite: Replace files that are there.
    """
    from vab.data.inputs.published import youtube

    table, lost = _table_of(out)
    start = table.stem.removesuffix("train")
    held_out = table.with_stem(f"{start}{'_' if start == table.stem else ''}{youtube.VAL}")
    _check([table, lost, *([] if val_share is None else [held_out])], [list], overwrite)
    found = youtube.audioset(Path(list), Path(media), _names(media), whole_videos, val_share)
    _tell(found, lost)
    how = ["--vocabulary", str(_beside(list, "class_labels_indices.csv"))]
    for part, rows in found.rows.items():
        _write(held_out if part == youtube.VAL else table, rows, Path(media), "centre", how)


def vggsound(
    list: str,
    media: str,
    out: str,
    whole_videos: bool = False,
    val_share: float | None = None,
    overwrite: bool = False,
) -> None:
    """The lists of VGGSound's splits, for the files that are there.

    Args:
        list: As published: vggsound.csv with both splits; or the list of one, such as test.csv, whose lines are
            ID_START.mp4,label.
        media: Folder of the files, with subfolders, named as in vab datasets audioset; ID.mp4 counts where the list has
            one segment of the video.
        out: Folder for train.csv and test.csv, or a file of the list's own name, and, for those without a file,
            missing.txt.
        whole_videos: Files called by the id alone are whole videos, of which the list's segments are parts.
        val_share: Share of the recordings of train, such as 0.02, to validate on instead of training on them. They go
            to val.csv. A hash of its id decides where a recording goes, with all of its segments: to the same side in
            every list, whatever files are there.
        overwrite: Replace files that are there.
    """
    from vab.data.inputs.published import youtube

    folder = Path(out)
    found = youtube.vggsound(Path(list), Path(media), _names(media), whole_videos, val_share)
    _check([folder / "missing.txt", *(folder / f"{part}.csv" for part in found.rows)], [list], overwrite)
    _tell(found, folder / "missing.txt")
    how = ["--vocabulary", str(_beside(list, "class_labels_indices_vgg.csv", "stat.csv"))]
    for part, rows in found.rows.items():
        _write(folder / f"{part}.csv", rows, Path(media), "centre", how)


def esc50(root: str, out: str, esc10: bool = False, overwrite: bool = False) -> None:
    """The list of ESC-50, or of ESC-10 within it.

    Writes esc50.csv, or esc10.csv, and classes.txt into a folder. The five folds are the first numbers of the names.

    Args:
        root: Unpacked folder of ESC-50, with meta/esc50.csv and audio/.
        out: Folder for the list.
        esc10: Only the ten classes of ESC-10.
        overwrite: Replace lists that are there.
    """
    from vab.data.inputs.published.esc50 import esc50 as esc50_rows

    folder, name = Path(out), "esc10" if esc10 else "esc50"
    found = esc50_rows(Path(root), esc10)
    table, lost = folder / f"{name}.csv", folder / "missing.txt"
    _check([table, lost, folder / "classes.txt"], [], overwrite)
    _tell(found, lost)
    _write(table, found.rows["all"], Path(root), "esc50", _with_classes(folder, found.classes))


def msrvtt(list: str, media: str, out: str, split: str | None = None, overwrite: bool = False) -> None:
    """The list of an MSR-VTT split, for the videos that are there.

    Args:
        list: As published: MSRVTT_data.json, test_videodatainfo.json and the like, whose categories become labels; or
            MSRVTT_JSFUSION_test.csv (1k-A) or another .csv with a column video_id.
        media: Folder of the videos, with subfolders, called video7010.mp4 and so on.
        out: The .csv file to write; ids without a file go to a .missing.txt beside it.
        split: Of a .json with several: train, validate or test.
        overwrite: Replace files that are there.
    """
    from vab.data.inputs.published.msrvtt import msrvtt as msrvtt_rows

    table, lost = _table_of(out)
    _check([table, lost], [list], overwrite)
    found = msrvtt_rows(Path(list), Path(media), _names(media), split)
    _tell(found, lost)
    _write(table, found.rows["all"], Path(media), "centre", [])


def _table_of(out: str) -> tuple[Path, Path]:
    """The list to write, and the file for its entries without a file."""
    table = Path(out)
    if table.suffix != ".csv":
        raise UserError(f"--out must end in .csv, got {out}")
    return table, table.with_name(fitting_name(table.stem, ".missing.txt"))


def _names(media: str | Path) -> Sequence[str]:
    from vab.data.inputs.listing import files_below

    if not Path(media).is_dir():
        raise UserError(f"{media}: there is no such folder")
    return files_below(Path(media))


def _beside(table: str, *names: str) -> Path:
    """A file that is published with a list, where it is beside it; else its name, for the user to find."""
    places = (Path(table).parent / name for name in names)
    return next((place for place in places if place.is_file()), Path(names[0]))


def _check(paths: Sequence[Path], inputs: Sequence[str], overwrite: bool) -> None:
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written: {path.parent}: {error.strerror}") from error
        check_files({"out": (str(path), path.suffix)}, inputs, overwrite)


def _with_classes(folder: Path, names: Iterable[str]) -> list[str]:
    """Write the names of the classes; gives the flags that name them."""
    path = folder / "classes.txt"
    write_atomically(path, "\n".join(names) + "\n")
    return ["--vocabulary", str(path)]


def _tell(found: Listing, lost: Path) -> None:
    """Print which entries of a list have no file, and which files no entry; write the names of the former."""
    if found.missing:
        write_atomically(lost, "\n".join(found.missing) + "\n")
        print(f"{len(found.missing)} that are listed have no file: {lost}")
    else:
        lost.unlink(missing_ok=True)
    for reason, (number, example) in found.unused.items():
        print(f"files that are {reason}: {number}, such as {example}")
    if found.repeats:
        print(f"{found.repeats} lines of the list repeat one before, and are taken once")


def _write(path: Path, rows: Sequence[Row], media: Path, change: str, how: Sequence[str]) -> None:
    """Write a list, and tell what to type next.

    Args:
        path: Of the list.
        rows: What it lists.
        media: Folder that its files are in.
        change: What is other than in the paper's recipe: a file of configs/extract/tweak.
        how: Further flags.
    """
    from vab.data.inputs.published.rows import rows_csv

    write_atomically(path, rows_csv(rows))
    if not rows:
        print(f"{path}: nothing of it is there")
        return
    recipe = ["--config", _PAPER, "--config", f"{_CHANGES}/{change}.yaml"]
    command = ["vab", "extract", *recipe, "--media", str(path), "--media_root", str(media), *how, "--out", "SHARDS"]
    print(f"{path}: {len(rows)} to extract, by {shlex.join(command)}")
