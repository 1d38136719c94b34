"""A full disk: one clear line, and nothing half-written."""

import numpy as np
import pytest
import torch

from tone_shards import short_spec, write_shards
from vab.callbacks import AtomicCheckpoints
from vab.data.media.write import write_wav
from vab.data.shards.format import is_complete
from vab.spec import UserError


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    saver = AtomicCheckpoints()
    saver.save_checkpoint({"step": 1}, small_disk / "last.ckpt")
    with pytest.raises(UserError, match="no space left"):
        saver.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, small_disk / "last.ckpt")
    assert files(small_disk) == ["last.ckpt"]
    assert torch.load(small_disk / "last.ckpt", weights_only=True) == {"step": 1}


def test_a_wav_that_does_not_fit_is_not_there(small_disk):
    with pytest.raises(UserError, match="no space left"):
        write_wav(small_disk / "out.wav", np.zeros(200_000, dtype=np.float32), 16_000)
    assert files(small_disk) == []


def test_shards_that_do_not_fit_are_no_data_set(small_disk):
    with pytest.raises(UserError, match="no space left"):
        write_shards(small_disk / "set", short_spec(), 48)
    assert not is_complete(small_disk / "set")
    assert not [name for name in files(small_disk) if name.endswith(".tar")]
