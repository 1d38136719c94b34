"""Plots of an evaluation: distributions of its metrics per file, and spectrograms of good and bad pairs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vab.audio import log_mel
from vab.data.extract.sounds import Decoded, Listening, decode
from vab.evaluation.figures import Comparison
from vab.evaluation.sides import Folder
from vab.files import as_plot_text, write_atomically
from vab.frozen.protocols import Judge

_RATE = 16000
_EACH = 3
"""Pairs shown of the best, the middle and the worst."""


def draw(
    folder: Path, comparison: Comparison, judges: Sequence[Judge], real: Folder | None, generated: Folder
) -> list[Path]:
    """Write PNGs into a folder.

    Args:
        folder: Is there.
        comparison: Measured.
        judges: Whose metrics are drawn.
        real: The real files; None if the real side is a saved reference.
        generated: The generated files.

    Returns:
        What was written: ``distributions_<judge>.png``, and ``pairs_<judge>.png`` where sounds are paired.

    Raises:
        UserError: If the disk is full.
    """
    files = {"real": _by_key(real), "generated": _by_key(generated)}
    written = []
    for judge in judges:
        spreads = {f"fad_{judge.name} of each file": comparison.distances(judge.name).numpy()}
        if comparison.paired and judge.classes:
            spreads[f"kld_{judge.name} of each pair, nats"] = comparison.divergences(judge.name).numpy()
        spread, pairs = plots_of(folder, judge.name)
        written.append(save_png(spread, _distributions(spreads)))
        if len(spreads) > 1:
            figure = _pairs(comparison, list(spreads.values())[1], f"kld_{judge.name}", files)
            written.append(save_png(pairs, figure))
    return written


def plots_of(folder: Path, judge: str) -> tuple[Path, Path]:
    """Where a judge's pictures go: distributions, and pairs."""
    return folder / f"distributions_{judge}.png", folder / f"pairs_{judge}.png"


def _distributions(spreads: Mapping[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(5 * len(spreads), 3.5), layout="constrained")
    for number, (name, values) in enumerate(spreads.items(), start=1):
        axes = figure.add_subplot(1, len(spreads), number)
        axes.hist(values, bins=min(40, max(5, len(values) // 5)), color="0.4")
        axes.axvline(float(np.median(values)), color="C3", label=f"median {np.median(values):.3g}")
        axes.set_xlabel(name)
        axes.set_ylabel("sounds")
        axes.legend()
    return figure


def _by_key(folder: Folder | None) -> dict[str, Path]:
    return {} if folder is None else dict(zip(folder.keys, folder.files, strict=True))


def _pairs(comparison: Comparison, values: np.ndarray, name: str, files: Mapping[str, Mapping[str, Path]]) -> Figure:
    """Spectrograms of the best, middle and worst pairs: real above generated."""
    order, count = np.argsort(values, kind="stable"), len(values)
    middle = max(0, count // 2 - _EACH // 2)
    chosen = dict.fromkeys([*order[:_EACH], *order[middle : middle + _EACH], *order[-_EACH:]])
    listening = Listening((_RATE,), comparison.listening.seconds, "keep", False)
    figure = Figure(figsize=(2.6 * len(chosen), 5), layout="constrained")
    for column, number in enumerate(chosen):
        key = comparison.generated.keys[number]
        for row, (side, paths) in enumerate(files.items()):
            axes = figure.add_subplot(2, len(chosen), row * len(chosen) + column + 1)
            title = f"{side} {key[-24:]}" + (f"\n{name} {values[number]:.3g}" if row == 0 else "")
            axes.set_title(as_plot_text(title), fontsize=8)
            sound = decode(paths[key], listening) if key in paths else None
            if isinstance(sound, Decoded):
                levels = log_mel(torch.from_numpy(sound.waveforms[_RATE]), _RATE)
                axes.imshow(
                    levels, aspect="auto", origin="lower", extent=(0, sound.seconds, 0, len(levels)), vmin=-11.5, vmax=0
                )
                axes.set_xlabel("s", fontsize=8)
            else:
                axes.text(0.5, 0.5, "no audio here", ha="center", va="center")
            axes.set_yticks([])
    return figure


def save_png(path: Path, figure: Figure) -> Path:
    """Draw a figure into a PNG file, whole or not at all; returns its path."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    write_atomically(path, stream.getbuffer())
    return path
