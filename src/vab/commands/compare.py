"""``vab compare``: reports of ``vab evaluate`` side by side."""

from __future__ import annotations

from vab.evaluation.compare import print_side_by_side, read_alike
from vab.metrics.card import Figure


def compare(reports: list[str], only: list[str] | None = None) -> dict[str, list[Figure | None]]:
    """Put reports of vab evaluate side by side.

    Numbers are compared only if their cards agree in all that numbers depend on: judge and weights, rate, lengths,
    definition, counts, the real set. Otherwise nothing is shown but the differences. A figure that a report lacks is a
    gap. With two reports the difference is shown, with its standard error as if the two were independent: for systems
    that were given the same videos it is on the large side.

    Args:
        reports: Two or more .json files of vab evaluate.
        only: Figures to compare, such as fad_vggish; all if not given.

    Raises:
        UserError: If numbers are of unlike kinds, or a report cannot be read.
    """
    rows = read_alike(reports, only)
    print_side_by_side(rows, reports)
    return rows
