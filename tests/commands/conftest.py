from dataclasses import replace

import pytest

from small_media import save_model
from tone_shards import short_spec
from vab.commands.generation import Generator
from vab.frozen.codec import load_codec


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained model of segments of 0.64 s."""
    return save_model(tmp_path_factory.mktemp("model") / "last.ckpt", short_spec(), load_codec("tiny").codebooks())


@pytest.fixture(scope="session")
def two_stages(tmp_path_factory):
    """Untrained models of the first two levels, and of the last two for given first ones."""
    folder, spec, codebooks = tmp_path_factory.mktemp("stages"), short_spec(), load_codec("tiny").codebooks()
    coarse = save_model(folder / "coarse.ckpt", replace(spec, num_codebooks=2), codebooks[:2])
    return coarse, save_model(folder / "fine.ckpt", spec, codebooks, conditioning_levels=2)


@pytest.fixture(scope="session")
def generator(checkpoint):
    return Generator.load(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def two_stage_generator(two_stages):
    coarse, fine = two_stages
    return Generator.load(coarse, device="cpu", fine_checkpoint=fine)
