"""Plan a listening test: find the files of its systems, and draw which two of them each trial compares."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vab.data.inputs.listing import MEDIA_SUFFIXES, VIDEO_SUFFIXES, find_sources
from vab.data.reading.labels import first_of
from vab.spec import UserError


@dataclass(frozen=True)
class Material:
    """A video and the sounds of the systems for it."""

    video: Path
    """The file whose pictures are shown."""
    sounds: dict[str, Path]
    """System -> the file whose sound is played."""


@dataclass(frozen=True)
class Trial:
    """One comparison."""

    name: str
    """As in the page and in the answers; does not show the systems."""
    video: str
    """Name of the video: its path below its folder, without suffix."""
    systems: tuple[str, str]
    """Whose sounds the page calls A and B."""


def find_material(videos: Path, systems: Mapping[str, Path], skip_missing: bool = False) -> dict[str, Material]:
    """Find each video's sounds: those of the same path below the system's folder, whatever the suffix.

    Args:
        videos: Folder, searched with its subfolders.
        systems: System -> its folder, of sounds or of videos with sound.
        skip_missing: Leave out a video that a system lacks, instead of refusing.

    Returns:
        Video -> its files, sorted by name.

    Raises:
        UserError: If a folder is missing or has nothing, no video is common to all, or one is missing and is not to
            be skipped.
    """
    shown = _by_name(videos, VIDEO_SUFFIXES)
    sounds = {system: _by_name(folder, MEDIA_SUFFIXES) for system, folder in systems.items()}
    common = [name for name in shown if all(name in files for files in sounds.values())]
    if not common:
        least = min(sounds, key=lambda system: len(shown.keys() & sounds[system].keys()))
        raise UserError(
            f"no video of {videos} has a sound of every system: a sound has the name of its video, {next(iter(shown))} "
            f"for example, and {systems[least]} has {next(iter(sounds[least]))}"
        )
    for system, files in sounds.items():
        missing = [name for name in shown if name not in files]
        if missing and not skip_missing:
            raise UserError(
                f"{systems[system]} has no sound for {len(missing)} of {len(shown)} videos ({first_of(missing)}): add "
                f"them, or leave them out with --on_error skip"
            )
    return {
        name: Material(_one(shown[name], videos), {s: _one(sounds[s][name], systems[s]) for s in systems})
        for name in common
    }


def plan_trials(videos: Sequence[str], systems: Sequence[str], num_pairs: int, seed: int) -> list[Trial]:
    """Draw trials, balanced over videos, pairs of systems, and which system is A.

    The numbers of trials of any two videos differ by one at most, and so do those of any two pairs of systems. Within a
    pair, each system is A in half of the trials; one more if their number is odd. No video is shown twice with the same
    pair.

    Args:
        videos: Their names.
        systems: Their names, two or more.
        num_pairs: How many trials.
        seed: Equal seeds give equal trials.

    Raises:
        UserError: If there are not that many trials.
    """
    pairs = list(itertools.combinations(systems, 2))
    available = len(videos) * len(pairs)
    if not 1 <= num_pairs <= available:
        raise UserError(
            f"num_pairs must be 1 to {available} ({len(videos)} videos, {len(pairs)} pairs of systems), got {num_pairs}"
        )
    generator = random.Random(seed)
    videos = generator.sample(list(videos), len(videos))
    pairs = generator.sample(pairs, len(pairs))
    # Both indices count round; after each common multiple one is shifted, so that all combinations come up once.
    period = math.lcm(len(videos), len(pairs))
    drawn = [(videos[i % len(videos)], pairs[(i + i // period) % len(pairs)]) for i in range(num_pairs)]
    turned = {pair: itertools.cycle(generator.sample([False, True], 2)) for pair in pairs}
    generator.shuffle(drawn)  # or sides would follow the videos' order
    placed = [(video, pair[::-1] if next(turned[pair]) else pair) for video, pair in drawn]
    generator.shuffle(placed)  # or sides would take turns
    return [Trial(f"t{number:03d}", video, (a, b)) for number, (video, (a, b)) in enumerate(placed, start=1)]


def name_systems(folders: Sequence[str], names: Sequence[str] | None) -> dict[str, Path]:
    """Names of the systems, those of their folders unless given, each with its folder.

    Raises:
        UserError: If there are fewer than two, or names are not as many, empty or alike.
    """
    if len(folders) < 2:
        raise UserError(f"a listening test compares two systems or more: --systems A_DIR B_DIR, got {len(folders)}")
    if names is not None and len(names) != len(folders):
        raise UserError(f"--names must be as many as --systems, got {len(names)} names for {len(folders)} systems")
    called = [name.strip() for name in names] if names is not None else [Path(f).resolve().name for f in folders]
    if not all(called):
        raise UserError(f"a system needs a name, got {called}: give --names")
    if twice := [name for name, count in Counter(called).items() if count > 1]:
        raise UserError(f"two systems are called {twice[0]!r}: give each its own name with --names")
    return {name: Path(folder) for name, folder in zip(called, folders, strict=True)}


def _by_name(folder: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    """Files below a folder by their path there without suffix."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    files: dict[str, list[Path]] = {}
    for source in find_sources(folder, "none", suffixes):
        files.setdefault(Path(source.name).with_suffix("").as_posix(), []).append(source.path)
    return files


def _one(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise UserError(f"{folder} has {names}: it must have one file of that name, for it is not clear which is meant")
    return files[0]
