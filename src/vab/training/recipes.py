"""Read the YAML files that recipes are made of. A file may name a base: another file, of which it changes a little."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jsonargparse
from omegaconf import OmegaConf

from vab.spec import UserError


def load(text: str, folder: Path = Path(), chain: tuple[Path, ...] = ()) -> Any:
    """The value of a YAML text, with ``${oc.env:...}`` filled in and merged over its base, if it names one.

    ``base: FILE`` at the top of a mapping names another file. Mappings are merged key by key; everything else, lists
    too, replaces the base's value, and so does a mapping that names another ``class_path``.

    Args:
        text: Contents of a file, or the value of a flag.
        folder: Folder that the base is relative to. The parser reads each file from within the file's folder.
        chain: Files on the way to this one, each the base of the one before.

    Raises:
        UserError: If the base does not exist, or a file is its own base.
    """
    value = jsonargparse.get_loader("yaml")(text)
    if not isinstance(value, (dict, list)):
        return value
    value = OmegaConf.to_object(OmegaConf.load(io.StringIO(text)))
    if not isinstance(value, dict) or not isinstance(value.get("base"), str):
        return value
    name = Path(value.pop("base"))
    base = (folder / name).resolve()
    if not base.is_file() or base in chain:
        raise UserError(f"base: {name}: {'it is its own base' if base in chain else f'there is no file {base}'}")
    return _merged(_moved(load(base.read_text(), base.parent, (*chain, base)), name.parent), value)


def _merged(base: Any, change: Any) -> Any:
    """`change` over `base`, mappings of one class key by key."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    if change.get("class_path", base.get("class_path")) != base.get("class_path"):
        return change
    return base | {key: _merged(base.get(key), value) for key, value in change.items()}


def _moved(value: Any, folder: Path) -> Any:
    """`value` with paths of YAML files that are relative to `folder` made relative to the folder above it."""
    if isinstance(value, dict):
        return {key: _moved(inner, folder) for key, inner in value.items()}
    return str(folder / value) if isinstance(value, str) and value.endswith(".yaml") else value
