"""Write a listening test: a page of plain files that any browser opens, without network or server, and its key."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vab import __version__
from vab.console import track
from vab.data.media.write import replace_audio
from vab.evaluation.listening.media import LEVEL_DB, PEAK_DB, SAMPLE_RATE, SHORT_SECONDS, match_levels, read_sounds
from vab.evaluation.listening.plan import Material, Trial
from vab.files import TEMPORARY_SUFFIX, fitting_name, sha256_of, write_atomically
from vab.metrics.health import SILENT_DB
from vab.pages import render_page
from vab.spec import UserError

KEY, KEY_FORMAT, VERSION = "key.json", "vab-listen-key", 1
QUESTIONS = {
    "overall_quality": "Which sound is better overall?",
    "visual_relevance": "Which sound fits the video better?",
}
"""Name -> what listeners are asked. Source: the paper's perceptual study, overall quality and visual relevance."""


def read_questions(lines: Sequence[str] | None) -> dict[str, str]:
    """Questions as typed, ``NAME: TEXT`` each; the paper's two if none are.

    Raises:
        UserError: If one has no name or no text, or two have the same name.
    """
    if lines is None:
        return dict(QUESTIONS)
    questions = {}
    for line in lines:
        name, _, text = (part.strip() for part in line.partition(":"))
        if not name or not text or name in questions:
            raise UserError(f"a question is 'NAME: TEXT', each of another name, got {line!r}")
        questions[name] = text
    if not questions:
        raise UserError("--questions is empty: leave it out for the two usual ones")
    return questions


@dataclass(frozen=True)
class ListeningTest:
    """What is compared, and what listeners are asked."""

    trials: Sequence[Trial]
    """Pairs to compare."""
    material: Mapping[str, Material]
    """Video -> its files, of the videos of the trials, sorted by name."""
    systems: Mapping[str, Path]
    """Name -> folder, in the order of the results."""
    questions: Mapping[str, str]
    """Name -> text."""
    seed: int
    """Of the draw of trials."""
    level_match: bool
    """Whether sounds of a video are brought to the same level."""

    @cached_property
    def page_id(self) -> str:
        """12 hexadecimal digits, equal for the same trials of the same files; answers carry them."""
        content = {
            "trials": [(trial.name, trial.video, trial.systems) for trial in self.trials],
            "files": {
                name: [sha256_of(files.video), {system: sha256_of(path) for system, path in files.sounds.items()}]
                for name, files in self.material.items()
            },
            "questions": list(self.questions.items()),
            "level_match": self.level_match,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has this very test already.

        Raises:
            UserError: If it has something else, which must not be mixed with it or lost.
        """
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        try:
            key = json.loads((folder / KEY).read_text(encoding="utf-8"))
            page = key["page"] if key["format"] == KEY_FORMAT else None
        except (OSError, ValueError, TypeError, KeyError):
            page = None
        if page is None:
            raise UserError(
                f"--out {folder} exists and is no listening test of vab: give a folder that is not there yet"
            )
        if page != self.page_id:
            raise UserError(
                f"{folder} holds another listening test (page {page}), whose key would be lost: give another --out"
            )
        return True

    def write(self, folder: Path) -> None:
        """Write ``page/`` (index.html and its media, which do not say whose sound is which) and ``key.json`` beside it.

        The folder, which is missing or empty before, is there whole or not at all.

        Raises:
            UserError: If a file cannot be read, or the disk is full or not writable.
        """
        building = folder.with_name(fitting_name(f".{folder.name}", TEMPORARY_SUFFIX))
        shutil.rmtree(building, ignore_errors=True)  # of a run that was stopped
        try:
            (building / "page" / "media").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error
        try:
            changes = self._write_media(building / "page" / "media")
            loudness = f"rms {LEVEL_DB:g} dBFS, less where a peak would pass {PEAK_DB:g} dBFS, equal within a trial"
            key = {
                "format": KEY_FORMAT,
                "version": VERSION,
                "vab": __version__,
                "page": self.page_id,
                "seed": self.seed,
                "systems": [{"name": name, "folder": str(place)} for name, place in self.systems.items()],
                "questions": dict(self.questions),
                "loudness": loudness if self.level_match else "as it was",
                "trials": [
                    {"name": t.name, "video": t.video, "A": t.systems[0], "B": t.systems[1], **changes[t]}
                    for t in self.trials
                ],
            }
            write_atomically(building / KEY, (json.dumps(key, indent=2) + "\n").encode())
            content = {
                "page": self.page_id,
                "questions": [{"name": name, "text": text} for name, text in self.questions.items()],
                "trials": [
                    {"name": t.name, "media": [f"media/{media_name(t, side)}" for side in "ab"]} for t in self.trials
                ],
            }
            write_atomically(building / "page" / "index.html", render_page(__package__, "page.html", content=content))
            if folder.exists():
                folder.rmdir()  # empty, as is_in has seen
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _write_media(self, folder: Path) -> dict[Trial, dict[str, Any]]:
        """Write two videos for each trial; returns what was done to their sounds."""
        of_video: dict[str, list[Trial]] = {name: [] for name in self.material}
        for trial in self.trials:
            of_video[trial.video].append(trial)
        short: Counter[str] = Counter()
        silent: Counter[str] = Counter()
        changes: dict[Trial, dict[str, Any]] = {}
        for video, trials in track(of_video.items(), "writing", len(of_video), "videos"):
            files = self.material[video]
            sounds, missing = read_sounds(files)
            short.update(system for system, seconds in missing.items() if seconds > SHORT_SECONDS)
            gains = match_levels(sounds)
            silent.update(sounds.keys() - gains.keys())
            if not self.level_match:
                gains = {}
            for trial in trials:
                for side, system in zip("ab", trial.systems, strict=True):
                    waveform = sounds[system] * 10 ** (gains.get(system, 0.0) / 20)
                    replace_audio(files.video, waveform, SAMPLE_RATE, folder / media_name(trial, side))
                changes[trial] = {
                    "gain_db": {side: round(gains.get(s, 0.0), 3) for side, s in zip("AB", trial.systems, strict=True)},
                    "seconds": round(len(sounds[trial.systems[0]]) / SAMPLE_RATE, 3),
                }
        cut = (
            f"end more than {SHORT_SECONDS:g} s before their video: the sounds that they are compared with are cut "
            "there too"
        )
        for counts, words in ((short, cut), (silent, f"are silent (below {SILENT_DB:g} dBFS)")):
            for system, count in counts.items():
                print(f"warning: {count} of {len(of_video)} sounds of {system} {words}", file=sys.stderr)
        return changes


def media_name(trial: Trial, side: str) -> str:
    """File name of one of a trial's two videos; ``side`` is a or b."""
    return f"{trial.name}_{side}.mp4"
