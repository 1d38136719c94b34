import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from vab.data.media.segments import read_audio, read_frames
from vab.demo import world
from vab.demo.drawing import Motion
from vab.demo.scene import KINDS, LARGEST, SECONDS, SMALLEST, Path, Scene, SoundingObject
from vab.demo.sounds import render_object
from vab.demo.world import CLASSES, FPS, SAMPLE_RATE, describe, render_audio, render_frames, write_world
from vab.spec import UserError

STRIKING = [kind for kind, traits in KINDS.items() if traits.motion == "strikes"]
CYCLING = [kind for kind, traits in KINDS.items() if traits.motion == "cycle"]


@cache
def scene_of(kind: str, start: int = 0) -> Scene:
    """The first scene from ``start`` in which such an object is alone, without distractors."""
    while True:
        scene = describe(0, start)
        if [item.kind for item in scene.objects] == [kind]:
            return replace(scene, distractors=())
        start += 1


def changed(scene: Scene, **changes: object) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], **changes),))


def level_db(waveform: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)) + 1e-12))


def digest(index: int) -> str:
    scene = describe(7, index)
    return hashlib.sha256(
        repr(scene).encode() + render_audio(scene).tobytes() + render_frames(scene).tobytes()
    ).hexdigest()


def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_segment_depends_on_seed_and_index_alone():
    script = (
        "import hashlib; from vab.demo.scene import describe; from vab.demo.sounds import render_audio\n"
        "from vab.demo.pictures import render_frames\n"
        "for index in (5, 3, 4):\n"
        "    scene = describe(7, index)\n"
        "    both = render_audio(scene).tobytes() + render_frames(scene).tobytes()\n"
        "    print(hashlib.sha256(repr(scene).encode() + both).hexdigest())\n"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    here = {index: digest(index) for index in (3, 4, 5)}
    assert elsewhere.stdout.split() == [here[5], here[3], here[4]]
    assert describe(7, 3) != describe(8, 3)
    assert len({repr(describe(7, index)) for index in range(50)}) == 50


def test_shapes_and_levels():
    for index in range(12):
        scene = describe(1, index)
        waveform, frames = render_audio(scene), render_frames(scene)
        assert waveform.shape == (SECONDS * SAMPLE_RATE,)
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() <= 0.99
        assert -36 < level_db(waveform) < -11
        assert frames.shape == (SECONDS * FPS, 96, 96, 3)
        assert frames.dtype == np.uint8


def test_what_scenes_hold():
    scenes = [describe(2, index) for index in range(800)]
    assert np.mean([len(scene.objects) == 2 for scene in scenes]) == pytest.approx(0.35, abs=0.05)
    assert {len(scene.distractors) for scene in scenes} == {0, 1, 2}
    assert {item.kind for scene in scenes for item in scene.objects} == set(CLASSES)
    for scene in scenes:
        assert len({item.kind for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            assert SMALLEST <= item.size <= LARGEST
            assert list(item.events) == sorted(item.events)
            assert 0 < item.events[0] <= item.events[-1] < SECONDS - 0.02
            assert len(item.events) == len(item.strengths) == len(item.notes)
            inside = [any(a - 1e-4 <= event <= b + 1e-4 for a, b in item.intervals) for event in item.events]
            assert all(inside)
    whole = [item.intervals[0][0] < 0.1 and item.intervals[-1][1] > 3.8 for s in scenes for item in s.objects]
    assert 0.2 < np.mean(whole) < 0.7  # the others start late or stop early


@pytest.mark.parametrize("kind", STRIKING)
def test_a_strike_is_heard_when_it_happens(kind):
    for start in (0, 500):
        scene = scene_of(kind, start)
        waveform = render_audio(scene)
        for event in scene.objects[0].events:
            at, span = round(event * SAMPLE_RATE), round(0.03 * SAMPLE_RATE)
            before, after = waveform[max(0, at - span) : at], waveform[at : at + span]
            assert level_db(after) > level_db(before) + 3


@pytest.mark.parametrize("kind", STRIKING)
def test_a_strike_is_seen_when_it_happens(kind):
    scene = scene_of(kind)
    item = scene.objects[0]
    moved = render_frames(changed(scene, events=tuple(event + 0.13 for event in item.events)))
    different = (moved != render_frames(scene)).any(axis=(1, 2, 3))
    assert different.sum() >= 2 * len(item.events)


def test_a_hammer_touches_at_the_strike_and_at_no_other_time():
    item = scene_of("anvil").objects[0]
    at = 1 + 0.5 / FPS  # in the middle of frame 16
    lift = Motion.of(replace(item, events=(at, at + 1.0), strengths=(1.0, 1.0))).lift()[:, 0]
    assert lift[16] == pytest.approx(0, abs=1e-4)
    assert lift[32] == pytest.approx(0, abs=1e-4)
    assert np.delete(lift, [16, 32]).min() > 0.15


@pytest.mark.parametrize("kind", CYCLING)
def test_sound_and_movement_stop_together(kind):
    scene = changed(
        scene_of(kind), intervals=((0.5, 1.5), (2.5, 3.5)), events=(0.6, 2.6), strengths=(1, 1), notes=(0, 0)
    )
    scene = changed(scene, path=Path((48.0, 48.0), (48.0, 48.0)))
    waveform = render_object(scene.objects[0])
    frames = render_frames(scene)
    for start, stop in ((0.0, 0.5), (1.85, 2.5), (3.85, 4.0)):
        assert level_db(waveform[round(start * SAMPLE_RATE) : round(stop * SAMPLE_RATE)]) < -60
        resting = frames[round(start * FPS) : round(stop * FPS)]
        assert (resting == resting[:1]).all()
    for start, stop in ((0.55, 1.45), (2.55, 3.45)):
        assert level_db(waveform[round(start * SAMPLE_RATE) : round(stop * SAMPLE_RATE)]) > -40
        assert len(np.unique(frames[round(start * FPS) : round(stop * FPS)], axis=0)) > 10


def test_an_object_is_loud_inside_its_intervals_alone():
    item = replace(scene_of("violin").objects[0], intervals=((0.5, 1.0), (2.0, 2.5)))
    level = item.envelope(np.array([0.49, 0.5, 0.515, 0.75, 0.97, 1.0, 1.03, 1.5, 2.25, 2.51]))
    assert level == pytest.approx([0, 0, 0.5, 1, 0.5, 0, 0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("kind", ["bird", "robot"])
def test_calls_sound_while_the_mouth_is_open(kind):
    item = scene_of(kind).objects[0]
    waveform, times = render_object(item), np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    open_now = np.any([(a - 1e-3 <= times) & (times <= b + 1e-3) for a, b in item.intervals], axis=0)
    assert np.abs(waveform[~open_now]).max() == 0
    assert level_db(waveform[open_now]) > -20


@pytest.mark.parametrize("kind", ["anvil", "ball", "bell", "glass", "siren", "violin", "xylophone"])
def test_bigger_is_lower(kind):
    scene = scene_of(kind)
    loudest = []
    for size in (16.0, 18.0, 20.0, 22.0, 24.0, 26.0):
        spectrum = np.abs(np.fft.rfft(render_object(changed(scene, size=size).objects[0]).astype(float))) ** 2
        loudest.append(float((spectrum * np.arange(len(spectrum))).sum() / spectrum.sum()))
    assert loudest == sorted(loudest, reverse=True)
    assert loudest[0] / loudest[-1] > 1.5


def test_lower_in_the_picture_is_louder_by_ten_db_at_most():
    scene = scene_of("siren")
    ways = [Path((48.0, y), (48.0, y)) for y in (20.0, 34.0, 48.0, 62.0, 76.0)]
    levels = [level_db(render_audio(changed(scene, path=way))) for way in ways]
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("kind", CYCLING)
def test_faster_is_heard_and_seen(kind):
    scene = scene_of(kind)
    faster = changed(scene, rate=scene.objects[0].rate * 1.3)
    assert (render_frames(faster) != render_frames(scene)).any()
    if kind != "shaker":  # its sound is its turns, which are events
        assert not np.array_equal(render_audio(faster), render_audio(scene))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_is_large_enough_to_be_seen(kind):
    scene = changed(scene_of(kind), size=SMALLEST, path=Path((48.0, 48.0), (48.0, 48.0)))
    seen = (render_frames(scene)[32] != render_frames(replace(scene, objects=()))[32]).any(axis=2)
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    assert seen.sum() > 200
    assert min(np.ptp(rows), np.ptp(columns)) >= 14
    assert max(np.ptp(rows), np.ptp(columns)) >= 22


def test_distractors_and_colours_are_silent():
    scene = next(s for s in (describe(3, index) for index in range(100)) if len(s.distractors) == 2)
    bare = replace(scene, distractors=())
    assert np.array_equal(render_audio(bare), render_audio(scene))
    frames = render_frames(scene)
    assert (render_frames(bare) != frames).any(axis=(1, 2, 3)).all()
    assert (frames[10] != frames[40]).any()
    item: SoundingObject = scene.objects[0]
    painted = replace(scene, objects=(replace(item, colour=item.accent, accent=item.colour), *scene.objects[1:]))
    assert np.array_equal(render_audio(painted), render_audio(scene))
    assert not np.array_equal(render_frames(painted), frames)


def test_both_of_two_objects_are_audible():
    doubles = [s for s in (describe(4, index) for index in range(60)) if len(s.objects) == 2]
    for scene in doubles:
        for item in scene.objects:
            alone = render_audio(replace(scene, objects=(item,)))
            blocks = np.square(alone.reshape(-1, 2000), dtype=np.float64).mean(axis=1)
            assert 10 * np.log10(blocks.max()) > -32


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("worlds") / "small"
    write_world(out, seed=5, num_train=3, num_val=2, num_workers=0)
    return out


def test_a_written_world(small_world):
    files = ["train/0000000.mp4", "train/0000001.mp4", "train/0000002.mp4", "val/1000000.mp4", "val/1000001.mp4"]
    notes = ["events.json", "train.csv", "val.csv", "world.json"]
    assert sorted(tree(small_world)) == sorted(files + notes)
    truth = json.loads((small_world / "events.json").read_text())
    assert list(truth) == files
    for split in ("train", "val"):
        with (small_world / f"{split}.csv").open() as table:
            rows = list(csv.DictReader(table))
        assert [row["file"] for row in rows] == [file for file in files if file.startswith(split)]
        for row in rows:
            objects = describe(5, int(row["file"][-11:-4])).objects
            assert row["labels"].split(";") == [item.kind for item in objects]
            assert [known["events"] for known in truth[row["file"]]["objects"]] == [list(i.events) for i in objects]
            assert [known["kind"] for known in truth[row["file"]]["objects"]] == row["labels"].split(";")


def test_a_written_video_holds_the_segment(small_world):
    scene = describe(5, 1_000_000)
    clip = read_audio(small_world / "val" / "1000000.mp4", SAMPLE_RATE, seconds=SECONDS)
    wanted = render_audio(scene)
    likeness = np.dot(clip.waveform, wanted) / np.sqrt(np.dot(clip.waveform, clip.waveform) * np.dot(wanted, wanted))
    assert likeness > 0.9
    frames = read_frames(small_world / "val" / "1000000.mp4", FPS, count=64).frames
    assert np.abs(frames.astype(int) - render_frames(scene)).mean() < 12


def test_equal_arguments_give_equal_bytes(small_world, tmp_path):
    write_world(tmp_path / "again", seed=5, num_train=3, num_val=2, num_workers=0)
    assert tree(tmp_path / "again") == tree(small_world)


def test_a_complete_world_is_left_alone(small_world):
    times = {file: file.stat().st_mtime_ns for file in small_world.rglob("*.mp4")}
    write_world(small_world, seed=5, num_train=3, num_val=2, num_workers=0)
    assert {file: file.stat().st_mtime_ns for file in small_world.rglob("*.mp4")} == times


def test_a_stopped_world_is_resumed(small_world, tmp_path):
    out = tmp_path / "stopped"
    shutil.copytree(small_world, out)
    for name in ("events.json", "train.csv", "val.csv", "train/0000002.mp4", "val/1000000.mp4"):
        (out / name).unlink()
    (out / "train" / "0000002.mp4.tmp").write_bytes(b"half a file")
    write_world(out, seed=5, num_train=3, num_val=2, num_workers=0)
    assert tree(out) == tree(small_world)


@pytest.mark.slow
def test_a_killed_world_is_resumed(small_world, tmp_path):
    out = tmp_path / "killed"
    script = f"from vab.demo.world import write_world; write_world({str(out)!r}, 5, 3, 2, 0)"
    process = subprocess.Popen([sys.executable, "-c", script])
    while process.poll() is None and not (out / "train" / "0000000.mp4").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "train.csv").exists()
    complete = tree(small_world)
    left = {name: content for name, content in tree(out).items() if not name.endswith(".tmp")}
    assert left.items() <= complete.items()  # what is there is whole
    write_world(out, seed=5, num_train=3, num_val=2, num_workers=0)
    assert tree(out) == complete


@pytest.mark.slow
def test_processes_share_the_work(small_world, tmp_path):
    write_world(tmp_path / "shared", seed=5, num_train=3, num_val=2, num_workers=2)
    assert tree(tmp_path / "shared") == tree(small_world)


def test_what_write_world_refuses(small_world, tmp_path):
    with pytest.raises(UserError, match=r"seed 5, num_train 3.*asked for.*seed 6.*rm -r"):
        write_world(small_world, seed=6, num_train=3, num_val=2, num_workers=0)
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds other files"):
        write_world(tmp_path, seed=5, num_train=3, num_val=2, num_workers=0)
    with pytest.raises(UserError, match=r"is a file"):
        write_world(tmp_path / "holiday.mp4", seed=5, num_train=3, num_val=2, num_workers=0)
    with pytest.raises(UserError, match=r"seed must be 0 or more, got -1"):
        write_world(tmp_path / "new", seed=-1, num_train=3, num_val=2, num_workers=0)
    with pytest.raises(UserError, match=r"num_val=0"):
        write_world(tmp_path / "new", seed=0, num_train=3, num_val=0, num_workers=0)
    assert world.truth(describe(0, 0))["index"] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["holiday.mp4"]
