"""What can be seen and heard in the report: videos as data, so that the page is one file."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.image import imsave
from torch import Tensor

from vab.callbacks.pictures import nearest, spectrograms_figure
from vab.data.media.write import replace_audio
from vab.data.reading.dataset import ShardDataset
from vab.demo.report.measures import place

_SHOWN = 3


def spread(dataset: ShardDataset, count: int, among: int) -> list[int]:
    """Records to show: of the first ``among`` evenly spaced ones, half with one object and half with two if possible.

    No look at what came of them.
    """
    two = [number for number in range(among) if len(dataset.label_names(number)) > 1]
    one = [number for number in range(among) if number not in set(two)]
    chosen = [pool[len(pool) * n // share] for pool, share in _shares(one, two, count) for n in range(share)]
    return sorted(chosen)


def _shares(one: list[int], two: list[int], count: int) -> list[tuple[list[int], int]]:
    of_two = min(count // 2, len(two))
    of_one = min(count - of_two, len(one))
    return [(one, of_one), (two, of_two)]


def video_data(path: Path) -> str:
    """A data URI of an .mp4 file."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def with_sound(video: Path, sound: Path) -> str:
    """A data URI of a video's picture with the sound of a .wav file."""
    waveform, rate = soundfile.read(sound, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "made.mp4"
        replace_audio(video, waveform, rate, out)
        return video_data(out)


def spectrograms(folder: Path, row: int, names: dict[str, str]) -> str:
    """A data URI of a PNG: spectrograms of a record's sounds, one above the other.

    Args:
        folder: Of the sounds.
        row: The record.
        names: Sound -> what stands beside it.
    """
    read = {name: soundfile.read(place(folder, name, row), dtype="float32") for name in names}
    rows = [(names[name], torch.from_numpy(waveform)) for name, (waveform, _) in read.items()]
    return png_data(spectrograms_figure(rows, next(iter(read.values()))[1]))


def png_data(picture: np.ndarray) -> str:
    """A data URI of a (height, width, 3) uint8 picture."""
    stream = io.BytesIO()
    imsave(stream, picture, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def found_for(audio: Tensor, video: Tensor, queries: Sequence[int]) -> list[list[int]]:
    """For the sounds of some records the records whose videos are nearest, nearest first."""
    return nearest(audio[list(queries)], video, min(_SHOWN, len(video))).tolist()
