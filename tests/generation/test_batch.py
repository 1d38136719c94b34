"""Whole test sets: each input exactly once, equal whatever interrupted the run, and by whatever number of ranks."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import command_line
from vab.backbone import Backbone
from vab.cli import main
from vab.data.media.write import write_video
from vab.files import lock_folder
from vab.generation import resumable
from vab.generation.batch import generate_many
from vab.generation.generator import Generator
from vab.generation.outputs import many_jobs, write_sound
from vab.generation.prefetch import prefetch
from vab.generation.recipe import Recipe
from vab.generation.request import Request
from vab.generation.resumable import Journal
from vab.generation.table import COLUMNS
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    """An untrained model, saved as Lightning saves it."""
    from lightning.pytorch import Trainer

    from vab.data.reading.datamodule import ShardDataModule

    torch.manual_seed(0)
    data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    task = PretrainTask(backbone, warmup_steps=1, schedule_steps=10, sampler=Sampler(decode_steps=2))
    quiet = dict.fromkeys(
        ["logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler"],
        False,
    )
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, **quiet)
    trainer.fit(task, data)
    path = tmp_path_factory.mktemp("model") / "last.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def generator(checkpoint):
    return Generator.load(checkpoint, device="cpu")


def video(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 255, (round(seconds * 10), 48, 64, 3), dtype=np.uint8)
    write_video(path, frames, 10, None, 16_000)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos of 0.3 to 0.7 s, the last of two windows, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(["a", "b", "c", "sub/d", "e"]):
        video(folder / f"{name}.mp4", 0.3 + 0.1 * number, number)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint, generator):
    """What ``vab generate`` does with a folder, on networks that are loaded once."""

    def run(source, out, *, seed=0, steps=2, variations=1, write=None, load=None, weights="ema", **options):
        class Loaded(Recipe):
            def load(self, device):
                loaded = (load or (lambda device: generator))(device)
                loaded.task.sampler = Sampler(steps, guidance_scale=2.0)
                return loaded

            def write(self, job, sound, sample_rate):
                (write or write_sound)(job, sound, sample_rate)

        jobs = many_jobs(Path(source), Request(Path(source), ""), Path(out), "wav", variations)
        recipe = Loaded(checkpoint, seed=seed, weights=weights)
        return generate_many(jobs, Path(out), recipe, **({"batch_size": 2, "device": "cpu"} | options))

    return run


def table(out):
    with (out / "generations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(out):
    """All files by name; the table without its timings."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    rows = list(csv.DictReader(io.StringIO(found["generations.csv"].decode())))
    assert all(row["error"] or float(row.pop("wall_seconds")) > 0 for row in rows)
    return found | {"generations.csv": rows}


