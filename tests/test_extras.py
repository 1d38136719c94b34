"""Every place where an optional package can be missing names a line that installs it, before weights are looked for."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vab import extras
from vab.data.extract.engines import RayEngine, Recipe
from vab.data.shards.arrays import Arrays
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.frozen.vision import load_vision
from vab.spec import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLACES = [
    ("encodec", "encodec", lambda: load_codec("encodec_24khz:6")),
    ("encodec", "encodec", lambda: load_codec("audiogen_16khz")),
    ("dac", "transformers", lambda: load_codec("dac_16khz")),
    ("clip", "open_clip", lambda: load_vision("EVA02-L-14-336/merged2b_s6b_b61k")),
    ("clip", "open_clip", lambda: load_vision("hf-hub:timm/ViT-B-16-SigLIP2")),
    ("fad", "frechet_audio_distance", lambda: load_judge("panns_16k")),
    ("fad", "frechet_audio_distance", lambda: load_judge("panns_32k")),
    ("passt", "hear21passt", lambda: load_judge("passt")),
    ("dac", "transformers", lambda: load_judge("clap")),
    ("hdf5", "h5py", lambda: Arrays(Path("a.h5"), "codes")),
    ("ray", "ray", lambda: RayEngine(Recipe("tiny", "tiny", None, None, {}), "cpu")),
]


def block(module, monkeypatch):
    for name in (module, *(name for name in sys.modules if name.startswith(f"{module}."))):
        monkeypatch.setitem(sys.modules, name, None)


def packages(line):
    """What a line installs: specifiers by name."""
    assert line.count("install ") == 1
    found = [Requirement(word) for word in shlex.split(line.partition("install ")[2]) if not word.startswith("-")]
    return {canonicalize_name(one.name): str(one.specifier) for one in found}


@pytest.mark.parametrize(("extra", "module", "load"), PLACES)
def test_a_missing_package_is_named_before_weights_are_looked_for(extra, module, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a.h5").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    block(module, monkeypatch)
    with pytest.raises(UserError, match=r"^[^;]* needs? a package \(.+\): ") as caught:
        load()
    assert extras.install_hint(extra) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_extra_and_every_message_has_a_place_here():
    named = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"install_hint\(['\"](\w+)", path.read_text())
    }
    assert named == {extra for extra, *_ in PLACES} == PROJECT["optional-dependencies"].keys() - {"all", "bench", "dev"}


@pytest.mark.parametrize("extra", sorted({extra for extra, *_ in PLACES}))
def test_the_line_installs_what_the_metadata_says_and_leaves_torch_alone(extra):
    wanted = [Requirement(text) for text in metadata.requires("vab") if text.endswith(f"; extra == '{extra}'")]
    found = packages(extras.install_hint(extra))
    kept = found.pop("torch", None)
    assert found == {canonicalize_name(one.name): str(one.specifier) for one in wanted}
    assert (kept is None) == (extra in ("hdf5", "ray"))
    assert kept is None or Requirement(f"torch{kept}").specifier.contains(metadata.version("torch"), prereleases=True)


def test_the_line_installs_into_the_python_that_runs(monkeypatch):
    pytest.importorskip("h5py")
    pytest.importorskip("pip")  # an environment of uv has none
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no environment is activated
    line = extras.install_hint("hdf5")
    # From elsewhere, as pip prints places below the current folder as relative ones.
    done = subprocess.run(f"{line} --no-index", shell=True, capture_output=True, text=True, check=True, cwd="/")
    wanted = next(one for one in map(Requirement, metadata.requires("vab")) if one.name == "h5py")
    place = Path(metadata.distribution("h5py").locate_file(""))
    assert f"already satisfied: h5py{wanted.specifier} in {place}" in done.stdout


def test_the_line_is_that_of_the_environment(monkeypatch, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    for name in ("python", "pip"):
        (python.parent / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert extras.pip_install("a>=1", "b") == f"{python} -m pip install 'a>=1' b"
    monkeypatch.setenv("PATH", str(python.parent))
    assert extras.pip_install("a>=1", "b") == "pip install 'a>=1' b"
    monkeypatch.setenv("PATH", "/nowhere")
    block("pip", monkeypatch)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pip")
    assert extras.pip_install("a>=1", "b") == f"uv pip install --python {python} 'a>=1' b"


def test_a_checkout_that_is_not_installed_installs_itself(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert extras.install_hint("clip").endswith(f"install --editable '{ROOT}[clip]'")


def test_no_line_anywhere_asks_an_index_for_vab():
    """Nobody has published it there: whoever did would be run by all who type the line."""
    folders = [ROOT / name for name in ("src", "tests", "bench", "configs", "notebooks", ".ci")]
    paths = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    ]
    paths += [*ROOT.glob("*.md"), ROOT / "data" / "README.md", ROOT / "Makefile"]
    asks = re.compile(r"(?:pip|uv) (?:install|add)(?: (?:-U|--[\w-]+))* ['\"]?vab\b(?!/)")
    assert asks.search("pip install 'va" + "b[clip]'")
    found = {path: asks.findall(path.read_text(errors="replace")) for path in paths if "__pycache__" not in path.parts}
    assert not {str(path): lines for path, lines in found.items() if lines}
    literal = [
        path.name for path in (ROOT / "src").rglob("*.py") if re.search(r"\bpip install \W?\w", path.read_text())
    ]
    assert literal in ([], ["extras.py"])
