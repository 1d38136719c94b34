"""Addresses where only files of this machine can be: refused in one line, with no folder called ``s3:``."""

import importlib
import inspect

import fsspec
import pytest

from vab.cli import COMMANDS, main
from vab.data.inputs.listing import find_sources
from vab.spec import UserError

TO_STORES = ("extract", "shards merge")  # commands that write data sets to addresses, too
WRITTEN = ("out", "page", "save_embeddings", "save_reference")


def functions():
    """All commands of ours: what is typed, and the function."""
    for name, (_, place) in COMMANDS.items():
        for words, where in (
            [(f"{name} {inner}", one) for inner, one in place.items()] if isinstance(place, dict) else [(name, place)]
        ):
            module, _, function = where.partition(":")
            yield words, getattr(importlib.import_module(module), function)


CASES = [
    (words, flag, [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty])
    for words, function in functions()
    for flag in WRITTEN
    if flag in inspect.signature(function).parameters
]


@pytest.mark.parametrize(("words", "flag", "needed"), CASES, ids=[f"{words} {flag}" for words, flag, _ in CASES])
def test_an_address_to_write_to_is_refused(words, flag, needed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    others = [word for name in needed if name != flag for word in (f"--{name}", "1")]
    address = "https://host/train" if words in TO_STORES else "s3://bucket/train"
    refused = (
        f"error: {address}: a data set is written to a folder of this machine or to an object store (s3://, "
        if words in TO_STORES
        else f"error: --{flag} {address}: results are written to local files only: give a"
    )
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), *others, f"--{flag}", address])
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(refused)
    assert len(complaint.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_commands_that_write_are_among_them():
    assert {"extract", "generate", "export", "evaluate", "shards import", "datasets vggsound", "retrieve", "sweep"} <= {
        words for words, _, _ in CASES
    }


def test_media_at_an_address_are_refused():
    fsspec.filesystem("memory").pipe_file("/bucket/videos/a.mp4", b"")
    (source,) = find_sources("memory://bucket/videos")
    with pytest.raises(UserError, match=r"^a\.mp4 of memory://bucket/videos is not on this machine: copy"):
        _ = source.path
