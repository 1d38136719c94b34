"""The command line: ``vab fit`` and its kin are Lightning's, the other commands are functions of ``vab.commands``."""

from __future__ import annotations

import errno
import importlib
import inspect
import io
import json
import os
import re
import sys
import typing
from collections import deque
from typing import Any, NoReturn

from vab import UserError, __version__
from vab.errors import OneLineErrors, exit_now, fail, nearest, refuse_addresses, refuse_empty, stopping_at_once

TRAINER_COMMANDS = {
    "fit": "train; --config FILE, then any --trainer.*, --data.*, --model.* flag",
    "folds": "cross-validation: fit for each of --folds 5, mean and deviation; flags as for fit",
    "validate": "score a checkpoint on the validation set",
    "test": "score a checkpoint on the test set",
    "predict": "codes, embeddings or probabilities for every record of a data set",
}
# What is wrong with a place that was given, not with what is done there.
_OF_THE_PLACE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
_BARE = ("vab compare", "vab shards merge")
"""Commands whose values before any flag are their first parameter's."""

# Command -> (its one line, where its function is); a dict is a group of commands.
COMMANDS: dict[str, tuple[str, Any]] = {
    "extract": ("media files to shards of codec tokens and frame features", "vab.commands.extract:extract"),
    "shards": (
        "look after folders of shards: verify, index, info, merge; import ready features",
        {
            "import": "vab.commands.shards:import_shards",
            "verify": "vab.commands.shards:verify_shards",
            "index": "vab.commands.shards:index_shards",
            "info": "vab.commands.shards:show_shards",
            "merge": "vab.commands.shards:merge_shards",
        },
    ),
    "export": ("a trained model as a folder to pass on: weights, config, card", "vab.commands.export:export"),
    "generate": ("sound for a silent video or a still picture", "vab.commands.generate:generate"),
    "retrieve": (
        "recall on shards or of any embeddings; with --query, what is nearest to a sound or a video",
        "vab.commands.retrieve:retrieve",
    ),
    "classify": ("the likeliest classes of media files", "vab.commands.classify:classify"),
    "sweep": ("try sampler settings on validation records; the best as a file", "vab.commands.sweep:sweep"),
    "evaluate": (
        "any system's sounds against real ones: FAD, KAD, KLD, IS, synchrony",
        "vab.commands.evaluate:evaluate",
    ),
    "compare": ("reports of evaluate side by side; unlike ones are refused", "vab.commands.compare:compare"),
    "listen": ("a page for a listening test, and the score of its answers", "vab.commands.listen:listen"),
    "datasets": (
        "list what to extract of a published data set: vggsound, audioset, esc50, speech_commands, msrvtt",
        {
            "vggsound": "vab.commands.datasets:vggsound",
            "audioset": "vab.commands.datasets:audioset",
            "esc50": "vab.commands.datasets:esc50",
            "speech_commands": "vab.commands.datasets:speech_commands",
            "msrvtt": "vab.commands.datasets:msrvtt",
        },
    ),
    "weights": (
        "files of weights: list, fetch into a folder for machines without a network, verify",
        {
            "list": "vab.commands.weights:list_weights",
            "fetch": "vab.commands.weights:fetch_weights",
            "verify": "vab.commands.weights:verify_weights",
        },
    ),
    "doctor": ("what is installed and works, which weights are where, what to type", "vab.commands.doctor:doctor"),
    "demo": (
        "the synthetic world: world, score, report",
        {
            "world": "vab.demo.world:write_world",
            "score": "vab.demo.score:score",
            "report": "vab.demo.report:report",
        },
    ),
}

RENAMED = {"lists": "vab datasets", "demo two-stage": "python -m bench.two_stage, in a checkout"}
"""Command of an earlier release -> what to type now."""


