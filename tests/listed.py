"""Fake folders of published data sets, and what lists of them say."""

import csv


def touch(folder, *names):
    """Empty files in a folder, which is made."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def rows(path):
    """Rows of a CSV as dictionaries."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    """A column of a CSV."""
    return [row[name] for row in rows(path)]
