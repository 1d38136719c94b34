"""Videos and pictures of the report as data URIs, so that the page is one file."""

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
    """Numbers of records to show, whatever their results: evenly spaced among the first ``among`` records.

    Half of them have one object and half two, if there are so many.
    """
    two = [number for number in range(among) if len(dataset.label_names(number)) > 1]
    one = [number for number in range(among) if number not in set(two)]
    num_two = min(count // 2, len(two))
    num_one = min(count - num_two, len(one))
    return sorted(
        pool[len(pool) * n // share] for pool, share in ((one, num_one), (two, num_two)) for n in range(share)
    )


def video_data(path: Path) -> str:
    """A data URI of an .mp4 file."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def with_sound(video: Path, sound: Path) -> str:
    """A data URI of the pictures of a video with the sound of a .wav file."""
    waveform, rate = soundfile.read(sound, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "generated.mp4"
        replace_audio(video, waveform, rate, out)
        return video_data(out)


def spectrograms(folder: Path, row: int, names: dict[str, str]) -> str:
    """A data URI of a PNG file: spectrograms of a record's sounds, one above the other.

    Args:
        folder: Folder of the sounds.
        row: Number of the record.
        names: Name of the sound -> its caption.
    """
    read = {name: soundfile.read(place(folder, name, row), dtype="float32") for name in names}
    rows = [(names[name], torch.from_numpy(waveform)) for name, (waveform, _) in read.items()]
    return png_data(spectrograms_figure(rows, next(iter(read.values()))[1]))


def png_data(picture: np.ndarray) -> str:
    """A data URI of a (height, width, 3) uint8 picture."""
    stream = io.BytesIO()
    imsave(stream, picture, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def nearest_videos(audio: Tensor, video: Tensor, queries: Sequence[int]) -> list[list[int]]:
    """For the sound of each query record, the records whose videos are nearest to it, nearest first."""
    return nearest(audio[list(queries)], video, min(_SHOWN, len(video))).tolist()
