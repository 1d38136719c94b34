"""Each flag of ``vab extract`` and ``vab shards`` changes the shards, their manifest or the report as it says."""

import itertools
import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from flags import arguments_of, each_flag, flip
from small_media import tone, video
from tone_shards import short_spec, write_shards
from vab.commands.extract import extract
from vab.commands.shards import import_shards, index_shards, merge_shards, show_shards, verify_shards
from vab.data.extract.decoders import DecodingPool
from vab.data.extract.encode import Encoders
from vab.data.media.write import write_video, write_wav
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError

HASH = "0123456789abcdef" * 4


def reasons(report):
    """Why inputs or segments were left out."""
    return {left.reason for left in report.left_out}


class Extract:
    """Two videos, of one segment of 0.64 s and of two."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        video(folder / "in" / "one" / "a.mp4", 1.28, seed=1)
        video(folder / "in" / "two" / "b.mp4", 0.64, seed=2)

    def run(self, **changes):
        """Run the command; gives its report and the shards."""
        settings = {
            "media": str(self.folder / "in"), "out": str(self.folder / str(next(self.numbers))), "device": "cpu",
            "segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0,
        } | changes  # fmt: skip
        return extract(**settings), ShardDataset(settings["out"])

    def with_file(self, name, write):
        """A folder of one of the videos and of a file that is written."""
        place = self.folder / f"with_{name}"
        place.mkdir()
        shutil.copy(self.folder / "in" / "two" / "b.mp4", place / "b.mp4")
        write(place / name)
        return str(place)

    def table(self, place, *lines):
        (place / "list.csv").write_text("\n".join(lines) + "\n")
        return str(place / "list.csv")

    def media(self):
        assert len(self.run()[1]) == 3
        assert len(self.run(media=str(self.folder / "in" / "two"))[1]) == 1

    def out(self):
        self.run(out=str(self.folder / "mine"))
        assert (self.folder / "mine" / "manifest.json").is_file()

    def codec(self):
        assert [self.run(codec=name)[1].spec.num_codebooks for name in ("tiny", "tiny8")] == [4, 8]

    def vision(self):
        with pytest.raises(UserError, match="nobody"):
            self.run(vision="nobody")

    def segment_seconds(self):
        shards = self.run(segment_seconds=0.32)[1]
        assert (len(shards), shards.spec.segment_seconds) == (6, 0.32)

    def video_fps(self):
        assert [self.run(video_fps=fps)[1].spec.num_frames for fps in (12.5, 6.25)] == [8, 4]

    def segments(self):
        shards = self.run(segments="centre")[1]
        assert len(shards) == 2
        assert 0.2 < max(shards.record(number)["start_seconds"] for number in range(2)) < 0.4

    def hop_seconds(self):
        shards = self.run(hop_seconds=0.32)[1]
        starts = [shards.record(number)["start_seconds"] for number in range(len(shards))]
        assert sorted(starts) == pytest.approx([0.0, 0.0, 0.32, 0.64])

    def min_seconds(self):
        media = self.with_file("short.mp4", lambda path: video(path, 0.4, seed=3))
        assert reasons(self.run(media=media)[0]) == set()
        assert reasons(self.run(media=media, min_seconds=0.5)[0]) == {"too_short"}

    def silence_db(self):
        media = self.with_file("quiet.mp4", lambda path: self.quiet(path, 0.01))
        assert reasons(self.run(media=media)[0]) == set()
        assert reasons(self.run(media=media, silence_db=-40.0)[0]) == {"silent"}

    def quiet(self, path, gain):
        frames = np.random.default_rng(5).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
        write_video(path, frames, 16, gain * tone(0.64), 16_000)

    def still_pictures(self):
        frames = np.full((10, 48, 64, 3), 90, np.uint8)
        media = self.with_file("still.mp4", lambda path: write_video(path, frames, 16, tone(0.64), 16_000))
        assert [len(self.run(media=media, still_pictures=choice)[1]) for choice in ("keep", "leave_out")] == [2, 1]

    def duplicates(self):
        media = self.with_file("copy.mp4", lambda path: shutil.copy(path.with_name("b.mp4"), path))
        assert [len(self.run(media=media, duplicates=choice)[1]) for choice in ("keep", "leave_out")] == [2, 1]

    def without_video(self):
        media = self.with_file("sound.wav", lambda path: write_wav(path, tone(0.64), 16_000))
        assert [len(self.run(media=media, without_video=choice)[1]) for choice in ("keep", "leave_out")] == [2, 1]

    def labels_from(self):
        assert [tuple(self.run(labels_from=choice)[1].labels) for choice in ("folder", "none")] == [("one", "two"), ()]

    def vocabulary(self):
        names = self.folder / "names.txt"
        names.write_text("two\none\nthree\n")
        assert tuple(self.run(labels_from="folder", vocabulary=str(names))[1].labels) == ("two", "one", "three")

    def media_root(self):
        table = self.table(self.folder, "file", "b.mp4")
        assert len(self.run(media=table, media_root=str(self.folder / "in" / "two"))[1]) == 1

    def codec_weights(self):
        with pytest.raises(UserError, match=r"codec tiny ships with its weights: leave out mine\.bin"):
            self.run(codec_weights="mine.bin")

    def vision_weights(self):
        with pytest.raises(UserError, match=r"vision encoder tiny ships with its weights: leave out mine\.bin"):
            self.run(vision_weights="mine.bin")

    def num_workers(self):
        with arguments_of(DecodingPool) as (arguments, _):
            self.run(num_workers=3)
        assert arguments[1] == 3

    def batch_size(self):
        with pytest.MonkeyPatch.context() as patch:
            sizes, encode = [], Encoders.encode

            def noting(encoders, segments, num_frames):
                sizes.append(len(segments))
                return encode(encoders, segments, num_frames)

            patch.setattr(Encoders, "encode", noting)
            self.run(batch_size=2)
            self.run(batch_size=16)
        assert sizes == [2, 1, 3]

    def inputs_per_part(self):
        out = self.folder / "one_each"
        self.run(out=str(out), inputs_per_part=1)
        assert len(list(out.glob("*.tar"))) == 2  # those of a file stay together

    devices = "tests/commands/test_extract_command.py::test_two_devices_make_what_one_makes"

    part = "tests/commands/test_extract_engines.py::test_tasks_of_any_order_make_what_one_makes"
    engine = "tests/commands/test_extract_engines.py::test_ray_makes_what_one_process_makes"
    actors = "tests/commands/test_extract_engines.py::test_ray_makes_what_one_process_makes"

    def retry(self):
        media = Path(self.with_file("retried.mp4", lambda path: path.write_text("no video")))
        out = str(self.folder / "retried")
        self.run(media=str(media), out=out)
        shutil.copy(media / "b.mp4", media / "retried.mp4")
        assert [len(self.run(media=str(media), out=out, retry=retry)[1]) for retry in (False, True)] == [1, 2]

    def strict(self):
        media = self.with_file("strict.mp4", lambda path: path.write_text("no video"))
        assert [self.run(media=media, strict=strict)[0].exit_status for strict in (False, True)] == [0, 3]

    def file_timeout(self):
        with arguments_of(DecodingPool) as (arguments, _):
            self.run(file_timeout=7.0)
        assert arguments[2] == 7.0

    def device(self):
        with pytest.raises(UserError, match="cuda:99"):
            self.run(device="cuda:99")


@pytest.fixture(scope="module")
def extracting(tmp_path_factory):
    return Extract(tmp_path_factory.mktemp("extract_flags"))


@each_flag(extract)
def test_extract(request, extracting, flag):
    flip(request, extracting, flag)


class Import:
    """Two recordings of 1.28 s: codes of the tiny codec's kind, and features of 128 channels at 12.5 a second."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        for name in "ab":
            self.write(name)

    def write(self, name, steps=64, frames=16, levels=4, channels=128, place="", **more):
        """A recording's two arrays, in the folders ``codes`` and ``features`` below a place."""
        values = np.random.default_rng(len(name))
        arrays = {
            "codes": values.integers(0, 256, (levels, steps)),
            "features": values.standard_normal((frames, channels)).astype(np.float32),
        }
        for kind, array in arrays.items():
            path = self.folder / place / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if more:
                np.savez(f"{path}.npz", mine=array, **more)
            else:
                np.save(f"{path}.npy", array)
        return {kind: str(self.folder / place / kind) for kind in arrays}

    def run(self, **changes):
        """Run the command; gives its report and the shards."""
        settings = {
            "codes": str(self.folder / "codes"), "features": str(self.folder / "features"),
            "out": str(self.folder / str(next(self.numbers))), "codec": "tiny", "vision": "tiny", "video_fps": 12.5,
            "segment_seconds": 0.64, "min_seconds": 0.2,
        } | changes  # fmt: skip
        return import_shards(**settings), ShardDataset(settings["out"])

    @cached_property
    def usual(self):
        return self.run()[1]

    def codes(self):
        moved = self.folder / "moved" / "codes"
        moved.mkdir(parents=True)
        for name in "ab":
            np.save(moved / f"{name}.npy", (np.load(self.folder / "codes" / f"{name}.npy") + 1) % 256)
        shards = self.run(codes=str(moved))[1]
        assert torch.equal(shards.read([0]).codes, (self.usual.read([0]).codes + 1) % 256)

    def out(self):
        self.run(out=str(self.folder / "mine"))
        assert (self.folder / "mine" / "manifest.json").is_file()

    def codec(self):
        places = self.write("a", place="eight", levels=8)
        assert self.run(**places, codec="tiny8")[1].spec.codec == "tiny8"

    def vision(self):
        assert self.run(vision="mine")[1].spec.vision == "mine"

    def video_fps(self):
        places = self.write("a", place="fast", frames=32)
        assert self.run(**places, video_fps=25.0)[1].spec.num_frames == 16

    def features(self):
        other = self.folder / "moved" / "features"
        other.mkdir(parents=True, exist_ok=True)
        for name in "ab":
            np.save(other / f"{name}.npy", np.load(self.folder / "features" / f"{name}.npy") + 1)
        moved = self.run(features=str(other))[1].read([0]).features - self.usual.read([0]).features
        assert moved.mean() == pytest.approx(1, abs=0.01)

    def target_video_fps(self):
        assert self.run(target_video_fps=6.25)[1].spec.num_frames == 4

    def segment_seconds(self):
        assert len(self.run(segment_seconds=0.32)[1]) == 8

    def segments(self):
        shards = self.run(segments="centre")[1]
        assert [shards.record(number)["start_seconds"] for number in range(len(shards))] == [0.32, 0.32]

    def hop_seconds(self):
        assert len(self.run(hop_seconds=0.32)[1]) == 6

    def min_seconds(self):
        places = self.write("a", place="short", steps=52, frames=13)  # 1.04 s: the last segment has 0.4
        assert [len(self.run(**places, min_seconds=least)[1]) for least in (0.2, 0.5)] == [2, 1]

    def max_difference_seconds(self):
        places = self.write("a", place="apart", frames=12)
        self.write("b", place="apart")
        assert reasons(self.run(**places)[0]) == set()
        assert reasons(self.run(**places, max_difference_seconds=0.1)[0]) == {"lengths_differ"}

    def without_video(self):
        shards = self.run(features=None, without_video="keep")[1]
        assert list(shards.frames(range(len(shards)))) == [0, 0, 0, 0]

    def labels(self):
        (self.folder / "labels.csv").write_text("id,labels\nb,dog;cat\n")
        shards = self.run(labels=str(self.folder / "labels.csv"))[1]
        assert (len(shards), tuple(shards.labels)) == (2, ("cat", "dog"))

    def vocabulary(self):
        (self.folder / "some.csv").write_text("id,labels\nb,dog\n")
        (self.folder / "names.txt").write_text("dog\nbird\n")
        shards = self.run(labels=str(self.folder / "some.csv"), vocabulary=str(self.folder / "names.txt"))[1]
        assert tuple(shards.labels) == ("dog", "bird")

    def keyed(self):
        return self.write("a", place="keyed", other=np.zeros((4, 64), np.int64))

    def codes_key(self):
        self.needs_key("codes_key")

    def features_key(self):
        self.needs_key("features_key")

    def needs_key(self, flag):
        keys = {"codes_key": "mine", "features_key": "mine"}
        assert len(self.run(**self.keyed(), **keys)[1]) == 2
        with pytest.raises(UserError, match="nothing"):
            self.run(**self.keyed(), **keys | {flag: "nothing"})

    def feature_dim(self):
        wide = self.write("a", place="wide", steps=32, frames=8, channels=12)
        assert self.run(**wide, vision="mine", feature_dim=12)[1].spec.feature_dim == 12
        with pytest.raises(UserError, match="13"):
            self.run(**wide, vision="mine", feature_dim=13)

    def codec_weights(self):
        with pytest.raises(UserError, match=r"codec tiny ships with its weights: leave out mine\.bin"):
            self.run(codec_weights="mine.bin")

    def published(self, **more):
        """Codes of a codec whose weights are not here."""
        table = np.random.default_rng(0).standard_normal((4, 2048, 2)).astype(np.float32)
        np.save(self.folder / "table.npy", table)
        return table, self.run(codec="audiogen_16khz", codebooks=str(self.folder / "table.npy"), **more)[1]

    def codebooks(self):
        table, shards = self.published()
        assert torch.equal(shards.codebooks, torch.from_numpy(table))

    def codec_hash(self):
        assert self.published(codec_hash=HASH)[1].spec.codec_hash == HASH

    def vision_weights(self):
        with pytest.raises(UserError, match=r"vision encoder tiny ships with its weights: leave out mine\.bin"):
            self.run(vision_weights="mine.bin")

    def vision_hash(self):
        assert self.run(vision="mine", vision_hash=HASH)[1].spec.vision_hash == HASH

    def records_per_shard(self):
        out = self.folder / "one_each"
        self.run(out=str(out), records_per_shard=1)
        assert len(list(out.glob("*.tar"))) == 2  # those of a recording stay together

    def strict(self):
        places = self.write("a", place="strict")
        np.save(self.folder / "strict" / "codes" / "alone.npy", np.zeros((4, 64), int))
        assert [self.run(**places, strict=strict)[0].exit_status for strict in (False, True)] == [0, 3]


