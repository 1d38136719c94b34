"""Inputs that changed since an extraction began, files that fail late, lists that lie: nothing is lost in silence."""

import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from small_media import tone, video
from tone_shards import short_spec
from vab.commands.extract import extract
from vab.data.collector import Settings
from vab.data.decoding_pool import Again, Cutting, DecodingPool, Ended, Job, LeftOut, Segment, decode
from vab.data.extract import Encoders, extract_sources
from vab.data.media import write_video
from vab.data.records import ShardDataset
from vab.data.report import ExtractionReport
from vab.data.results import Result, ResultLog, Results
from vab.data.sources import find_sources
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError

SETTINGS = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0, "device": "cpu"}


class Stop(Exception):  # noqa: N818 - not an error
    """Stands for a kill: nothing of the run's own code sees it coming."""


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(6):
        video(folder / f"{number}.mp4", 0.64, seed=number)
    return folder


def interrupted(listed, out, after, records_per_shard=1):
    """A run that is cut off after some files."""
    vision, seen = load_vision("tiny"), []

    def stopping(frames):
        seen.append(1)
        if len(seen) > 8 * after:
            raise Stop
        return vision.preprocess(frames)

    cutting = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "keep", stopping)
    encoders = Encoders(load_codec("tiny"), vision, torch.device("cpu"))
    with pytest.raises(Stop):
        extract_sources(find_sources(listed), out, encoders, cutting, Settings(0, 1, 60.0, records_per_shard))


def listing(tmp_path, media, labels, name="list.csv"):
    path = tmp_path / name
    rows = [f"{media}/{number}.mp4,{label}" for number, label in enumerate(labels)]
    path.write_text("\n".join(["file,labels", *rows]) + "\n")
    return path


def test_labels_that_were_mended_before_their_shard_was_written_are_taken(media, tmp_path):
    out = tmp_path / "out"
    interrupted(listing(tmp_path, media, "abcabc"), out, 3, records_per_shard=100)
    mended = listing(tmp_path, media, "cbaabc")
    extract(str(mended), str(out), records_per_shard=100, **SETTINGS)
    data = ShardDataset(out)
    assert [data.label_names(number) for number in range(6)] == [[label] for label in "cbaabc"]


def test_labels_that_changed_after_their_shard_was_written_are_refused(media, tmp_path):
    out = tmp_path / "out"
    interrupted(listing(tmp_path, media, "abcabc"), out, 3)
    with pytest.raises(UserError, match=r"holds what .*0\.mp4 was before \(2 such\): its size, labels or id"):
        extract(str(listing(tmp_path, media, "cbaabc")), str(out), records_per_shard=1, **SETTINGS)
    # Refused again, and gone on with once they are what they were.
    with pytest.raises(UserError, match=r"2 such"):
        extract(str(listing(tmp_path, media, "cbaabc")), str(out), records_per_shard=1, **SETTINGS)
    report = extract(str(listing(tmp_path, media, "abcabc")), str(out), records_per_shard=1, **SETTINGS)
    assert (report.records, report.left_out) == (6, [])


def test_a_file_that_was_replaced_is_decoded_again_or_refused(media, tmp_path):
    once, late = tmp_path / "once", tmp_path / "late"
    interrupted(media, once, 3, records_per_shard=100)
    interrupted(media, late, 3)
    video(media / "0.mp4", 0.96, seed=9)
    extract(str(media), str(once), records_per_shard=100, **SETTINGS)
    extract(str(media), str(tmp_path / "whole"), records_per_shard=100, **SETTINGS)
    first, second = ShardDataset(once), ShardDataset(tmp_path / "whole")
    assert first.manifest["extraction"]["inputs"] == second.manifest["extraction"]["inputs"]
    assert torch.equal(first.read(range(7)).codes, second.read(range(7)).codes)
    with pytest.raises(UserError, match=r"holds what 0\.mp4 was before"):
        extract(str(media), str(late), records_per_shard=1, **SETTINGS)


