"""Ready arrays to shards: what was extracted, written out in other people's ways, comes back as it was."""

import gc
import json
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from lightning.pytorch import Trainer

from small_media import save_model, tone, video
from vab.commands.extract import extract
from vab.commands.shards import import_shards
from vab.data.media.write import write_video
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.arrays import ArrayError, ArrayReader, Arrays, Cut
from vab.data.shards.importing import codec_info, import_arrays, sources_of, vision_info
from vab.data.shards.verify import verify
from vab.evaluation.embedding import load_encoders
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.generation.generator import Generator
from vab.spec import NOT_STATED, UserError

LEVELS, SIZE, CHANNELS = 4, 256, 128  # of the tiny networks
TINY = {"codec": "tiny", "vision": "tiny", "video_fps": 12.5, "segment_seconds": 0.64, "min_seconds": 0.2}
LENGTHS = {"a": 0.64, "b.1": 1.28, "sub/c": 1.6, "sub/d": 0.48}  # s; segments are 32 steps and 8 frames


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Videos of several lengths, as vab extract makes them to shards."""
    root = tmp_path_factory.mktemp("media")
    (root / "in" / "sub").mkdir(parents=True)
    for number, (name, seconds) in enumerate(LENGTHS.items()):
        video(root / "in" / f"{name}.mp4", seconds, seed=number)
    settings = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0, "device": "cpu"}
    extract(str(root / "in"), str(root / "out"), labels_from="folder", **settings)
    return ShardDataset(root / "out")


@pytest.fixture(scope="module")
def whole(extracted):
    """Codes (K, T) and features (V, C) of each recording from its start to its end."""
    parts = {}
    for number in range(len(extracted)):
        record, batch = extracted.record(number), extracted.read([number])
        codes, features = parts.setdefault(record["id"], ([], []))
        codes.append(batch.codes[0, :, : record["steps"]].numpy())
        features.append(batch.features[0, : record["frames"]].numpy())
    return {name: (np.concatenate(codes, 1), np.concatenate(features)) for name, (codes, features) in parts.items()}


@pytest.fixture
def two_folders(tmp_path):
    """Write arrays as NAME.npy into two folders; gives the arguments that name them."""

    def write(codes, features):
        for kind, arrays in (("codes", codes), ("features", features)):
            for name, array in arrays.items():
                path = tmp_path / kind / f"{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, array)
        return {"codes": str(tmp_path / "codes"), "features": str(tmp_path / "features")}

    return write


def some(steps, frames, seed=0):
    """Codes and features of these lengths."""
    values = np.random.default_rng(seed)
    return values.integers(0, SIZE, (LEVELS, steps)), values.standard_normal((frames, CHANNELS)).astype(np.float32)


def write_npy(root, whole):
    for name, (codes, features) in whole.items():
        for kind, array in (("codes", codes.astype(np.int64)), ("features", features)):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / kind / f"{name}.npy", array)
    return {"codes": root / "codes", "features": root / "features"}


def write_turned_npy(root, whole):
    turned = {
        name: (codes.T[None].astype(np.uint8), features.T.astype(">f8")) for name, (codes, features) in whole.items()
    }
    return write_npy(root, turned)


def write_npz(root, whole):
    """One file for both, per-level axes, and something else."""
    for name, (codes, features) in whole.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        arrays = {"tokens": codes[:, None].astype(np.int32), "clip": features[None], "fps": np.array(12.5)}
        np.savez_compressed(root / f"{name}.npz", **arrays)
    return {"codes": root, "features": root, "codes_key": "tokens", "features_key": "clip"}


def write_hdf5_each(root, whole):
    for name, (codes, features) in whole.items():
        for kind, array in (("c", codes.T.astype(np.int16)), ("f", features.astype(np.float16))):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(root / kind / f"{name}.hdf5", "w") as file:
                file["x/data"] = array
    return {"codes": root / "c", "features": root / "f"}


def write_hdf5(root, whole):
    with h5py.File(root / "c.h5", "w") as codes_file, h5py.File(root / "f.h5", "w") as features_file:
        for name, (codes, features) in whole.items():
            codes_file[name], features_file[name] = codes, features
    return {"codes": root / "c.h5", "features": root / "f.h5"}


def write_hdf5_groups(root, whole):
    with h5py.File(root / "all.h5", "w") as file:
        for name, (codes, features) in whole.items():
            file[f"{name}/codes"], file[f"{name}/eva"] = codes, features
    return {"codes": root / "all.h5", "features": root / "all.h5", "codes_key": "codes", "features_key": "eva"}


WRITERS = [write_npy, write_turned_npy, write_npz, write_hdf5_each, write_hdf5, write_hdf5_groups]


@pytest.fixture
def labels_csv(tmp_path):
    (tmp_path / "labels.csv").write_text("id,labels\nsub/d,sub\nb.1,\nsub/c,sub\na,\n")
    return str(tmp_path / "labels.csv")


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_extracted_comes_back_record_for_record(write, extracted, whole, labels_csv, tmp_path):
    (tmp_path / "arrays").mkdir()
    places = {name: str(value) for name, value in write(tmp_path / "arrays", whole).items()}
    report = import_shards(out=str(tmp_path / "out"), labels=labels_csv, **places, **TINY)
    assert (report.exit_status, report.inputs, report.kept, report.records) == (0, 4, 4, len(extracted))
    imported = ShardDataset(tmp_path / "out", check_crc=True)
    assert verify(tmp_path / "out") == []
    assert imported.spec == extracted.spec
    assert imported.labels == extracted.labels == ("sub",)
    assert torch.equal(imported.codebooks, extracted.codebooks)
    numbers = {imported.key(number): number for number in range(len(imported))}
    assert sorted(numbers) == sorted(map(extracted.key, range(len(extracted))))
    short = 0
    for number in range(len(extracted)):
        mine, theirs = numbers[extracted.key(number)], extracted.record(number)
        got, expected, steps = imported.read([mine]), extracted.read([number]), theirs["steps"]
        for name in ("features", "steps", "frames", "labels", "source"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert torch.equal(got.codes[..., :steps], expected.codes[..., :steps])
        assert torch.equal(got.codes[..., steps:], got.codes[..., steps - 1 : steps].expand(1, -1, 32 - steps))
        short += steps < 32
        record = imported.record(mine)
        assert (record["id"], record["labels"]) == (theirs["id"], theirs["labels"])
        assert record["start_seconds"] == pytest.approx(theirs["start_seconds"])
    assert short == 2


def test_the_datamodule_reads_the_same_batches(extracted, whole, two_folders, tmp_path):
    """Beside the extracted data set, as training and validation data must go together."""
    full = {name: arrays for name, arrays in whole.items() if arrays[0].shape[1] % 32 == 0}
    places = two_folders(*({name: arrays[place] for name, arrays in full.items()} for place in (0, 1)))
    import_shards(out=str(tmp_path / "out"), **places, **TINY)
    folder = str(tmp_path / "out")
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def batches(train, val):
        data = ShardDataModule(train, val, batch_size=2, num_workers=0)
        data.trainer = Trainer(**settings)
        return list(data.val_dataloader())

    imported = ShardDataset(folder)
    keys = [imported.key(number) for number in range(len(imported))]
    chosen = [number for number in range(len(extracted)) if extracted.key(number) in keys]
    assert [extracted.key(number) for number in chosen] == keys
    with pytest.raises(UserError, match=r"do not go together \(labels: 1 != 0"):
        batches(str(extracted.folder), folder)
    expected = extracted.read(chosen)
    got = [batch.widened() for batch in batches(folder, folder)]
    assert [len(batch) for batch in got] == [2, 1]
    assert torch.equal(torch.cat([batch.codes for batch in got]), expected.codes)
    assert torch.equal(torch.cat([batch.features for batch in got]), expected.features)
    assert not any(batch.ragged for batch in got)


# ---- time ----


def test_fewer_frames_are_those_that_an_extraction_at_that_rate_shows(tmp_path):
    """The features that are there are a video of their rate: a second extraction, at the rate wanted, says which."""
    frames = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "v.mp4", frames, 12, tone(2.0), 16_000)
    settings = {"segment_seconds": 2.0, "num_workers": 0, "device": "cpu"}
    extract(str(tmp_path / "in"), str(tmp_path / "12"), video_fps=12, **settings)
    batch = ShardDataset(tmp_path / "12").read([0])
    assert torch.cdist(batch.features[0], batch.features[0]).add(torch.eye(24) * 100).min() > 0.5
    np.savez(tmp_path / "v.npz", codes=batch.codes[0].numpy(), features=batch.features[0].numpy())
    place = {
        "codes_key": "codes",
        "features_key": "features",
        "codec": "tiny",
        "vision": "tiny",
        "segment_seconds": 2.0,
    }
    (tmp_path / "v").mkdir()
    (tmp_path / "v.npz").rename(tmp_path / "v" / "v.npz")
    for fps in (12, 6, 5, 4, 2.5, 1):
        extract(str(tmp_path / "in"), str(tmp_path / f"x{fps}"), video_fps=fps, **settings)
        folder = str(tmp_path / "v")
        import_shards(folder, str(tmp_path / f"i{fps}"), features=folder, video_fps=12, target_video_fps=fps, **place)
        expected, got = ShardDataset(tmp_path / f"x{fps}"), ShardDataset(tmp_path / f"i{fps}")
        assert got.spec == expected.spec
        # The encoder's rounding depends on how many pictures it sees at once; another picture is far away.
        torch.testing.assert_close(got.read([0]).features, expected.read([0]).features, atol=2e-3, rtol=0)
        assert got.read([0]).frames.tolist() == expected.read([0]).frames.tolist()


@pytest.mark.parametrize(("steps", "frames"), [(32, 8), (31, 8), (30, 7), (33, 9), (34, 10), (32, 6)])
def test_a_step_or_two_more_or_less_are_taken(two_folders, tmp_path, steps, frames):
    codes, features = some(steps, frames)
    report = import_shards(out=str(tmp_path / "out"), **two_folders({"a": codes}, {"a": features}), **TINY)
    assert (report.exit_status, report.records) == (0, 1)
    batch = ShardDataset(tmp_path / "out").read([0])
    valid, seen = min(steps, 32), min(frames, 8)
    assert (batch.steps.tolist(), batch.frames.tolist()) == ([valid], [seen])
    assert np.array_equal(batch.codes[0, :, :valid], codes[:, :valid])
    assert np.array_equal(batch.features[0, :seen], features[:seen].astype(np.float16))


def test_a_long_recording_is_cut_with_a_hop_or_in_its_middle(two_folders, tmp_path):
    codes, features = some(112, 28)
    places = two_folders({"a": codes}, {"a": features})
    import_shards(out=str(tmp_path / "hop"), hop_seconds=0.48, **places, **TINY)
    data = ShardDataset(tmp_path / "hop")
    assert [data.record(number)["start_seconds"] for number in range(len(data))] == [0.0, 0.48, 0.96, 1.44, 1.92]
    assert np.array_equal(data.read([2]).codes[0], codes[:, 48:80])
    assert np.array_equal(data.read([2]).features[0], features[12:20].astype(np.float16))
    import_shards(out=str(tmp_path / "centre"), segments="centre", **places, **TINY)
    middle = ShardDataset(tmp_path / "centre")
    assert len(middle) == 1
    assert middle.record(0)["start_seconds"] == 0.8
    assert np.array_equal(middle.read([0]).codes[0], codes[:, 40:72])
    assert np.array_equal(middle.read([0]).features[0], features[10:18].astype(np.float16))


def test_at_a_rate_of_no_whole_steps_every_whole_segment_is_whole(two_folders, tmp_path):
    """Sound and picture of each are those of the same time, and none is a step short because its start was rounded."""
    rate, values = 44100 / 512, np.random.default_rng(0)
    table = tmp_path / "table.npy"
    np.save(table, values.standard_normal((9, 1024, 4)).astype(np.float32))
    codes, features = {}, {}
    for seconds in (4, 5, 6, 7):
        name, steps = f"v{seconds}", -(-seconds * 44100 // 512)
        codes[name] = np.tile(np.arange(steps) % 1024, (9, 1))
        features[name] = np.repeat(np.arange(4 * seconds)[:, None], 6, axis=1).astype(np.float32)
    settings = {"codec": "dac_44khz", "codebooks": str(table), "vision": "own", "video_fps": 4, "segment_seconds": 1.0}
    import_shards(out=str(tmp_path / "out"), **two_folders(codes, features), **settings)
    data = ShardDataset(tmp_path / "out")
    assert (len(data), data.spec.num_steps, data.spec.num_frames) == (22, 87, 4)
    batch = data.read(list(range(len(data)))).widened()
    assert not batch.ragged
    assert batch.steps.tolist() == [87] * 22
    for number in range(len(data)):
        start = data.record(number)["start_seconds"]
        assert abs(start - round(start)) < 1 / rate
        assert batch.codes[number, 0, 0] == round(start * rate)
        assert batch.features[number, :, 0].tolist() == [4 * round(start) + frame for frame in range(4)]


def test_padding_does_not_reach_the_loss(two_folders, tmp_path):
    codes, features = some(20, 5)
    import_shards(out=str(tmp_path / "out"), **two_folders({"a": codes}, {"a": features}), **TINY)
    data = ShardDataset(tmp_path / "out")
    save_model(tmp_path / "model.ckpt", data.spec, data.codebooks)
    from vab.tasks import load_task

    task = load_task(tmp_path / "model.ckpt").eval()
    batch = data.read([0])
    assert (batch.steps.tolist(), batch.frames.tolist(), batch.ragged) == ([20], [5], True)
    mask = task.evaluation_mask(batch)
    first, _ = task.guessing_sums(task.logits(batch, mask), batch, mask)
    batch.codes[..., 20:] = (batch.codes[..., 20:] + 77) % SIZE
    batch.features[:, 5:] += 3.0
    second, _ = task.guessing_sums(task.logits(batch, mask), batch, mask)
    assert not mask[..., 20:].any()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


# ---- what is left out ----


def test_every_recording_ends_in_the_shards_or_in_the_report(tmp_path):
    codes, features = tmp_path / "codes", tmp_path / "features"
    codes.mkdir()
    features.mkdir()
    good = some(32, 8)

    def write(name, own=None, seen=None):
        for folder, array in ((codes, good[0] if own is None else own), (features, good[1] if seen is None else seen)):
            np.save(folder / f"{name}.npy", array)

    write("good")
    write("levels", own=good[0][:3])
    write("turned", own=good[0].T)
    write("three", own=np.zeros((4, 32, 2), int))
    write("floats", own=good[0].astype(np.float32))
    write("large", own=np.where(good[0] == good[0].max(), SIZE, good[0]))
    write("negative", own=good[0] - 300)
    write("wide", seen=good[1][:, :100])
    write("whole", seen=good[1].astype(np.int32))
    write("nan", seen=np.where(np.arange(CHANNELS) == 5, np.nan, good[1]))
    write("huge", seen=good[1].astype(np.float64) * 1e6)
    write("longer", seen=np.tile(good[1], (3, 1)))
    write("short", *(array[..., :5] if array is good[0] else array[:2] for array in good))
    write("empty", own=np.zeros((4, 0), int))
    write("pickled")
    np.save(codes / "pickled.npy", np.array([good[0], None], dtype=object), allow_pickle=True)
    write("pickle")
    (codes / "pickle.npy").write_bytes(pickle.dumps(good[0]))
    write("text")
    (features / "text.npy").write_text("not an array")
    write("cut")
    (features / "cut.npy").write_bytes((features / "cut.npy").read_bytes()[:-100])
    np.save(codes / "alone.npy", good[0])
    np.save(features / "mute.npy", good[1])
    (codes / "notes.txt").write_text("not looked at")
    report = import_shards(str(codes), str(tmp_path / "out"), features=str(features), **TINY)
    assert {left.source: left.reason for left in report.left_out} == {
        "levels": "bad_codes",
        "turned": "bad_codes",
        "three": "bad_codes",
        "floats": "bad_codes",
        "large": "bad_codes",
        "negative": "bad_codes",
        "wide": "bad_features",
        "whole": "bad_features",
        "nan": "not_finite",
        "huge": "not_finite",
        "longer": "lengths_differ",
        "short": "too_short",
        "empty": "bad_codes",
        "pickled": "pickled",
        "pickle": "pickled",
        "text": "unreadable",
        "cut": "unreadable",
        "alone": "no_features",
        "mute": "no_codes",
    }
    assert (report.inputs, report.kept, report.exit_status) == (20, 1, 0)
    details = {left.source: left.detail for left in report.left_out}
    assert details["large"] == "codes/large.npy holds 256: codes of tiny are 0 to 255"
    assert details["levels"] == "codes/levels.npy has shape (3, 32): tiny has 4 levels, so that one axis must be 4"
    assert details["turned"] == "codes/turned.npy has shape (32, 4): in the other recordings the other axis is time"
    assert details["huge"] == "features/huge.npy holds a magnitude above 65504, the largest of float16"
    assert details["pickled"].startswith("codes/pickled.npy is pickled, and reading it could run code")
    assert details["longer"] == "32 steps of codes last 0.64 s, 24 frames at 12.5 per second 1.92 s"
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {entry["source"]: entry["detail"] for entry in written["left_out"]} == details
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"records": 1, "sources": 20, "left_out": 19}
    imported = manifest["extraction"]["imported"]
    assert imported == {"codes": "(K, T), .npy files", "features": "(V, C), .npy files"}
    assert verify(tmp_path / "out") == []


def test_when_nothing_can_be_used_the_report_says_why(two_folders, tmp_path):
    codes, features = some(32, 8)
    places = two_folders({"a": codes + SIZE, "b": codes}, {"a": features, "b": features * np.nan})
    words = r"not one of 2 inputs gave a record \(1 bad_codes, 1 not_finite\).*; a: codes/a.npy holds"
    with pytest.raises(UserError, match=words):
        import_shards(out=str(tmp_path / "out"), **places, **TINY)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["reasons"] == {"bad_codes": 1, "not_finite": 1}
    two_folders({"a": codes}, {})
    assert import_shards(out=str(tmp_path / "out"), **places, **TINY).kept == 1


def test_sound_alone_is_kept_when_asked_for(two_folders, tmp_path):
    (codes, features), (other, _) = some(32, 8), some(20, 8, seed=1)
    places = two_folders({"a": other, "b": codes}, {"b": features})
    report = import_shards(out=str(tmp_path / "out"), without_video="keep", **places, **TINY)
    assert (report.exit_status, report.records) == (0, 2)
    batch = ShardDataset(tmp_path / "out").read([0, 1])
    assert (batch.frames.tolist(), batch.steps.tolist()) == ([0, 8], [20, 32])
    assert not batch.features[0].any()
    with pytest.raises(UserError, match="--features is missing; for sound alone"):
        import_shards(places["codes"], str(tmp_path / "none"), **TINY)
    settings = TINY | {"without_video": "keep", "vision": "whatever"}
    with pytest.raises(UserError, match="give --feature_dim"):
        import_shards(places["codes"], str(tmp_path / "none"), **settings)
    import_shards(places["codes"], str(tmp_path / "none"), feature_dim=7, **settings)
    data = ShardDataset(tmp_path / "none")
    assert (len(data), data.without_video(), data.spec.feature_dim) == (2, 2, 7)


def test_a_list_says_what_is_imported_and_its_labels(two_folders, tmp_path):
    arrays = [some(32, 8, seed) for seed in range(3)]
    places = two_folders(*({name: pair[place] for name, pair in zip("abc", arrays, strict=True)} for place in (0, 1)))
    listed, classes = tmp_path / "list.csv", tmp_path / "classes.txt"
    listed.write_text("file, labels\nc.mp4, dog;cow\nz.mp4,dog\na.mp4,cow\n")
    classes.write_text("ant\ncow\ndog\n")
    report = import_shards(out=str(tmp_path / "out"), labels=str(listed), vocabulary=str(classes), **places, **TINY)
    assert [(left.source, left.reason) for left in report.left_out] == [("z.mp4", "missing")]
    data = ShardDataset(tmp_path / "out")
    assert data.labels == ("ant", "cow", "dog")
    assert [(data.record(number)["id"], data.label_names(number)) for number in (0, 1)] == [
        ("a", ["cow"]),
        ("c", ["cow", "dog"]),
    ]
    assert data.manifest["extraction"]["not_listed"] == 1
    classes.write_text("ant\n")
    with pytest.raises(UserError, match="no class 'dog' among the 1"):
        import_shards(out=str(tmp_path / "x"), labels=str(listed), vocabulary=str(classes), **places, **TINY)
    for text, words in (
        ("id,start\na,1.5\n", "gives a@1.5 a start"),
        ("name\na\n", "needs a column 'id' or 'file'"),
        ("id,Labels\na,dog\n", "has a column 'Labels': call it 'labels', or give"),
        ("id\na\na\n", "'a' more than once"),
        ("id\nz\n", "none of the 1 recordings that are listed has codes, such as 'z'; .*codes has such as"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=words):
            import_shards(out=str(tmp_path / "x"), labels=str(listed), **places, **TINY)


# ---- layouts ----


def test_width_is_told_from_time_by_the_codes_or_by_the_user(two_folders, tmp_path):
    codes, features = some(100, 25)
    loose = TINY | {"vision": "eva", "segment_seconds": 2.0, "out": str(tmp_path / "out")}
    places = two_folders({"a": codes, "b": codes}, {"a": features.T, "b": np.ones((CHANNELS, 24), np.float16)})
    report = import_shards(**places, **loose)
    assert (report.records, ShardDataset(tmp_path / "out").spec.feature_dim) == (2, CHANNELS)
    assert np.array_equal(ShardDataset(tmp_path / "out").read([0]).features[0], features.astype(np.float16))
    square = {"a": np.ones((25, 26), np.float32), "b": np.ones((25, 25), np.float32)}
    two_folders({}, square)
    with pytest.raises(UserError, match=r"2 bad_features.*shape \(25, 26\): which axis is time cannot be told"):
        import_shards(**places, **(loose | {"out": str(tmp_path / "no")}))
    import_shards(feature_dim=26, **places, **(loose | {"out": str(tmp_path / "yes")}))
    assert ShardDataset(tmp_path / "yes").spec.feature_dim == 26


def test_square_codes_lie_as_the_others_do(two_folders, tmp_path):
    (codes, features), (square, few) = some(32, 8), some(LEVELS, 1)
    places = two_folders({"a": square.T, "b": codes.T}, {"a": few, "b": features})
    settings = TINY | {"min_seconds": 0.01, "out": str(tmp_path / "out")}
    assert import_shards(**places, **settings).exit_status == 0
    batch = ShardDataset(tmp_path / "out").read([0])
    assert np.array_equal(batch.codes[0, :, :LEVELS], square)
    only = {kind: f"{place}/only" for kind, place in places.items()}
    two_folders({"only/a": square}, {"only/a": few})
    with pytest.raises(UserError, match=r"shape \(4, 4\): which axis is time cannot be told"):
        import_shards(**only, **(settings | {"out": str(tmp_path / "no")}))


# ---- reading ----


@pytest.mark.parametrize("write", [write_npy, write_npz, write_hdf5_each])
def test_a_damaged_file_is_an_array_or_a_reason(write, tmp_path):
    codes, features = some(32, 8)
    places = write(tmp_path, {"a": (codes, features)})
    path = next(path for path in places["codes"].rglob("a.*"))
    content, chance = path.read_bytes(), random.Random(0)
    arrays = Arrays(places["codes"], "codes", places.get("codes_key"))
    assert np.array_equal(
        arrays.read("a").reshape(-1), codes.T.reshape(-1) if write is write_hdf5_each else codes.reshape(-1)
    )
    outcomes = set()
    for trial in range(200):
        damaged = bytearray(content[: chance.randrange(len(content))] if trial % 2 else content)
        for _ in range(0 if trial % 2 else 4):
            damaged[chance.randrange(min(len(damaged), 300 if trial % 4 else len(damaged)))] = chance.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            outcomes.add(type(arrays.read("a")))
        except ArrayError as error:
            outcomes.add(error.reason)
    assert {np.ndarray, "unreadable"} <= outcomes <= {np.ndarray, "unreadable", "pickled", "no_array"}


class Garbage:
    """Deleting it switches to another thread, wherever the collector runs."""

    def __init__(self):
        self.cycle = self

    def __del__(self):
        time.sleep(0)


def test_several_threads_read_whenever_they_are_switched(tmp_path):
    places = write_npy(tmp_path, {"a": some(32, 8)})
    arrays = Arrays(places["codes"], "codes")
    expected, threshold = arrays.read("a"), gc.get_threshold()

    def read(_):
        Garbage()
        return np.array_equal(arrays.read("a"), expected)

    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(read, range(4000)))
    finally:
        gc.set_threshold(*threshold)


def test_which_array_of_a_file_is_wanted_must_be_said(tmp_path):
    places = write_npz(tmp_path, {"a": some(32, 8)})
    with pytest.raises(ArrayError, match=r"a.npz has 3 arrays \(tokens, clip, fps\): say which with --codes_key"):
        Arrays(places["codes"], "codes").read("a")
    with pytest.raises(ArrayError, match=r"has no array 'code', it has tokens, clip, fps"):
        Arrays(places["codes"], "codes", "code").read("a")
    write_hdf5_groups(tmp_path, {"a": some(32, 8)})
    with pytest.raises(UserError, match="no dataset NAME/code in it, it has a/codes, a/eva"):
        Arrays(tmp_path / "all.h5", "codes", "code")


def test_places_that_hold_no_arrays(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    for make, words in (
        (lambda: None, r"no .npy, .npz, .h5, .hdf5 file in it$"),
        ((tmp_path / "f" / "a.pt").touch, r"it has 1 .pt files, which can run code when they are read"),
        (lambda: [np.save(tmp_path / "f" / "a.npy", 1), np.savez(tmp_path / "f" / "a.npz", 1)], "leave one of them"),
    ):
        make()
        with pytest.raises(UserError, match=words):
            Arrays(tmp_path / "f", "codes")
    with pytest.raises(UserError, match=r"--codes .*none: there is no such folder or file"):
        Arrays(tmp_path / "none", "codes")
    with pytest.raises(UserError, match=r"expected a folder of .* files, or one .h5 file"):
        Arrays(tmp_path / "f" / "a.npy", "codes")
    (tmp_path / "a.h5").write_text("nothing")
    with pytest.raises(UserError, match="cannot be read as hdf5"):
        Arrays(tmp_path / "a.h5", "codes")
    h5py.File(tmp_path / "empty.h5", "w").close()
    with pytest.raises(UserError, match=r"no dataset NAME in it, it has none$"):
        Arrays(tmp_path / "empty.h5", "codes")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"hdf5 files need a package .*pip install 'h5py>=3"):
        Arrays(tmp_path / "a.h5", "codes")


def test_an_hdf5_file_leads_to_no_other_file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros((4, 32), int)
    (tmp_path / "raw.bin").write_bytes(bytes(1024))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("other.h5", "x")
        layout = h5py.VirtualLayout((4, 32), int)
        layout[:] = h5py.VirtualSource("other.h5", "x", (4, 32))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", (4, 32), "i8", external=[("raw.bin", 0, 1024)])
        file["text"] = "hello"
        file["nothing"] = h5py.Empty("f4")
    arrays = Arrays(tmp_path / "a.h5", "codes")
    assert sorted(arrays.suffixes) == ["nothing", "outside", "text", "virtual"]
    for name, words in (
        ("virtual", "from other"),
        ("outside", "from other"),
        ("text", "no array"),
        ("nothing", "no"),
    ):
        with pytest.raises(ArrayError, match=words):
            arrays.read(name)


# ---- interruptions ----


class Stop(Exception):  # noqa: N818 - not an error
    """Stands for a kill: nothing of the run's own code sees it coming."""


