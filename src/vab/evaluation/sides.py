"""The two sides of an evaluation: their files, what judges compute from them, and how they pair.

No waveform outlives its batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vab.console import ProgressBar
from vab.data.extract.sounds import Decoded, Listening, Unusable, decode_all
from vab.data.inputs.listing import MEDIA_SUFFIXES, find_sources
from vab.data.reading.labels import first_of
from vab.files import as_utf8
from vab.frozen.batches import JudgeOutputs, judge_sounds
from vab.frozen.protocols import Judge
from vab.metrics.synchrony import find_onsets
from vab.spec import UserError

OnError = Literal["stop", "skip"]
Pair = Literal["auto", "name", "none"]

ONSET_RATE = 16000
"""Hz at which onsets are looked for; the judges' rates do not matter."""
_THREADS = 4


@dataclass(frozen=True)
class Folder:
    """The sound files of a folder, in the order of their paths."""

    path: Path
    """Of the folder."""
    keys: tuple[str, ...]
    """Of each file its path in the folder without the suffix (with it, where two differ in nothing else)."""
    files: tuple[Path, ...]
    """Where they are."""
    ignored: tuple[str, ...]
    """Other files, by their suffix not media; hidden ones are not counted."""


def find_folder(path: str | Path) -> Folder:
    """List a folder's sounds.

    Raises:
        UserError: If it is no folder, or has no media file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder of sounds' if folder.exists() else 'not there'}: give a folder")
    sources = find_sources(folder, "none")
    return Folder(folder, tuple(s.id for s in sources), tuple(s.path for s in sources), tuple(_others(folder)))


def _others(folder: Path) -> list[str]:
    """Files that are no media, with subfolders through links too, each once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            seen.add(real)
            others = (name for name in files if not name.startswith("."))
            found += [Path(parent, name) for name in others if Path(name).suffix.lower() not in MEDIA_SUFFIXES]
    return sorted(path.relative_to(folder).as_posix() for path in found)


