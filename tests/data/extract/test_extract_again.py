"""Inputs that changed since an extraction began, files that fail late, lists that lie: nothing is lost in silence."""

import json
import os
import shutil
import struct
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import gethostname
from threading import Thread

import numpy as np
import pytest
import torch

from small_media import tone, video
from vab.commands.extract import extract
from vab.data.extract.cutting import Cutting, LeftOut, Segment
from vab.data.extract.decoders import Again, DecodingPool, Ended, Job
from vab.data.extract.encode import Encoders
from vab.data.extract.parts import Settings
from vab.data.extract.report import ExtractionReport
from vab.data.extract.run import extract_sources
from vab.data.inputs.listing import find_sources
from vab.data.media.segments import read_audio
from vab.data.media.write import write_video
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.verify import verify
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError

SETTINGS = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0, "device": "cpu"}


class Stop(BaseException):
    """Stands for a kill: nothing of the run's own code sees it coming."""


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(6):
        video(folder / f"{number}.mp4", 0.64, seed=number)
    return folder


def interrupted(listed, out, after, inputs_per_part=1):
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
        extract_sources(find_sources(listed), out, encoders, cutting, Settings(0, 1, 60.0, inputs_per_part))


def listing(tmp_path, media, labels, name="list.csv"):
    path = tmp_path / name
    rows = [f"{media}/{number}.mp4,{label}" for number, label in enumerate(labels)]
    path.write_text("\n".join(["file,labels", *rows]) + "\n")
    return path


def test_labels_that_were_mended_before_their_shard_was_written_are_taken(media, tmp_path):
    out = tmp_path / "out"
    interrupted(listing(tmp_path, media, "abcabc"), out, 3, inputs_per_part=100)
    mended = listing(tmp_path, media, "cbaabc")
    extract(str(mended), str(out), inputs_per_part=100, **SETTINGS)
    data = ShardDataset(out)
    assert [data.label_names(number) for number in range(6)] == [[label] for label in "cbaabc"]


def test_labels_that_changed_after_their_shard_was_written_are_refused(media, tmp_path):
    out = tmp_path / "out"
    interrupted(listing(tmp_path, media, "abcabc"), out, 3)
    with pytest.raises(UserError, match=r"holds what .*0\.mp4 was before \(2 such\): its size, labels or id"):
        extract(str(listing(tmp_path, media, "cbaabc")), str(out), inputs_per_part=1, **SETTINGS)
    # Refused again, and gone on with once they are what they were.
    with pytest.raises(UserError, match=r"2 such"):
        extract(str(listing(tmp_path, media, "cbaabc")), str(out), inputs_per_part=1, **SETTINGS)
    report = extract(str(listing(tmp_path, media, "abcabc")), str(out), inputs_per_part=1, **SETTINGS)
    assert (report.records, report.left_out) == (6, [])


def test_a_file_that_was_replaced_is_decoded_again_or_refused(media, tmp_path):
    once, late = tmp_path / "once", tmp_path / "late"
    interrupted(media, once, 3, inputs_per_part=100)
    interrupted(media, late, 3)
    video(media / "0.mp4", 0.96, seed=9)
    extract(str(media), str(once), inputs_per_part=100, **SETTINGS)
    extract(str(media), str(tmp_path / "whole"), inputs_per_part=100, **SETTINGS)
    first, second = ShardDataset(once), ShardDataset(tmp_path / "whole")
    assert first.manifest["extraction"]["inputs"] == second.manifest["extraction"]["inputs"]
    assert torch.equal(first.read(range(7)).codes, second.read(range(7)).codes)
    with pytest.raises(UserError, match=r"holds what 0\.mp4 was before"):
        extract(str(media), str(late), inputs_per_part=1, **SETTINGS)