class Stopping(Arrays):
    """Arrays of which only so many can be read."""

    left = 0

    def read(self, name):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return super().read(name)


def bytes_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".tar", ".npy", ".safetensors")}


@pytest.mark.parametrize("after", [2, 7, 15, 30])
def test_an_import_cut_off_anywhere_goes_on_to_the_same_bytes(two_folders, tmp_path, after):
    pairs = {f"{number:02d}": some(32, 8, number) for number in range(30)}
    pairs["07"] = (pairs["07"][0] + SIZE, pairs["07"][1])
    places = two_folders(*({name: pair[place] for name, pair in pairs.items()} for place in (0, 1)))
    settings = TINY | {"records_per_shard": 4}
    import_shards(out=str(tmp_path / "whole"), **places, **settings)
    cut = Cut(0.64, 12.5, 12.5, "all", 0.64, 0.2, 0.5)

    def run(left):
        codes, features = Stopping(places["codes"], "codes"), Arrays(places["features"], "features")
        codes.left = left
        reader = ArrayReader(codes, features, codec_info("tiny"), CHANNELS, cut)
        sources = sources_of(codes, features, None)
        report = import_arrays(sources, reader, tmp_path / "out", vision_info("tiny"), records_per_shard=4)
        return report, left - codes.left

    with pytest.raises(Stop):
        run(after)
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = 4 * len(list((tmp_path / "out").glob("*.tar")))
    assert after - 1 - 8 - 4 <= done < after  # the first read finds the layout, eight threads read ahead, a tar is open
    report, reads = run(1000)
    assert reads == 1 + 30 - done - (done > 7)  # those of committed shards are not read again
    assert (report.records, report.reasons) == (29, {"bad_codes": 1})
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_folder_is_gone_on_with_only_if_it_is_the_same_import(two_folders, tmp_path):
    codes, features = some(32, 8)
    places = two_folders({"a": codes}, {"a": features})
    import_shards(out=str(tmp_path / "out"), **places, **TINY)
    again = import_shards(out=str(tmp_path / "out"), **places, **TINY)
    assert again.already_finished
    for change, words in (
        ({"min_seconds": 0.3}, "min_seconds: 0.2 != 0.3"),
        ({"vision_hash": None, "vision": "other"}, "vision: tiny != other"),
    ):
        with pytest.raises(UserError, match=f"made with other settings .*{words}"):
            import_shards(out=str(tmp_path / "out"), **places, **(TINY | change))
    two_folders({"b": codes}, {"b": features})
    with pytest.raises(UserError, match=r"made of other inputs \(1 then, 2 now; the first new one is b\)"):
        import_shards(out=str(tmp_path / "out"), **places, **TINY)