@pytest.fixture(scope="module")
def importing(tmp_path_factory):
    return Import(tmp_path_factory.mktemp("import_flags"))


@each_flag(import_shards)
def test_import(request, importing, flag):
    flip(request, importing, flag)


@pytest.fixture
def two_sets(tmp_path):
    """Folders of shards with 3 and with 5 records."""
    return [str(write_shards(tmp_path / str(count), short_spec(), count)) for count in (3, 5)]


def test_verify_and_info_are_of_the_folder_that_is_named(two_sets, capsys):
    for folder, count in zip(two_sets, (3, 5), strict=True):
        verify_shards(folder)
        assert f"{count} records, all as the manifest says" in capsys.readouterr().out
        show_shards(folder)
        assert json.loads(capsys.readouterr().out)["records"] == count


def test_index_takes_the_folder_and_the_spec_that_are_named(two_sets, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in Path(two_sets[1]).glob("*.tar"):
        shutil.copy(tar, bare)
    with pytest.raises(UserError, match="spec"):
        index_shards(str(bare))
    index_shards(str(bare), f"{two_sets[0]}/manifest.json")
    assert "5 records in 1 tars" in capsys.readouterr().out
    assert ShardDataset(bare).spec == short_spec()


def test_merge_joins_the_folders_that_are_named(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in "abc":
        video(folder / name / f"{name}.mp4", 0.64, seed=ord(name))
    settings = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0, "device": "cpu"}
    for name, files in (("one", "a,a\nb,b\n"), ("two", "c,a;c\n")):
        rows = files.replace(",", ".mp4,")
        (folder / f"{name}.csv").write_text("file,labels\n" + "".join(f"{row[0]}/{row}\n" for row in rows.split()))
        extract(str(folder / f"{name}.csv"), str(tmp_path / name), **settings)
    merge_shards([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "both"))
    assert "3 records of 2 data sets" in capsys.readouterr().out
    verify_shards(str(tmp_path / "both"))
    merged, parts = ShardDataset(tmp_path / "both"), [ShardDataset(tmp_path / name) for name in ("one", "two")]
    assert tuple(merged.labels) == ("a", "b", "c")
    assert [merged.label_names(n) for n in range(3)] == [["a"], ["b"], ["a", "c"]]
    assert torch.equal(merged.read(range(3)).codes, torch.cat([part.read(range(len(part))).codes for part in parts]))
    assert not (tmp_path / "both" / "parts").exists()
    with pytest.raises(UserError, match="already holds a finished data set"):
        merge_shards([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "both"))
    with pytest.raises(UserError, match="give two or more folders"):
        merge_shards([str(tmp_path / "one")], str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"key .* occurs twice"):
        merge_shards([str(tmp_path / "one"), str(tmp_path / "one")], str(tmp_path / "twice"))
    extract(str(folder / "two.csv"), str(tmp_path / "three"), **settings | {"min_seconds": 0.3})
    with pytest.raises(UserError, match=r"three cannot be merged \(min_seconds: 0.2 != 0.3\)"):
        merge_shards([str(tmp_path / "one"), str(tmp_path / "three")], str(tmp_path / "y"))
