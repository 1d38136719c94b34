"""The report as one page of HTML, which needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vab.demo.report.measures import SOUNDS
from vab.metrics.recall import CUTS
from vab.pages import render_page


@dataclass(frozen=True)
class Example:
    """A record of which the page shows the video, with its own sound and with the generated one."""

    title: str
    real: str
    """Data URI of the video."""
    generated: str
    """Data URI of the same pictures with the generated sound."""
    spectrograms: str
    """Data URI of a picture."""


@dataclass(frozen=True)
class Found:
    """The videos that are nearest to the sound of a record."""

    title: str
    query: str
    """Data URI of the record's own video."""
    rank: int
    """Rank of its own video, from 1."""
    hits: list[tuple[str, str, bool]]
    """Title, data URI, and whether it is the record's own video."""


def page(
    report: Mapping[str, Any], plots: Mapping[str, str], examples: Sequence[Example], found: Sequence[Found]
) -> str:
    """The text of the page, from the template page.html.

    Args:
        report: All metrics.
        plots: By run its curves, an SVG element.
        examples: Records to watch and hear.
        found: Searches to watch.
    """
    cuts = [cut for cut in CUTS if cut < report["retrieval"]["N"]]
    return render_page(
        __package__,
        "page.html",
        **report,
        sounds=SOUNDS,
        plots=plots,
        examples=examples,
        found=found,
        cuts=cuts,
        names_of_cuts=[f"R@{cut}" for cut in cuts],
    )
