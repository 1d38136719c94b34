import errno
import io
import json
import multiprocessing
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from vab.cli import main
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.shards import format as shard_format
from vab.data.shards import verify as indexing
from vab.data.shards.format import Left, is_complete, make_key
from vab.data.shards.merge import merge
from vab.data.shards.writer import ShardWriter
from vab.spec import UserError


def write(writer, *records, left_out=()):
    writer.add(records[0][3]["source"], records, left_out)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.*"))}


@pytest.fixture
def ten(tmp_path, make_shards):
    """Ten records in three tars."""
    return make_shards(tmp_path / "ten", 10)


# Writing


def test_what_is_read_is_what_was_written(ten, small_spec, codebooks, make_record):
    dataset = ShardDataset(ten, check_crc=True)
    batch = dataset.__getitems__([9, 0, 3])
    for place, number in enumerate([9, 0, 3]):
        key, codes, features, meta = make_record(number)
        assert dataset.key(number) == key
        assert dataset.record(number) == meta
        assert torch.equal(batch.codes[place], torch.from_numpy(codes))
        assert torch.equal(batch.features[place], torch.from_numpy(features.astype(np.float16)).float())
        assert batch.labels[place].tolist() == [float(name in meta["labels"]) for name in dataset.labels]
        assert dataset.label_names(number) == meta["labels"]
    assert batch.codes.dtype == batch.index.dtype == torch.int64
    assert batch.index.tolist() == [9, 0, 3]
    assert batch.steps.tolist() == [24, 25, 24]
    assert batch.frames.tolist() == [4, 4, 4]
    assert batch.valid.all()
    assert batch.ragged
    assert not dataset.read([0, 2]).ragged
    assert torch.equal(dataset[7].codes, dataset.read([7]).codes)
    assert dataset.spec == small_spec
    assert torch.equal(dataset.codebooks, codebooks)
    assert indexing.verify(ten) == []


def test_arrays_may_lie_in_memory_in_any_order(tmp_path, small_spec, codebooks, make_record):
    key, codes, features, meta = make_record(1)
    with ShardWriter(tmp_path, small_spec, meta["labels"]) as writer:
        write(writer, (key, np.asfortranarray(codes), np.asfortranarray(features), meta))
        writer.finish(codebooks)
    batch = ShardDataset(tmp_path).read([0])
    assert np.array_equal(batch.codes[0], codes)
    assert np.array_equal(batch.features[0], features.astype(np.float16))
    assert indexing.verify(tmp_path) == []


def test_same_input_gives_same_bytes(tmp_path, make_shards):
    assert contents(make_shards(tmp_path / "a", 10)) == contents(make_shards(tmp_path / "b", 10))


def test_manifest_states_the_numbers(ten, small_spec):
    manifest = json.loads((ten / "manifest.json").read_text())
    assert manifest["spec"] == small_spec.to_dict()
    assert manifest["counts"] == {"records": 10, "sources": 10, "left_out": 0}
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["versions"]["webdataset"] == webdataset.__version__
    assert sorted(path.name for path in ten.iterdir()) == sorted(
        ["manifest.json", *manifest["files"], *(shard["name"] for shard in manifest["shards"])]
    )


@pytest.mark.parametrize("kill_after", [0, 1, 4, 5, 7, 8, 9])
def test_killed_writer_goes_on_and_ends_with_the_same_bytes(
    tmp_path, ten, small_spec, codebooks, make_record, kill_after
):
    folder = tmp_path / "killed"
    labels = ShardDataset(ten).labels

    def work():
        writer = ShardWriter(folder, small_spec, labels, 4)
        for number in range(kill_after):
            write(writer, make_record(number))
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not is_complete(folder)
    with ShardWriter(folder, small_spec, labels, 4) as writer:
        assert writer.num_records == len(writer.done) == kill_after // 4 * 4
        for number in range(10):
            record = make_record(number)
            if record[3]["source"] not in writer.done:
                write(writer, record)
        writer.finish(codebooks)
    assert contents(folder) == contents(ten)