@dataclass(frozen=True)
class Side:
    """B sounds in order, and what is known of them."""

    keys: tuple[str, ...]
    """B names."""
    hashes: tuple[str, ...]
    """SHA-256 of each file."""
    seconds: Tensor
    """(B,) float64, of sound, without padding."""
    level_db: Tensor
    """(B,) float64 dBFS; -inf for silence."""
    onsets: tuple[Tensor, ...]
    """Of each sound (n,) float64, s."""
    outputs: Mapping[str, JudgeOutputs]
    """By judge, what it computed."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that could not be used, and why."""
    ignored: tuple[str, ...] = ()
    """Files that are no media."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def set_hash(self) -> str:
        """SHA-256 over names and contents, whatever folder they are in."""
        lines = sorted(f"{key}\t{digest}\n" for key, digest in zip(self.keys, self.hashes, strict=True))
        return hashlib.sha256(as_utf8("".join(lines))).hexdigest()

    def take(self, keys: Sequence[str]) -> Side:
        """The sounds of these names, in this order."""
        if tuple(keys) == self.keys:
            return self
        place = {key: number for number, key in enumerate(self.keys)}
        numbers = [place[key] for key in keys]
        return replace(
            self,
            keys=tuple(keys),
            hashes=tuple(self.hashes[n] for n in numbers),
            seconds=self.seconds[numbers],
            level_db=self.level_db[numbers],
            onsets=tuple(self.onsets[n] for n in numbers),
            outputs={name: _take(outputs, numbers) for name, outputs in self.outputs.items()},
        )


def judge_folder(
    folder: Folder,
    judges: Sequence[Judge],
    listening: Listening,
    *,
    num_workers: int,
    batch_size: int,
    on_error: OnError,
    title: str,
) -> Side:
    """Decode a folder's sounds and run the judges on them, a batch at a time.

    Args:
        folder: The files.
        judges: Networks, each on its device.
        listening: What is decoded of each file.
        num_workers: Processes that decode; 0 for none.
        batch_size: Sounds that a judge gets at once.
        on_error: ``stop`` at a file that cannot be used, or ``skip`` it.
        title: For the progress bar.

    Raises:
        UserError: If a file cannot be used and ``on_error`` is ``stop``, or none can.
    """
    used: list[tuple[str, Decoded, Tensor]] = []  # key, sound without its waveforms, onsets
    left_out: dict[str, str] = {}
    batches: dict[str, list[JudgeOutputs]] = {judge.name: [] for judge in judges}
    waiting: list[tuple[str, Path, Decoded]] = []

    def leave_out(path: Path, reason: str) -> None:
        if on_error == "stop":
            raise UserError(f"{path}: {reason} (--on_error skip leaves such files out and counts them)")
        left_out[path.relative_to(folder.path).as_posix()] = reason

    def flush() -> None:
        # In threads, so that this is done while a judge is busy on its device.
        coming = [threads.submit(_onsets, decoded) for _, _, decoded in waiting]
        outputs = {}
        for judge in judges:
            sounds = [torch.from_numpy(decoded.waveforms[judge.sample_rate]) for _, _, decoded in waiting]
            outputs[judge.name] = judge_sounds(judge, sounds, judge.sample_rate, batch_size)
        finite = torch.stack([_is_finite(of_judge) for of_judge in outputs.values()])  # (judges, sounds)
        for number, (key, path, decoded) in enumerate(waiting):
            if bool(finite[:, number].all()):
                used.append((key, replace(decoded, waveforms={}), coming[number].result()))
            else:
                name = judges[int(finite[:, number].int().argmin())].name
                leave_out(path, f"makes judge {name} give numbers that are not finite: is its level sane?")
        for name, of_judge in outputs.items():
            batches[name].append(_take(of_judge, finite.all(0).nonzero()[:, 0].tolist()))
        waiting.clear()

    rates = tuple(dict.fromkeys([ONSET_RATE, *listening.rates]))
    stream = decode_all(folder.files, replace(listening, rates=rates), num_workers, ahead=2 * batch_size)
    with (
        closing(stream),
        ThreadPoolExecutor(_THREADS) as threads,
        torch.inference_mode(),
        ProgressBar(title, len(folder.files), "files") as bar,
    ):
        for key, path, decoded in zip(folder.keys, folder.files, stream, strict=True):
            if isinstance(decoded, Unusable):
                leave_out(path, decoded.reason)
            else:
                waiting.append((key, path, decoded))
                if len(waiting) == batch_size:
                    flush()
            bar.advance()
        if waiting:
            flush()
    if not used:
        first, reason = next(iter(left_out.items()))
        raise UserError(f"not one of {len(left_out)} files in {folder.path} can be used; the first, {first}: {reason}")
    keys, sounds, onsets = zip(*used, strict=True)
    return Side(
        keys,
        tuple(sound.sha256 for sound in sounds),
        torch.tensor([sound.seconds for sound in sounds], dtype=torch.float64),
        torch.tensor([sound.level_db for sound in sounds], dtype=torch.float64),
        onsets,
        {name: JudgeOutputs(*map(torch.cat, zip(*outputs, strict=True))) for name, outputs in batches.items()},
        left_out,
        folder.ignored,
    )


def _is_finite(outputs: JudgeOutputs) -> Tensor:
    """(B,) bool: whether all that a judge computed from a sound is finite."""
    parts = outputs.embedding.isfinite().all(1).split(outputs.rows.tolist())
    return torch.stack([part.all() for part in parts]) & outputs.logits.isfinite().all(1)


def _take(outputs: JudgeOutputs, numbers: Sequence[int]) -> JudgeOutputs:
    """Those of these sounds, in this order."""
    parts = outputs.embedding.split(outputs.rows.tolist())
    empty = outputs.embedding[:0]
    chosen = torch.cat([empty, *(parts[n] for n in numbers)])
    return JudgeOutputs(chosen, outputs.rows[numbers], outputs.logits[numbers])


def _onsets(decoded: Decoded) -> Tensor:
    """(n,) float64, of the sound without its padding."""
    sound = decoded.waveforms[ONSET_RATE][: round(decoded.seconds * ONSET_RATE)]
    return find_onsets(torch.from_numpy(sound), ONSET_RATE)


def is_paired(pair: Pair, real: Sequence[str], generated: Sequence[str], skip: bool) -> bool:
    """Whether sounds are compared pair by pair, by their names.

    Args:
        pair: ``name``; ``none``; or ``auto``: by name if any name is on both sides.
        real: Keys.
        generated: Keys.
        skip: Leave unpaired names out, instead of refusing them.

    Raises:
        UserError: If names have no counterpart and ``skip`` is not set, or no name is on both sides.
    """
    common = set(real) & set(generated)
    if pair == "none":
        return False
    if pair == "auto" and not common:
        if {key.casefold() for key in real} & {key.casefold() for key in generated}:
            raise UserError(
                f"names of the two sides differ in upper and lower case only ({real[0]!r}, {generated[0]!r}): rename "
                f"them to pair, or give --pair none"
            )
        return False
    if not common:
        raise UserError(
            f"not one name is on both sides (real has {real[0]!r}, ..., generated {generated[0]!r}, ...): files pair "
            f"by their path in the folder without the suffix; --pair none compares the sets as wholes"
        )
    alone = {"real": sorted(set(real) - common), "generated": sorted(set(generated) - common)}
    if any(alone.values()) and not skip:
        words = "; ".join(f"{len(keys)} in {side} only ({first_of(keys)})" for side, keys in alone.items() if keys)
        raise UserError(
            f"of {len(common)} pairs, names without counterpart: {words}. --on_error skip leaves them out and counts "
            f"them, --pair none compares the sets as wholes"
        )
    return True
