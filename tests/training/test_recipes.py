"""A file of a recipe that changes another, its base."""

import pytest
import yaml

from vab.cli import main
from vab.spec import UserError
from vab.training.recipes import load


@pytest.fixture
def write(tmp_path):
    """Writes files of the folder; returns the last one as it is read."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text)
        return load(path.read_text(), path.parent)

    return write


def test_mappings_are_merged_and_all_else_is_replaced(write):
    first = "a: {b: 1, c: {d: 2, e: 3}}\nlist: [{x: 1}, 2]\nkept: ${oc.env:NOWHERE,data}/here\nnothing: null\n"
    assert write(first=first, second="base: first.yaml\na: {c: {d: 4}}\nlist: [{y: 1}]\nnothing: {f: 5}\n") == {
        "a": {"b": 1, "c": {"d": 4, "e": 3}},
        "list": [{"y": 1}],
        "kept": "data/here",
        "nothing": {"f": 5},
    }


def test_arguments_are_kept_for_the_same_class_only(write):
    first = "one: {class_path: A, init_args: {x: 1}}\ntwo: {class_path: A, init_args: {x: 1}}\n"
    second = "base: first.yaml\none: {class_path: B}\ntwo: {class_path: A, init_args: {y: 2}}\n"
    assert write(first=first, second=second) == {
        "one": {"class_path": "B"},
        "two": {"class_path": "A", "init_args": {"x": 1, "y": 2}},
    }
    assert write(third="base: second.yaml\none: auto\n")["one"] == "auto"


def test_a_base_of_that_name_alone_is_a_file(write):
    assert write(weights="train: {base: 3}\n") == {"train": {"base": 3}}
    assert load("{base: 3}") == {"base": 3}


@pytest.mark.parametrize(("text", "complaint"), [("nowhere", "there is no file .*nowhere"), ("one", "its own base")])
def test_a_base_that_cannot_be_read_is_named(write, text, complaint):
    with pytest.raises(UserError, match=f"base: {text}.yaml: .*{complaint}"):
        write(one="base: two.yaml\n", two=f"base: {text}.yaml\n")


def test_a_part_of_ones_own_changes_a_shipped_one_from_any_folder(tmp_path, capsys, monkeypatch, request):
    """The base names its network relative to its own folder."""
    configs = request.config.rootpath / "configs"
    task = tmp_path / "mine.yaml"
    task.write_text(f"base: {configs}/task/pretrain_demo.yaml\ninit_args: {{warmup_steps: 7}}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(configs / "demo/pretrain.yaml"), "--model", "mine.yaml", "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (model["warmup_steps"], model["optimizer"]["init_args"]["lr"]) == (7, 2e-3)
    assert model["backbone"]["init_args"]["dim"] == 128


def test_a_mistake_is_one_line(tmp_path, capsys, request):
    (tmp_path / "data.yaml").write_text("base: demo.yaml\n")
    recipe = request.config.rootpath / "configs/demo/pretrain.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(recipe), "--data", str(tmp_path / "data.yaml")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: base: demo.yaml: there is no file {tmp_path}/demo.yaml\n"
