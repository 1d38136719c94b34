"""Reading from tars that are cut off or vanish during a run, from more tars than may be open, without ``preadv``."""

import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from same_batches import same
from small_runs import SmallTask, run
from vab.data.reading import tars
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.tars import read_from
from vab.spec import UserError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_is_cut_off_under_a_run_is_one_line(tmp_path, make_shards, num_workers):
    folder, val = make_shards(tmp_path / "train", 14), make_shards(tmp_path / "val", 4)

    class Truncating(SmallTask):
        def before_step(self, number):
            for tar in folder.glob("*.tar"):
                os.truncate(tar, 100)

    with pytest.raises(UserError) as raised:
        run((str(folder), str(val)), num_workers=num_workers, make_task=Truncating)
    assert str(raised.value).startswith(f"{folder}/shard-00000")
    assert "has 100 bytes instead of" in str(raised.value)
    assert str(raised.value).endswith(f"type: vab shards verify {folder}")
    assert len(str(raised.value).splitlines()) == 1


def test_a_tar_that_ends_within_a_record_or_vanishes_is_named(tmp_path, make_shards):
    folder = make_shards(tmp_path / "s", 8)
    row, data = ShardDataset(folder).index_row(3), ShardDataset(folder)
    end = row["features_offset"] + row["features_size"]
    os.truncate(folder / "shard-000000.tar", end)
    data.read([3])
    os.truncate(folder / "shard-000000.tar", end - 1)
    with pytest.raises(UserError, match=rf"shard-000000.tar has {end - 1} bytes instead of \d+: for a full report"):
        data.read([3])
    data.read([0, 4])
    data = ShardDataset(make_shards(tmp_path / "t", 8))
    (data.folder / "shard-000001.tar").unlink()
    data.read([0, 3])
    with pytest.raises(UserError, match=r"shard-000001.tar is missing: for a full report, type: vab shards verify"):
        data.record(4)


def test_a_tar_that_is_cut_off_and_then_replaced_is_not_read(tmp_path, make_shards):
    data = ShardDataset(make_shards(tmp_path / "s", 8))
    data.read([0, 4])
    first, second = (data.folder / f"shard-00000{number}.tar" for number in (0, 1))
    os.truncate(second, 100)
    first.replace(second)
    with pytest.raises(UserError, match=r"shard-000001.tar was replaced by another file .* vab shards verify"):
        data.read([4])


def test_more_tars_than_a_process_may_open(tmp_path, make_shards):
    folder = make_shards(tmp_path / "many", 60, records_per_shard=1)
    program = (
        "import resource, sys, numpy as np\n"
        "from vab.data.reading.dataset import ShardDataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "data = ShardDataset(sys.argv[1])\n"
        "for _ in range(3):\n"
        "    print(data.read(np.arange(60)[::-1]).codes.sum().item())\n"
    )
    found = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(ShardDataset(folder).read(np.arange(60)).codes.sum().item())] * 3


def open_files(folder):
    """Tars below a folder that this process has open."""
    files = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{name}"))
    return [file for file in files if file.startswith(str(folder)) and file.endswith(".tar")]


def test_the_files_of_a_data_set_are_closed_with_it(tmp_path, make_shards):
    data = ShardDataset(make_shards(tmp_path / "s", 40, records_per_shard=1))
    data.read(np.arange(40))
    assert len(open_files(tmp_path)) == 40
    del data
    assert open_files(tmp_path) == []


def test_a_system_without_preadv_reads_the_same(tmp_path, make_shards, monkeypatch):
    (tmp_path / "tar").write_bytes(bytes(range(100)))
    first, second = bytearray(3), bytearray(10)
    with (tmp_path / "tar").open("rb") as file:
        assert read_from(file, [first, memoryview(second)[:4], memoryview(second)[4:]], 20) == 13
        assert (bytes(first), bytes(second)) == (bytes(range(20, 23)), bytes(range(23, 33)))
        assert read_from(file, [first, second], 95) == 5
    assert (bytes(first), bytes(second[:2])) == (bytes(range(95, 98)), bytes((98, 99)))
    data = ShardDataset(make_shards(tmp_path / "s", 8))
    expected = data.read(np.arange(8))
    monkeypatch.setattr(tars, "_preadv", None)
    same(data.read(np.arange(8)), expected)
    os.truncate(data.folder / "shard-000000.tar", 100)
    with pytest.raises(UserError, match=r"shard-000000.tar has 100 bytes instead of \d+"):
        data.read([0])
