"""Every flag of a command is flipped once, and its effect is looked at.

The flags of a command have a class with a method for each, named as the flag. The method runs the command with the flag
changed and asserts what must then differ in the output, the card or the report. Where another test already shows the
effect, the attribute is that test's id instead; it must exist.
"""

import inspect
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

ROOT = Path(__file__).parents[1]


def each_flag(command):
    """Parametrises a test by the flags of a command, as its signature has them."""
    return pytest.mark.parametrize("flag", list(inspect.signature(command).parameters))


def flip(request, flags, flag):
    """Run the entry of a flag.

    Args:
        request: Of the test.
        flags: Has an attribute for each flag.
        flag: Its name.
    """
    entry = getattr(flags, flag, None)
    if entry is None:
        pytest.fail(f"--{flag} has no entry in {type(flags).__name__}: add a method that sees its effect")
    if isinstance(entry, str):
        assert is_test(request.session, entry), f"{entry} is no test"
    else:
        entry()


def is_test(session, test_id):
    """Whether pytest collects a test of this id from its file, in any of its cases."""
    path, _, name = test_id.partition("::")
    if not (ROOT / path).is_file():
        return False
    module = pytest.Module.from_parent(session, path=ROOT / path)
    return any(name in (item.name, getattr(item, "originalname", None)) for item in module.collect())


@contextmanager
def batches_seen(*kinds):
    """The batch sizes that modules of some kinds are called with, as a list that fills."""
    sizes = []

    def note(module, arguments):
        if isinstance(module, kinds):
            sizes.append(len(arguments[0]))

    handle = register_module_forward_pre_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


@contextmanager
def precisions_of(kind):
    """In what modules of a kind compute by autocast, as a set that fills; float32 without."""
    found = set()

    def note(module, _):
        if isinstance(module, kind):
            found.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


class _ReachedError(Exception):
    """Instead of processes that would take seconds to start."""


@contextmanager
def arguments_of(kind):
    """What a class is first called with, as a list and a dict that fill; what is run within ends there."""
    positional, named = [], {}

    def stop(_, *arguments, **options):
        positional.extend(arguments)
        named.update(options)
        raise _ReachedError

    with pytest.MonkeyPatch.context() as patch, suppress(_ReachedError):
        patch.setattr(kind, "__init__", stop)
        yield positional, named
