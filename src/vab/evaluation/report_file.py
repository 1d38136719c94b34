"""Reading ``report.json`` again, without torch: for commands that only show its numbers."""

from __future__ import annotations

import json
from pathlib import Path

from vab import UserError
from vab.metrics.card import Figure, MetricCard

FORMAT = 1
"""Version of ``report.json``."""


def read_figures(path: Path) -> dict[str, Figure]:
    """The figures of a ``report.json``.

    Raises:
        UserError: If it cannot be read, or is no report.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"{path} is a report of format {values['format']}, this version of vab reads {FORMAT}")
        return {
            name: Figure(
                float(entry["value"]),
                None if entry["error"] is None else float(entry["error"]),
                MetricCard.from_dict(entry["card"]),
                dict(entry["details"]),
            )
            for name, entry in values["figures"].items()
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a report of vab evaluate, or it is damaged: {error}") from error


def number(value: float) -> str:
    """As tables show it; what is left of 0 after rounding as 0."""
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
