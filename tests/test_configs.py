"""Every shipped YAML against the code."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name in ("configs", "demo")]
FOLDERS = ["trainer", "data", "task", "backbone"]


def keys(value, prefix=""):
    """Every dotted key of a YAML, but not those inside lists, or of the strategy, which is named or described."""
    if not isinstance(value, dict) or prefix == "strategy.":
        return set()
    return {prefix + key for key in value} | {
        name for key, inner in value.items() for name in keys(inner, f"{prefix}{key}.")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_holds_paths_only(path):
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) == {"seed_everything", "trainer", "data", "model"}
    for part in ("trainer", "data", "model"):
        assert (path.parent / recipe[part]).is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_parts_of_a_folder_set_the_same_keys(folder):
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    found = {path.name: keys(yaml.safe_load(path.read_text())) for path in files}
    assert len(files) > 1
    assert all(names == found[files[0].name] for names in found.values()), found


def test_no_part_interpolates_but_from_the_environment():
    for path in CONFIGS.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            assert "${" not in line.replace("${oc.env:", ""), f"{path}: {line}"


def test_the_repository_names_every_recipe():
    described = (CONFIGS / "README.md").read_text()
    for path in RECIPES:
        assert str(path.relative_to(CONFIGS)) in described
