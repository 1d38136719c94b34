"""Write the page of a listening test: a folder of plain files that any browser opens, without network or server."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
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


def page_id(
    trials: Sequence[Trial], material: Mapping[str, Material], questions: Mapping[str, str], level_match: bool
) -> str:
    """12 hexadecimal digits: equal for the same trials of the same files, by which answers are known again."""
    shown = {name: material[name] for name in sorted({trial.video for trial in trials})}
    content = {
        "trials": [(trial.name, trial.video, trial.systems) for trial in trials],
        "files": {
            name: [sha256_of(files.video), {system: sha256_of(path) for system, path in files.sounds.items()}]
            for name, files in shown.items()
        },
        "questions": list(questions.items()),
        "level_match": level_match,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def holds_page(out: Path, page: str) -> bool:
    """Whether the folder has this very test already.

    Raises:
        UserError: If it has something else, which must not be mixed with it or lost.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        key = json.loads((out / KEY).read_text(encoding="utf-8"))
        theirs = key["page"] if key["format"] == KEY_FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        theirs = None
    if theirs is None:
        raise UserError(f"--out {out} exists and is no listening test of vab: give a folder that is not there yet")
    if theirs != page:
        raise UserError(
            f"{out} holds another listening test (page {theirs}), whose key would be lost: give another --out"
        )
    return True


def write_page(
    out: Path,
    page: str,
    trials: Sequence[Trial],
    material: Mapping[str, Material],
    systems: Mapping[str, Path],
    questions: Mapping[str, str],
    seed: int,
    level_match: bool,
) -> None:
    """Write ``page/`` (index.html and its media, where nothing says which system is which) and ``key.json`` beside it.

    The folder is there whole or not at all.

    Args:
        out: The folder; missing or empty.
        page: As ``page_id`` has it.
        trials: What is compared.
        material: Video -> its files.
        systems: Name -> folder, in the order of the results.
        questions: Name -> text.
        seed: What the trials were drawn with, for the key.
        level_match: Whether sounds are brought to the same level.

    Raises:
        UserError: If a file cannot be read, or the disk is full or not writable.
    """
    building = out.with_name(fitting_name(f".{out.name}", TEMPORARY_SUFFIX))
    shutil.rmtree(building, ignore_errors=True)  # of a run that was stopped
    try:
        (building / "page" / "media").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    try:
        done = _write_media(building / "page" / "media", trials, material, level_match)
        key = {
            "format": KEY_FORMAT,
            "version": VERSION,
            "vab": __version__,
            "page": page,
            "seed": seed,
            "systems": [{"name": name, "folder": str(folder)} for name, folder in systems.items()],
            "questions": dict(questions),
            "loudness": f"rms {LEVEL_DB:g} dBFS, less where a peak would pass {PEAK_DB:g} dBFS, equal within a trial"
            if level_match
            else "as it was",
            "trials": [
                {"name": trial.name, "video": trial.video, "A": trial.systems[0], "B": trial.systems[1], **done[trial]}
                for trial in trials
            ],
        }
        write_atomically(building / KEY, (json.dumps(key, indent=2) + "\n").encode())
        write_atomically(building / "page" / "index.html", _html(page, trials, questions))
        if out.exists():
            out.rmdir()  # empty, as holds_page has seen
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_media(
    folder: Path, trials: Sequence[Trial], material: Mapping[str, Material], level_match: bool
) -> dict[Trial, dict[str, Any]]:
    """Two videos for each trial; returns what was done to their sounds."""
    of_video: dict[str, list[Trial]] = {}
    for trial in trials:
        of_video.setdefault(trial.video, []).append(trial)
    short: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    done: dict[Trial, dict[str, Any]] = {}
    for video, its_trials in track(of_video.items(), "videos", len(of_video)):
        sounds, missing = read_sounds(material[video])
        short.update(system for system, seconds in missing.items() if seconds > SHORT_SECONDS)
        gains = match_levels(sounds)
        silent.update(sounds.keys() - gains.keys())
        if not level_match:
            gains = {}
        for trial in its_trials:
            for side, system in zip("ab", trial.systems, strict=True):
                waveform = sounds[system] * 10 ** (gains.get(system, 0.0) / 20)
                replace_audio(material[video].video, waveform, SAMPLE_RATE, folder / media_name(trial, side))
            done[trial] = {
                "gain_db": {side: round(gains.get(s, 0.0), 3) for side, s in zip("AB", trial.systems, strict=True)},
                "seconds": round(len(sounds[trial.systems[0]]) / SAMPLE_RATE, 3),
            }
    for system, count in short.items():
        print(
            f"warning: {count} of {len(of_video)} sounds of {system} end more than {SHORT_SECONDS:g} s before their "
            f"video: the sounds that they are compared with are cut there too",
            file=sys.stderr,
        )
    for system, count in silent.items():
        print(
            f"warning: {count} of {len(of_video)} sounds of {system} are silent (below {SILENT_DB:g} dBFS)",
            file=sys.stderr,
        )
    return done


def media_name(trial: Trial, side: str) -> str:
    """Of one of a trial's two videos; ``side`` is a or b."""
    return f"{trial.name}_{side}.mp4"


def _html(page: str, trials: Sequence[Trial], questions: Mapping[str, str]) -> str:
    content = {
        "page": page,
        "questions": [{"name": name, "text": text} for name, text in questions.items()],
        "trials": [{"name": t.name, "media": [f"media/{media_name(t, side)}" for side in "ab"]} for t in trials],
    }
    return render_page(__package__, "page.html", content=content)
