"""``vab extract`` as a user starts it: exit status, several ranks, kills at any moment, millions of rows."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

import command_line
from small_media import tone, video
from vab.cli import main
from vab.commands.extract import extract
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.verify import verify

FLAGS = ["--segment_seconds=0.64", "--video_fps=12.5", "--min_seconds=0.2", "--device=cpu", "--inputs_per_part=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of several lengths, some that cannot be used, and two pairs with the same bytes."""
    root = tmp_path_factory.mktemp("media")
    for number in range(12):
        (root / f"{number % 3}").mkdir(exist_ok=True)
        video(root / f"{number % 3}" / f"{number:02d}.mp4", 0.64 + 0.32 * (number % 4), seed=number)
    shutil.copy(root / "1/01.mp4", root / "2/z_copy.mp4")
    shutil.copy(root / "1/04.mp4", root / "1/copy.mp4")
    write_wav(root / "0" / "sound.wav", tone(0.64), 16_000)
    (root / "0" / "text.mp4").write_text("not a video")
    return root


def contents(out):
    there = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    there["report.json"] = there["report.json"].replace(str(out).encode(), b"OUT")
    return there


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run = start(folder, out, "--num_workers=0")
    printed, complaint = run.communicate(timeout=200)
    assert (run.returncode, complaint) == (0, "")
    return out, printed


def start(folder, out, *arguments):
    return command_line.start("extract", "--media", folder, "--out", out, *FLAGS, *arguments)


def test_the_exit_status_says_whether_anything_was_left_out_if_asked(folder, whole, tmp_path, capsys):
    out, printed = whole
    assert "2 of 16 inputs left out:\n  1 no_video: 0/sound.wav\n  1 unreadable: 0/text.mp4\n" in printed
    assert verify(out) == []
    settings = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0}
    report = extract(str(folder / "1"), str(tmp_path / "good"), **settings)
    assert (report.exit_status, report.kept, report.left_out) == (0, 5, [])
    some = ["extract", "--media", str(folder / "0"), "--out", str(tmp_path / "some"), "--num_workers=0", *FLAGS]
    main(some)
    assert "2 of 6 inputs left out" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main([*some, "--strict=true"])
    assert left.value.code == 3
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.mp4").write_text("no video")
    with pytest.raises(SystemExit) as none:
        main(["extract", "--media", str(tmp_path / "bad"), "--out", str(tmp_path / "none"), "--num_workers=0"])
    assert none.value.code == 2


def test_files_with_the_bytes_of_another_are_named_and_left_out_if_asked(folder, whole, tmp_path):
    pairs = {"1/copy.mp4": "1/04.mp4", "2/z_copy.mp4": "1/01.mp4"}
    kept = json.loads((whole[0] / "report.json").read_text())
    assert kept["duplicates"] == pairs
    assert "2 inputs are kept that have the very bytes of another one" in whole[1]
    settings = {"segment_seconds": 0.64, "video_fps": 12.5, "min_seconds": 0.2, "num_workers": 0}
    report = extract(str(folder), str(tmp_path / "out"), duplicates="leave_out", labels_from="folder", **settings)
    named = {left.source: left.detail for left in report.left_out if left.reason == "duplicate"}
    assert named == {
        "1/copy.mp4": "has the very bytes of 1/04.mp4",
        "2/z_copy.mp4": "has the very bytes of 1/01.mp4, whose labels are 1",
    }
    assert (report.kept, report.duplicates) == (12, {})
    assert report.records < kept["records"]


def test_a_file_of_the_same_size_is_no_duplicate(tmp_path):
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", tone(1.0), 16_000)
    write_wav(tmp_path / "in" / "b.wav", tone(1.0, 700.0), 16_000)
    report = extract(str(tmp_path / "in"), str(tmp_path / "out"), without_video="keep", num_workers=0)
    assert (report.kept, report.duplicates) == (2, {})


