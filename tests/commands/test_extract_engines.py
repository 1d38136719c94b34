"""The same data set, byte for byte, from one process, from tasks that share the parts, and from Ray."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import command_line
import vab
from small_media import video
from vab.data.shards.verify import verify

FLAGS = ["--segment_seconds=0.64", "--video_fps=12.5", "--min_seconds=0.2", "--device=cpu", "--inputs_per_part=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight parts: videos, one that cannot be read, and two with the same bytes."""
    root = tmp_path_factory.mktemp("media")
    for number in range(14):
        video(root / f"{number:02d}.mp4", 0.64 + 0.32 * (number % 4), seed=number)
    (root / "05b.mp4").write_text("not a video")
    shutil.copy(root / "03.mp4", root / "12b.mp4")
    return root


def start(folder, out, *arguments):
    return command_line.start("extract", "--media", folder, "--out", out, *FLAGS, *arguments)


def run(folder, out, *arguments):
    process = start(folder, out, *arguments)
    printed, complaint = process.communicate(timeout=300)
    assert (process.returncode, complaint) == (0, ""), complaint
    return printed


def contents(out):
    there = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return there | {"report.json": there["report.json"].replace(str(out).encode(), b"OUT")}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(folder, out, "--num_workers=0")
    assert verify(out) == []
    return contents(out)


@pytest.mark.timeout(300)
def test_tasks_of_any_order_make_what_one_makes(folder, whole, tmp_path):
    out = tmp_path / "out"
    assert "2 parts done by this task (3/4), 2 of 8 parts are there" in run(
        folder, out, "--part=3/4", "--num_workers=0"
    )
    assert not (out / "manifest.json").exists()
    pair = [start(folder, out, f"--part={part}/4", "--num_workers=0") for part in (4, 1)]  # two at once
    assert [process.communicate(timeout=200)[1] for process in pair] == ["", ""]
    assert f"{out}: " in run(folder, out, "--part=2/4", "--num_workers=0")
    assert contents(out) == whole
    assert "nothing to do" in run(folder, out, "--part=1/4", "--num_workers=0", "--retry=false")
    assert contents(out) == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tasks_that_end_at_once_both_join(folder, whole, tmp_path):
    out = tmp_path / "out"
    several = [start(folder, out, f"--part={part}/2", "--num_workers=0") for part in (1, 2, 1, 2)]
    assert [process.communicate(timeout=300)[1] for process in several] == [""] * 4
    assert contents(out) == whole


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "a/b"])
def test_a_part_that_is_none_is_refused(folder, tmp_path, part, capsys):
    from vab.cli import main

    with pytest.raises(SystemExit) as end:
        main(["extract", "--media", str(folder), "--out", str(tmp_path / "out"), f"--part={part}"])
    assert end.value.code == 2
    assert f"--part must be I/N, counted from 1, such as 1/4 to 4/4, got '{part}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def killed(folder, out, times, seed, *arguments):
    """Kill runs at random moments after some more parts are done, and finish then."""
    kills, moments = 0, random.Random(seed)

    def done():
        return len(list(out.glob("parts/0*.json")))

    for _ in range(times):
        more = done() + moments.randrange(4)
        process = start(folder, out, "--num_workers=0", "--batch_size=1", *arguments)
        while process.poll() is None and done() < more:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
        if process.returncode == 0:
            shutil.rmtree(out)
    run(folder, out, "--num_workers=0")
    return kills


@pytest.mark.timeout(300)
def test_killed_at_random_moments_nothing_is_lost(folder, whole, tmp_path):
    assert killed(folder, tmp_path / "out", 2, seed=5) >= 1
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_20_times_nothing_is_lost(folder, whole, tmp_path):
    assert killed(folder, tmp_path / "out", 20, seed=6) >= 10
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_device_whose_process_is_killed_is_started_again(folder, whole, tmp_path):
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "out"
    process = start(folder, out, "--devices=2", "--num_workers=0", "--batch_size=1")
    while not list(out.glob("parts/0*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    children = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    os.kill(children[0].pid, signal.SIGKILL)
    assert process.communicate(timeout=200)[1] == ""
    assert contents(out) == whole


RAY = """
import json, os, signal, sys, threading, time
from pathlib import Path

if __name__ == "__main__":
    import ray
    from vab.cli import main

    media, out, *flags = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    killed = []

    def kill():  # one actor, once it has begun a part and has not ended it
        while not list(Path(out).glob("parts/0*.json")):
            time.sleep(0.01)
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"ray::_RayWorker") and not killed:
                killed.append(int(path.name))
                os.kill(killed[0], signal.SIGKILL)

    if "--batch_size=1" in flags:
        threading.Thread(target=kill, daemon=True).start()
    try:
        main(["extract", "--media", media, "--out", out, "--engine=ray", "--actors=2", *flags])
    finally:
        print(json.dumps({"killed": len(killed)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [False, True])
def test_ray_makes_what_one_process_makes(folder, whole, tmp_path, kill):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    flags = [*FLAGS, "--num_workers=0", *(["--batch_size=1"] if kill else [])]
    if not kill:  # folders may be relative to the one in which the command is typed
        folder, out = os.path.relpath(folder, tmp_path), "out"
    command = [sys.executable, "-c", RAY, str(folder), str(out), *flags]
    source = str(Path(vab.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": source})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"killed": int(kill)}
    found = contents(tmp_path / "out")
    assert found == whole | ({} if kill else {"report.json": whole["report.json"].replace(b'"OUT"', b'"out"')})
