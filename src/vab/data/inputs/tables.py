"""What to say of a CSV that is none."""

from __future__ import annotations

import csv

from vab.spec import UserError


def not_csv(name: object, error: Exception) -> UserError:
    """What to say of a file that cannot be read as CSV.

    All are read strictly: else a quote that is not closed makes one cell of all lines that follow, and a list that was
    cut within one is taken for whole.

    Args:
        name: What the file is called.
        error: Of reading it.
    """
    is_open = isinstance(error, csv.Error) and "unexpected end" in str(error)
    reason = "a double quote is not closed: is the file cut?" if is_open else str(error)
    return UserError(f"{name} cannot be read as CSV in UTF-8: {reason}")