@pytest.mark.timeout(300)
def test_two_devices_make_what_one_makes(folder, whole, tmp_path):
    run = start(folder, tmp_path / "two", "--devices=2", "--num_workers=1")
    printed, complaint = run.communicate(timeout=250)
    assert (run.returncode, complaint) == (0, "")
    assert printed.replace(str(tmp_path / "two"), "") == whole[1].replace(str(whole[0]), "")
    assert contents(tmp_path / "two") == contents(whole[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mistake_of_two_devices_is_said_once(folder, tmp_path):
    run = start(folder, tmp_path / "out", "--devices=2", "--codec=gramophone")
    printed, complaint = run.communicate(timeout=200)
    assert (run.returncode, printed, complaint.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()


def state(folder):
    found = set()
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # it has got its last name in between
            found.add((path.name, path.stat().st_size))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(folder, whole, tmp_path):
    """The process group is killed, as a node that fails would be."""
    moments = random.Random(1)
    out, killed = tmp_path / "out", 0
    for attempt in range(9):
        before = state(out)
        run = start(folder, out, "--num_workers=1", "--batch_size=1")
        # From before the first file, through decoding, to the writing of the last shard.
        if attempt % 3:
            while run.poll() is None and state(out) == before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.1))
        else:
            time.sleep(moments.uniform(0.5, 6.0))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            killed += 1
        run.communicate(timeout=60)
        if run.returncode == 0:
            shutil.rmtree(out)
    assert killed >= 4
    run = start(folder, out, "--num_workers=1")
    _, complaint = run.communicate(timeout=250)
    assert (run.returncode, complaint) == (0, "")
    assert contents(out) == contents(whole[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_is_one_line_and_the_next_run_goes_on(folder, tmp_path):
    listed, out = tmp_path / "list.csv", tmp_path / "out"
    listed.write_text("file,id\n" + "".join(f"{number}.mp4,{number}\n" for number in range(400)))
    for number in range(400):
        (tmp_path / f"{number}.mp4").symlink_to(folder / "1/04.mp4")
    run = start(listed, out, "--num_workers=1")
    while len(list(out.glob("*.tar"))) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    printed, complaint = run.communicate(timeout=60)
    assert (run.returncode, printed, complaint) == (130, "", "stopped\n")
    run = start(listed, out, "--num_workers=1")
    _, complaint = run.communicate(timeout=200)
    assert (run.returncode, complaint) == (0, "")
    data = ShardDataset(out)
    assert sorted({int(data.record(number)["id"]) for number in range(len(data))}) == list(range(400))


def test_nothing_that_is_listed_is_there(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("file\na.mp4\nb.mp4\n")
    with pytest.raises(SystemExit) as end:
        main(["extract", "--media", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"error: none of 2 inputs is there, such as {tmp_path}/a.mp4: give --media_root")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_rows_are_planned_gone_on_with_and_reported_in_seconds(folder, tmp_path):
    """Of a million rows, ten are there: what is counted is what a million costs beside the decoding."""
    rows = [f"missing/{number:07d}.mp4,{number % 300},{number % 7}\n" for number in range(1_000_000)]
    for place in range(10):
        rows[place * 100_000 + 17] = f"{folder}/1/04.mp4,{place},0.{place}\n"
    (tmp_path / "list.csv").write_text("file,labels,start\n" + "".join(rows))
    command = [sys.executable, "-c", MEASURED, "--media", tmp_path / "list.csv", "--out", tmp_path / "out", *FLAGS[:-1]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak_mib"] < 800
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # The file lasts 0.64 s, and 0.2 s are needed: it is too short from 0.5, 0.6, ... 0.9 s on.
    assert report["reasons"] == {"missing": 999_990, "too_short": 5}
    assert (report["inputs"], report["kept"], report["records"]) == (1_000_000, 5, 5)


MEASURED = """
import json, re, sys, time
from pathlib import Path
from vab.cli import main
if __name__ == "__main__":
    begin = time.time()
    try:
        main(["extract", *sys.argv[1:]])
    finally:
        # Not getrusage: that begins with the peak of the process that started this one. Pages of files, most of them of
        # libraries, are the kernel's choice: they differed by 70 MiB between two installations of the same versions.
        status = dict(re.findall(r"(VmHWM|RssFile):\\s+(\\d+) kB", Path("/proc/self/status").read_text()))
        peak = (int(status["VmHWM"]) - int(status["RssFile"])) / 1024
        print(json.dumps({"seconds": round(time.time() - begin, 1), "peak_mib": round(peak)}))
"""


def test_features_after_the_end_of_the_video_are_those_of_its_last_picture(tmp_path):
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / "a.mp4", 0.4)
    extract(str(tmp_path / "in"), str(tmp_path / "out"), segment_seconds=0.64, video_fps=12.5, min_seconds=0.2,
            num_workers=0)  # fmt: skip
    batch = ShardDataset(tmp_path / "out").read([0])
    valid = int(batch.frames[0])
    assert 0 < valid < 8
    assert np.array_equal(batch.features[0, valid:], np.repeat(batch.features[0, valid - 1 : valid], 8 - valid, axis=0))