def main(argv: list[str] | None = None) -> None:
    """Run ``vab`` on ``argv``, or on the process's own arguments.

    A user's mistake is one clear line on stderr and exit status 2; anything else that is raised is a bug of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, nor the terminal
    try:
        arguments = import_plugins(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        fail(str(error))
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        return print(overview())
    if command == "--version":
        return print(f"vab {__version__}")
    for old in (command, " ".join(arguments[:2])):
        if old in RENAMED:
            fail(f"vab {old} is now {RENAMED[old]}")
    if command not in TRAINER_COMMANDS and command not in COMMANDS:
        hint = nearest(command, [*TRAINER_COMMANDS, *COMMANDS])
        fail(f"no command {command!r}{hint}; vab --help lists them")

    try:
        if command == "folds":
            run_folds(arguments[1:])
        elif command in TRAINER_COMMANDS:
            with stopping_at_once():
                from vab.training.cli import train

            train(arguments)
        else:
            run_command(command, arguments[1:])
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; say nothing more
    except UnicodeDecodeError as error:
        fail(f"a file that was given as text is something else ({error}): check --config and the like")
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"no space left on the disk{place and ' of' + place}: free some and run it again")
        if error.errno in _OF_THE_PLACE:
            fail(f"cannot write or read{place}: {error.strerror}")
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        exit_now(130)


def import_plugins(arguments: list[str]) -> list[str]:
    """Import the modules that ``--plugins`` and the environment's ``VAB_PLUGINS`` name, joined by commas.

    A task, backbone or optimizer of one's own is a class of such a module. Files may name it, but never import it.

    Returns:
        The arguments without ``--plugins``.

    Raises:
        UserError: If a module cannot be imported.
    """
    names = os.environ.get("VAB_PLUGINS", "").split(",")
    others: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        flag, equals, value = argument.partition("=")
        if flag != "--plugins":
            others.append(argument)
            continue
        value = value if equals else rest.popleft() if rest else ""
        if not value or value.startswith("-"):
            raise UserError("--plugins needs the name of a Python module, such as --plugins my_package.my_task")
        names += value.split(",")
    if names := [*dict.fromkeys(name.strip() for name in names if name.strip())]:
        os.environ["VAB_PLUGINS"] = ",".join(names)  # for the processes that this one starts
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's own code may raise
            raise UserError(
                f"--plugins {name}: importing it failed ({type(error).__name__}: {' '.join(str(error).split())}); "
                "install it, or add its folder to the environment's PYTHONPATH"
            ) from error
    return others


def overview() -> str:
    """What ``vab --help`` prints; importing nothing heavy."""
    lines = ["usage: vab COMMAND ...     vab COMMAND --help tells more", ""]
    described = {**TRAINER_COMMANDS, **{name: words for name, (words, _) in COMMANDS.items()}}
    lines += [f"  {name:<10}{words}" for name, words in described.items()]
    more = "with any command: --plugins MODULE,... imports the modules of your own tasks, backbones and optimizers"
    return "\n".join([*lines, "", more])


def run_folds(arguments: list[str]) -> None:
    """``vab folds``: what is not its own goes to ``vab fit``."""
    import argparse

    with stopping_at_once():
        from vab.commands.folds import cross_validate

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"folds: {message}")

    description = inspect.cleandoc(cross_validate.__doc__ or "").partition("\n\nArgs:")[0]
    parser = Parser(
        prog="vab folds", description=description, epilog="All other flags are vab fit's.", allow_abbrev=False
    )
    parser.add_argument("--folds", type=int, default=5, help="how many there are, numbered from 1 (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="train again what was done before")
    own, others = parser.parse_known_args(arguments)
    if not others:
        raise UserError("folds needs a recipe: vab folds --config configs/classify/esc50.yaml")
    cross_validate(others, own.folds, own.overwrite)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a typed function as a command: its parameters are the flags, its docstring the help."""
    with stopping_at_once():
        import jsonargparse

    place = COMMANDS[name][1]
    if isinstance(place, dict):
        if arguments and arguments[0] in place:
            prog, place, arguments = f"vab {name} {arguments[0]}", place[arguments[0]], arguments[1:]
        elif not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: vab {name} {{{','.join(place)}}} ...")
            return
        else:
            fail(f"no command {arguments[0]!r} in vab {name}: it has {', '.join(place)}")
    else:
        prog = f"vab {name}"
    module, _, function = place.partition(":")
    with stopping_at_once():
        component = getattr(importlib.import_module(module), function)

    class Parser(OneLineErrors, jsonargparse.ArgumentParser):
        def parse_args(self, *arguments: Any, **settings: Any) -> Any:
            values = super().parse_args(*arguments, **settings)
            refuse_empty(self, vars(values))
            if prog not in ("vab extract", "vab shards merge"):
                refuse_addresses(vars(values))
            return values

    outcome = jsonargparse.auto_cli(
        component,
        args=_lists_as_items(component, _files_as_keys(component, arguments), prog in _BARE),
        as_positional=prog in ("vab shards verify", "vab shards index", "vab shards info"),  # vab shards verify DIR
        fail_untyped=True,
        parser_class=Parser,
        prog=prog,
    )
    if status := getattr(outcome, "exit_status", 0):
        raise SystemExit(status)


def _files_as_keys(component: Any, arguments: list[str]) -> list[str]:
    """``--sampler FILE`` as ``--sampler.file FILE``, for parameters that take a file or a mapping.

    jsonargparse takes either, but a later ``--sampler.decode_steps 8`` would silently displace the file.
    """
    for name, hint in typing.get_type_hints(component).items():
        if {str, dict} <= {typing.get_origin(kind) or kind for kind in typing.get_args(hint)}:
            arguments = [re.sub(rf"^--{name}(?==|$)", f"--{name}.file", argument) for argument in arguments]
    return arguments


def _lists_as_items(component: Any, arguments: list[str], bare: bool) -> list[str]:
    """``--judges a b`` as ``--judges=["a", "b"]``, for parameters that take a list.

    With ``bare`` the values before any flag are the first parameter's: ``vab compare A.json B.json``.
    """
    hints = typing.get_type_hints(component)
    alternatives = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    lists = [name for name, kinds in alternatives.items() if any(typing.get_origin(kind) is list for kind in kinds)]
    if bare and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{lists[0]}", *arguments]
    changed: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        changed.append(argument)
        values = []
        while argument.removeprefix("--") in lists and rest and not rest[0].startswith("-"):
            values.append(rest.popleft())
        if len(values) == 1 and values[0].startswith("["):
            changed.append(values[0])
        elif values:
            changed[-1] += f"={json.dumps(values)}"
    return changed


if __name__ == "__main__":
    main()
