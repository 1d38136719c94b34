"""All published weights by name: none is forgotten, and each is found where it is put."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vab.frozen.vision import clip_files
from vab.frozen.weight_files.catalogue import CODECS, JUDGES, VISION, all_weights, published_as
from vab.spec import UserError

RECIPES = Path(__file__).parents[3] / "configs" / "extract"
PUBLISHED = [weights.published for weights in all_weights() if weights.published]


def test_every_name_of_the_loaders_is_there_once():
    names = [name for weights in all_weights() for name in weights.names]
    assert sorted(names) == sorted([*CODECS, *VISION, *JUDGES])
    assert len({published.name for published in PUBLISHED}) == len(PUBLISHED)


def test_the_vision_encoders_are_those_of_the_recipes():
    named = {yaml.safe_load(path.read_text())["vision"] for path in RECIPES.glob("*.yaml")}
    assert named == set(VISION)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_what_lies_where_it_is_fetched_to_is_found(published, tmp_path, monkeypatch):
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert published.files_in(tmp_path) == []
    place = tmp_path / published.names[0]
    paths = [place / name for name in published.files] if len(published.files) > 1 else [place]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert published.files_in(tmp_path) == paths
    assert published.local() == place
    assert published_as(published.name) is published


WITHOUT_TORCH = """
import os, sys
from vab.frozen.weight_files.catalogue import all_weights
from vab.frozen.weight_files.hashes import check
from vab.frozen.weight_files.published import folders

def searched():
    os.environ.update(HOME="/home/me", VAB_WEIGHTS="/w")
    for variables in ({}, {"XDG_CACHE_HOME": "~/x"}, {"XDG_CACHE_HOME": "~/x", "TORCH_HOME": "/a/~b"}):
        for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
            os.environ.pop(name, None)
        os.environ.update(variables)
        yield [str(path) for path in folders()]

assert not any(weights.published.local() for weights in all_weights() if weights.published)
before = list(searched())
assert "torch" not in sys.modules, "torch was imported"
import torch.hub
assert list(searched()) == before
print(*(paths[-1] for paths in before))
"""


def test_weights_are_listed_and_searched_without_torch_in_the_same_folders(tmp_path):
    environment = os.environ | dict.fromkeys(("HOME", "HF_HOME", "TORCH_HOME", "VAB_WEIGHTS"), str(tmp_path))
    command = [sys.executable, "-c", WITHOUT_TORCH]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["/home/me/.cache/torch/hub", "/home/me/x/torch/hub", "/a/~b/hub"]


def test_names_of_loaders_lead_to_the_file():
    assert published_as("encodec_24khz:6").name == "encodec_24khz"
    assert published_as("vggish_relu").name == "vggish"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("panns_16", r"no weights are called 'panns_16'; did you mean 'panns_16k'\?; there are audiogen_16khz, "),
        ("tiny8", "tiny8 ships with vab"),
        ("timm/ViT-B-16-SigLIP2", "hf download OWNER/NAME --local-dir FOLDER/NAME"),
    ],
)
def test_other_names_are_one_line(name, words):
    with pytest.raises(UserError, match=words):
        published_as(name)


@pytest.mark.parametrize("name", VISION[1:])
def test_the_address_of_a_vision_encoder_is_open_clips(name, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    wanted = clip_files.parse(name)
    facts = open_clip.get_pretrained_cfg(wanted.model, wanted.tag)
    assert facts["hf_hub"].strip("/") == published_as(name).repository
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    for place in reversed(published_as(name).names):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert clip_files.file_of_tag(wanted, facts, open_clip) == tmp_path / place


def test_the_address_of_passt_is_its_packages():
    passt = pytest.importorskip("hear21passt.models.passt")
    assert published_as("passt").url == passt.default_cfgs["passt_s_swa_p16_128_ap476"]["url"]
