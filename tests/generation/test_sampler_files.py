"""Sampler settings from files and flags."""

import pytest

from vab.generation.sampler_files import changed_sampler
from vab.spec import UserError
from vab.tokens.sampler import Sampler

BASE = Sampler(decode_steps=7, temperature=0.8)


def test_no_changes_leave_the_checkpoints_own():
    assert changed_sampler(BASE, None, "--sampler") == BASE


def test_a_file_changes_what_it_names_and_flags_come_after_it(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text("decode_steps: [16, 1, 1, 1]\ntemperature: 9e-1\ntop_k: null\n")
    by_file = Sampler(decode_steps=[16, 1, 1, 1], temperature=0.9, top_k=None)
    assert changed_sampler(BASE, str(path), "--sampler") == by_file
    both = changed_sampler(BASE, {"file": str(path), "decode_steps": 3}, "--sampler")
    assert both == Sampler(decode_steps=3, temperature=0.9, top_k=None)
    assert changed_sampler(BASE, {"order": "halton"}, "--sampler") == Sampler(7, 0.8, order="halton")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode_step: 3\n", "unknown key 'decode_step'; did you mean 'decode_steps'?"),
        ("order: sideways\n", "order must be one of confidence"),
        ("temperature: hot\n", "temperature must be a number, got 'hot'"),
        ("- 3\n- 4\n", "must hold lines such as 'decode_steps: 8'"),
        ("just words\n", "unknown key 'just words'; there are decode_steps, "),
        ("", "must hold lines such as 'decode_steps: 8'"),
        ("a: [1\n", "is not YAML"),
        ("order: ${b}\n", "got '${b}'"),  # others may have written it: nothing is looked up
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as problem:
        changed_sampler(BASE, str(path), "--sampler")
    assert words in str(problem.value)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        changed_sampler(BASE, str(tmp_path / "none.yaml"), "--sampler")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"binary\.yaml is not YAML"):
        changed_sampler(BASE, str(tmp_path / "binary.yaml"), "--sampler")
