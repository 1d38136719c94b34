"""One side of an evaluation: its files, and what the judges heard in them. No waveform outlives its batch."""

from __future__ import annotations

import hashlib
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
from vab.evaluation.folders import Folder
from vab.files import as_utf8
from vab.frozen.listening import Impressions, listen
from vab.frozen.protocols import Judge
from vab.metrics.synchrony import find_onsets
from vab.spec import UserError

OnError = Literal["stop", "skip"]

ONSET_RATE = 16000
"""Hz at which onsets are looked for; the judges' rates do not matter."""
_THREADS = 4


@dataclass(frozen=True)
class Side:
    """B sounds in order, and what is known of them."""

    keys: tuple[str, ...]
    """B names."""
    hashes: tuple[str, ...]
    """SHA-256 of each file."""
    seconds: Tensor
    """(B,) float64, of sound heard, without padding."""
    level_db: Tensor
    """(B,) float64 dBFS; -inf for silence."""
    onsets: tuple[Tensor, ...]
    """Of each sound (n,) float64, s."""
    heard: Mapping[str, Impressions]
    """By judge."""
    lost: dict[str, str] = field(default_factory=dict)
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
        heard = {name: _chosen(all_of_it, numbers) for name, all_of_it in self.heard.items()}
        return Side(
            tuple(keys),
            tuple(self.hashes[n] for n in numbers),
            self.seconds[numbers],
            self.level_db[numbers],
            tuple(self.onsets[n] for n in numbers),
            heard,
            self.lost,
            self.ignored,
        )


def hear(
    folder: Folder,
    judges: Sequence[Judge],
    listening: Listening,
    *,
    num_workers: int,
    batch_size: int,
    on_error: OnError,
    title: str,
) -> Side:
    """Decode a folder's sounds and have the judges listen, a batch at a time.

    Raises:
        UserError: If a file cannot be used and ``on_error`` is ``stop``, or none can.
    """
    found: list[Decoded] = []
    keys: list[str] = []
    lost: dict[str, str] = {}
    parts: dict[str, list[Impressions]] = {judge.name: [] for judge in judges}
    waiting: list[tuple[str, Path, Decoded]] = []
    onsets: list[Tensor] = []

    def lose(path: Path, reason: str) -> None:
        if on_error == "stop":
            raise UserError(f"{path}: {reason} (--on_error skip leaves such files out and counts them)")
        lost[path.relative_to(folder.path).as_posix()] = reason

    def flush() -> None:
        # In threads, so that this is done while a judge is busy on its device.
        coming = [threads.submit(_onsets, decoded) for _, _, decoded in waiting]
        heard = {}
        for judge in judges:
            sounds = [torch.from_numpy(decoded.waveforms[judge.sample_rate]) for _, _, decoded in waiting]
            heard[judge.name] = listen(judge, sounds, judge.sample_rate, batch_size)
        sane = torch.stack([_finite(impressions) for impressions in heard.values()])  # (judges, sounds)
        for number, (key, path, decoded) in enumerate(waiting):
            if bool(sane[:, number].all()):
                keys.append(key)
                found.append(decoded)
                onsets.append(coming[number].result())
            else:
                deaf = judges[int(sane[:, number].int().argmin())]
                lose(path, f"makes judge {deaf.name} give numbers that are not finite: is its level sane?")
            decoded.waveforms.clear()
        for name, impressions in heard.items():
            parts[name].append(_chosen(impressions, sane.all(0).nonzero()[:, 0].tolist()))
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
                lose(path, decoded.reason)
            else:
                waiting.append((key, path, decoded))
                if len(waiting) == batch_size:
                    flush()
            bar.advance()
        if waiting:
            flush()
    if not found:
        first, reason = next(iter(lost.items()))
        raise UserError(f"not one of {len(lost)} files in {folder.path} can be used; the first, {first}: {reason}")
    return Side(
        tuple(keys),
        tuple(decoded.sha256 for decoded in found),
        torch.tensor([decoded.seconds for decoded in found], dtype=torch.float64),
        torch.tensor([decoded.level_db for decoded in found], dtype=torch.float64),
        tuple(onsets),
        {name: Impressions(*map(torch.cat, zip(*heard, strict=True))) for name, heard in parts.items()},
        lost,
        folder.ignored,
    )


def _finite(heard: Impressions) -> Tensor:
    """(B,) bool: whether all that was heard in a sound is finite."""
    parts = heard.embedding.isfinite().all(1).split(heard.rows.tolist())
    return torch.stack([part.all() for part in parts]) & heard.logits.isfinite().all(1)


def _chosen(heard: Impressions, numbers: Sequence[int]) -> Impressions:
    """Of these sounds, in this order."""
    parts = heard.embedding.split(heard.rows.tolist())
    empty = heard.embedding[:0]
    return Impressions(torch.cat([empty, *(parts[n] for n in numbers)]), heard.rows[numbers], heard.logits[numbers])


def _onsets(decoded: Decoded) -> Tensor:
    """(n,) float64, of the sound without its padding."""
    heard = decoded.waveforms[ONSET_RATE][: round(decoded.seconds * ONSET_RATE)]
    return find_onsets(torch.from_numpy(heard), ONSET_RATE)