@pytest.fixture(scope="module")
def whole(videos, run, tmp_path_factory):
    """The folder as a run leaves it that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = run(videos, out)
    assert (report.made, len(report.rows), report.failed) == (5, 5, [])
    return out


def test_each_input_has_one_output_and_one_row(whole, videos, checkpoint, capsys):
    names = ["a", "b", "c", "e", "sub/d"]
    assert sorted(contents(whole)) == sorted(["generations.csv", "generations.json", *(f"{n}.wav" for n in names)])
    rows = table(whole)
    assert tuple(rows[0]) == COLUMNS
    assert [row["output"] for row in rows] == [f"{name}.wav" for name in names]
    lengths = {row["output"]: float(row["seconds"]) for row in rows}
    assert lengths == pytest.approx(
        {"a.wav": 0.3, "b.wav": 0.4, "c.wav": 0.5, "sub/d.wav": 0.6, "e.wav": 0.7}, abs=0.01
    )
    for row in rows:
        assert (row["seed"], row["variation"], row["error"], row["checkpoint"]) == ("0", "0", "", checkpoint)
        assert json.loads(row["sampler"])["decode_steps"] == 2
        assert len(row["entropy"].split(";")) == 4
        assert float(row["peak"]) > 0
        assert float(row["rms_db"]) < 0
    settings = json.loads((whole / "generations.json").read_text())["settings"]
    assert (settings["seed"], settings["format"], settings["checkpoint_sha256"]) == (
        0,
        ".wav",
        rows[0]["checkpoint_sha256"],
    )


def test_a_finished_folder_is_left_as_it_is(whole, videos, run, capsys):
    before = contents(whole)
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*.wav")}
    report = run(videos, whole, batch_size=3)  # which is no part of what determines the outputs
    assert (report.made, len(report.rows)) == (0, 5)
    assert "0 made, 5 there before, 0 failed" in capsys.readouterr().out
    assert contents(whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.wav")} == times


# ---- interruptions ----


class Killed(BaseException):
    """Nothing in the program expects it, like a kill."""


class Moments:
    """Lets the program live up to the n-th moment at which a kill could matter."""

    def __init__(self, monkeypatch):
        self.left = self.passed = 0
        write_atomically, add, unlink = resumable.write_atomically, Journal.add, Path.unlink

        def written(path, content):
            self.pass_one()
            write_atomically(path, content)
            self.pass_one()

        def added(journal, output, row):
            self.pass_one()
            if self.is_now():
                half = resumable._line(output, row)
                journal._file.write(half[: len(half) // 2])
            self.pass_one()
            add(journal, output, row)
            self.pass_one()

        def unlinked(path, missing_ok=False):
            self.pass_one()
            unlink(path, missing_ok)

        monkeypatch.setattr(resumable, "write_atomically", written)
        monkeypatch.setattr(Journal, "add", added)
        monkeypatch.setattr(Path, "unlink", unlinked)

    def write(self, job, sound, rate):
        self.pass_one()
        write_sound(job, sound, rate)

    def is_now(self):
        return self.passed + 1 == self.left

    def pass_one(self):
        self.passed += 1
        if self.passed == self.left:
            raise Killed

    def kill_at(self, moment):
        self.left, self.passed = moment, 0


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(videos, run, tmp_path, monkeypatch):
    moments, three = Moments(monkeypatch), tmp_path / "three.csv"
    three.write_text("file,id\n" + "".join(f"{videos}/{name}.mp4,{name}\n" for name in "abc"))
    run(three, tmp_path / "whole", write=moments.write)
    expected, count = contents(tmp_path / "whole"), moments.passed
    assert count >= 3 * 4 + 2 * 2 + 1
    for moment in range(1, count + 1):
        out = tmp_path / str(moment)
        moments.kill_at(moment)
        with pytest.raises(Killed):
            run(three, out, write=moments.write)
        journals = [path.read_bytes() for path in out.glob(".generations.*.jsonl")] if out.exists() else []
        noted = 3 if (out / "generations.csv").exists() else max([text.count(b"\n") for text in journals], default=0)
        moments.kill_at(0)
        report = run(three, out, write=moments.write)
        assert (report.made, contents(out)) == (3 - noted, expected), moment


def test_a_run_killed_again_and_again_gets_there(whole, videos, run, tmp_path, monkeypatch):
    chance, moments, kills = random.Random(0), Moments(monkeypatch), 0
    while not (tmp_path / "generations.csv").exists():
        moments.kill_at(chance.randint(1, 12))
        try:
            run(videos, tmp_path, write=moments.write)
        except Killed:
            kills += 1
            # The next run may have other ranks.
            for path in tmp_path.glob(".generations.rank_0.jsonl"):
                path.rename(path.with_name(f".generations.rank_{chance.randint(0, 9)}.jsonl"))
    moments.kill_at(0)
    run(videos, tmp_path, write=moments.write)
    assert kills >= 3
    assert contents(tmp_path) == contents(whole)


def test_a_group_is_generated_whole_and_only_what_is_missing_is_written(whole, videos, run, generator, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "b.wav").unlink()
    batches, written = [], []

    class Watched(Generator):
        def make(self, prepared, *arguments, **options):
            batches.append([item.request.name for item in prepared])
            return super().make(prepared, *arguments, **options)

    def write(job, sound, rate):
        written.append(job.target.name)
        write_sound(job, sound, rate)

    watched = Watched(generator.task, generator.codec, generator.vision)
    report = run(videos, out, load=lambda device: watched, write=write)
    assert [[Path(name).name for name in batch] for batch in batches] == [["a.mp4", "b.mp4"]]
    assert (written, report.made) == (["b.wav"], 1)
    assert contents(out) == contents(whole)


def test_a_full_disk_ends_it_and_more_room_goes_on(whole, videos, run, small_disk):
    with pytest.raises(UserError, match="no space left"):
        run(videos, small_disk / "out")
    made = {path.name: path.read_bytes() for path in (small_disk / "out").rglob("*.wav")}
    assert 0 < len(made) < 5
    assert not (small_disk / "out" / "generations.csv").exists()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    report = run(videos, small_disk / "out")
    assert report.made == 5 - len(made)
    assert contents(small_disk / "out") == contents(whole)


def test_two_runs_do_not_share_a_folder(videos, run, tmp_path):
    for alone in (True, False):  # the first rank of another run, or one of its ranks that outlived it
        with (
            lock_folder(tmp_path, "vab generate", alone, share=True),
            pytest.raises(UserError, match="another vab generate"),
        ):
            run(videos, tmp_path)
    assert not list(tmp_path.iterdir())
    run(videos, tmp_path)


# ---- what cannot be made ----


def test_inputs_that_fail_are_listed_and_tried_again(videos, run, whole, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(videos, folder)
    (folder / "b.mp4").write_text("not a video")
    (folder / "sub" / "d.mp4").write_text("nor this")
    with pytest.raises(UserError, match=r"2 of 5 videos gave no sound:\n.*b\.mp4.*\n.*d\.mp4"):
        run(folder, out)
    assert "3 made, 0 there before, 2 failed" in capsys.readouterr().out
    rows = table(out)
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True]
    assert [row["output"] for row in rows] == ["a.wav", "", "c.wav", "e.wav", ""]
    assert "b.mp4" in rows[1]["error"]
    assert not list(out.glob(".generations*"))

    shutil.copy(videos / "b.mp4", folder / "b.mp4")
    with pytest.raises(UserError, match=r"1 of 5 videos gave no sound:\n.*d\.mp4"):
        run(folder, out)
    assert [bool(row["error"]) for row in table(out)] == [False, False, False, False, True]
    (folder / "sub" / "d.mp4").unlink()
    report = run(folder, out)  # not listed any more, and there is no sound of it
    assert (report.made, len(report.rows)) == (0, 4)
    assert table(out)[1]["error"] == ""


def test_an_output_that_cannot_hold_its_input_fails_alone(videos, run, tmp_path):
    def write(job, sound, rate):
        if job.target.name == "c.wav":
            raise UserError("its container cannot hold it")
        write_sound(job, sound, rate)

    with pytest.raises(UserError, match=r"1 of 5 videos gave no sound:\nc\.mp4: its container"):
        run(videos, tmp_path, write=write)
    assert [row["error"] for row in table(tmp_path)] == ["", "", "its container cannot hold it", "", ""]


def test_what_breaks_is_not_taken_for_a_bad_input(videos, run, tmp_path):
    def write(job, sound, rate):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(videos, tmp_path, write=write)


# ---- settings ----


def test_other_settings_are_refused_and_overwriting_starts_afresh(whole, videos, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "mine.txt").write_text("not a generated sound")
    with pytest.raises(UserError, match=r"seed: 0 != 1; sampler.decode_steps: 2 != 3\)") as refused:
        run(videos, out, seed=1, steps=3)
    assert "--overwrite" in str(refused.value)
    with pytest.raises(UserError, match=r"num_variations: 1 != 2; weights: \"ema\" != \"live\""):
        run(videos, out, variations=2, weights="live")
    expected = contents(whole)
    assert {name: value for name, value in contents(out).items() if name != "mine.txt"} == expected

    run(videos, out, variations=2, overwrite=True)
    made = contents(out)
    assert sorted(path.name for path in out.rglob("*.wav")) == sorted(f"{n}_{v}.wav" for n in "abcde" for v in (1, 2))
    assert (out / "mine.txt").exists()
    assert made["a_1.wav"] != made["a_2.wav"]
    run(videos, out, overwrite=True)
    assert contents(out) == expected | {"mine.txt": b"not a generated sound"}


def test_a_damaged_table_is_named_and_can_be_overwritten(whole, videos, run, tmp_path):
    for name in ("generations.csv", "generations.json"):
        out = tmp_path / name
        shutil.copytree(whole, out)
        (out / name).write_text("file;output\nx;y\n")
        with pytest.raises(UserError, match=rf"{name} is .*--overwrite"):
            run(videos, out)
        run(videos, out, overwrite=True)
        assert contents(out) == contents(whole)


def test_sounds_of_inputs_that_are_gone_are_not_mixed_in(whole, videos, run, tmp_path):
    out, fewer = tmp_path / "out", tmp_path / "list.csv"
    shutil.copytree(whole, out)
    fewer.write_text(f"file,id\n{videos}/a.mp4,a\n")
    with pytest.raises(UserError, match=r"holds 4 sounds of inputs that --video does not list any more.*b\.wav"):
        run(fewer, out)


def test_files_of_unknown_origin_are_not_replaced(videos, run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.wav").write_text("somebody's")
    with pytest.raises(UserError, match=r"d\.wav exists, but no generations\.json"):
        run(videos, tmp_path)
    assert (tmp_path / "sub" / "d.wav").read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sub"]
    run(videos, tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--batch_size must be 1 or more"),
        ({"devices": 0}, "--devices must be 1 or more"),
        ({"num_nodes": 0}, "--num_nodes must be 1 or more"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(videos, run, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run(videos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- reading ahead ----


def test_the_next_piece_is_worked_on_meanwhile_and_not_more():
    began = [threading.Event() for _ in range(7)]

    def work(number, stopped):
        began[number].set()
        return number

    seen = []
    with prefetch(work, range(6)) as pieces:
        for piece in pieces:
            seen.append(piece)
            assert piece == 5 or began[piece + 1].wait(5)
            assert not began[piece + 2 if piece < 5 else 6].wait(0.01)
    assert seen == list(range(6))
    with prefetch(work, []) as pieces:
        assert list(pieces) == []


def test_an_error_while_reading_ahead_reaches_the_caller_and_leaving_stops_the_thread():
    def fail(number, stopped):
        if number == 1:
            raise ZeroDivisionError
        return number

    with prefetch(fail, [0, 1]) as pieces:
        assert next(pieces) == 0
        with pytest.raises(ZeroDivisionError):
            next(pieces)

    ended = threading.Event()

    def slow(number, stopped):
        if number == 1:
            stopped.wait(60)
            ended.set()
        return number

    with prefetch(slow, range(9)) as pieces:
        assert next(pieces) == 0
    assert ended.is_set()


def test_a_call_that_does_not_end_is_abandoned_when_the_work_is_stopped():
    release, stuck = threading.Event(), threading.Event()

    def read(number, stopped):  # in one long call of a library
        if number == 1:
            stuck.set()
            release.wait(60)
        return number

    begin = time.monotonic()
    with suppress(KeyboardInterrupt), prefetch(read, range(3), patience=0.1) as pieces:
        assert next(pieces) == 0
        assert stuck.wait(5)
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 10
    release.set()


# ---- the command ----


def start(checkpoint, videos, out, *arguments):
    return command_line.start("generate", "--checkpoint", checkpoint, "--video", videos, "--out", out, "--device=cpu",
                              "--format=wav", *arguments)  # fmt: skip


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(300)
def test_two_ranks_make_what_one_makes(checkpoint, videos, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(videos, folder)
    (folder / "c.mp4").write_text("not a video")
    alone = {"checkpoint": checkpoint, "video": folder, "out": tmp_path / "one", "device": "cpu", "format": "wav"}
    with pytest.raises(SystemExit):
        main(["generate", "--batch_size=2", *(f"--{name}={value}" for name, value in alone.items())])
    capsys.readouterr()
    run = start(checkpoint, folder, tmp_path / "two", "--batch_size=2", "--devices=2")
    printed, complaint = run.communicate(timeout=250)
    assert run.returncode == 2
    assert printed.startswith(f"{tmp_path}/two/generations.csv: 4 made, 0 there before, 1 failed")
    assert complaint.startswith("error: 1 of 5 videos gave no sound:\n")
    assert len(complaint.splitlines()) == 2, complaint  # one rank speaks
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "two")) == 4 + 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_one_line_and_the_next_run_goes_on(checkpoint, videos, tmp_path, ranks):
    listed, out = tmp_path / "list.csv", tmp_path / "out"
    for number in range(200):
        (tmp_path / f"{number}.mp4").symlink_to(videos / "e.mp4")
    listed.write_text("file\n" + "".join(f"{number}.mp4\n" for number in range(200)))
    arguments = (checkpoint, listed, out, f"--devices={ranks}")
    run = start(*arguments)
    wait_for_sounds(out, 5)
    os.killpg(run.pid, signal.SIGINT)
    printed, complaint = run.communicate(timeout=60)
    assert (run.returncode, printed, complaint) == (130, "", "stopped\n")
    made = len(list(out.glob("*.wav")))
    assert 5 <= made < 200
    run = start(*arguments)
    printed, complaint = run.communicate(timeout=250)
    assert (run.returncode, complaint) == (0, "")
    there = int(printed.split(" made, ")[1].split()[0])
    assert made - ranks <= there <= made  # at most one of each rank was in place but not in its journal
    assert len(contents(out)) == 200 + 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_videos_killed_at_five_moments_end_as_if_never_killed(checkpoint, tmp_path):
    chance, folder, out = random.Random(0), tmp_path / "in", tmp_path / "out"
    for number in range(200):
        video(folder / f"{number:03d}.mp4", chance.choice([0.3, 0.4, 0.5, 0.6, 0.7]), number)
    (folder / "100.mp4").write_text("not a video")
    whole = start(checkpoint, folder, tmp_path / "whole")
    assert "1 of 200 videos" in whole.communicate(timeout=250)[1]
    progress = []
    for kill in range(5):
        run = start(checkpoint, folder, out)
        wait_for_sounds(out, 35 * kill + chance.randint(1, 30))
        time.sleep(chance.uniform(0, 0.2))
        assert run.poll() is None
        run.kill()
        run.communicate(timeout=60)
        progress.append(len(list(out.glob("*.wav"))))
    assert progress == sorted(set(progress))
    assert progress[0] > 0
    assert progress[-1] < 199
    last = start(checkpoint, folder, out)
    assert "1 of 200 videos" in last.communicate(timeout=250)[1]
    assert contents(out) == contents(tmp_path / "whole")
    assert len({row["output"] for row in table(out) if row["output"]}) == 199


def wait_for_sounds(out, count):
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.wav"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
