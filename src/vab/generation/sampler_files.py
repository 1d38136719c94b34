"""Sampler settings from YAML files and flags: one sampler, or a grid of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vab.spec import UserError
from vab.tokens.sampler import Sampler, sampler_from

Changes = str | dict[str, Any] | None
"""Changes to a checkpoint's own sampler: a YAML file, or names and values, with an optional ``file``."""


def changed_sampler(base: Sampler, changes: Changes, flag: str, num_levels: int | None = None) -> Sampler:
    """A sampler with some settings changed: first by the file, then one by one.

    Args:
        base: The checkpoint's own.
        changes: What to change.
        flag: Of the command line, for errors.
        num_levels: Number of levels to generate, if known; a list of decode_steps must not be longer.

    Raises:
        UserError: If the file cannot be read, or a name or value is not valid for a sampler.
    """
    single = {"file": changes} if isinstance(changes, str) else dict(changes or {})
    file = single.pop("file", None)
    if file is not None:
        content = _read_yaml(file)
        if not isinstance(content, dict) or not content:
            raise UserError(f"the sampler file {file} must hold lines such as 'decode_steps: 8', got {content!r:.60}")
        base = sampler_from(content, base, str(file))
    return _sampler(single, base, num_levels, flag)


def sampler_file(changes: Changes) -> str | None:
    """The file of the changes, if any."""
    return changes if isinstance(changes, str) or changes is None else changes.get("file")


@dataclass(frozen=True)
class Setting:
    """One point of a grid."""

    name: str
    """Name of the table that it comes from; may be empty."""
    sampler: Sampler
    """All settings; the checkpoint's own where the grid does not name them."""


def read_grid(file: str | Path, base: Sampler, num_levels: int) -> list[Setting]:
    """Read a grid file: names of a sampler's fields, each with a list of values, in every combination.

    A single value stands for a list of one. The file may also be a list of such tables, whose settings are joined. An
    entry ``{}`` is the base, and a ``name`` in a table labels its settings. Duplicate settings are kept once, under
    their first name::

        - name: confidence
          decode_steps: [8, 16, [13, 1, 1, 1]]
          choice_temperature: [0, 4.5]
        - name: halton
          decode_steps: [8, 16]
          order: halton

    Args:
        file: The YAML file.
        base: The values of settings that the grid does not name.
        num_levels: Number of levels to generate; a list of decode_steps must not be longer.

    Raises:
        UserError: If the file cannot be read, or a name or value is not valid for a sampler.
    """
    content = _read_yaml(file)
    settings: list[Setting] = []
    for number, table in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{file}, entry {number}" if isinstance(content, list) else str(file)
        if not isinstance(table, dict) or not (table or isinstance(content, list)):  # an entry may be {}: no change
            raise UserError(f"{where}: must hold lines such as 'decode_steps: [8, 16]', got {table!r:.60}")
        name = table.pop("name", "")
        if not isinstance(name, str):
            raise UserError(f"{where}: name must be a word, got {name!r}")
        lists = [value if isinstance(value, list) else [value] for value in table.values()]
        if empty := [field for field, values in zip(table, lists, strict=True) if not values]:
            raise UserError(f"{where}: {empty[0]} has no values")
        for values in itertools.product(*lists):
            sampler = _sampler(dict(zip(table, values, strict=True)), base, num_levels, where)
            if all(sampler != setting.sampler for setting in settings):
                settings.append(Setting(name, sampler))
    if not settings:
        raise UserError(f"{file}: the grid is empty")
    return settings


def _sampler(values: Mapping[str, Any], base: Sampler, num_levels: int | None, where: str) -> Sampler:
    sampler = sampler_from(values, base, where)
    if num_levels is not None:
        try:
            sampler.stages(num_levels)
        except UserError as error:
            raise UserError(str(error).replace("sampler:", f"{where}:", 1)) from error
    return sampler


def _read_yaml(file: str | Path) -> Any:
    """A YAML file as dicts, lists and values. ``${...}`` is not resolved: others may have written the file."""
    try:
        return OmegaConf.to_container(OmegaConf.create(Path(file).read_text()))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
