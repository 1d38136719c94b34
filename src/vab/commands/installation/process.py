"""Asking the processes that try things, and outliving them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MODULE = "vab.commands.installation.probes"
SECONDS = 300
"""For one answer: big files may have to be read over a network for it."""

Answers = dict[str, dict[str, Any]]


def ask(groups: Sequence[Sequence[str]], tell: Callable[[str], None], seconds: float = SECONDS) -> Answers:
    """The answers of `vab.commands.installation.probes`.

    A process for each group answers all of it, which is quicker than one for each name, as they share their imports.
    Where it ends without an answer, another goes on with what comes after. They are forbidden to use the network.

    Args:
        groups: Names of probes; groups are tried side by side.
        tell: Is told which one is waited for.
        seconds: After which an answer is no longer waited for.

    Returns:
        By name; ``{"error": WHY}`` where it failed.
    """
    answers: Answers = {}
    children = {index: _start(group) for index, group in enumerate(groups) if group}
    try:
        for index, group in enumerate(groups):
            while left := [name for name in group if name not in answers]:
                answers |= _read(children[index], left, tell, seconds)
                if rest := [name for name in left if name not in answers]:
                    _end(children[index])
                    children[index] = _start(rest)
    finally:
        for child in children.values():
            _end(child)
    return answers


def _start(names: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # -P: else a file in the user's folder that is called as a package would be taken for it.
        [sys.executable, "-P", "-m", _MODULE, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def _read(child: subprocess.Popen[str], names: Sequence[str], tell: Callable[[str], None], seconds: float) -> Answers:
    """Answers of one process, until it gives none."""
    assert child.stdout is not None
    answers: Answers = {}
    with ThreadPoolExecutor(1) as reader:
        for name in names:
            tell(name)
            try:
                line = reader.submit(child.stdout.readline).result(seconds)
            except TimeoutError:
                child.kill()
                return answers | {name: {"error": f"no answer in {seconds:g} s"}}
            except BaseException:
                child.kill()  # else the reader, and with it this process, would wait for it
                raise
            if not line:
                return answers | {name: {"error": _ending(child.wait())}}
            answers[name] = json.loads(line)
    return answers


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _ending(status: int) -> str:
    """How a process ended that should not have, in words."""
    if status >= 0:
        return f"the process that tried it ended with exit status {status}"
    return f"the process that tried it crashed ({signal.Signals(-status).name})"