@pytest.mark.parametrize("name", ["report.json", "index.npy", "label_ids.npy", "codebooks.safetensors"])
@pytest.mark.parametrize("level", [0, SIZE])
def test_a_users_own_files_are_refused_and_kept(two_folders, tmp_path, name, level):
    codes, features = some(32, 8)
    own = tmp_path / "out" / name
    own.parent.mkdir()
    own.write_text("mine")
    # Codes that are out of range give no record; then the report alone would be written.
    gives_none = level > 0 and name != "report.json"
    with pytest.raises(UserError, match="not one of 1 inputs" if gives_none else name):
        import_shards(out=str(tmp_path / "out"), **two_folders({"a": codes + level}, {"a": features}), **TINY)
    assert own.read_text() == "mine"


# ---- whose codes, whose features ----


def test_weights_that_nobody_states_fit_no_others(two_folders, extracted, tmp_path, capsys):
    codes, features = some(32, 8)
    places = two_folders({"a": codes}, {"a": features})
    known = vision_info("tiny").weight_hash
    for name, change in (("x", {}), ("y", {}), ("z", {"vision": "other"}), ("h", {"vision_hash": "0" * 64})):
        import_shards(out=str(tmp_path / name), **places, **(TINY | {"vision": "eva"} | change))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].startswith("vision eva: weights not stated, so that vab generate and its like will refuse")
    x, y, z, h = (ShardDataset(tmp_path / name).spec for name in "xyzh")
    assert x.vision_hash == NOT_STATED
    assert x == y
    assert x.differences(z) == ["vision: eva != other"]
    assert x.differences(h) == [f"vision_hash: not stated != {'0' * 64}"]
    assert x.differences(extracted.spec) == ["vision: eva != tiny", f"vision_hash: not stated != {known}"]
    with pytest.raises(UserError, match="vision_hash: not stated != 0000"):
        ShardDataModule(str(tmp_path / "x"), str(tmp_path / "h"), num_workers=0)


