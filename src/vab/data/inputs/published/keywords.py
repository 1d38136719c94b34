"""Speech Commands v0.01, with the 12 classes of SUPERB."""

from __future__ import annotations

import wave
from pathlib import Path

from vab import UserError
from vab.data.inputs.published.rows import Listing, Row

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
KEYWORDS = (*WORDS, UNKNOWN, SILENCE)
"""The 12 classes of keyword spotting in SUPERB (Yang et al. 2021), in its order."""
_HELD_OUT = 10
"""One of this many seconds of the noise is for validation."""


def speech_commands(root: Path, test_root: Path | None = None) -> Listing:
    """Speech Commands v0.01 with 12 classes: train, val, and test where its own archive is given.

    Source: SUPERB's keyword spotting: ten words, all other words are ``_unknown_``; the data set's own
    ``validation_list.txt`` and ``testing_list.txt`` (which its hash of the speaker gives, too) divide the recordings,
    and those of the testing list are not used; the test is the archive ``speech_commands_test_set_v0.01``. SUPERB
    takes ``_silence_`` at random from all of the background noise in training and validation; here every tenth second
    of it is for validation and the others for training, so that none is in both.

    Args:
        root: Unpacked folder of the data set.
        test_root: Unpacked folder of the test archive; its files must be below ``root`` or a folder beside it.

    Returns:
        The rows of each set; paths are relative to `media_root`.

    Raises:
        UserError: If something of it is missing.
    """
    needed = [root / name for name in (*WORDS, NOISE, "validation_list.txt", "testing_list.txt")]
    if missing := [path.name for path in needed if not path.exists()]:
        raise UserError(f"{root} is not Speech Commands v0.01: it lacks {', '.join(missing)}")
    base = media_root(root, test_root)
    listed = {name: _lines(root / f"{name}_list.txt") for name in ("validation", "testing")}
    sets: dict[str, list[Row]] = {"train": [], "val": []}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != NOISE):
        label = folder.name if folder.name in WORDS else UNKNOWN
        for path in sorted(folder.glob("*.wav")):
            name = f"{folder.name}/{path.name}"
            if name not in listed["testing"]:
                part = "val" if name in listed["validation"] else "train"
                sets[part].append(Row(path.relative_to(base).as_posix(), (label,)))
    for path in sorted((root / NOISE).glob("*.wav")):
        for second in range(_seconds(path)):
            part = "val" if second % _HELD_OUT == 0 else "train"
            file = path.relative_to(base)
            record = f"{file.with_suffix('').as_posix()}-{second:03d}"
            sets[part].append(Row(file.as_posix(), (SILENCE,), float(second), record))
    if test_root is not None:
        if missing := [name for name in KEYWORDS if not (test_root / name).is_dir()]:
            raise UserError(f"{test_root} is not the test set of Speech Commands v0.01: it lacks {', '.join(missing)}")
        sets["test"] = [
            Row(path.relative_to(base).as_posix(), (name,))
            for name in KEYWORDS
            for path in sorted((test_root / name).glob("*.wav"))
        ]
    return Listing(sets, classes=KEYWORDS)


def media_root(root: Path, test_root: Path | None) -> Path:
    """The folder that rows of Speech Commands are relative to.

    Raises:
        UserError: If the two folders are not in one.
    """
    if test_root is None:
        return root
    if test_root.parent.resolve() != root.parent.resolve():
        raise UserError(f"put both into one folder, they are in {root.parent} and {test_root.parent}")
    return root.parent


def _lines(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text().splitlines() if line.strip()}


def _seconds(path: Path) -> int:
    """Whole seconds of a .wav file."""
    try:
        with wave.open(str(path)) as file:
            return file.getnframes() // file.getframerate()
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path} is not a .wav file: {error}") from error
