"""A batch in one piece of memory is the batch, in this process, from a worker, and by any way of starting it."""

import numpy as np
import pytest
import torch

from same_batches import same
from tone_shards import short_spec, write_shards
from vab.data.reading.dataset import ShardDataset, sources_of
from vab.data.reading.loader import Loader
from vab.data.reading.order import train_batches
from vab.data.shards.format import make_key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ShardDataset(
        write_shards(tmp_path_factory.mktemp("packed") / "s", short_spec(), 24, ragged=True, per_source=3)
    )


def test_it_holds_what_is_stored_and_widening_gives_what_is_read(data):
    numbers = [5, 0, 17, 17, 23]
    packed = data.gather(numbers)
    narrow, wide = packed.unpack(), data.read(numbers)
    assert (narrow.codes.dtype, narrow.features.dtype) == (torch.uint16, torch.float16)
    assert (wide.codes.dtype, wide.features.dtype) == (torch.int64, torch.float32)
    same(narrow.widened(), wide)
    assert all(
        part.untyped_storage().data_ptr() == packed.buffer.untyped_storage().data_ptr()
        for part in (narrow.codes, narrow.features, narrow.labels, narrow.source)
    )


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_worker_hands_on_what_this_process_would_read(data, way):
    loader = Loader(data, 2, pin_memory=False)
    loader.shares = lambda: train_batches(np.arange(24)[::-1].copy(), 5, 1, 0)
    loader._settings["multiprocessing_context"] = way
    batches = list(loader.batches())
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        assert batch.codes.is_shared()
        same(batch.widened(), data.read(np.arange(24)[::-1][step * 5 : step * 5 + 5]))


@pytest.mark.slow
def test_batches_stay_what_they_are_while_others_come(data):
    loader = Loader(data, 1, pin_memory=False)
    loader.shares = lambda: train_batches(np.arange(24), 4, 1, 0)
    kept = list(loader.batches())
    for step, batch in enumerate(kept):
        assert batch.index.tolist() == list(range(4 * step, 4 * step + 4))


def test_a_recording_has_one_number_whatever_the_length_of_the_keys():
    names = [f"clip{number}" for number in range(2000)] + ["a", "ab", "a_b", "x" * 70, "x" * 71, "_", "00000000"]
    keys = np.array(
        [make_key(name, start).encode() for name in names for start in (0.0, 3.5)] + [b"bare", b"bare_0000"]
    )
    numbers = sources_of(keys)
    pairs = numbers[: 2 * len(names)].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert len(np.unique(numbers)) == len(names) + 2  # a start has eight digits
    assert np.array_equal(sources_of(keys.astype("S90")), numbers)
