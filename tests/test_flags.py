"""What is typed is what functions take, and every command has a test that flips its flags."""

import importlib
import inspect
import re

import pytest

from flags import is_test
from vab.cli import COMMANDS, main

FLIPPED = {
    "extract": "tests/commands/test_shards_flags.py::test_extract",
    "shards import": "tests/commands/test_shards_flags.py::test_import",
    "shards verify": "tests/commands/test_shards_flags.py::test_verify_and_info_are_of_the_folder_that_is_named",
    "shards index": "tests/commands/test_shards_flags.py::test_index_takes_the_folder_and_the_spec_that_are_named",
    "shards merge": "tests/commands/test_shards_flags.py::test_merge_joins_the_folders_that_are_named",
    "shards info": "tests/commands/test_shards_flags.py::test_verify_and_info_are_of_the_folder_that_is_named",
    "export": "tests/commands/test_other_flags.py::test_export",
    "generate": "tests/commands/test_generate_flags.py::test_generate",
    "retrieve": "tests/commands/test_search_flags.py::test_retrieve",
    "classify": "tests/commands/test_search_flags.py::test_classify",
    "sweep": "tests/commands/test_sweep_flags.py::test_sweep",
    "evaluate": "tests/commands/test_evaluate_flags.py::test_evaluate",
    "compare": "tests/commands/test_evaluate_flags.py::test_compare",
    "listen": "tests/commands/test_other_flags.py::test_listen",
    "datasets vggsound": "tests/commands/test_other_flags.py::test_datasets_vggsound",
    "datasets audioset": "tests/commands/test_other_flags.py::test_datasets_audioset",
    "datasets esc50": "tests/commands/test_other_flags.py::test_datasets_esc50",
    "datasets speech_commands": "tests/commands/test_other_flags.py::test_datasets_speech_commands",
    "datasets msrvtt": "tests/commands/test_other_flags.py::test_datasets_msrvtt",
    "weights list": "tests/commands/test_weights_command.py::test_the_list_shows_places_and_what_to_type",
    "weights fetch": "tests/commands/test_other_flags.py::test_weights_fetch",
    "weights verify": "tests/commands/test_other_flags.py::test_weights_verify",
    "doctor": "tests/commands/test_other_flags.py::test_doctor",
    "demo world": "tests/demo/test_demo_flags.py::test_demo_world",
    "demo score": "tests/demo/test_demo_flags.py::test_demo_score",
    "demo report": "tests/demo/test_report.py::test_demo_report",
}
"""Command -> the test of its flags."""


def places():
    """Command as typed -> where its function is."""
    for name, (_, place) in COMMANDS.items():
        if isinstance(place, dict):
            yield from ((f"{name} {part}", inner) for part, inner in place.items())
        else:
            yield name, place


@pytest.mark.parametrize(("command", "place"), list(places()))
def test_the_flags_of_a_command_are_those_of_its_function(command, place, capsys):
    module, _, name = place.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    flags = re.findall(r"^  (?:-\w, )?--([\w.]+)", text, re.MULTILINE)
    own = {flag.partition(".")[0] for flag in flags if flag not in ("help", "config", "print_config")}
    assert own == set(parameters)


def test_every_command_has_a_test_that_flips_its_flags(request):
    assert set(FLIPPED) == {command for command, _ in places()}
    assert [test for test in FLIPPED.values() if not is_test(request.session, test)] == []
