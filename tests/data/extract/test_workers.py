"""Processes for each device: what one of them must be like, and parts of one that dies."""

import os
import signal
from dataclasses import replace

import pytest

from small_media import video
from vab.data.extract.engines import DevicesEngine, Recipe, WorkersEngine, _Process
from vab.data.extract.parts import Settings
from vab.data.extract.run import extract_parts
from vab.data.inputs.listing import find_sources
from vab.data.shards.folder import OutFolder
from vab.data.shards.verify import verify
from vab.spec import UserError

RULES = {"segment_seconds": 0.64, "video_fps": 12.5, "segments": "all", "hop_seconds": 0.64, "min_seconds": 0.2,
         "silence_db": -60.0, "still_pictures": "keep", "without_video": "leave_out"}  # fmt: skip
RECIPE = Recipe("tiny", "tiny", None, None, RULES, threads=1)


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(4):
        video(folder / f"{number}.mp4", 0.64, seed=number)
    return folder


def run(media, out, engine):
    return extract_parts(find_sources(media), OutFolder(out), engine, Settings(0, 1, 60.0, 1))


def before_each_part(engine, act):
    """Have a function called with the number of each part that a worker is about to be given."""
    run = engine.run

    def parts(given):
        for part in given:
            act(part.number)
            yield part

    engine.run = lambda given, *rest: run(parts(given), *rest)


@pytest.mark.slow
def test_a_process_that_dies_as_it_is_given_a_part_is_started_again(media, tmp_path):
    engine = DevicesEngine(RECIPE, ["cpu"])

    def kill(number):
        if number == 1:
            os.kill(engine._workers[0].process.pid, signal.SIGKILL)
            engine._workers[0].process.join()

    before_each_part(engine, kill)
    try:
        assert run(media, tmp_path / "out", engine).records == 4
    finally:
        engine.close()
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_part_whose_process_dies_again_and_again_ends_the_run(media, tmp_path):
    engine = DevicesEngine(RECIPE, ["cpu"])
    send = engine._workers[0].send

    def kill(message):
        send(message)
        if engine._workers[0].parts:
            os.kill(engine._workers[0].process.pid, signal.SIGKILL)

    try:
        engine._workers[0].send = kill
        words = r"the process of device cpu died 3 times in part 0 \(exit code -9, out of memory\?\)"
        with pytest.raises(UserError, match=words):
            run(media, tmp_path / "out", engine)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_worker_with_other_rules_or_networks_than_the_first_is_refused(media, tmp_path):
    other = replace(RECIPE, rules=RULES | {"silence_db": -50.0})
    engine = WorkersEngine([_Process(RECIPE, "cpu"), _Process(other, "cpu")], _Process.ready)
    before_each_part(engine, lambda number: engine._workers[1].connection.poll(100))  # until the second has loaded
    try:
        with pytest.raises(UserError, match=r"the process of device cpu has other .*\(silence_db: -50.0 != -60.0\)"):
            run(media, tmp_path / "out", engine)
    finally:
        engine.close()


@pytest.mark.slow
def test_processes_leave_no_temporary_files(media, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine = DevicesEngine(RECIPE, ["cpu", "cpu"])
    run(media, tmp_path / "out", engine)
    engine.close()
    assert list(tmp_path.glob("pymp-*")) == []


def test_a_process_without_its_networks_ends_in_one_line():
    with pytest.raises(UserError, match="codec"):
        DevicesEngine(replace(RECIPE, codec="none"), ["cpu"])


def test_an_interrupt_while_processes_start_ends_those_that_were_started():
    class Interrupted(_Process):
        def start(self):
            raise KeyboardInterrupt

    workers = [_Process(RECIPE, "cpu"), Interrupted(RECIPE, "cpu")]
    with pytest.raises(KeyboardInterrupt):
        WorkersEngine(workers, _Process.ready)
    assert not workers[0].process.is_alive()