@pytest.mark.parametrize("lost", ["missing", "unreadable"])
@pytest.mark.parametrize("inputs_per_part", [1, 100])
def test_a_file_that_could_not_be_read_by_a_run_that_was_cut_off_is_taken(media, tmp_path, lost, inputs_per_part):
    listed, out = listing(tmp_path, media, "abcabc"), tmp_path / "out"
    extract(str(listed), str(tmp_path / "whole"), **SETTINGS)
    content = (media / "0.mp4").read_bytes()
    (media / "0.mp4").unlink()
    if lost == "unreadable":  # as a disk that fails for a while: the file is what it was, and cannot be read
        of_one_size(media / "0.mp4", 0)
        content = (media / "0.mp4").read_bytes()
        (media / "0.mp4").write_bytes(bytes(len(content)))
    interrupted(listed, out, 2, inputs_per_part)
    written = (media / "0.mp4").stat().st_mtime_ns if lost == "unreadable" else None
    (media / "0.mp4").write_bytes(content)
    if written is not None:
        os.utime(media / "0.mp4", ns=(written, written))
    report = extract(str(listed), str(out), inputs_per_part=inputs_per_part, **SETTINGS)
    assert (report.records, report.left_out) == (6, [])
    assert by_key(out).keys() == by_key(tmp_path / "whole").keys()


def test_other_ids_are_other_inputs(media, tmp_path):
    (tmp_path / "list.csv").write_text(f"file,id\n{media}/0.mp4,one\n")
    extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)
    (tmp_path / "list.csv").write_text(f"file,id\n{media}/0.mp4,two\n")
    with pytest.raises(UserError, match=r"made of other inputs \(1 then, 1 now; the first new one is .*0\.mp4\)"):
        extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)


def test_addresses_that_are_signed_anew_are_the_same_inputs_and_no_secret_is_written(media, tmp_path, capsys):
    (media / "2.mp4").write_text("no video")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(media))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for secret in ("SECRET1", "SECRET2"):
            rows = [f"{address}/{number}.mp4?X-Signature={secret}/a.b" for number in range(3)]
            (tmp_path / "list.csv").write_text("\n".join(["file", *rows]))
            extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), retry=False, **SETTINGS)
        server.shutdown()
    assert "nothing to do" in capsys.readouterr().out
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 4
    assert [path for path in written if b"SECRET" in path.read_bytes()] == []
    assert ShardDataset(tmp_path / "out").record(0)["source"] == f"{address}/0.mp4"


def test_in_what_the_inputs_of_a_finished_folder_differ_is_told(media, tmp_path):
    labelled = listing(tmp_path, media, "abcab")
    extract(str(labelled), str(tmp_path / "out"), **SETTINGS)
    for labels, changes, words in (
        (
            "abcaba",
            {},
            r"finished data set, made of other inputs \(5 then, 6 now; the first new one is .*5\.mp4\): give",
        ),
        ("abca", {}, r"made of other inputs \(5 then, 4 now; none is new\)"),
        ("abcaa", {}, r"made of other inputs \(5 then, 5 now; sizes, labels or starts are others\)"),
        (
            "abcaa",
            {"min_seconds": 0.3},
            r"made with other settings \(min_seconds: 0.2 != 0.3\) and made of other inputs",
        ),
    ):
        with pytest.raises(UserError, match=words):
            extract(str(listing(tmp_path, media, labels)), str(tmp_path / "out"), **(SETTINGS | changes))


# ---- files of the same size, files of another time ----


def of_one_size(path, seed):
    """A video that fills 100,000 bytes, the rest of which is free space."""
    video(path, 0.64, seed=seed)
    content = path.read_bytes()
    room = 100_000 - len(content)
    path.write_bytes(content + struct.pack(">I4s", room, b"free") + bytes(room - 8))


def test_a_file_that_was_replaced_by_one_of_its_size_is_decoded_again(media, tmp_path):
    of_one_size(media / "0.mp4", seed=0)
    interrupted(media, tmp_path / "out", 3, inputs_per_part=100)
    of_one_size(media / "0.mp4", seed=9)
    report = extract(str(media), str(tmp_path / "out"), inputs_per_part=100, **SETTINGS)
    extract(str(media), str(tmp_path / "whole"), inputs_per_part=100, **SETTINGS)
    first, second = (ShardDataset(tmp_path / name).read(range(6)) for name in ("out", "whole"))
    assert torch.equal(first.features, second.features)
    assert report.touched == []