def test_killed_before_the_part_was_marked_done_is_done_again(tmp_path, ten, small_spec, codebooks, make_record):
    folder = tmp_path / "killed"
    labels = ShardDataset(ten).labels
    with ShardWriter(folder, small_spec, labels, 4) as writer:
        for number in range(4):
            write(writer, make_record(number))
    (folder / "parts" / "000000.json").unlink()
    with ShardWriter(folder, small_spec, labels, 4) as writer:
        assert writer.done == set()
        for number in range(10):
            write(writer, make_record(number))
        writer.finish(codebooks)
    assert contents(folder) == contents(ten)


def test_committed_tar_that_was_cut_is_refused(tmp_path, small_spec, make_record):
    with ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"], 1) as writer:
        write(writer, make_record(0))
    os.truncate(tmp_path / "shard-000000.tar", 1000)
    with pytest.raises(UserError, match=r"shard-000000.tar has 1000 bytes, \d+ were written"):
        ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"], 1)


def test_commit_keeps_a_shard_that_is_not_full(tmp_path, small_spec, make_record):
    with ShardWriter(tmp_path, small_spec, ["bell"], 4) as writer:
        write(writer, make_record(1))
        writer.commit()
        write(writer, make_record(0))
    with ShardWriter(tmp_path, small_spec, ["bell"], 4) as writer:
        assert writer.done == {"video.1.mp4"}


def test_source_of_several_records_stays_whole(tmp_path, small_spec, codebooks, make_record):
    with ShardWriter(tmp_path, small_spec, (), 2) as writer:
        records = [make_record(0, source="long.mp4", start_seconds=float(start), id="long") for start in range(3)]
        write(writer, *((make_key("long", start), *record[1:]) for start, record in enumerate(records)))
        manifest = writer.finish(codebooks)
    assert [shard["records"] for shard in manifest["shards"]] == [3]
    assert [ShardDataset(tmp_path).record(number)["start_seconds"] for number in range(3)] == [0, 1, 2]


def test_what_is_left_out_is_in_the_manifest(tmp_path, small_spec, codebooks, make_record):
    labels = ["bell", "dog", "drum"]
    with ShardWriter(tmp_path, small_spec, labels, 1) as writer:
        writer.add("broken.mp4", [], [Left("broken.mp4", "unreadable")])
        write(writer, make_record(0), left_out=[Left("video.0.mp4", "silent", start_seconds=1.0)])
    with ShardWriter(tmp_path, small_spec, labels, 1) as writer:
        assert writer.done == {"video.0.mp4"}  # what could not be read is tried again
        writer.add("broken.mp4", [], [Left("broken.mp4", "unreadable")])
        writer.add("video.1.mp4", [], [Left("video.1.mp4", "broken", "at 7 s")])
        manifest = writer.finish(codebooks)
    assert [left.to_json() for left in manifest["left_out"]] == [
        {"source": "video.0.mp4", "reason": "silent", "start_seconds": 1.0},
        {"source": "broken.mp4", "reason": "unreadable"},
        {"source": "video.1.mp4", "reason": "broken", "detail": "at 7 s"},
    ]
    assert manifest["counts"] == {"records": 1, "sources": 3, "left_out": 3}
    assert indexing.info(tmp_path)["left_out"] == {"unreadable": 1, "silent": 1, "broken": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": np.full((2, 25), 300)}, r"codes must be in 0\.\.299, got 300\.\.300"),
        ({"codes": np.full((2, 25), -1)}, r"got -1\.\.-1"),
        ({"codes": np.zeros((2, 24), int)}, r"codes must be integer of shape \(2, 25\), got int64 \(2, 24\)"),
        ({"codes": np.zeros((2, 25))}, "codes must be integer .* got float64"),
        ({"features": np.zeros((4, 7))}, r"features must be floating of shape \(4, 6\)"),
        ({"features": np.full((4, 6), np.nan)}, "features must be finite"),
        ({"features": np.full((4, 6), 1e6)}, "finite as float16"),
        ({"key": "a.b"}, "key 'a.b' must be"),
        ({"key": ""}, "key '' must be"),
        ({"key": "x" * 88}, "must be 1 to 87"),
        ({"meta": {"steps": 26}}, r"steps must be in 1\.\.25, got 26"),
        ({"meta": {"frames": -1}}, r"frames must be in 0\.\.4, got -1"),
        ({"meta": {"labels": ["cat"]}}, r"\['cat'\] are not in the data set's vocabulary"),
    ],
)
def test_bad_record_is_refused(tmp_path, small_spec, make_record, change, words):
    key, codes, features, meta = make_record(0)
    record = {"key": key, "codes": codes, "features": features} | change | {"meta": meta | change.get("meta", {})}
    with ShardWriter(tmp_path, small_spec, ["bell"]) as writer, pytest.raises(UserError, match=words):
        write(writer, tuple(record.values()))


