"""Flags of every command except the trainer's: a function's parameters, parsed by jsonargparse."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import jsonargparse

from vab.errors import OneLineErrors, refuse_empty


def parse(command: Callable[..., Any], prog: str, arguments: list[str], given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parse arguments as the parameters of a function; its docstring is the help.

    Values before the first flag belong to the first parameter: ``vab compare A.json B.json``. A list takes one value
    or several, ``--judges a b``, and a switch none or one, ``--overwrite`` or ``--overwrite true``.

    Args:
        command: A function with type hints. They must need no import that its module does not make, except the type
            that it returns.
        prog: The command as it is typed, for messages and help.
        arguments: What follows the command.
        given: Parameters that are no flags: the caller passes them itself. With any, there is no ``--config``.

    Returns:
        Values by parameter.
    """
    command.__annotations__.pop("return", None)  # its import may be slow
    hints = typing.get_type_hints(command)
    command.__annotations__.update(hints)  # jsonargparse would import what is there for type checkers only
    names = [name for name in hints if name not in given]
    kinds = {
        name: {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}
        for name, hint in hints.items()
    }
    if arguments and not arguments[0].startswith("-") and names:
        arguments = [f"--{names[0]}", *arguments]
    # A file of settings gets a key: a later --sampler.decode_steps 8 would silently replace --sampler FILE.
    for name in (name for name in names if {str, dict} <= kinds[name]):
        arguments = [re.sub(rf"^--{name}(?==|$)", f"--{name}.file", argument) for argument in arguments]

    class Parser(OneLineErrors, jsonargparse.ArgumentParser):
        """With lists of several values: ``nargs="+"`` of jsonargparse would make a list of lists of them."""

        def _get_nargs_pattern(self, action: Any) -> str:
            return "(A+)" if list in kinds.get(action.dest, ()) else super()._get_nargs_pattern(action)

        def _get_values(self, action: Any, values: list[str]) -> Any:
            is_list = list in kinds.get(action.dest, ()) and not (len(values) == 1 and values[0].startswith("["))
            return values if is_list else super()._get_values(action, values)

    about = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.cleandoc(command.__doc__ or ""))[0]
    parser = Parser(prog=prog, description=about)
    if not given:
        parser.add_argument("--config", action="config", help="Path to a file with values of flags.")
    parser.add_function_arguments(
        command, as_group=False, as_positional=False, fail_untyped=True, sub_configs=True, skip={*given}
    )
    for action in parser._actions:
        if bool in kinds.get(action.dest, ()):
            action.nargs, action.const = "?", True
    values = parser.parse_args(arguments).as_dict()
    refuse_empty(parser, values)
    return {name: values[name] for name in names}
