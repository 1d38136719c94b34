"""Networks and optimizers as plain JSON, in the form of configs, and rebuilt from it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vab.backbone import Backbone
from vab.spec import UserError
from vab.tasks.optim import made_optimizer

Built = dict[str, Any]
"""An object as plain JSON: ``{"class_path": ..., "init_args": {...}}``, as in configs."""


def build(described: Built) -> Any:
    """Create the network that ``{"class_path", "init_args"}`` describes."""
    return class_of(described["class_path"], Backbone)(**described.get("init_args", {}))


def build_later(described: Built) -> Callable[[Iterable], Optimizer]:
    """A function of parameters that creates the optimizer that ``{"class_path", "init_args"}`` describes."""
    return lambda params: class_of(described["class_path"], Optimizer)(params, **described.get("init_args", {}))


def described_as(value: Any) -> Any:
    """A constructor argument as JSON: networks and optimizers by class and arguments, settings by their fields.

    Raises:
        UserError: If an optimizer refuses its arguments.
    """
    if isinstance(value, Backbone):
        return {"class_path": f"{type(value).__module__}.{type(value).__name__}", "init_args": value.init_args}
    if callable(value):
        optimizer = made_optimizer(value, [nn.Parameter(torch.zeros(1))])
        kind = type(optimizer)
        taken = inspect.signature(kind).parameters
        arguments = {name: described_as(value) for name, value in optimizer.defaults.items() if name in taken}
        return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": arguments}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


def class_of(path: str, base: type) -> type:
    """The class of that name, if it is a ``base`` and its module is loaded: by vab, torch or ``--plugins``.

    Nothing is imported: the name may come from a checkpoint, and importing a module runs its code.

    Raises:
        UserError: If its module is not loaded.
        TypeError: If there is no such class, or it is no ``base``.
    """
    module, _, name = str(path).rpartition(".")
    if module not in sys.modules:
        raise UserError(
            f"{path} is not a class of vab or torch, and a checkpoint may not import it: if you trust the code of"
            f" {module or path!r}, add --plugins {module or 'MODULE'}, or in Python import it first"
        )
    found = vars(sys.modules[module]).get(name)  # not getattr: a module may import others when it is asked for a name
    if not (isinstance(found, type) and issubclass(found, base)):
        raise TypeError(f"{path} is no {base.__name__}")
    return found


def class_or_none(path: str, base: type) -> type | None:
    """`class_of`, or None where it raises."""
    try:
        return class_of(path, base)
    except (TypeError, UserError):
        return None
