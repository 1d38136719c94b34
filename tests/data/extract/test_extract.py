import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from small_media import read_segment
from vab.commands.extract import extract
from vab.data.extract.cutting import Cutting, LeftOut, Segment
from vab.data.extract.decoders import DecodingPool, Ended, Job
from vab.data.extract.encode import Encoders
from vab.data.extract.parts import Settings
from vab.data.extract.report import ExtractionReport
from vab.data.extract.run import extract_sources
from vab.data.inputs.listing import files_below, find_sources
from vab.data.media.write import write_video, write_wav
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.format import Left
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError

RATE, FPS = 16000, 4
SHORT = {"segment_seconds": 1.0, "video_fps": 4.0, "min_seconds": 0.5, "num_workers": 0, "device": "cpu"}


def video(path, seconds, pitch, *, loudness=0.3, sound_seconds=None):
    """A tone and a grey that both follow from `pitch`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.zeros((round(seconds * FPS), 32, 32, 3), np.uint8)
    frames[:] = np.linspace(0, 100, len(frames)).astype(np.uint8)[:, None, None, None] + pitch // 20
    times = np.arange(round((sound_seconds or seconds) * RATE)) / RATE
    sound = loudness * np.sin(2 * np.pi * pitch * times)
    write_video(path, frames, FPS, None if sound_seconds == 0 else sound.astype(np.float32), RATE)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of two classes in folders, and one file of each kind that cannot be used."""
    root = tmp_path_factory.mktemp("media")
    for number in range(4):
        video(root / "low" / f"a.{number}.mp4", 1.0, 200 + 20 * number)
        video(root / "high" / f"b{number}.mp4", 2.6, 1000 + 100 * number)
    video(root / "high" / "mute.mp4", 1.0, 500, sound_seconds=0)
    video(root / "low" / "silent.mp4", 1.0, 500, loudness=1e-5)
    video(root / "low" / "blink.mp4", 0.25, 500)
    write_wav(root / "low" / "sound.wav", 0.1 * np.ones(RATE, np.float32), RATE)
    (root / "low" / "broken.mp4").write_text("not a video")
    (root / "low" / "notes.txt").write_text("no media file at all")
    return root


REASONS = {"no_audio": 1, "silent": 1, "too_short": 1, "no_video": 1, "unreadable": 1}