def test_a_file_of_another_time_in_a_finished_shard_is_named_and_changes_nothing(media, tmp_path):
    out = tmp_path / "out"
    extract(str(media), str(tmp_path / "whole"), inputs_per_part=1, **SETTINGS)
    interrupted(media, out, 3)
    newer = (out / "parts" / "000000.json").stat().st_mtime_ns + 10**9
    os.utime(media / "0.mp4", ns=(0, newer))
    report = extract(str(media), str(out), inputs_per_part=1, **SETTINGS)
    assert report.touched == ["0.mp4"]
    assert "1 inputs were written again since their records were made (0.mp4)" in str(report)
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    os.utime(media / "0.mp4", ns=(0, 10**18))  # only files that are newer than their part are known to have changed
    assert extract(str(media), str(out), inputs_per_part=1, **SETTINGS).touched == []
    os.utime(media / "5.mp4", ns=(0, 2 * (out / "manifest.json").stat().st_mtime_ns))
    assert extract(str(media), str(out), inputs_per_part=1, **SETTINGS).touched == ["5.mp4"]


# ---- a user's own files ----

OWN = ("report.json", "index.npy", "label_starts.npy", "label_ids.npy", "codebooks.safetensors")
OWN_PARTS = ("parts", "parts/head.json", "parts/000000.json", "extraction.partial")


@pytest.mark.parametrize("text", ["mine", '{"mine": 1}\n'])
@pytest.mark.parametrize("name", [*OWN, *OWN_PARTS])
def test_a_users_own_files_are_refused_and_kept(media, tmp_path, name, text):
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text(text)
    with pytest.raises(UserError, match=name.rpartition("/")[-1]):
        extract(str(media), str(tmp_path / "out"), **SETTINGS)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [own]
    assert own.read_text() == text


def test_files_that_no_extraction_writes_may_be_there(media, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    names = ("notes.txt", "shard-notes.tmp", "shard-notes.journal.json")
    for name in names:
        (out / name).write_text("mine")
    interrupted(media, out, 2)
    (out / "parts" / "mine.txt").write_text("mine")
    extract(str(media), str(out), inputs_per_part=1, **SETTINGS)
    assert {(out / name).read_text() for name in (*names, "parts/mine.txt")} == {"mine"}
    assert extract(str(media), str(out), inputs_per_part=1, **SETTINGS).already_finished


def test_a_run_killed_as_it_began_is_resumed(media, tmp_path):
    work = tmp_path / "out" / f".vab-{gethostname()}-999999999-0123.tmp"
    (work / "parts").mkdir(parents=True)
    (work / "parts" / "head.json").write_text("{")
    assert extract(str(media), str(tmp_path / "out"), **SETTINGS).records == 6
    assert not work.exists()


def test_a_folder_begun_by_an_earlier_version_is_refused(media, tmp_path):
    (tmp_path / "out" / "extraction.partial").mkdir(parents=True)
    with pytest.raises(UserError, match=r"was begun by an earlier version of vab \(extraction.partial\).*: delete the"):
        extract(str(media), str(tmp_path / "out"), **SETTINGS)


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
    extract(str(listed), str(out), inputs_per_part=1, **SETTINGS)
    assert json.loads((out / "report.json").read_text())["records"] == 1


# ---- files that fail late ----


def cutting(**changes):
    vision = load_vision("tiny")
    values = {"still_pictures": "keep"} | changes
    return Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, preprocess=vision.resizer, **values)


def test_a_long_file_whose_sound_no_decoder_knows_is_left_out_alone(tmp_path):
    path = tmp_path / "x.mp4"
    video(path, 2.0)
    content = path.read_bytes()
    for known in (b"mp4a", b"esds"):
        at = content.rindex(known)
        content = content[:at] + b"zzzz" + content[at + 4 :]
    path.write_bytes(content)
    items = list(cutting().decode(path, None))
    assert items
    assert {(item.reason, "there is no decoder for its audio track" in item.detail) for item in items} == {
        ("unreadable", True)
    }


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "nul\0.mp4"])
def test_names_that_no_disk_takes_are_unreadable(tmp_path, name):
    (item,) = cutting().decode(tmp_path / name, None)
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
        name: [getattr(item, "reason", "kept") for item in leave_out.decode(tmp_path / name, 0.0)]
        for name in ("still.mp4", "moving.mp4")
    }
    assert kinds == {"still.mp4": ["still"], "moving.mp4": ["kept"]}
    (kept,) = leave_out.decode(tmp_path / "moving.mp4", 0.0)
    (same,) = cutting().decode(tmp_path / "moving.mp4", 0.0)
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
    from vab.data.shards.format import Left

    report = ExtractionReport("out", 1, 0, 0, [Left("caf\udce9.mp4", "unreadable", "is empty (0 bytes)", None)])
    assert "caf\\udce9.mp4" in str(report).encode("utf-8").decode()


