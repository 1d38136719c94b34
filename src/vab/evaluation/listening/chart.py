"""Draw the preference chart: a stacked bar for each two systems, "first much better" to "second much better"."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vab.evaluation.listening.scores import PairScore
from vab.evaluation.plots import save_png
from vab.files import as_plot_text
from vab.spec import UserError

_COLOURS = ("#1f5fa8", "#8db8e2", "#d9dde2", "#f2b98a", "#c65d13")
"""Blue for the first system, orange for the second, which colour-blind readers distinguish; grey for neither."""
_INK = ("#ffffff", "#1d232b", "#1d232b", "#1d232b", "#ffffff")
_LEGEND = ("left much better", "left better", "no preference", "right better", "right much better")


def draw_chart(file: Path, scores: Sequence[PairScore], questions: Mapping[str, str]) -> None:
    """Draw the shares of the five answers, each preferred share with its 95 % interval, as PNG.

    Args:
        file: Ends in .png.
        scores: Grouped by question, one or more.
        questions: Name -> text.

    Raises:
        UserError: If the file cannot be written.
    """
    groups = [(name, list(entries)) for name, entries in itertools.groupby(scores, lambda entry: entry.question)]
    heights = [0.55 * len(entries) + 0.55 for _, entries in groups]
    figure = Figure(figsize=(9.0, sum(heights) + 1.05), dpi=160, layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (name, entries) in zip(axes, groups, strict=True):
        rows = np.arange(len(entries))
        left = np.zeros(len(entries))
        for place, colour in enumerate(_COLOURS):
            shares = np.array([100 * entry.preference.shares[place] for entry in entries])
            axis.barh(rows, shares, left=left, height=0.62, color=colour, label=_LEGEND[place], edgecolor="white")
            for row, share, start in zip(rows, shares, left, strict=True):
                if share >= 4:  # a narrower piece has no room for its number
                    axis.text(
                        start + share / 2, row, f"{share:.0f}", ha="center", va="center", color=_INK[place], fontsize=9
                    )  # fmt: skip
            left += shares
        for row, entry in zip(rows, entries, strict=True):
            first, second = entry.preference.first, entry.preference.second
            for share, low, high, colour, below in (
                (first.share, first.low, first.high, _COLOURS[0], 0.37),
                (1 - second.share, 1 - second.high, 1 - second.low, _COLOURS[-1], 0.44),
            ):
                reach = [[100 * (share - low)], [100 * (high - share)]]
                axis.errorbar(
                    100 * share, row + below, xerr=reach, fmt="|", markersize=6, color=colour, capsize=3,
                    elinewidth=1.3, clip_on=False,
                )  # fmt: skip
        axis.set_yticks(rows, [as_plot_text(entry.first) for entry in entries])
        axis.set_ylim(len(entries) - 0.45, -0.5)
        axis.set_xlim(0, 100)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        right = axis.twinx()
        right.set_ylim(axis.get_ylim())
        right.set_yticks(
            rows,
            [
                f"{as_plot_text(e.second)}\n{e.preference.num_answers} answers, {e.preference.num_raters} people"
                for e in entries
            ],
        )
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        axis.set_title(as_plot_text(f"{name.replace('_', ' ')}: {questions[name]}"), loc="left", fontsize=10.5)
    axes[-1].set_xlabel("share of answers, %; lines: 95 % intervals of those that prefer left (blue), right (orange)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[: len(_LEGEND)], labels[: len(_LEGEND)], loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_png(file, figure)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
