"""The command line: ``vab fit`` and its kin are Lightning's, the other commands are functions of ``vab.commands``."""

from __future__ import annotations

import errno
import importlib
import inspect
import io
import os
import sys
from collections import deque
from typing import Any

from vab import UserError, __version__
from vab.errors import ctrl_c_ends_imports, exit_now, fail, nearest, refuse_addresses

TRAINER_COMMANDS = {
    "fit": "train; --config FILE, then any --trainer.*, --data.*, --model.* flag",
    "folds": "cross-validation: fit for each of --folds 5, mean and deviation; flags as for fit",
    "plan": "memory, time, epochs and disk of a training before it starts; flags as for fit",
    "validate": "score a checkpoint on the validation set",
    "test": "score a checkpoint on the test set",
    "predict": "codes, embeddings or probabilities for every record of a data set",
}
# What is wrong with a place that was given, not with what is done there.
_OF_THE_PLACE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
AROUND_FIT = {
    "folds": "vab.commands.folds:cross_validate",
    "plan": "vab.commands.plan:plan",
}
"""Commands that take the flags of ``vab fit`` besides their own."""
_RECIPE_OF = {"folds": "configs/classify/esc50.yaml", "plan": "configs/pretrain.yaml"}
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
            "world": "vab.commands.demo:world",
            "score": "vab.commands.demo:score",
            "report": "vab.commands.demo:report",
        },
    ),
}

RENAMED = {
    "lists": "vab datasets",
    "recall": "vab retrieve --audio A.npz --video V.npz",
    "--on_missing": "--on_error",
    "demo two-stage": "python -m bench.two_stage, in a checkout",
}
"""Command or flag of an earlier release -> what to type now."""


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
    refuse_former_names(arguments)
    if command not in TRAINER_COMMANDS and command not in COMMANDS:
        hint = nearest(command, [*TRAINER_COMMANDS, *COMMANDS])
        fail(f"no command {command!r}{hint}; vab --help lists them")

    try:
        with ctrl_c_ends_imports():
            if command in AROUND_FIT:
                run_around_fit(command, arguments[1:])
            elif command == "fit" and "--print_plan" in arguments:
                run_around_fit("plan", [argument for argument in arguments[1:] if argument != "--print_plan"])
            elif command in TRAINER_COMMANDS:
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


def refuse_former_names(arguments: list[str]) -> None:
    """Name what replaces a command or a flag of an earlier release; exit status 2."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for old in (arguments[0], " ".join(arguments[:2]), *flags):  # a folder may be called lists
        if old in RENAMED:
            fail(f"{old if old.startswith('-') else f'vab {old}'} is now {RENAMED[old]}")


def overview() -> str:
    """What ``vab --help`` prints; importing nothing heavy."""
    lines = ["usage: vab COMMAND ...     vab COMMAND --help tells more", ""]
    described = {**TRAINER_COMMANDS, **{name: words for name, (words, _) in COMMANDS.items()}}
    lines += [f"  {name:<10}{words}" for name, words in described.items()]
    lines += ["", "values before the first flag belong to that command's first flag: vab compare A.json B.json"]
    return "\n".join([*lines, "--plugins MODULE,... imports your own tasks, backbones and optimizers, in any command"])


def run_around_fit(name: str, arguments: list[str]) -> None:
    """Run ``vab folds`` or ``vab plan``: flags that are not the command's own are those of ``vab fit``."""
    from vab.flags import parse

    module, _, function = AROUND_FIT[name].partition(":")
    component = getattr(importlib.import_module(module), function)
    flags = {f"--{parameter}" for parameter in inspect.signature(component).parameters} | {"-h", "--help"}
    own: list[str] = []
    others: list[str] = []
    mine = others
    for argument in arguments:
        if argument.startswith("-"):
            mine = own if argument.partition("=")[0] in flags else others
        mine.append(argument)
    values = parse(component, f"vab {name}", own, given=("arguments",))
    if not others:
        raise UserError(f"{name} needs a recipe: vab {name} --config {_RECIPE_OF[name]}")
    component(others, **values)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a function as a command: its parameters are the flags, its docstring is the help."""
    place = COMMANDS[name][1]
    if isinstance(place, dict):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: vab {name} {{{','.join(place)}}} ...")
            return
        if arguments[0] not in place:
            fail(f"no command {arguments[0]!r} in vab {name}: it has {', '.join(place)}")
        name, place, arguments = f"{name} {arguments[0]}", place[arguments[0]], arguments[1:]
    from vab.flags import parse

    module, _, function = place.partition(":")
    component = getattr(importlib.import_module(module), function)
    values = parse(component, f"vab {name}", arguments)
    if name not in ("extract", "shards merge"):
        refuse_addresses(values)
    if status := getattr(component(**values), "exit_status", 0):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