# ---- inputs that could not be read and can be now ----


def by_key(out):
    """The records of a data set, which must be whole, by key; none may be there twice."""
    assert verify(out) == []
    found = by_key_of_the_manifest(out)
    assert len(found) == len(ShardDataset(out))
    return found


def by_key_of_the_manifest(out):
    """As ``by_key``, of a folder that may have further shards, which its manifest does not name yet."""
    data = ShardDataset(out)
    batch = data.read(range(len(data)))
    return {data.key(n): (batch.codes[n].tolist(), batch.features[n].tolist()) for n in range(len(data))}


def losing(listed, out, after, lose, inputs_per_part=2):
    """A run in the course of which something happens to its inputs."""
    vision, seen = load_vision("tiny"), []

    def preprocess(frames):
        seen.append(1)
        if len(seen) == 8 * after:
            lose()
        return vision.preprocess(frames)

    rules = Cutting(0.64, 16_000, 12.5, "all", 0.64, 0.2, -60.0, "keep", preprocess)
    encoders = Encoders(load_codec("tiny"), vision, torch.device("cpu"))
    return extract_sources(find_sources(listed), out, encoders, rules, Settings(0, 1, 60.0, inputs_per_part))


def test_a_run_whose_media_go_away_stops_and_nothing_is_lost(media, tmp_path):
    whole, out, again = tmp_path / "whole", tmp_path / "out", {**SETTINGS, "inputs_per_part": 2}
    extract(str(media), str(whole), **again)
    with pytest.raises(UserError, match=r"2 of 2 inputs of part 2 were there .* check that the disk"):
        losing(media, out, 3, lambda: media.rename(tmp_path / "away"))
    assert [path.name for path in sorted(out.glob("parts/0*.json"))] == ["000000.json", "000001.json"]
    with pytest.raises(UserError, match="there is no such folder"):
        extract(str(media), str(out), **again)
    (tmp_path / "away").rename(media)
    report = extract(str(media), str(out), **again)
    assert (report.records, report.kept, report.left_out) == (6, 6, [])
    assert by_key(out) == by_key(whole)


def test_media_that_were_away_for_a_while_are_taken_by_the_same_command(media, tmp_path):
    whole, out, again = tmp_path / "whole", tmp_path / "out", {**SETTINGS, "inputs_per_part": 3}
    extract(str(media), str(whole), **again)
    report = losing(media, out, 5, lambda: media.rename(tmp_path / "away"), 3)
    assert (report.kept, report.reasons, report.exit_status) == (5, {"missing": 1}, 0)
    (tmp_path / "away").rename(media)
    assert extract(str(media), str(out), retry=False, **again).reasons == {"missing": 1}
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    report = extract(str(media), str(out), **again)
    assert (report.records, report.kept, report.left_out, report.exit_status) == (6, 6, [], 0)
    assert (report.tried_again, report.already_finished) == (1, False)
    assert "1 inputs that could not be read before were tried again" in str(report)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first  # of another part: stays as it was
    assert by_key(out) == by_key(whole)
    assert (out / "shard-000001-1.tar").read_bytes() == (whole / "shard-000001.tar").read_bytes()
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001-1.tar"]
    assert json.loads((out / "report.json").read_text())["records"] == 6
    manifest = (out / "manifest.json").read_bytes()
    assert "nothing to do" in str(extract(str(media), str(out), **again))
    assert (out / "manifest.json").read_bytes() == manifest
    first, second = (ShardDataset(place).manifest for place in (whole, out))
    assert first["counts"] == second["counts"]
    assert first["extraction"] == second["extraction"]


