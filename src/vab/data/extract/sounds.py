"""Decode folders of sound files to waveforms, in worker processes, in order and with bounded memory.

The worker processes import this module: it must not import torch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vab.audio import level_db
from vab.data.extract.cutting import LeftOut
from vab.data.extract.decoders import DecodingPool, Job
from vab.data.media.segments import MediaError, read_audio
from vab.files import sha256_of

LEAST_SECONDS = 0.05
"""A shorter sound is not evaluated."""
PATIENCE_SECONDS = 300
_GRACE = 0.02
"""s. A file that is shorter than asked for by less than this, a frame of sound, is not short."""

Short = Literal["keep", "pad", "refuse"]


@dataclass(frozen=True)
class Listening:
    """What is decoded of each file; the same for generated and for real sounds."""

    rates: tuple[int, ...]
    """Sample rates of the waveforms, Hz, without duplicates, at least one."""
    seconds: float | None
    """The first so many seconds; None for all."""
    short: Short
    """Shorter files are kept as they are, padded with silence, or refused."""
    remove_mean: bool
    """Whether the mean over time of the whole file is subtracted, before resampling and cutting."""

    def decode(self, path: Path, start: float | None = None) -> Iterator[Decoded | Unusable]:
        """``decode`` of the whole file, for a ``DecodingPool``."""
        yield decode(path, self)

    @property
    def length(self) -> str:
        """For metric cards."""
        if self.seconds is None:
            return "whole sounds"
        rules = {"keep": "as long as they are", "pad": "followed by silence", "refuse": "refused"}
        return f"first {self.seconds:g} s; shorter ones {rules[self.short]}"

    @property
    def mono(self) -> str:
        """For metric cards."""
        return "channels mixed as ffmpeg -ac 1" + (
            ", mean over the whole file subtracted before resampling" if self.remove_mean else ""
        )


@dataclass(frozen=True)
class Decoded:
    """A file's sound."""

    waveforms: dict[int, np.ndarray]
    """By sample rate, (N,) float32."""
    seconds: float
    """Length without padding, s."""
    level_db: float
    """dBFS without padding; -inf for silence."""
    sha256: str
    """Of the file's bytes."""

    @property
    def nbytes(self) -> int:
        """Memory of the waveforms."""
        return sum(waveform.nbytes for waveform in self.waveforms.values())


@dataclass(frozen=True)
class Unusable:
    """A file that gives no sound, and why."""

    reason: str


def decode(path: Path, listening: Listening) -> Decoded | Unusable:
    """Decode one file. Faults of the file are returned, not raised."""
    try:
        waveforms = {}
        for rate in listening.rates:
            span = read_audio(path, rate, seconds=listening.seconds, remove_mean=listening.remove_mean)
            valid = span.valid_samples / rate
            waveform = span.waveform[: span.valid_samples]
            padding = len(span.waveform) - len(waveform) if listening.short == "pad" else 0
            waveforms[rate] = np.pad(waveform, (0, padding))
        digest = sha256_of(path)
    except MediaError as error:
        return Unusable(error.detail)
    except OSError as error:
        return Unusable(f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Unusable("needs more memory than there is")
    if listening.short == "refuse" and listening.seconds is not None and valid < listening.seconds - _GRACE:
        return Unusable(f"has {valid:.2f} s of sound, and --short refuse asks for {listening.seconds:g} s")
    if valid < LEAST_SECONDS:
        return Unusable(f"has {valid:.3f} s of sound, at least {LEAST_SECONDS:g} s are needed")
    rate = listening.rates[0]
    return Decoded(waveforms, valid, level_db(waveforms[rate][: round(valid * rate)]), digest)


def decode_all(
    paths: Sequence[Path], listening: Listening, num_workers: int, ahead: int, patience: int = PATIENCE_SECONDS
) -> Generator[Decoded | Unusable]:
    """Decode files in order.

    Args:
        paths: The files.
        listening: What is decoded of each.
        num_workers: Processes; 0 decodes in this one, which a file that crashes the decoder then ends.
        ahead: Most files that are decoded in advance.
        patience: s after which a file that is still being decoded is given up and its worker is killed.

    Raises:
        UserError: If worker processes cannot be started.
    """
    jobs = (Job(number, path) for number, path in enumerate(paths))
    pool: DecodingPool[Decoded | Unusable] = DecodingPool(listening, num_workers, patience)
    with closing(pool.run_in_order(jobs, max(ahead, num_workers))) as decoded:
        for items in decoded:
            item = items[-1]
            yield Unusable(item.detail.partition("\n")[0]) if isinstance(item, LeftOut) else item