def test_a_file_that_was_missing_and_is_there_now_is_taken_or_refused(media, tmp_path):
    listed = listing(tmp_path, media, "abcabc")
    once, late = tmp_path / "once", tmp_path / "late"
    content = (media / "0.mp4").read_bytes()
    (media / "0.mp4").unlink()
    interrupted(listed, once, 2, records_per_shard=100)
    interrupted(listed, late, 2)
    (media / "0.mp4").write_bytes(content)
    assert extract(str(listed), str(once), records_per_shard=100, **SETTINGS).records == 6
    with pytest.raises(UserError, match="or it was not there"):
        extract(str(listed), str(late), records_per_shard=1, **SETTINGS)


def test_other_ids_are_other_inputs(media, tmp_path):
    (tmp_path / "list.csv").write_text(f"file,id\n{media}/0.mp4,one\n")
    extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)
    (tmp_path / "list.csv").write_text(f"file,id\n{media}/0.mp4,two\n")
    with pytest.raises(UserError, match=r"already holds a finished data set, made with other settings \(inputs"):
        extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)


def test_another_vocabulary_is_told_in_a_few_words(media, tmp_path):
    out = tmp_path / "out"
    names = [f"class{number}" for number in range(400)]
    for name, text in (("a.txt", names), ("b.txt", [*names[:-1], "other"])):
        (tmp_path / name).write_text("\n".join(text) + "\n")
    extract(str(media), str(out), vocabulary=str(tmp_path / "a.txt"), **SETTINGS)
    with pytest.raises(UserError) as problem:
        extract(str(media), str(out), vocabulary=str(tmp_path / "b.txt"), **SETTINGS)
    assert "labels: 400 != 400, 1 not there now ('class399') and 1 new ('other')" in str(problem.value)


def test_the_report_of_a_run_without_a_record_does_not_outlive_it(media, tmp_path):
    out, listed = tmp_path / "out", tmp_path / "in"
    listed.mkdir()
    (listed / "x.mp4").write_text("no video")
    with pytest.raises(UserError, match="not one of 1 inputs"):
        extract(str(listed), str(out), **SETTINGS)
    assert (out / "report.json").exists()
    video(listed / "x.mp4", 0.64)
    interrupted(listed, out, 0)
    assert not (out / "report.json").exists()
    extract(str(listed), str(out), **SETTINGS)
    assert json.loads((out / "report.json").read_text())["records"] == 1


# ---- logs ----


def entries(results):
    return [source for source, _ in results.poll()]


@pytest.mark.parametrize("hole", ["zeros", "long", "torn"])
def test_a_hole_in_a_log_is_waited_for_and_not_believed(tmp_path, hole):
    head = {"spec": short_spec().to_dict(), "labels": [], "extraction": {}}
    out = tmp_path / "out"
    out.mkdir()
    results = Results(out / "p", head)
    with ResultLog(out / "p", 0, 1) as log:
        log.add(1, "one", Result([], []))
        path, offset = log.add(2, "two", Result([], []))
    whole = path.read_bytes()
    seen = {
        "zeros": whole[:offset] + bytes(len(whole) - offset),  # what a network's disk may show for a while
        "long": whole[:offset] + struct.pack("<4sIQQ", b"vab1", 0, 1 << 60, 2),
        "torn": whole[:-1],
    }[hole]
    path.write_bytes(seen)
    assert entries(results) == [1]
    assert entries(results) == []
    path.write_bytes(whole)
    assert entries(results) == [2]
    assert entries(Results(out / "p", head)) == [1, 2]


# ---- files that fail late ----


def cutting(**changes):
    vision = load_vision("tiny")
    values = {"still_pictures": "keep"} | changes
    return Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, preprocess=vision.preprocess, **values)


def test_a_long_file_whose_sound_no_decoder_knows_is_left_out_alone(tmp_path):
    path = tmp_path / "x.mp4"
    video(path, 2.0)
    content = path.read_bytes()
    for known in (b"mp4a", b"esds"):
        at = content.rindex(known)
        content = content[:at] + b"zzzz" + content[at + 4 :]
    path.write_bytes(content)
    items = list(decode(path, None, cutting()))
    assert items
    assert {(item.reason, "there is no decoder for its audio track" in item.detail) for item in items} == {
        ("unreadable", True)
    }


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "nul\0.mp4"])
def test_names_that_no_disk_takes_are_unreadable(tmp_path, name):
    (item,) = decode(tmp_path / name, None, cutting())
    assert (item.reason, item.detail.startswith("cannot be read: ")) == ("unreadable", True)