def test_files_that_were_not_there_or_not_whole_are_taken_once_they_are(media, tmp_path):
    listed, out = listing(tmp_path, media, "abcabc"), tmp_path / "out"
    extract(str(listed), str(tmp_path / "whole"), **SETTINGS)
    contents = {number: (media / f"{number}.mp4").read_bytes() for number in (0, 2, 4)}
    (media / "0.mp4").unlink()
    (media / "2.mp4").write_bytes(contents[2][:200])
    (media / "4.mp4").write_text("no video")
    report = extract(str(listed), str(out), **SETTINGS)
    assert report.reasons == {"missing": 1, "unreadable": 2}
    manifest = (out / "manifest.json").read_bytes()
    report = extract(str(listed), str(out), **SETTINGS)  # as they were: tried again, and nothing changes
    assert (report.already_finished, report.tried_again, report.exit_status) == (True, 3, 0)
    assert "3 inputs that could not be read before were tried again, in vain" in str(report)
    assert (out / "manifest.json").read_bytes() == manifest
    (media / "0.mp4").write_bytes(contents[0])
    report = extract(str(listed), str(out), **SETTINGS)
    assert (report.kept, report.reasons) == (4, {"unreadable": 2})
    assert [entry.source for entry in report.left_out] == [f"{media}/2.mp4", f"{media}/4.mp4"]
    for number, content in contents.items():
        (media / f"{number}.mp4").write_bytes(content)
    assert extract(str(listed), str(out), **SETTINGS).left_out == []
    assert by_key(out) == by_key(tmp_path / "whole")
    data = ShardDataset(out)
    assert {data.record(n)["source"][-5]: data.label_names(n) for n in range(6)} == {
        str(number): [label] for number, label in enumerate("abcabc")
    }
    (media / "1.mp4").write_bytes(contents[0])  # what is in the shards must be what it was
    with pytest.raises(UserError, match="made of other inputs"):
        extract(str(listed), str(out), **SETTINGS)


def test_a_second_try_that_is_killed_leaves_the_data_set_and_is_gone_on_with(media, tmp_path):
    listed, out = listing(tmp_path, media, "abcabc"), tmp_path / "out"
    extract(str(listed), str(tmp_path / "whole"), inputs_per_part=1, **SETTINGS)
    media.rename(tmp_path / "away")
    media.mkdir()
    for number in (2, 3):
        (media / f"{number}.mp4").write_bytes((tmp_path / "away" / f"{number}.mp4").read_bytes())
    extract(str(listed), str(out), inputs_per_part=1, **SETTINGS)
    first = by_key(out)
    for path in media.iterdir():
        path.unlink()
    media.rmdir()
    (tmp_path / "away").rename(media)
    os.utime(media / "2.mp4", ns=(0, 0))
    os.utime(media / "3.mp4", ns=(0, 0))
    interrupted(listed, out, 2)  # of the four
    assert by_key_of_the_manifest(out) == first
    assert sorted(path.name for path in out.glob("*-1.tar")) == ["shard-000000-1.tar", "shard-000001-1.tar"]
    # Killed between the index and the manifest: the index has the new records, too.
    other = tmp_path / "other"
    shutil.copytree(out, other)
    assert extract(str(listed), str(other), inputs_per_part=1, **SETTINGS).records == 6
    for name in ("index.npy", "label_starts.npy", "label_ids.npy"):
        shutil.copy(other / name, out / name)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished: run the same command again"):
        ShardDataset(out)
    report = extract(str(listed), str(out), inputs_per_part=1, **SETTINGS)
    assert (report.records, report.left_out) == (6, [])
    assert by_key(out) == by_key(tmp_path / "whole")
    assert (out / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    assert extract(str(listed), str(out), inputs_per_part=1, **SETTINGS).already_finished


def test_duplicates_are_left_out_of_a_second_try_too(media, tmp_path):
    (media / "5.mp4").write_bytes((media / "1.mp4").read_bytes())
    settings = {**SETTINGS, "duplicates": "leave_out"}
    (tmp_path / "list.csv").write_text("file\n" + "".join(f"{media}/{number}.mp4\n" for number in range(6)))
    content = (media / "5.mp4").read_bytes()
    (media / "5.mp4").unlink()
    extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **settings)
    (media / "5.mp4").write_bytes(content)
    report = extract(str(tmp_path / "list.csv"), str(tmp_path / "out"), **settings)
    assert report.reasons == {"duplicate": 1}
    assert report.left_out[0].detail == f"has the very bytes of {media}/1.mp4"