def test_key_given_twice_is_refused(tmp_path, small_spec, make_record, codebooks):
    with ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"], 1) as writer:
        write(writer, make_record(0))
    with ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"], 1) as writer:
        key, codes, features, meta = make_record(0)
        write(writer, (key, codes, features, meta | {"source": "other.mp4"}))
        with pytest.raises(UserError, match=f"key {key} occurs twice, in shard-000000.tar and shard-000001.tar"):
            writer.finish(codebooks)


def test_mistakes_of_the_calling_code_are_no_user_errors(tmp_path, small_spec, make_record):
    with ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"]) as writer:
        with pytest.raises(ValueError, match="no record and no reason") as caught:
            writer.add("nothing.mp4", [])
        assert not isinstance(caught.value, UserError)
        write(writer, make_record(1))
        with pytest.raises(ValueError, match="added before"):
            writer.add("video.1.mp4", [], [Left("video.1.mp4", "late")])


def test_folder_that_cannot_be_written_to_is_refused(tmp_path, ten, small_spec, make_record, codebooks):
    with pytest.raises(UserError, match="already holds a finished data set"):
        ShardWriter(ten, small_spec)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="tars that vab did not write"):
        ShardWriter(foreign, small_spec)
    assert contents(foreign) == {"a.tar": b"precious"}
    begun = tmp_path / "begun"
    with ShardWriter(begun, small_spec, ["bell", "dog", "drum"], 1, {"loudness": (1, 2)}) as writer:
        write(writer, make_record(1))
        with pytest.raises(UserError, match="another process is writing"):
            ShardWriter(begun, small_spec)
    with pytest.raises(UserError, match=r"begun with other settings \(loudness: \[1, 2\] != None"):
        ShardWriter(begun, small_spec, ["bell", "dog", "drum"], 1)
    ShardWriter(begun, small_spec, ["bell", "dog", "drum"], 1, {"loudness": (1, 2)}).close()
    with ShardWriter(tmp_path / "empty", small_spec) as writer:
        writer.add("a.mp4", [], [Left("a.mp4", "silent")])
        with pytest.raises(UserError, match=r"no record was made; left out because: \['silent'\]"):
            writer.finish(codebooks)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ShardWriter(tmp_path / "file", small_spec)


def test_codebooks_must_fit_the_spec(tmp_path, small_spec, codebooks, make_record):
    with ShardWriter(tmp_path, small_spec, ["bell", "dog", "drum"]) as writer:
        write(writer, make_record(0))
        with pytest.raises(UserError, match=r"of shape \(2, 300, 4\); got \(2, 299, 4\)"):
            writer.finish(codebooks[:, 1:])


@pytest.mark.parametrize("when", ["writing", "part", "finish"])
def test_full_disk_leaves_nothing_half_written(tmp_path, small_spec, codebooks, make_record, monkeypatch, when):
    labels = ["bell", "dog", "drum"]
    with ShardWriter(tmp_path, small_spec, labels, 2) as writer:
        write(writer, make_record(0))
        write(writer, make_record(1))
        kept = set(contents(tmp_path))
        full = OSError(errno.ENOSPC, "No space left on device")

        class FullDisk(io.BytesIO):
            def write(self, data):
                raise full

        real = Path.open
        names = {"writing": "000001.tar", "part": "000001.json.tmp", "finish": "index.npy.tmp"}

        def full_open(path, *arguments, **settings):
            file = real(path, *arguments, **settings)
            if path.name.endswith(names[when]):
                file.close()
                return FullDisk()
            return file

        monkeypatch.setattr(Path, "open", full_open)

        def go_on():
            write(writer, make_record(2))
            write(writer, make_record(3))
            writer.finish(codebooks)

        with pytest.raises(UserError, match=rf"no space left in {tmp_path}: the next file needs [\d,]+ bytes"):
            go_on()
        monkeypatch.undo()
    left = set(contents(tmp_path))
    assert not [name for name in left if ".tmp" in name]
    assert left - kept <= {"shard-000001.tar", "parts/000001.npy", "parts/000001.json"}
    with ShardWriter(tmp_path, small_spec, labels, 2) as writer:
        for number in range(4):
            if f"video.{number}.mp4" not in writer.done:
                write(writer, make_record(number))
        writer.finish(codebooks)
    assert indexing.verify(tmp_path) == []