def test_a_model_of_unstated_weights_is_given_no_media(extracted, tmp_path):
    spec, codebooks = extracted.spec, load_codec("tiny").codebooks()
    unstated = save_model(tmp_path / "u.ckpt", replace(spec, vision_hash=NOT_STATED), codebooks)
    with pytest.raises(UserError, match=r"imported features of tiny, weights not stated.*--vision_weights FILE"):
        Generator.load(unstated, device="cpu")
    other = save_model(tmp_path / "o.ckpt", replace(spec, vision_hash="0" * 64), codebooks)
    with pytest.raises(UserError, match=f"weights 000000000000, but {spec.vision_hash[:12]} is installed"):
        Generator.load(other, device="cpu")
    stated = Generator.load(save_model(tmp_path / "s.ckpt", spec, codebooks), device="cpu")
    assert stated.vision.weight_hash == load_vision("tiny").weight_hash
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"imported codes of tiny, weights not stated.*--codec_weights"):
        load_encoders(replace(spec, codec_hash=NOT_STATED), cpu, audio=True, video=False)
    assert load_encoders(replace(spec, codec_hash=NOT_STATED), cpu, audio=False, video=True).codec is None


def test_codebooks_do_without_the_codecs_weights(two_folders, tmp_path):
    table = torch.randn(4, 2048, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "t.npy", table.double().numpy())
    safetensors.torch.save_file({"tokens": table}, tmp_path / "t.safetensors")
    codes, features = some(32, 8)
    places = two_folders({"a": codes + 1700}, {"a": features})
    settings = TINY | {"codec": "audiogen_16khz"}
    for name, file in (("one", "t.npy"), ("two", "t.safetensors")):
        import_shards(out=str(tmp_path / name), codebooks=str(tmp_path / file), **places, **settings)
    first, second = ShardDataset(tmp_path / "one"), ShardDataset(tmp_path / "two")
    assert first.spec == second.spec
    assert (first.spec.codec_hash, first.spec.sample_rate, first.spec.num_steps) == (NOT_STATED, 16000, 32)
    torch.testing.assert_close(first.codebooks, table)
    known = settings | {"codec_hash": "1" * 64, "out": str(tmp_path / "three")}
    import_shards(codebooks=str(tmp_path / "one"), **places, **known)
    assert ShardDataset(tmp_path / "three").spec == replace(first.spec, codec_hash="1" * 64)
    facts = codec_info("audiogen_16khz", codebooks=str(tmp_path / "three" / "codebooks.safetensors"))
    assert facts.weight_hash == "1" * 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "opus"}, "unknown codec 'opus': codes can be imported of tiny, "),
        ({"name": "tiny", "weight_hash": "ff"}, "--codec_hash must be a SHA-256, .*got 'ff'"),
        ({"name": "tiny", "weight_hash": "f" * 64}, f"--codec_hash is {'f' * 64}, but the weights have "),
        ({"name": "tiny", "codebooks": "x.npy"}, "codec tiny ships with its weights: leave out --codebooks"),
        ({"name": "dac_16khz", "codebooks": "x.npy", "weights": "y"}, "both give the codebooks: leave one out"),
        ({"name": "dac_16khz", "codebooks": "x.npy"}, "codebooks x.npy cannot be read: .*No such file"),
        ({"name": "dac_16khz", "codebooks": "x.pt"}, "must be a .npy or .safetensors file"),
        (
            {"name": "dac_16khz", "codebooks": "{}/small.npy"},
            r"K, S = \(12, 1024\) for codec dac_16khz, got \(4, 8, 2\)",
        ),
        ({"name": "dac_16khz", "codebooks": "{}/flat.npy"}, r"must be finite floats \(K, S, code_dim\), got .*\(8,\)"),
        ({"name": "dac_16khz", "codebooks": "{}/two.safetensors"}, "cannot be read: no tensor 'codebooks'"),
        ({"name": "dac_16khz", "codebooks": "{}/tiny"}, "are those of codec tiny, not of --codec dac_16khz"),
    ],
)
def test_a_codec_that_is_not_known_is_refused(arguments, words, extracted, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((4, 8, 2), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(8, np.float32))
    safetensors.torch.save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / "tiny").symlink_to(extracted.folder)
    with pytest.raises(UserError, match=words):
        codec_info(**{name: value.format(tmp_path) for name, value in arguments.items()})