def test_an_index_that_is_damaged_is_not_taken_over(media, tmp_path):
    (media / "0.mp4").write_text("no video")
    extract(str(media), str(tmp_path / "out"), **SETTINGS)
    index = np.load(tmp_path / "out" / "index.npy")
    index["codes_offset"][0] += 1
    np.save(tmp_path / "out" / "index.npy", index)
    video(media / "0.mp4", 0.64)
    assert extract(str(media), str(tmp_path / "out"), **SETTINGS).records == 6
    assert verify(tmp_path / "out") == []


# ---- files that raise what nobody foresaw ----


def wav_of_64_bits(path, seconds=1.0):
    """PCM of 64 bits, as RIFF allows and FFmpeg reads: two channels, of which the second is silent."""
    sound = np.zeros((round(16_000 * seconds), 2), "<i8")
    sound[:, 0] = (tone(seconds) * 2.0**62).astype("<i8")
    data = sound.tobytes()
    form = struct.pack("<HHIIHH", 1, 2, 16_000, 16_000 * 16, 16, 64)
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def test_sound_of_64_bits_is_read(tmp_path):
    span = read_audio(wav_of_64_bits(tmp_path / "x.wav"), 16_000)
    assert np.abs(span.waveform - tone(1.0) / 4).max() < 1e-6  # half of full scale, and the mean of two channels
    report = extract(str(tmp_path), str(tmp_path / "out"), without_video="keep", **SETTINGS)
    assert (report.records, report.left_out) == (2, [])


class Stumbling:
    """Prepares frames, but not those of one grey."""

    def __init__(self, preprocess, grey):
        self.preprocess, self.grey = preprocess, grey

    def __call__(self, frames):
        if abs(int(frames[0, 16, 16, 0]) - self.grey) <= 10:
            raise ZeroDivisionError("a bug\nof ours")
        return self.preprocess(frames)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_that_nobody_foresaw_is_the_entry_of_its_file(tmp_path, num_workers):
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    for number in range(3):
        grey = np.full((16, 64, 64, 3), 60 + 60 * number, np.uint8)
        write_video(media / f"{number}.mp4", grey, 16, tone(1.0), 16_000)
    vision = load_vision("tiny")
    encoders = Encoders(load_codec("tiny"), vision, torch.device("cpu"))

    def run(preprocess):
        rules = Cutting(1.0, 16_000, 4.0, "all", 1.0, 0.5, -60.0, "keep", preprocess)
        return extract_sources(find_sources(media), out, encoders, rules, Settings(num_workers, 2, 60.0))

    report = run(Stumbling(vision.resizer, 120))
    assert (report.kept, report.reasons, report.exit_status) == (2, {"error": 1}, 0)
    (entry,) = json.loads((out / "report.json").read_text())["left_out"]
    assert (entry["source"], entry["reason"]) == ("1.mp4", "error")
    assert entry["detail"].startswith("ZeroDivisionError: a bug of ours (test_extract_again.py, line ")
    assert entry["traceback"].startswith("Traceback (most recent call last):")
    assert "ZeroDivisionError: a bug" in entry["traceback"]
    assert run(Stumbling(vision.resizer, 120)).already_finished
    assert (run(vision.resizer).kept, verify(out)) == (3, [])  # once it is mended


# ---- starts ----


def test_starts_of_one_video_that_differ_late_are_inputs_of_their_own(tmp_path):
    starts = ("10800.12", "10800.13", "1234.561", "1234.562", "9999998.999", "9999999")
    (tmp_path / "list.csv").write_text("file,start\n" + "".join(f"long.mp4,{start}\n" for start in starts))
    assert [source.name for source in find_sources(tmp_path / "list.csv")] == [f"long.mp4@{start}" for start in starts]
