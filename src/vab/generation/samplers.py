"""Sampler settings from files and flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vab.spec import UserError
from vab.tokens.sampler import Sampler, sampler_from

Changes = str | dict[str, Any] | None
"""Changes to a checkpoint's own sampler: a YAML file, or names and values, among which ``file`` names one."""


def changed_sampler(base: Sampler, changes: Changes, flag: str) -> Sampler:
    """A sampler with some settings changed: first by the file, then one by one.

    Args:
        base: The checkpoint's own.
        changes: What to change.
        flag: Of the command line, for errors.

    Raises:
        UserError: If the file cannot be read, or a name or value is not one of a sampler's.
    """
    if changes is None:
        return base
    single = {"file": changes} if isinstance(changes, str) else dict(changes)
    file = single.pop("file", None)
    if file is not None:
        base = sampler_from(read_sampler(file), base, str(file))
    return sampler_from(single, base, flag) if single else base


def sampler_file(changes: Changes) -> str | None:
    """The file that changes name, if any."""
    return changes if isinstance(changes, str) or changes is None else changes.get("file")


def read_sampler(file: str | Path) -> Mapping[str, Any]:
    """Names and values of a sampler file, not yet checked.

    Raises:
        UserError: If the file is missing, or not YAML of names and values.
    """
    path = Path(file)
    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text()))  # no ${...}: others may have written it
    except OSError as error:
        raise UserError(f"the sampler file {path} cannot be read: {error.strerror or error}") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"the sampler file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"the sampler file {path} must hold lines such as 'decode_steps: 8', got {content!r:.60}")
    return {str(name): value for name, value in content.items()}