def test_a_merge_onto_a_full_disk_says_so_and_resumes_when_there_is_space(small_disk, tmp_path, make_shards):
    folders = [make_shards(tmp_path / f"{start}", 10, start) for start in (0, 10)]  # of about 50 kB each
    before = [contents(folder) for folder in folders]
    out = small_disk / "merged"
    with pytest.raises(UserError, match=rf"no space left in {out}: the next file needs [\d,]+ bytes"):
        merge(folders, out)
    assert not is_complete(out)
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    merge(folders, out)
    assert indexing.verify(out) == []
    assert [contents(folder) for folder in folders] == before


def test_keys_are_readable_and_never_shared():
    assert make_key("dog_bark-7", 12.5) == "dog_bark-7_00012500"
    hard = ["a.b", "a_b", "a b", "a/b", "\u00e4", "", "x" * 300, "x" * 301, "a_b_00000000"]
    keys = [make_key(record_id, start) for record_id in hard for start in (0, 0.001, 4)]
    assert len(set(keys)) == len(keys)
    assert all(shard_format.KEY_PATTERN.fullmatch(key) and len(key) <= 87 for key in keys)
    with pytest.raises(ValueError, match="0 s or later"):
        make_key("a", -1)


# Other readers


def read_with_webdataset(folder):
    """Keys and shapes, through the plain pipeline."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode()
    return [
        [record["__key__"], record["codes.npy"].tolist(), record["features.npy"].tolist(), record["json"]]
        for record in pipeline
    ]


def as_written(make_record, count):
    rows = []
    for number in range(count):
        key, codes, features, meta = make_record(number)
        rows.append([key, codes.tolist(), features.astype(np.float16).tolist(), meta])
    return rows


def test_plain_webdataset_reads_the_shards(ten, make_record):
    assert read_with_webdataset(ten) == as_written(make_record, 10)


@pytest.mark.slow
def test_old_webdataset_reads_the_shards(ten, make_record, tmp_path):
    old = os.environ.get("VAB_OLD_WEBDATASET")
    if old is None:
        old = str(tmp_path / "old")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", old, "webdataset==0.2.111"]
        if subprocess.run(command, capture_output=True, check=False, timeout=100).returncode:
            pytest.skip("webdataset 0.2.111 cannot be installed here; point VAB_OLD_WEBDATASET to a folder with it")
    code = (
        "import glob, json, sys; sys.path.insert(0, sys.argv[1]); import webdataset\n"
        "assert webdataset.__version__ == '0.2.111', webdataset.__version__\n"
        "pipeline = webdataset.WebDataset(sorted(glob.glob(sys.argv[2] + '/*.tar')), shardshuffle=False).decode()\n"
        "print(json.dumps([[r['__key__'], r['codes.npy'].tolist(), r['features.npy'].tolist(), r['json']]"
        " for r in pipeline]))"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, old, str(ten)], capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout) == as_written(make_record, 10)


def test_tar_lists_the_shards(ten, make_record):
    listed = subprocess.run(
        ["tar", "tf", ten / "shard-000002.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    keys = [make_record(number)[0] for number in (8, 9)]
    assert listed == [f"{key}.{field}" for key in keys for field in ("codes.npy", "features.npy", "json")]
    with tarfile.open(ten / "shard-000002.tar") as tar:
        members = tar.getmembers()
        assert [(member.mtime, member.uname, member.mode) for member in members] == [(0, "vab", 0o444)] * 6
        assert np.array_equal(
            np.load(io.BytesIO(tar.extractfile(members[0]).read()), allow_pickle=False), make_record(8)[1]
        )


# Reading


def test_pickled_data_set_carries_no_maps_and_reads_the_same(ten):
    dataset = ShardDataset(ten)
    dataset.read([0, 5])
    carried = pickle.dumps(dataset)
    assert len(carried) < 6000
    assert torch.equal(pickle.loads(carried).read([3, 8]).codes, dataset.read([3, 8]).codes)


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same(ten, start):
    dataset = ShardDataset(ten)
    dataset.read([0])  # maps that are open already must not get in the way
    loader = DataLoader(dataset, 4, num_workers=2, collate_fn=as_it_is, multiprocessing_context=start)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.features for batch in batches]), dataset.read(range(10)).features)


@pytest.mark.parametrize("numbers", [[10], [-1], []])
def test_number_out_of_range_is_refused(ten, numbers):
    with pytest.raises(IndexError, match=r"0\.\.9"):
        ShardDataset(ten).read(numbers)


def test_data_set_without_labels(tmp_path, small_spec, codebooks, make_record):
    with ShardWriter(tmp_path, small_spec) as writer:
        write(writer, make_record(0))
        writer.finish(codebooks)
    dataset = ShardDataset(tmp_path)
    assert dataset.labels == ()
    assert dataset[0].labels.shape == (1, 0)
    assert indexing.verify(tmp_path) == []
    assert indexing.info(tmp_path)["labels"] == {}


def test_missing_or_unfinished_data_set_says_what_to_type(tmp_path, small_spec, make_record):
    with pytest.raises(UserError, match=r"no folder .*absent.*type: vab extract --media DIR --out .*absent"):
        ShardDataset(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no manifest.json.*vab shards index"):
        ShardDataset(tmp_path)
    with ShardWriter(tmp_path, small_spec, ["bell"], 1) as writer:
        write(writer, make_record(1))
    with pytest.raises(UserError, match="is not finished: run the same command again"):
        ShardDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "wav"}, "does not describe a vab data set"),
        ({"format_version": 2}, "has format version 2, this vab reads 1"),
        ({"spec": None}, "lacks \\['spec'\\]"),
        ({"dtypes": {"features": "<f2"}}, "does not give the dtypes of codes and features"),
        ({"dtypes": []}, "does not give the dtypes of codes and features"),
    ],
)
def test_manifest_of_another_kind_is_refused(ten, change, words):
    manifest = json.loads((ten / "manifest.json").read_text()) | change
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (ten / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=words):
        ShardDataset(ten)
    assert len(indexing.verify(ten)) == 1


@pytest.mark.parametrize(
    "change", [lambda shards: 2 * shards, lambda shards: [shards[0] | {"records": 9}, *shards[1:]]]
)
def test_an_index_of_another_length_than_the_shards_is_reported(ten, change):
    manifest = json.loads((ten / "manifest.json").read_text())
    manifest["shards"] = change(manifest["shards"])
    (ten / "manifest.json").write_text(json.dumps(manifest))
    records = sum(shard["records"] for shard in manifest["shards"])
    assert f"the manifest counts 10 records, its shards {records}" in indexing.verify(ten)


def test_what_a_damaged_manifest_advises_works(ten, tmp_path, capsys):
    whole = (ten / "manifest.json").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(whole)
    for damaged in (whole[: len(whole) // 2], json.dumps(json.loads(whole) | {"counts": None}).replace("counts", "c")):
        (ten / "manifest.json").write_text(damaged)
        for command in ("verify", "index", "info"):
            with pytest.raises(SystemExit) as ended:
                main(["shards", command, str(ten)])
            assert ended.value.code == 2
            typed = capsys.readouterr().err.partition("type: ")[2].strip()
            assert typed == f"vab shards index {ten} --spec OTHER/manifest.json"
        main(shlex.split(typed.replace("OTHER", str(tmp_path / "other")))[1:])
        said = capsys.readouterr().out
        assert said.startswith(f"{ten}: 10 records in 3 tars; wrote index.npy, ")
        assert said.endswith(", manifest.json\n")
        assert indexing.verify(ten) == []


def test_cut_or_missing_tar_is_refused_at_opening(ten):
    os.truncate(ten / "shard-000001.tar", 4096)
    with pytest.raises(UserError, match=r"shard-000001.tar has 4096 bytes instead of .*type: vab shards verify"):
        ShardDataset(ten)
    (ten / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar is missing"):
        ShardDataset(ten)
    assert indexing.verify(ten) == [f"{ten / 'shard-000001.tar'} is missing"]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["codes", "features"])
def test_flipped_bit_is_found(ten, name):
    row = ShardDataset(ten).index_row(6)
    flip(ten / "shard-000001.tar", row[f"{name}_offset"])
    ShardDataset(ten).read([6])
    with pytest.raises(UserError, match=rf"shard-000001.tar: {name} of record {row['key']} is not what was written"):
        ShardDataset(ten, check_crc=True).read([6])
    problems = indexing.verify(ten)
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert f"{name}_crc" in problems[1]


@pytest.mark.parametrize("numbers", [[6], [9, 6, 0]])
def test_a_code_that_the_codebook_does_not_have_is_found_without_checksums(ten, numbers):
    dataset = ShardDataset(ten)
    row = dataset.index_row(6)
    path = ten / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    last = row["codes_offset"] + row["codes_size"] - 2
    content[last : last + 2] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"shard-000001.tar: codes of record {row['key']} is not what was written"):
        ShardDataset(ten).read(numbers)


def test_flipped_bit_in_a_description_is_found(ten):
    row = ShardDataset(ten).index_row(6)
    flip(ten / "shard-000001.tar", row["json_offset"] + 3)
    with pytest.raises(UserError, match=r"json of record .* is not what was written"):
        ShardDataset(ten).record(6)


def test_wrong_index_is_refused(ten):
    manifest = json.loads((ten / "manifest.json").read_text())
    index = np.load(ten / "index.npy")
    for column, value, words in [
        ("codes_offset", 10**6, "codes beyond the end of a tar"),
        ("shard", 3, "shard 3 of 3"),
        ("features_size", 3, "features of another size"),
    ]:
        wrong = index.copy()
        wrong[column][4] = value
        np.save(ten / "index.npy", wrong)
        assert (ten / "index.npy").stat().st_size == manifest["files"]["index.npy"]["bytes"]
        with pytest.raises(UserError, match=words):
            ShardDataset(ten)
    index["steps"][4] = 7
    np.save(ten / "index.npy", index)
    problems = indexing.verify(ten)
    assert "index.npy has SHA-256" in problems[0]
    assert "is wrong in ['steps']" in problems[1]


# Tars made elsewhere


@pytest.fixture
def pack(tmp_path):
    """Write a tar of (name, bytes)."""

    def write_tar(members, name="foreign.tar", ending=True):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        if not ending:
            size = sum(512 + -(-len(content) // 512) * 512 for _, content in members)
            os.truncate(tmp_path / name, size)
        return tmp_path

    return write_tar


def npy(array, **settings):
    stream = io.BytesIO()
    np.save(stream, array, **settings)
    return stream.getvalue()


def members(number, make_record, code_type=np.int32, feature_type=np.float32, **changes):
    _, codes, features, meta = make_record(number)
    fields = {
        "codes.npy": npy(codes.astype(code_type)),
        "features.npy": npy(features.astype(feature_type)),
        "json": json.dumps({"labels": meta["labels"]}).encode(),
    } | changes
    return [(f"./{number:04d}.{name}", content) for name, content in fields.items() if content is not None]


@pytest.mark.parametrize("code_type", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("feature_type", [np.float16, np.float32])
def test_tars_made_elsewhere_can_be_indexed(
    ten, pack, tmp_path, make_record, codebooks, code_type, feature_type, small_spec
):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for tar in range(2):
        records = [members(number, make_record, code_type, feature_type) for number in range(tar * 3, tar * 3 + 3)]
        pack([member for record in records for member in record], f"elsewhere/{tar}.tar")
    manifest = indexing.index_folder(folder, ten / "manifest.json")
    assert manifest["dtypes"] == {"codes": np.dtype(code_type).str, "features": np.dtype(feature_type).str}
    dataset = ShardDataset(folder, check_crc=True)
    assert dataset.labels == ("bell", "dog", "drum")
    batch = dataset.read(range(6))
    for number in range(6):
        _, codes, features, meta = make_record(number)
        assert torch.equal(batch.codes[number], torch.from_numpy(codes))
        assert torch.equal(batch.features[number], torch.from_numpy(features.astype(feature_type)).float())
        assert dataset.label_names(number) == meta["labels"]
    assert batch.codes.dtype == torch.int64
    assert batch.features.dtype == torch.float32
    assert batch.steps.tolist() == [25] * 6
    assert torch.equal(dataset.codebooks, codebooks)
    assert indexing.verify(folder) == []
    (folder / "spec.json").write_text(json.dumps(small_spec.to_dict()))
    assert indexing.index_folder(folder, folder / "spec.json", codebooks) == manifest


def test_indexing_keeps_some_bytes_of_a_record(ten, pack, tmp_path, make_record):
    """There can be millions. What a tar needs while it is read is the same for few and for many."""
    record = members(0, make_record)
    peaks = []
    for tars in (2, 7):
        folder = tmp_path / str(tars)
        folder.mkdir()
        for tar in range(tars):
            keys = [f"{tar}{number:05d}-abcdefghijklmnopqrst" for number in range(300)]
            fields = [(name.split(".", 2)[2], content) for name, content in record]
            pack([(f"{key}.{name}", content) for key in keys for name, content in fields], f"{tars}/{tar}.tar")
        tracemalloc.start()
        indexing.index_folder(folder, ten / "manifest.json")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (5 * 300) < 250, peaks


def test_keys_of_others_may_end_with_a_number(ten, pack, tmp_path, make_record):
    """Each is a recording of its own, though a key of ours ends with its start; and need have no id."""
    (tmp_path / "elsewhere").mkdir()
    names = [f"sample_{number:08d}" for number in range(4)]
    records = [members(number, make_record) for number in range(4)]
    pack(
        [(f"{name}.{field.split('.', 2)[2]}", content) for name, record in zip(names, records, strict=True)
         for field, content in record],
        "elsewhere/0.tar",
    )  # fmt: skip
    indexing.index_folder(tmp_path / "elsewhere", ten / "manifest.json")
    dataset = ShardDataset(tmp_path / "elsewhere")
    assert [dataset.record_id(number) for number in range(4)] == names
    assert len(dataset.read(range(4)).source.unique()) == 4
    data = ShardDataModule(str(dataset.folder), str(dataset.folder), fold=3, fold_pattern=r"(\d+)$", batch_size=1)
    assert (len(data.train_dataset), len(data.val_dataset)) == (3, 1)
    ours = ShardDataset(ten)
    expected = len({ours.record(number)["source"] for number in range(10)})
    assert len(ours.read(range(10)).source.unique()) == expected


@pytest.mark.parametrize("name", ["label_starts.npy", "label_ids.npy"])
def test_damaged_labels_are_refused(ten, name):
    stored = np.load(ten / name)
    content = (ten / name).read_bytes()
    assert len(content) == len(npy(stored))
    swapped = stored.copy()
    swapped[1], swapped[2] = stored[2] + (name == "label_starts.npy"), stored[1]
    np.save(ten / name, swapped)
    with pytest.raises(UserError, match=rf"{name} is not what was written"):
        ShardDataset(ten, check_crc=True)
    if name == "label_starts.npy":
        with pytest.raises(UserError, match=r"index of .* is wrong \(label_starts.npy does not rise from 0 to"):
            ShardDataset(ten)


def test_a_mask_is_no_list_of_records(ten):
    dataset = ShardDataset(ten)
    mask = np.arange(10) > 6
    with pytest.raises(TypeError, match=r"must be whole numbers, got bool: of a mask, give np.flatnonzero\(mask\)"):
        dataset.choose(mask)
    dataset.choose(np.flatnonzero(mask))
    assert len(dataset) == 3


def test_lost_index_is_made_again(ten):
    before = contents(ten)
    for name in ("index.npy", "label_ids.npy"):
        (ten / name).unlink()
    indexing.index_folder(ten)
    assert contents(ten) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes.npy": None}, r"0001 lacks codes.npy"),
        ({"txt": b"hello"}, r"0001 has a field txt; the fields are codes.npy, features.npy, json"),
        ({"codes.npy": npy(np.zeros((2, 24), np.int32))}, r"must be \(2, 25\) of .* got \(2, 24\) of <i4"),
        ({"codes.npy": npy(np.zeros((2, 25), np.float64))}, r"got \(2, 25\) of <f8"),
        ({"codes.npy": npy(np.zeros((25, 2), np.int32).T)}, "columns first"),
        ({"codes.npy": npy(np.full((2, 25), 300))}, r"codes must be in 0\.\.299, got 300\.\.300"),
        ({"codes.npy": npy(np.array([[None] * 25] * 2), allow_pickle=True)}, r"of \|O"),
        ({"codes.npy": b"nonsense"}, "not a .npy file"),
        ({"codes.npy": npy(np.zeros((2, 25), np.int32))[:-8]}, "192 bytes of data"),
        ({"features.npy": npy(np.full((4, 6), np.inf, np.float32))}, "features must be finite as float32"),
        ({"features.npy": npy(np.zeros((4, 6), np.float16))}, "others"),
        ({"json": b"{"}, "not JSON"),
        ({"json": b"[]"}, "must be an object"),
        ({"json": b'{"steps": 99}'}, r"steps must be in 1\.\.25, got 99"),
    ],
)
def test_foreign_record_that_does_not_fit_is_refused(ten, pack, make_record, changes, words):
    folder = pack([*members(0, make_record), *members(1, make_record, **changes), *members(2, make_record)])
    with pytest.raises(UserError, match=words) as caught:
        indexing.index_folder(folder, ten / "manifest.json")
    assert "foreign.tar" in str(caught.value)
    assert not is_complete(folder)


def test_foreign_tar_that_is_cut_is_refused(ten, pack, make_record):
    both = [*members(0, make_record), *members(1, make_record)]
    folder = pack(both, ending=False)
    with pytest.raises(UserError, match="its end is missing"):
        indexing.index_folder(folder, ten / "manifest.json")
    size = (folder / "foreign.tar").stat().st_size
    os.truncate(folder / "foreign.tar", size - 700)
    with pytest.raises(UserError, match="is cut"):
        indexing.index_folder(folder, ten / "manifest.json")


def test_foreign_folder_that_cannot_be_indexed_is_refused(ten, pack, make_record, tmp_path):
    with pytest.raises(UserError, match=r"no .tar files"):
        indexing.index_folder(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.tar.gz is compressed"):
        indexing.index_folder(tmp_path)
    folder = pack([*members(0, make_record), *members(1, make_record), *members(0, make_record)])
    with pytest.raises(UserError, match=r"--spec FILE.json"):
        indexing.index_folder(folder)
    with pytest.raises(UserError, match=r"key 0000 occurs twice, in foreign.tar and foreign.tar"):
        indexing.index_folder(folder, ten / "manifest.json")
    folder = pack([("a/0.codes.npy", b"")])
    with pytest.raises(UserError, match="keys must be of"):
        indexing.index_folder(folder, ten / "manifest.json")
    pack(members(0, make_record))
    (tmp_path / "spec.json").write_text(json.dumps(json.loads((ten / "manifest.json").read_text())["spec"]))
    with pytest.raises(UserError, match=r"no codebooks.safetensors .* copy it"):
        indexing.index_folder(folder, tmp_path / "spec.json")


def test_info_counts(ten):
    info = indexing.info(ten)
    assert info["records"] == 10
    assert info["shards"] == 3
    assert info["shorter_than_segment"] == 5
    assert info["labels"] == {"bell": 7, "dog": 4, "drum": 2}
    assert info["hours"] == round(5 * (25 + 24) / 50 / 3600, 3)
    assert json.loads(json.dumps(info)) == info
