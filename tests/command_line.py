"""``vab`` as a user starts it, and what it makes of a line that a user may copy."""

import argparse
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vab.cli import AROUND_FIT, COMMANDS, main


def start(*arguments):
    """Start ``vab``, in a process group of its own; for other ranks Fabric runs the same command line."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("vab")), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def parsed(arguments, capsys):
    """What ``vab ARGUMENTS`` would do, as settings, without doing it; fails where it would be refused."""
    command, *rest = arguments
    if command in AROUND_FIT:
        module, _, name = AROUND_FIT[command].partition(":")
        own = argparse.ArgumentParser(allow_abbrev=False)
        for parameter in list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)[1:]:
            own.add_argument(f"--{parameter}", nargs="?")
        command, rest = "fit", own.parse_known_args(rest)[1]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, *rest, "--print_config"])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.err) == (0, ""), shlex.join(["vab", *arguments])
    return yaml.safe_load(printed.out)


def is_whole(arguments, settings):
    """Whether nothing that a command of ours cannot do without is missing from what was parsed."""
    command, *rest = arguments
    if command not in COMMANDS:
        return True
    place = COMMANDS[command][1]
    module, _, name = (place[rest[0]] if isinstance(place, dict) else place).partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    return all(settings[one.name] is not None for one in parameters if one.default is inspect.Parameter.empty)


def code_of(page):
    """What a Markdown page's blocks say, in one text; a line that goes on in the next is one."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in blocks if "-->" not in block).replace("\\\n", " ")  # a picture has arrows


def prose_of(page):
    """A Markdown page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)


def spans_of(page):
    """What stands in backticks in a Markdown page's sentences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]
