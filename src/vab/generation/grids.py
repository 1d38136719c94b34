"""Grids of sampler settings, from YAML files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vab.spec import UserError
from vab.tokens.sampler import Sampler, sampler_from


@dataclass(frozen=True)
class Setting:
    """One point of a grid."""

    name: str
    """Of the product that it comes from; may be empty."""
    sampler: Sampler
    """All of it: the checkpoint's own where the grid says nothing."""

    @property
    def content(self) -> str:
        """Equal for equal samplers, however their numbers were written."""
        return content_of(self.sampler)


def content_of(sampler: Sampler) -> str:
    """A sampler as text: equal for equal settings, ``1`` and ``1.0`` being the same."""
    fields = {name: float(value) if type(value) is int else value for name, value in asdict(sampler).items()}
    return json.dumps(fields, sort_keys=True)


def read_grid(file: str | Path, base: Sampler, num_levels: int) -> list[Setting]:
    """Read a grid file: names of a sampler's fields, each with a list of values, of which every combination is meant.

    Several such tables in a list are united; a ``name`` in one labels its settings. A value alone stands for a list of
    one. Settings that come up twice are kept once, under their first name::

        - name: confidence
          decode_steps: [8, 16, [13, 1, 1, 1]]
          choice_temperature: [0, 4.5]
        - name: halton
          decode_steps: [8, 16]
          order: halton

    Args:
        file: The YAML file.
        base: What holds where the grid says nothing.
        num_levels: Levels that are to be filled, which a list of decode_steps must not exceed.

    Raises:
        UserError: If the file cannot be read, or a name or a value is none of a sampler's.
    """
    path = Path(file)
    content = _yaml(path)
    tables = content if isinstance(content, list) else [content]
    settings: dict[str, Setting] = {}
    for number, table in enumerate(tables, start=1):
        where = f"{path}, entry {number}" if isinstance(content, list) else str(path)
        if not isinstance(table, dict):
            raise UserError(f"{where}: must hold lines such as 'decode_steps: [8, 16]', got {table!r:.60}")
        name = table.get("name", "")
        if not isinstance(name, str):
            raise UserError(f"{where}: name must be a word, got {name!r}")
        for values in _combinations({key: value for key, value in table.items() if key != "name"}, where):
            setting = Setting(name, _sampler(values, base, num_levels, where))
            settings.setdefault(setting.content, setting)
    if not settings:
        raise UserError(f"{path}: the grid is empty")
    return list(settings.values())


def _sampler(values: Mapping[str, Any], base: Sampler, num_levels: int, where: str) -> Sampler:
    sampler = sampler_from(values, base, where)
    try:
        sampler.stages(num_levels)
    except UserError as error:
        raise UserError(str(error).replace("sampler:", f"{where}:", 1)) from error
    return sampler


def _combinations(table: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the values; the last name's values change fastest."""
    lists = [value if isinstance(value, list) else [value] for value in table.values()]
    for name, values in zip(table, lists, strict=True):
        if not values:
            raise UserError(f"{where}: {name} has no values")
    for combination in itertools.product(*lists):
        yield dict(zip(table, combination, strict=True))


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"the grid {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the grid {path} is not YAML: {' '.join(str(error).split())}") from error
