"""Grid files: what they mean, and what is said about mistakes."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from vab.generation.sampler_files import Setting, read_grid
from vab.spec import UserError
from vab.tokens.sampler import Sampler

SWEEPS = Path(__file__).parents[2] / "configs" / "sweep"
BASE = Sampler(decode_steps=12, temperature=0.9)


@pytest.fixture
def grid(tmp_path):
    def read(text, levels=4):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_grid(path, BASE, levels)

    return read


def test_a_table_means_every_combination(grid):
    got = grid("decode_steps: [4, [3, 1]]\ntop_p: [0.5, 0.9]\norder: [halton]\n")
    assert [(setting.sampler.decode_steps, setting.sampler.top_p) for setting in got] == [
        (4, 0.5), (4, 0.9), ([3, 1], 0.5), ([3, 1], 0.9)
    ]  # fmt: skip
    assert {setting.sampler.order for setting in got} == {"halton"}
    assert {setting.sampler.temperature for setting in got} == {0.9}  # the base's
    assert {setting.name for setting in got} == {""}


def test_tables_are_united_and_equal_settings_kept_once_under_their_first_name(grid):
    got = grid(
        "- {name: one, decode_steps: [4, 8], temperature: 1}\n- {name: two, temperature: [1.0, 2.0], decode_steps: 4}\n"
    )
    assert [(setting.name, setting.sampler.decode_steps, setting.sampler.temperature) for setting in got] == [
        ("one", 4, 1), ("one", 8, 1), ("two", 4, 2)
    ]  # fmt: skip


def test_a_value_alone_is_a_list_of_one(grid):
    (setting,) = grid("decode_steps: 4\ntop_k: null\n")
    assert setting == Setting("", replace(BASE, decode_steps=4, top_k=None))


def test_a_pool_is_another_setting_than_a_list_and_a_number_is_the_same_however_it_is_written(grid):
    assert len(grid("decode_steps: [4, [4]]\n")) == 2
    assert len(grid("temperature: [1, 1.0, 1e0]\n")) == 1
    assert len(grid("top_k: [null, 256]\n")) == 2


def test_an_entry_without_changes_is_the_checkpoints_own_sampler(grid):
    assert [setting.sampler for setting in grid("- {}\n- {order: [halton]}")] == [BASE, replace(BASE, order="halton")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode_stepz: [4]", "did you mean 'decode_steps'?"),
        ("- {order: [haltom]}", "entry 1: order must be one of confidence"),
        ("- {decode_steps: 4}\n- {temperature: [hot]}", "entry 2: temperature must be a number, got 'hot'"),
        ("temperature: []", "temperature has no values"),
        ("decode_steps: [[1, 1, 1, 1, 1]]", "decode_steps lists 5 levels, but the codes have 4"),
        ("- {name: [1], decode_steps: 4}", "name must be a word"),
        ("- 4", "entry 1: must hold lines"),
        ("just words", "unknown key 'just words'"),
        ("", "must hold lines"),
        ("[]", "the grid is empty"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_names_the_file(grid, tmp_path, text, words):
    with pytest.raises(UserError) as complaint:
        grid(text)
    assert str(tmp_path / "grid.yaml") in str(complaint.value)
    assert words in str(complaint.value)
    assert "\n" not in str(complaint.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read: No such file"):
        read_grid(tmp_path / "nowhere.yaml", BASE, 4)


@pytest.mark.parametrize(("name", "least", "most"), [("quick", 6, 6), ("demo", 50, 70)])
def test_the_shipped_grids_are_read(name, least, most):
    settings = read_grid(SWEEPS / f"{name}.yaml", BASE, 4)
    assert least <= len(settings) <= most
    assert len({str(setting.sampler) for setting in settings}) == len(settings)
    table = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())
    assert {setting.name for setting in settings} == {entry["name"] for entry in table}


def test_the_demo_grid_compares_at_the_same_numbers_of_passes():
    settings = read_grid(SWEEPS / "demo.yaml", BASE, 4)
    assert {setting.sampler.total_steps for setting in settings} == {4, 8, 16, 32}
    tried = {(setting.sampler.order, setting.sampler.total_steps) for setting in settings}
    assert {(order, 16) for order in ("confidence", "random", "van_der_corput", "halton")} <= tried
    assert {asdict(setting.sampler)["remask"] for setting in settings} == {"none", "cap", "rescale", "loop"}
    assert {setting.sampler.guidance for setting in settings} == {"constant", "ramp", "anneal"}
