"""What pyproject.toml, constraints.txt, the Makefile and README say of packages and of Python agrees."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
PYTHONS = [f"3.{minor}" for minor in range(30) if SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")]


def of_extra(name):
    """The requirements of an extra, those of the extras that it includes among them."""
    for requirement in EXTRAS[name]:
        if requirement.name == "vab":
            for other in requirement.extras:
                yield from of_extra(other)
        else:
            yield requirement


def test_all_includes_every_extra_of_a_user():
    assert {extra for one in EXTRAS["all"] for extra in one.extras} == EXTRAS.keys() - {"all", "bench", "dev"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_to_a_version_that_fits(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    every = [Requirement(line) for line in lines if not line.startswith("#")]
    environment = {"python_version": python, "extra": ""}
    here = [pin for pin in every if pin.marker is None or pin.marker.evaluate(environment)]
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here}
    assert len(pins) == len(here)
    direct = [Requirement(text) for text in PROJECT["dependencies"]]
    wanted = [*direct, *(one for extra in EXTRAS for one in of_extra(extra))]
    assert len(wanted) > 30
    unfit = [str(one) for one in wanted if pins.get(canonicalize_name(one.name), "none") not in one.specifier]
    assert unfit == []


def test_tests_import_at_once_only_what_make_setup_installs():
    """What only an extra installs is imported by `pytest.importorskip`, so that tests pass without it."""
    installed, open_ends = set(), [*map(Requirement, PROJECT["dependencies"]), *of_extra("dev")]
    while open_ends:
        one = open_ends.pop()
        name = canonicalize_name(one.name)
        if (name, *sorted(one.extras)) in installed:
            continue
        installed.add((name, *sorted(one.extras)))
        for inner in map(Requirement, metadata.requires(name) or ()):
            extras = one.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                open_ends.append(inner)
    names = {name for name, *_ in installed}
    owners = metadata.packages_distributions()
    own = {path.stem for path in (ROOT / "tests").rglob("*")} | {"vab", "tests", "bench", "tools"}
    faults = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in (module.partition(".")[0] for module in modules):
                if top in own or top in sys.stdlib_module_names:
                    continue
                if not names & {canonicalize_name(owner) for owner in owners.get(top, [])}:
                    faults[path.name] = top
    assert faults == {}


def test_the_makefile_and_readme_name_the_same_versions_of_python():
    first, last = PYTHONS[0], PYTHONS[-1]
    makefile = (ROOT / "Makefile").read_text()
    low, high = re.search(r"not \((\d+, \d+)\) <= sys.version_info < \((\d+, \d+)\)", makefile).groups()
    assert SpecifierSet(f">={low.replace(', ', '.')},<{high.replace(', ', '.')}") == SpecifierSet(
        PROJECT["requires-python"]
    )
    assert f"Python {first} to {last} is needed" in makefile
    assert f"needs Python {first} to {last}" in (ROOT / "README.md").read_text()


def test_python_m_vab_is_vab():
    done = subprocess.run([sys.executable, "-m", "vab", "--help"], capture_output=True, text=True, check=True)
    vab = subprocess.run([Path(sys.executable).with_name("vab"), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == vab.stdout


def test_its_types_are_for_those_who_import_it():
    assert resources.files("vab").joinpath("py.typed").is_file()