def bytes_of(out):
    there = {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    there["report.json"] = there["report.json"].replace(str(out).encode(), b"OUT")
    return there


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """The folder, extracted in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, extract(str(folder), str(out), labels_from="folder", inputs_per_part=4, **SHORT)


def test_every_input_ends_in_the_shards_or_in_the_report(done, capsys):
    out, report = done
    assert (report.inputs, report.kept, report.reasons) == (13, 8, REASONS)
    assert report.records == 4 * 1 + 4 * 3  # 2.6 s are two whole seconds and one segment of 0.6 s
    written = json.loads((out / "report.json").read_text())
    assert written["reasons"] == REASONS
    assert {entry["source"]: entry["reason"] for entry in written["left_out"]} == {
        "high/mute.mp4": "no_audio",
        "low/silent.mp4": "silent",
        "low/blink.mp4": "too_short",
        "low/sound.wav": "no_video",
        "low/broken.mp4": "unreadable",
    }
    assert "5 of 13 inputs left out" in str(report)


def test_records_are_what_the_frozen_networks_make_of_the_media(done, folder):
    data = ShardDataset(done[0])
    records = {(data.record(i)["id"], data.record(i)["start_seconds"]): i for i in range(len(data))}
    assert len(records) == 16
    number = records["high/b2", 1.0]
    batch = data.__getitems__([number])
    segment = read_segment(folder / "high" / "b2.mp4", RATE, 4.0, start=1.0, seconds=1.0)
    codec, vision = load_codec("tiny"), load_vision("tiny")
    codes = codec.encode(torch.from_numpy(segment.waveform)[None, None])
    features = vision.encode(vision.preprocess(segment.frames))
    assert torch.equal(batch.codes, codes)
    assert torch.equal(batch.features[0], features.half().float())
    assert data.record(number)["labels"] == ["high"]
    assert tuple(data.labels) == ("high", "low")
    assert torch.equal(data.codebooks, codec.codebooks())


def test_a_short_last_segment_is_padded_and_its_valid_lengths_recorded(done):
    data = ShardDataset(done[0])
    for index in range(len(data)):
        record = data.record(index)
        short = record["start_seconds"] == 2.0
        assert record["steps"] == (load_codec("tiny").steps_for(round(0.6 * RATE)) if short else data.spec.num_steps)
        # Frames are shown at 0.125, 0.375, 0.625 and 0.875 s: the video's last frame lasts from 0.25 to 0.5 s.
        assert record["frames"] == (2 if short else 4)


def test_a_finished_folder_is_left_as_it_is(done, folder):
    out, first = done
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = extract(str(folder), str(out), labels_from="folder", inputs_per_part=4, **SHORT)
    assert again.already_finished
    assert (again.records, again.left_out) == (first.records, first.left_out)
    assert "1 inputs that could not be read before were tried again, in vain" in str(again)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"min_seconds: 0.5 != 0.7"):
        extract(str(folder), str(out), labels_from="folder", **(SHORT | {"min_seconds": 0.7}))


def test_workers_and_batches_leave_no_trace(done, folder, tmp_path):
    settings = SHORT | {"num_workers": 2, "batch_size": 3}
    extract(str(folder), str(tmp_path / "out"), labels_from="folder", inputs_per_part=4, **settings)
    assert bytes_of(tmp_path / "out") == bytes_of(done[0])


def test_centre_takes_one_segment_from_the_middle(folder, tmp_path):
    report = extract(str(folder / "high"), str(tmp_path / "out"), segments="centre", **SHORT)
    data = ShardDataset(tmp_path / "out")
    assert report.records == 4
    # A video of 10 frames at 4 per second lasts 2.5 s.
    assert [data.record(i)["start_seconds"] for i in range(4)] == pytest.approx([0.75] * 4, abs=0.05)


def test_a_hop_makes_segments_overlap(folder, tmp_path):
    extract(str(folder / "high"), str(tmp_path / "out"), hop_seconds=0.8, **SHORT)
    data = ShardDataset(tmp_path / "out")
    assert [data.record(i)["start_seconds"] for i in range(3)] == pytest.approx([0.0, 0.8, 1.6])
    assert len(data) == 12


def test_still_pictures_can_be_left_out(tmp_path):
    frames = np.full((8, 32, 32, 3), 90, np.uint8)
    tone = 0.3 * np.sin(np.arange(2 * RATE) / 5).astype(np.float32)
    write_video(tmp_path / "m" / "still.mp4", frames, FPS, tone, RATE)
    video(tmp_path / "m" / "moves.mp4", 2.0, 400)
    kept = extract(str(tmp_path / "m"), str(tmp_path / "kept"), **SHORT)
    left = extract(str(tmp_path / "m"), str(tmp_path / "left"), still_pictures="leave_out", **SHORT)
    assert (kept.kept, left.kept, left.reasons) == (2, 1, {"still": 1})


def test_single_segments_are_left_out_with_their_start(tmp_path):
    path = tmp_path / "m" / "half.mp4"
    path.parent.mkdir()
    tone = 0.3 * np.sin(np.arange(2 * RATE) / 5).astype(np.float32)
    tone[RATE - 200 :] = 0
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    write_video(path, frames, FPS, tone, RATE)
    report = extract(str(path.parent), str(tmp_path / "out"), **SHORT)
    (entry,) = report.left_out
    assert (entry.source, entry.reason, entry.start_seconds) == ("half.mp4", "silent", 1.0)
    assert (report.inputs, report.kept, report.records) == (1, 1, 1)


# ---- what to extract ----


def test_a_csv_names_files_labels_starts_and_ids(folder, tmp_path):
    rows = [
        "file,labels,start,id",
        f"{folder}/high/b1.mp4,tone; high,1.5,first",
        f"{folder}/high/b1.mp4,tone,,second",
        f"{folder}/gone.mp4,,,third",
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    report = extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SHORT)
    data = ShardDataset(tmp_path / "out")
    found = [
        (data.record(i)["id"], data.record(i)["start_seconds"], data.record(i)["labels"]) for i in range(len(data))
    ]
    assert found == [("first", 1.5, ["tone", "high"])] + [("second", float(k), ["tone"]) for k in range(3)]
    assert tuple(data.labels) == ("high", "tone")
    assert report.reasons == {"missing": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name\nx.mp4\n", "needs a column 'file'"),
        ("file,start\nx.mp4,soon\n", "line 2: start must be seconds"),
        ("file\nx.mp4\nx.mp4\n", "'x.mp4' more than once"),
        ("file,id\nx.mp4,1\ny.mp4,1\n", "id '1' and one start to several inputs"),
        ("file,label\nx.mp4,dog\n", "call it 'labels'"),
        ("file\n", "lists no file"),
        ("file\nx.mp4,dog\n", "more values than columns"),
        ("file,Labels\nx.mp4,dog\n", "has a column 'Labels': call it 'labels', or say labels_from none"),
        ("file,lable\nx.mp4,dog\n", "has a column 'lable': call it 'labels'"),
        ("file,strat\nx.mp4,1\n", "has a column 'strat': call it 'start', or give it a name less like that"),
        ("file,labels,ID\nx.mp4,dog,a\n", "has a column 'ID': call it 'id'"),
        ("file,labels, labels\nx.mp4,dog,cat\n", "more than one column 'labels'"),
        ("file,labels,start,id\nx.mp4,dog,1,a\ny.mp4,do", r"line 3: 2 of 4 values \(file, labels, start, id\)"),
    ],
)
def test_a_csv_that_cannot_be_understood(tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        find_sources(tmp_path / "list.csv")


def test_blanks_and_other_columns_of_a_csv_do_not_count(tmp_path):
    (tmp_path / "list.csv").write_text('file, labels , start,title,mid\nx.mp4, "a dog; cow", 1.5,Some,/m/1\n\n')
    (source,) = find_sources(tmp_path / "list.csv")
    assert (source.file, source.labels, source.start) == ("x.mp4", ("a dog", "cow"), 1.5)
    (tmp_path / "list.csv").write_text("file,Labels\nx.mp4,dog\n")
    assert find_sources(tmp_path / "list.csv", "none")[0].labels == ()


def test_files_of_one_stem_keep_their_suffix_in_their_id(tmp_path):
    for name in ("a.mp4", "a.mkv", "sub/b.mp4", ".hidden/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [source.id for source in find_sources(tmp_path)] == ["a.mkv", "a.mp4", "sub/b"]
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    (tmp_path / "sub-2").symlink_to(tmp_path / ".hidden")
    assert files_below(tmp_path) == ["a.mkv", "a.mp4", "sub-2/c.mp4", "sub/b.mp4"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segment_seconds": 0.0}, "segment_seconds must be above 0"),
        ({"min_seconds": 2.0}, "longer than a segment"),
        ({"video_fps": 0.1}, "has no frame"),
        ({"segments": "middle"}, "segments must be all or centre"),
        ({"batch_size": 0}, "batch_size must be 1"),
        ({"hop_seconds": 0.0004}, "hop_seconds must be 0.001 or more, got 0.0004: records are named by their start"),
        ({"silence_db": float("-inf")}, "silence_db must be a finite number of dBFS, 0 or less .*, got -inf"),
        ({"silence_db": float("nan")}, "silence_db must be a finite number of dBFS, 0 or less .*, got nan"),
        ({"device": "abacus"}, "device must be"),
        ({"codec": "gramophone"}, "unknown codec"),
        ({"labels_from": "csv"}, "is a folder"),
    ],
)
def test_settings_that_make_no_sense(folder, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        extract(str(folder), str(tmp_path / "out"), **(SHORT | change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("C:/x", "is not a folder of this machine"),
        ("C:\\x", "is not a folder of this machine"),
        ("https://host/x", r"is written to a folder of this machine or to an object store \(s3://,"),
        ("ftp2://host/x", "cannot read ftp2:// addresses"),
    ],
)
def test_a_place_that_is_not_here_never_becomes_a_folder(folder, tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        extract(str(folder), out, **SHORT)
    assert not any(tmp_path.iterdir())


def test_when_nothing_can_be_used_the_report_says_why(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"not one of 1 inputs gave a record \(1 unreadable\)"):
        extract(str(tmp_path / "m"), str(tmp_path / "out"), **SHORT)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["reasons"] == {"unreadable": 1}
    video(tmp_path / "m" / "x.mp4", 1.0, 400)
    assert extract(str(tmp_path / "m"), str(tmp_path / "out"), **SHORT).records == 1


def test_where_all_is_sound_alone_it_says_how_to_take_it(tmp_path):
    (tmp_path / "m").mkdir()
    write_wav(tmp_path / "m" / "a.wav", 0.1 * np.ones(RATE, np.float32), RATE)
    with pytest.raises(UserError, match="no video track; to take files of sound alone: --without_video keep"):
        extract(str(tmp_path / "m"), str(tmp_path / "out"), **SHORT)


def test_files_that_are_no_inputs_are_counted(tmp_path):
    video(tmp_path / "m" / "x.mp4", 1.0, 400)
    for name in ("a.wv", "sub/B.WV", "c.wv", "d.wv", "x.txt", ".DS_Store", "bare"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).touch()
    report = extract(str(tmp_path / "m"), str(tmp_path / "out"), **SHORT)
    assert (report.inputs, report.exit_status) == (1, 0)
    line = "7 files ignored, by suffix no media: 4 .wv (a.wv, c.wv, d.wv, ...), 1 no suffix (bare), 1 .txt, 1 hidden"
    assert line in str(report)
    again = extract(str(tmp_path / "m"), str(tmp_path / "out"), **SHORT)
    assert line in str(again)
    written = json.loads((tmp_path / "out" / "report.json").read_text())["ignored"]
    assert written[0] == {"suffix": ".wv", "files": 4, "such_as": ["a.wv", "c.wv", "d.wv"]}
    assert sum(kind["files"] for kind in written) == 7


# ---- interruptions ----


class Stop(BaseException):
    """Stands for a kill: nothing of the run's own code sees it coming."""


@pytest.mark.parametrize("after", [1, 3, 7, 12])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_bytes(done, folder, tmp_path, after):
    sources = find_sources(folder, "folder")
    codec, vision = load_codec("tiny"), load_vision("tiny")
    encoders = Encoders(codec, vision, torch.device("cpu"))
    seen = 0

    def stopping(frames):
        nonlocal seen
        seen += 1
        if seen > 4 * after:  # a segment has four pictures
            raise Stop
        return vision.preprocess(frames)

    def run(preprocess):
        cutting = Cutting(1.0, RATE, 4.0, "all", 1.0, 0.5, -60.0, "keep", preprocess)
        return extract_sources(sources, tmp_path / "out", encoders, cutting, Settings(0, 2, 60.0, 4))

    with pytest.raises(Stop):
        run(stopping)
    decoded = 0

    def counting(frames):
        nonlocal decoded
        decoded += 1
        return vision.preprocess(frames)

    report = run(counting)
    assert bytes_of(tmp_path / "out") == bytes_of(done[0])
    assert (report.records, report.reasons) == (16, REASONS)
    # Of what was decoded, only the part in the making is decoded again: four files of up to three segments.
    assert decoded <= 4 * (16 - after + 4 * 3)


def test_other_settings_than_those_of_the_interrupted_run_are_refused(folder, tmp_path):
    sources, out = find_sources(folder, "folder"), tmp_path / "out"
    vision = load_vision("tiny")
    encoders = Encoders(load_codec("tiny"), vision, torch.device("cpu"))

    def stopping(frames):
        raise Stop

    cutting = Cutting(1.0, RATE, 4.0, "all", 1.0, 0.5, -60.0, "keep", stopping)
    with pytest.raises(Stop):
        extract_sources(sources, out, encoders, cutting, Settings(0, 1, 60.0, 4))
    with pytest.raises(UserError, match=r"begun with other settings \(segment_seconds: 1.0 != 0.5"):
        extract(str(folder), str(out), labels_from="folder", **(SHORT | {"segment_seconds": 0.5}))


SCRIPT = """
import sys
from vab.commands.extract import extract
if __name__ == "__main__":
    extract(sys.argv[1], sys.argv[2], segment_seconds=1.0, video_fps=4.0, min_seconds=0.5, num_workers=2,
            labels_from="folder", inputs_per_part=4, device="cpu", batch_size=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_to_the_same_bytes(done, folder, tmp_path, how):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), str(out)]
    stopped = 0

    for _ in range(3):  # each time as soon as it has come a little further
        parts = len(list(out.glob("parts/0*.json")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(out.glob("parts/0*.json"))) > parts or (not stopped and (out / "parts" / "head.json").exists()):
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, how)
        if process.wait() != 0:
            stopped += 1
            # One that was stopped after its last file is written has ended all the same.
            assert (out / "manifest.json").exists() or not (out / "report.json").exists()
    assert stopped >= 1
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert bytes_of(out) == bytes_of(done[0])
    assert json.loads((out / "report.json").read_text())["reasons"] == REASONS


# ---- workers that die or hang ----


class Trap:
    """Prepares frames, but for one grey of which the process dies, or never comes back."""

    def __init__(self, preprocess, grey, dies):
        self.preprocess, self.grey, self.dies = preprocess, grey, dies

    def __call__(self, frames):
        if abs(int(frames[0, 16, 16, 0]) - self.grey) <= 2:
            if self.dies:
                os._exit(9)
            time.sleep(3600)
        return self.preprocess(frames)


@pytest.mark.parametrize("dies", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_file_that_kills_or_hangs_a_worker_is_left_out_alone(tmp_path, dies):
    paths = [video(tmp_path / f"{number}.mp4", 1.0, 400 + 400 * number) for number in range(4)]
    trap = Trap(load_vision("tiny").resizer, (400 + 400 * 2) // 20, dies)
    cutting = Cutting(1.0, RATE, 4.0, "all", 1.0, 0.5, -60.0, "keep", trap)
    pool = DecodingPool(cutting, num_workers=2, timeout=60.0 if dies else 1.0)
    items = list(pool.run(Job(number, path) for number, path in enumerate(paths)))
    kinds = sorted((number, type(item)) for number, item in items if not isinstance(item, Ended))
    assert sorted(number for number, item in items if isinstance(item, Ended)) == [0, 1, 2, 3]
    assert kinds == [(0, Segment), (1, Segment), (2, LeftOut), (3, Segment)]
    (left_out,) = [item for _, item in items if isinstance(item, LeftOut)]
    assert left_out.reason == "unreadable"
    assert ("crashed (exit code 9)" if dies else "nothing was decoded for 1 s") in left_out.detail


# ---- real videos ----


def test_the_report_reads_well():
    left_out = [Left("a", "silent", "", 2.0), Left("b", "silent"), Left("c", "no_audio")]
    report = ExtractionReport("out", 5, 3, 7, left_out)
    assert str(report).splitlines() == [
        "out: 7 records of 3 inputs",
        "2 of 5 inputs left out:",
        "  1 no_audio: c",
        "  1 silent: b",
        "1 single segments left out: 1 silent",
        "each with its reason in out/report.json",
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_odd_media_end_in_the_shards_or_the_report(shared_data, tmp_path):
    files = [p for p in (shared_data / "odd-media").rglob("*") if p.is_file() and "very-long" not in p.name]
    settings = SHORT | {"num_workers": 2}
    report = extract(str(shared_data / "odd-media"), str(tmp_path / "out"), segments="centre", **settings)
    known = len(find_sources(shared_data / "odd-media"))
    assert report.inputs == known <= len(files) + 1
    assert report.kept == report.records == len(ShardDataset(tmp_path / "out"))
    assert report.kept + sum(report.reasons.values()) == known
    assert set(report.reasons) == {"unreadable", "no_audio", "no_video", "too_short", "silent"}
