"""Reading some levels of the records; the rest of reading is tested with writing, in test_shards.py."""

import pickle

import pytest
import torch

from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError


@pytest.fixture(scope="module")
def ten(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("levels") / "ten", 10)


@pytest.mark.parametrize("check_crc", [False, True])
@pytest.mark.parametrize("levels", [1, 2, None])
def test_the_first_levels_are_those_of_the_whole_record(ten, codebooks, levels, check_crc):
    whole = ShardDataset(ten)
    dataset = ShardDataset(ten, check_crc, levels)
    count = levels or 2
    batch, expected = dataset.read([9, 0, 3]), whole.read([9, 0, 3])
    assert torch.equal(batch.codes, expected.codes[:, :count])
    assert batch.codes.is_contiguous()
    assert torch.equal(batch.features, expected.features)
    assert torch.equal(batch.steps, expected.steps)
    assert dataset.spec.num_codebooks == count
    assert dataset.spec.differences(whole.spec) == ([f"num_codebooks: {count} != 2"] if count != 2 else [])
    assert torch.equal(dataset.codebooks, codebooks[:count])
    assert (dataset.manifest, dataset.manifest_hash) == (whole.manifest, whole.manifest_hash)


def test_a_choice_of_records_is_a_data_set_of_its_own(ten):
    names = []
    for chosen in ([0, 1], [0, 1], [0, 2], [1, 0]):
        dataset = ShardDataset(ten)
        dataset.choose(chosen)
        names.append(dataset.manifest_hash)
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_workers_get_the_levels_too(ten):
    dataset = ShardDataset(ten, levels=1)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).read([4]).codes, dataset.read([4]).codes)


@pytest.mark.parametrize("levels", [0, -1, 3])
def test_levels_that_are_not_there_are_refused(ten, levels):
    with pytest.raises(UserError, match=rf"levels must be 1 to 2, the codebooks of .*ten; got {levels}"):
        ShardDataset(ten, levels=levels)


def test_a_flipped_bit_in_a_level_that_is_not_read_is_found(tmp_path, make_shards):
    folder = make_shards(tmp_path / "flipped", 3)
    row = ShardDataset(folder).index_row(1)
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[row["codes_offset"] + row["codes_size"] - 1] ^= 1
    path.write_bytes(content)
    dataset = ShardDataset(folder, check_crc=True, levels=1)
    dataset.read([0, 2])
    with pytest.raises(UserError, match=r"codes of record .* is not what was written"):
        dataset.read([1])