def test_a_picture_is_still_or_not_whatever_its_size(tmp_path):
    still = np.full((16, 64, 64, 3), 90, np.uint8)
    moving = still.copy()
    for number, frame in enumerate(moving):
        frame[:, 4 * number : 4 * number + 8] = 250
    for name, frames in (("still.mp4", still), ("moving.mp4", moving)):
        write_video(tmp_path / name, frames, 16, tone(1.0), 16_000)
    leave_out = cutting(still_pictures="leave_out")
    kinds = {
        name: [getattr(item, "reason", "kept") for item in decode(tmp_path / name, 0.0, leave_out)]
        for name in ("still.mp4", "moving.mp4")
    }
    assert kinds == {"still.mp4": ["still"], "moving.mp4": ["kept"]}
    (kept,) = decode(tmp_path / "moving.mp4", 0.0, leave_out)
    (same,) = decode(tmp_path / "moving.mp4", 0.0, cutting())
    assert np.array_equal(kept.pixels, same.pixels)


KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
class Dying:
    def __init__(self, folder, times): self.folder, self.times = folder, times
    def __call__(self, frames):
        import torch
        marks = len(list(Path(self.folder).glob("mark*")))
        if marks < self.times:
            Path(self.folder, f"mark{marks}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(frames), 3, 8, 8)
"""


@pytest.mark.parametrize(("kills", "kept"), [(1, True), (2, False)])
def test_a_file_whose_decoder_was_killed_is_tried_once_more(tmp_path, monkeypatch, kills, kept):
    (tmp_path / "dying.py").write_text(KILLED_ONCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    import dying

    video(tmp_path / "x.mp4", 0.64)
    rules = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "keep", dying.Dying(str(tmp_path), kills))
    items = [item for _, item in DecodingPool(rules, 1).run([Job(0, tmp_path / "x.mp4")])]
    sys.modules.pop("dying")
    assert [type(item) for item in items] == [Again, Segment if kept else LeftOut, Ended]
    if not kept:
        assert items[1].detail == "its decoder crashed (exit code -9, for want of memory?)"


# ---- lists ----


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("file,start\na.mp4,1.0001\na.mp4,1.0004\n", "or starts by a millisecond"),
        ("file,start\na.mp4,\na.mp4,10\n", "lists 'a' both whole and with a start"),
        ('file,labels\na.mp4,"a;b\nb.mp4,c\n', "a double quote is not closed"),
        ('file,labels\na.mp4,"a;b\nb.mp4,c"\n', "line 3: a line break inside of double quotes"),
        ("file,start\na.mp4,1e13\n", "line 2: start must be seconds, 0 to 9999999, got '1e13'"),
    ],
)
def test_lists_that_would_fail_late_are_refused_at_once(tmp_path, rows, words):
    (tmp_path / "list.csv").write_text(rows)
    with pytest.raises(UserError, match=words):
        find_sources(tmp_path / "list.csv")


@pytest.mark.skipif(os.name == "nt", reason="folders have no such rights there")
def test_a_folder_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:  # not below pytest's, which nobody else may enter
        folder, me = Path(name), os.geteuid()
        folder.chmod(0o755)
        (folder / "shut").mkdir()
        video(folder / "a.mp4", 0.64)
        (folder / "shut").chmod(0)
        try:
            if me == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(UserError, match=r"shut cannot be read \(Permission denied\)"):
                find_sources(folder)
        finally:
            os.seteuid(me)
            (folder / "shut").chmod(0o700)


def test_a_report_with_names_that_are_not_utf_8_can_be_printed():
    from vab.data.format import Left

    report = ExtractionReport("out", 1, 0, 0, [Left("caf\udce9.mp4", "unreadable", "is empty (0 bytes)", None)])
    assert "caf\\udce9.mp4" in str(report).encode("utf-8").decode()


def test_under_torchrun_a_finished_run_is_no_failure(monkeypatch):
    from vab.data.format import Left

    report = ExtractionReport("out", 1, 0, 0, [Left("a.mp4", "silent", "", None)])
    assert report.exit_status == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert report.exit_status == 0
