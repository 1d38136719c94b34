"""Error messages on one line, for argument parsers too, and how the process exits after an error."""

from __future__ import annotations

import difflib
import inspect
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from vab import UserError


def fail(message: str) -> NoReturn:
    """Print an error message on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def exit_now(status: int) -> NoReturn:
    """Exit without the interpreter's own clean-up, for a process that was stopped in the middle of its work.

    Threads of a library may still run, and one that runs during the clean-up can crash the process.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def ctrl_c_ends_imports() -> Iterator[None]:
    """Let Ctrl-C end the process at once while a module is imported; at any other time it raises KeyboardInterrupt.

    Some packages swallow a KeyboardInterrupt that is raised while they are imported, and are broken afterwards.
    Nothing changes where Ctrl-C is ignored or has a handler already.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code.co_filename == "<frozen importlib._bootstrap>":
                os.write(2, b"stopped\n")  # print is not safe in a signal handler
                exit_now(130)
            at = at.f_back
        signal.default_int_handler(signum, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def nearest(word: str, known: list[str]) -> str:
    """``; did you mean ...?`` with the known word closest to ``word``; empty if none is close, or ``word`` is known."""
    if word in known:
        return ""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


_UNKNOWN_NAME = re.compile(
    r"(?:does not accept (?:nested key|option|argument)|[Uu]nrecognized arguments?:|No action for key) ['\"]?-*([\w.]+)"
)
_REQUIRED = re.compile(r"(?<=arguments are required: ).*")
_NO_NUMBER = re.compile(
    r"Parser key ['\"]([\w.]+)['\"]: Expected a <class 'float'>. Got value: ([-+]?(?:inf(?:inity)?|nan))", re.IGNORECASE
)
_UNKNOWN_ARGUMENT = re.compile(
    r"(?:Parser key ['\"])?([\w.]+)['\"]?:.*Option ['\"](\w+)['\"] is not accepted", re.DOTALL
)


class OneLineErrors:
    """A parser whose errors are one line with the closest known name. It accepts no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError instead of printing the usage."""
        text = explain(ex if ex is not None else message)
        text = _REQUIRED.sub(lambda names: _as_typed(self, names.group()), text)
        text = _NO_NUMBER.sub(r"--\1 must be a finite number, got \2", text)
        deep = _UNKNOWN_ARGUMENT.search(text)
        if deep:
            hint = nearest(deep.group(2), _argument_names())
            raise UserError(f"{deep.group(1)}: there is no option {deep.group(2)!r}{hint}")
        known = list(_option_names(self))
        unknown = _UNKNOWN_NAME.search(text)
        hint = ""
        if unknown:
            word = unknown.group(1)
            names = set(known) if "." in word else {name.rsplit(".", 1)[-1] for name in known}
            in_sampler = "sampler" in known and word in _sampler_settings()
            hint = f"; type --sampler.{word}" if in_sampler else nearest(word, sorted(names))
        elif text.endswith("expected one argument"):
            hint = "; join a value that begins with '-' by '=', as in --keep=-2"
        raise UserError(text + hint)


def _option_names(parser: Any) -> Iterator[str]:
    """Yield the names of a parser's options and of its subcommands' options."""
    for action in parser._actions:
        yield from (name.lstrip("-") for name in action.option_strings)
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from _option_names(inner)


def _as_typed(parser: Any, names: str) -> str:
    """Write names of arguments, joined by commas, as a user types them: ``fit.out`` as ``--out``."""
    commands = {name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices}
    positional = {action.dest for action in parser._actions if not action.option_strings}
    typed = []
    for name in names.split(", "):
        command, _, rest = name.partition(".")
        own = rest if command in commands else name
        typed.append(own.upper() if own in positional else f"--{own}")
    return ", ".join(typed)


_OUTPUTS = ("out", "page", "key", "save_embeddings", "save_reference")
"""Flags of all commands that name an output file or folder."""


def refuse_addresses(values: Mapping[str, Any]) -> None:
    """Refuse an address such as ``s3://...`` as the output of a command that writes local files only.

    As a path it would be a local folder called ``s3:``.

    Raises:
        UserError: Naming the flag.
    """
    for name in _OUTPUTS:
        if "://" in str(values.get(name)):
            raise UserError(
                f"--{name} {values[name]}: results are written to local files only: give a local path and upload"
                " the result afterwards"
            )


def refuse_empty(parser: Any, values: Mapping[str, Any]) -> None:
    """Refuse an empty string as a flag's value. As a path it would be the current folder.

    Raises:
        UserError: Naming the flag.
    """
    if empty := next((name for name, value in values.items() if value in ("", [""])), None):
        raise UserError(
            f"{_as_typed(parser, empty)} is empty: give it a value (is it a variable of the shell that is not set?)"
        )


def _sampler_settings() -> set[str]:
    from vab.tokens.sampler import Sampler

    return set(Sampler.__dataclass_fields__)


def _argument_names() -> list[str]:
    """List the parameter names of tasks, backbone, sampler and masking, for hints."""
    from vab import tasks
    from vab.backbone import Backbone
    from vab.tokens.masking import Masking
    from vab.tokens.sampler import Sampler

    classes = [getattr(tasks, name) for name in tasks.__all__ if inspect.isclass(getattr(tasks, name))]
    known = (*classes, Backbone, Sampler, Masking)
    return sorted({name for kind in known for name in inspect.signature(kind).parameters})


def explain(problem: Exception | str) -> str:
    """Put an error message on one line; of a parser's message only the innermost reason."""
    lines = [line.strip(" -") for line in str(problem).strip().splitlines()]
    if any("Union subtypes" in line for line in lines):
        return _explain_union(lines)
    return " ".join(line for line in lines if line)


_AROUND_A_REASON = re.compile(
    r'^(Parser key "[^"]+": ?|Errors: ?|Expected a path but .*? either not accessible or invalid ?)+'
)
_NO_REASON = re.compile(
    r"$|Does not validate against any|Subtypes:|Given value|Expected a <class 'NoneType'>|Expected a dot import path"
)


def _explain_union(lines: list[str]) -> str:
    """Shorten an error about a value of several possible types: its key, what was expected, what was given.

    Lines that a parser repeats for each type, and those about None, are left out.
    """
    text = re.sub(r":\n+", ": ", "\n".join(lines))
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    unique = dict.fromkeys(_AROUND_A_REASON.sub("", line) for line in text.split("\n"))
    reasons = [line for line in unique if not _NO_REASON.match(line)]
    if len(reasons) == 1 and (inner := re.match(r"[\w.]+(?=: )", reasons[0])):  # of a nested parser
        keys.append(inner.group())
        reasons = [reasons[0][inner.end() + 2 :]]
    words = re.sub(r"<class '([^']+)'>", r"\1", "; or ".join(reasons))
    words = re.sub(r"Expected an? (?:typing\.)?Literal\[([^\]]+)\]", r"Expected one of \1", words)
    given = re.search(r"^Given value: (?!NestedArg)(.+)", text, re.MULTILINE)
    got = f", got {given.group(1)}" if given and given.group(1) not in words else ""
    return f"{'.'.join(keys)}: {words or 'the value fits none of the expected types'}{got}"


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """Find the first error of these kinds in a chain of causes; None if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__ or found.__context__
    return found
