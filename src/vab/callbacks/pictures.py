"""Pictures for a log, as pixels: spectrograms with axes, a confusion matrix, retrieved sounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vab.audio import log_mel
from vab.files import as_plot_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOWEST, _BANDS = 50.0, 64
"""Hz, and bands: those of `log_mel`."""
_FREQUENCIES = (100, 500, 1000, 2000, 4000, 8000, 16_000)
"""Hz, marked on the axis as far as the sound reaches."""
_DPI = 80
_COLUMNS = 3


@dataclass(frozen=True)
class Found:
    """A sound, and the title above its spectrogram."""

    title: str
    sound: Tensor
    """(N,) float32."""
    right: bool = False
    """Whether it is the one that was searched for."""


def spectrogram_picture(waveform: Tensor, sample_rate: int, floor: float = -9.0, ceiling: float = 1.0) -> np.ndarray:
    """A log-mel spectrogram as a picture with a fixed scale, so that pictures of a run can be compared.

    Args:
        waveform: (N,) float32.
        sample_rate: Hz.
        floor: Natural-log energy shown black.
        ceiling: Natural-log energy shown brightest.

    Returns:
        (3, bands, frames) float32 in [0, 1], low frequencies at the bottom.
    """
    import matplotlib as mpl

    mel = log_mel(waveform, sample_rate).numpy()[::-1]
    shade = np.clip((mel - floor) / (ceiling - floor), 0, 1)
    return mpl.colormaps["magma"](shade)[..., :3].transpose(2, 0, 1).astype(np.float32)


def spectrograms_figure(
    rows: Sequence[tuple[str, Tensor]], sample_rate: int, title: str = "", frames: np.ndarray | None = None
) -> np.ndarray:
    """Spectrograms one above the other on one time axis, below some frames of the video.

    Args:
        rows: Name and waveform (N,) float32 of each.
        sample_rate: Hz.
        title: Above all.
        frames: (V, H, W, 3) uint8, evenly spaced over the time axis; None without a video.

    Returns:
        (height, width, 3) uint8.
    """
    heights = [1.0] * len(rows) if frames is None else [0.8, *[1.0] * len(rows)]
    inches = 1.0 + 1.3 * sum(heights)
    figure = _figure(6.0, inches)
    places = {"left": 0.14, "right": 0.98, "top": 1 - 0.4 / inches, "bottom": 0.55 / inches, "hspace": 0.08}
    grid = places | {"height_ratios": heights}
    axes = list(np.ravel(figure.subplots(len(heights), 1, squeeze=False, gridspec_kw=grid)))
    seconds = max(len(sound) for _, sound in rows) / sample_rate
    if frames is not None:
        strip = axes.pop(0)
        strip.imshow(np.concatenate(list(frames), axis=1), aspect="auto", extent=(0, seconds, 0, 1))
        strip.set_axis_off()
    for axis, (name, sound) in zip(axes, rows, strict=True):
        _draw_spectrogram(axis, sound, sample_rate)
        axis.set_xlim(0, seconds)
        axis.set_ylabel(f"{name}\nkHz", fontsize=10)
        axis.tick_params(labelbottom=axis is axes[-1])
    axes[-1].set_xlabel("seconds", fontsize=11)
    figure.suptitle(as_plot_text(title), fontsize=12, y=1 - 0.1 / inches)
    return _pixels(figure)


def confusion_figure(counts: Tensor, names: Sequence[str], title: str) -> np.ndarray:
    """A confusion matrix: a row for each true class, darker for a larger share of the row, with the counts.

    Args:
        counts: (L, L), 0 or more; a row for each true class, a column for each predicted one.
        names: L of them.
        title: Above it.

    Returns:
        (height, width, 3) uint8.
    """
    inches = 2.0 + 0.3 * max(4, len(names))
    figure = _figure(inches + 0.4, inches)
    axis = figure.add_axes(
        (1.2 / (inches + 0.4), 1.3 / inches, (inches - 1.8) / (inches + 0.4), (inches - 1.8) / inches)
    )
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in counts.nonzero().tolist():
        dark = shares[row, column] > 0.5
        text = f"{int(counts[row, column])}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    places, names = range(len(names)), [as_plot_text(name) for name in names]
    axis.set_xticks(places, names, rotation=90, fontsize=10)
    axis.set_yticks(places, names, fontsize=10)
    axis.set_xlabel("predicted", fontsize=11)
    axis.set_ylabel("true", fontsize=11)
    axis.set_title(as_plot_text(title), fontsize=11)
    return _pixels(figure)


def retrieval_figure(query: Found, found: Sequence[Found], sample_rate: int, title: str) -> np.ndarray:
    """The spectrograms of a query and of the sounds found for it; the right one has a frame.

    Args:
        query: The sound that was searched with.
        found: The nearest sounds, nearest first.
        sample_rate: Hz.
        title: Above all.

    Returns:
        (height, width, 3) uint8.
    """
    rows = -(-(1 + len(found)) // _COLUMNS)
    inches = 0.7 + 2.1 * rows
    figure = _figure(2.3 * _COLUMNS, inches)
    places = {"left": 0.08, "right": 0.98, "top": 1 - 0.9 / inches, "bottom": 0.5 / inches, "hspace": 0.55}
    axes = np.ravel(figure.subplots(rows, _COLUMNS, squeeze=False, gridspec_kw=places | {"wspace": 0.2}))
    for axis in axes[1 + len(found) :]:
        axis.set_axis_off()
    for axis, item in zip(axes, [query, *found], strict=False):
        _draw_spectrogram(axis, item.sound, sample_rate)
        axis.set_title(as_plot_text(item.title), fontsize=10, color="green" if item.right else "black")
        if item.right:
            for spine in axis.spines.values():
                spine.set(edgecolor="limegreen", linewidth=5)
    figure.supxlabel("seconds", fontsize=10, y=0.02)
    figure.supylabel("kHz", fontsize=10, x=0.005)
    figure.suptitle(as_plot_text(title), fontsize=11, y=1 - 0.08 / inches)
    return _pixels(figure)


def _figure(width: float, height: float) -> Figure:
    """Size in inches; without a window or global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI)


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_spectrogram(axis: Axes, sound: Tensor, sample_rate: int) -> None:
    """Time in seconds; frequency on the mel scale, marked in kHz."""
    picture = spectrogram_picture(sound, sample_rate).transpose(1, 2, 0)
    edges = (0.0, len(sound) / sample_rate, -0.5, _BANDS - 0.5)
    axis.imshow(picture, aspect="auto", extent=edges, interpolation="nearest")
    marks = [hertz for hertz in _FREQUENCIES if hertz < sample_rate / 2]
    axis.set_yticks([_band(hertz, sample_rate) for hertz in marks], [f"{hertz / 1000:g}" for hertz in marks])
    axis.tick_params(labelsize=9)


def _band(hertz: float, sample_rate: int) -> float:
    """Number of the mel band, from 0 with fractions, whose middle is at that frequency."""
    low, here, high = (math.log10(1 + value / 700) for value in (_LOWEST, hertz, sample_rate / 2))
    return (here - low) / (high - low) * (_BANDS + 1) - 1


def nearest(queries: Tensor, gallery: Tensor, count: int) -> Tensor:
    """(Q, count) int64: numbers of the gallery's rows with the highest cosine, highest first; ties to the lower number.

    Args:
        queries: (Q, E) float.
        gallery: (N, E) float, N >= count.
        count: How many.
    """
    unit = torch.nn.functional.normalize
    cosines = unit(queries.double(), dim=1) @ unit(gallery.double(), dim=1).T
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