def test_a_vision_encoder_is_what_the_user_says_unless_it_is_here():
    assert vision_info("eva clip, 5 fps").weight_hash == NOT_STATED
    assert vision_info("eva", None, "a" * 64, 768).feature_dim == 768
    tiny = vision_info("tiny")
    assert (tiny.weight_hash, tiny.feature_dim) == (load_vision("tiny").weight_hash, CHANNELS)
    for arguments, words in (
        (("tiny", None, "a" * 64), "--vision_hash is a+, but the weights have"),
        (("tiny", None, None, 5), "has features of 128 channels, got 5"),
        ((" ",), "must name what made the features"),
        (("eva", None, None, 0), "--feature_dim must be 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            vision_info(*arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_video_fps": 25.0}, "--target_video_fps 25 is more than the 12.5 frames per second that there are"),
        ({"video_fps": 0.0}, "video_fps must be above 0"),
        ({"min_seconds": 2.0}, "longer than a segment"),
        ({"max_difference_seconds": -1.0}, "--max_difference_seconds must be 0 or more"),
        ({"segments": "middle"}, "segments must be all or centre"),
        ({"records_per_shard": 0}, "records_per_shard must be 1 or more"),
        ({"hop_seconds": 0.01}, "--hop_seconds must be a step of the codes or more, 0.02 s, got 0.01"),
    ],
)
def test_settings_that_make_no_sense(two_folders, tmp_path, change, words):
    codes, features = some(32, 8)
    with pytest.raises(UserError, match=words):
        import_shards(out=str(tmp_path / "out"), **two_folders({"a": codes}, {"a": features}), **(TINY | change))
    assert not (tmp_path / "out").exists()


def test_names_that_do_not_meet_are_shown(two_folders, tmp_path):
    codes, features = some(32, 8)
    places = two_folders({"x/a": codes}, {"a": features})
    words = "no recording has both codes and features: .*codes has such as 'x/a', .*features such as 'a'"
    with pytest.raises(UserError, match=words):
        import_shards(out=str(tmp_path / "out"), **places, **TINY)
