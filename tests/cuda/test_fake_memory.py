"""The memory of every recipe for GPUs, against the cards that its data and the tweaks name."""

import pytest
import torch

from flags import ROOT
from vab.planning.fake_cuda import TORCH
from vab.planning.plan import plan_run
from vab.planning.segments import PAPER
from vab.training.cli import settings_of_fit

pytestmark = pytest.mark.skipif(torch.__version__ < TORCH, reason=f"fake CUDA needs torch {TORCH}")

CARDS = {80: [], 40: ["--config", "configs/tweak/gpu_40gb.yaml"], 24: ["--config", "configs/tweak/gpu_24gb.yaml"]}
RECIPES = {
    "pretrain": {},
    "align": {},
    "dac/coarse": {"codec": "dac_16khz"},
    "dac/fine": {"codec": "dac_16khz"},
    "classify/vggsound": {},
    "classify/audioset_2m": {},
    "classify/audioset_20k": {},
    "classify/esc50": {"segment_seconds": 5.0},
    "classify/speech_commands": {"segment_seconds": 1.0},
}
TWEAKED = ("pretrain", "align", "classify/vggsound")  # on smaller cards; the others' batches are as large as theirs
QUICK = {("pretrain", 80), ("classify/vggsound", 24)}


def cases():
    for recipe in RECIPES:
        for card in CARDS if recipe in TWEAKED else (80,):
            marks = [] if (recipe, card) in QUICK else [pytest.mark.slow]
            yield pytest.param(recipe, card, marks=marks, id=f"{recipe} on {card} GB")


@pytest.mark.parametrize(("recipe", "card"), cases())
def test_whole_ragged_and_logged_steps_validation_and_generation_fit_the_card(recipe, card, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = settings_of_fit(["--config", f"configs/{recipe}.yaml", *CARDS[card]])
    gpus = 1 if settings["trainer"]["devices"] == 1 else 8
    found = plan_run(settings, gpus, card, extraction=PAPER | RECIPES[recipe], compare=False)
    memory = found.numbers["memory"]
    assert sum(name.startswith("peak: ") for name in memory) >= 3
    assert found.fits, {name: round(size / 2**30, 1) for name, size in memory.items()}
