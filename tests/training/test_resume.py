"""A run that is killed and taken up again ends with the weights of a run that was left alone, bit for bit."""

import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine_runs import run
from fit_runs import PYTHON, flags, last, said, same_weights, start, status
from moments import VALIDATING
from tasks_help import quiet_trainer, small_backbone
from vab.callbacks import EMA, Checkpoints
from vab.cli import main
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.files import TEMPORARY_SUFFIX
from vab.tasks import AlignTask, ClassifyTask
from vab.tasks.checkpoints import find_checkpoint

STEPS = 60
KILLS = 5


def begin(shards, folder, workers, resume=None):
    """``vab fit`` in a process group of its own; validation and a checkpoint every 4 steps, dropout on."""
    folder.mkdir(exist_ok=True)
    (folder / VALIDATING).unlink(missing_ok=True)
    more = [f"--data.num_workers={workers}", "--data.val_batch_size=1", "--trainer.callbacks+=moments.Marks"]
    more += [f"--ckpt_path={resume}"] if resume else []
    command = [*PYTHON, "vab.cli", *flags(shards, "run", batch_size=8, steps=STEPS), *more]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return start(folder, "run", command, PYTHONPATH=os.pathsep.join(paths))


def wait_until(process, folder, happens):
    """Look again and again, all the time, as what is waited for may be over in a millisecond."""
    limit = time.monotonic() + 200
    while not happens():
        assert process.poll() is None, f"the run ended: {said(folder, 'run')[-2000:]}"
        assert time.monotonic() < limit
        time.sleep(0.0001)


def end(shards, folder, workers, resume=None):
    assert status(begin(shards, folder, workers, resume)) == 0, said(folder, "run")[-3000:]
    return last(folder, "run")


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The last checkpoint of a run that was left alone."""
    return end(shards, tmp_path_factory.mktemp("resume") / "whole", 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("moment", ["anywhere", "writing", "validating"])
def test_a_run_killed_again_and_again_ends_like_one_that_was_left_alone(moment, shards, whole, tmp_path):
    folder, draws = tmp_path / "killed", random.Random(moment)
    checkpoints = folder / "runs"
    hits, steps, resume = 0, [0], None

    def written():
        return {(file, file.stat().st_mtime_ns) for file in checkpoints.rglob("last.ckpt")}

    def is_writing():
        return any(checkpoints.rglob(f"*{TEMPORARY_SUFFIX}"))

    for number in range(KILLS):
        before = written()
        # Other numbers of workers than the run before, by turns.
        process = begin(shards, folder, 0 if number % 2 else 2, resume)
        wait_until(process, folder, lambda before=before: written() - before)  # it has come further
        if moment == "anywhere":
            time.sleep(draws.uniform(0, 0.3))
        elif moment == "writing":
            wait_until(process, folder, is_writing)
        else:
            wait_until(process, folder, (folder / VALIDATING).exists)
            time.sleep(draws.uniform(0, 0.01))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        hits += {"anywhere": True, "writing": is_writing(), "validating": (folder / VALIDATING).exists()}[moment]
        resume = find_checkpoint(folder / "runs" / "run")
        steps.append(torch.load(resume, weights_only=True)["global_step"])
    assert all(0 < later - earlier < STEPS for earlier, later in pairwise(steps)), steps
    assert steps[-1] < STEPS
    assert hits, "no kill fell where it was meant to"
    assert same_weights(end(shards, folder, 0, resume), whole), steps
    print(f"{moment}: killed at {steps[1:]}, {hits} of {KILLS} where they were meant to")


def test_a_run_that_goes_on_as_it_began_is_one_run(shards, tmp_path, monkeypatch):
    """In one folder, with one best, and a line of TensorBoard without a step back; another setting, another folder."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "run"

    def fit(steps, *more):
        main([*flags(shards, "run", batch_size=8, steps=steps, every=2), "--trainer.log_every_n_steps=1", *more])
        return sorted(path.name for path in place.iterdir())

    fit(4)
    shutil.copytree(place, tmp_path / "killed")
    fit(6, f"--ckpt_path={place}")
    shutil.rmtree(place / "version_0" / "checkpoints")  # as if the run had been killed after step 6 was logged ...
    shutil.copytree(tmp_path / "killed" / "version_0" / "checkpoints", place / "version_0" / "checkpoints")
    assert fit(8, f"--ckpt_path={place}") == ["version_0"]  # ... and before anything was saved
    assert len(list((place / "version_0").glob("events.*"))) == 3
    state = torch.load(place / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = (value for name, value in state.items() if "Checkpoints" in name)
    assert set(best["best_k_models"]) == {best["best_model_path"]}
    read = EventAccumulator(str(place / "version_0"))
    read.Reload()
    assert [point.step for point in read.Scalars("train/loss")] == list(range(8))
    assert [point.step for point in read.Scalars("val/loss")] == [1, 3, 5, 7]
    checkpoint = f"--ckpt_path={place / 'version_0'}"
    assert fit(10, checkpoint, "--model.label_smoothing=0.2") == ["version_0", "version_1"]
    earlier = place / "version_0" / "checkpoints" / "earlier.ckpt"
    shutil.copy(tmp_path / "killed" / "version_0" / "checkpoints" / "last.ckpt", earlier)
    assert fit(8, f"--ckpt_path={earlier}") == ["version_0", "version_1", "version_2"]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_a_checkpoint_of_two_ranks_goes_on_on_any_number_of_them(shards, tmp_path):
    """The global batch stays, so the run goes on as if nothing had happened; an epoch is 6 steps."""
    whole = run(tmp_path / "whole", shards, 2, max_steps=8)
    run(tmp_path / "half", shards, 2, max_steps=3)
    for ranks in (1, 2, 4):
        resume = str(tmp_path / "half" / "last.ckpt")
        on = run(tmp_path / f"on{ranks}", shards, ranks, max_steps=8, resume=resume)
        assert on["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5 if ranks != 2 else 0), ranks
        assert on["figures"]["val/loss"] == pytest.approx(whole["figures"]["val/loss"], rel=1e-5), ranks
        for name, value in whole["checkpoint"]["live_state_dict"].items():
            torch.testing.assert_close(
                on["checkpoint"]["live_state_dict"][name], value, rtol=0, atol=1e-5, msg=f"{ranks} {name}"
            )


@pytest.mark.parametrize("kind", ["align", "classify"])
def test_later_stages_that_stop_and_go_on_end_alike(kind, shards, tmp_path):
    """With averaged weights, dropout and mixup; a trainer of its own for each part, as separate commands have."""
    labels = ShardDataset(shards / "train").labels
    shared = {"warmup_steps": 2, "schedule_steps": 8}

    def task():
        backbone = small_backbone(ShardDataset(shards / "train").spec, dropout=0.1)
        if kind == "align":
            return AlignTask(backbone, micro_batch_size=3, embedding_dim=16, **shared)
        return ClassifyTask(backbone, labels, mixup=0.5, multi_label=True, head_dropout=0.1, **shared)

    def end_of(name, *parts):
        checkpoint = None
        for steps in parts:
            data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=4, num_workers=0)
            keep = Checkpoints(dirpath=str(tmp_path / name), every_n_train_steps=1, save_last=True)
            settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": True}
            trainer = quiet_trainer(callbacks=[EMA(0.9), keep], **settings)
            trainer.fit(task(), data, ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / name / "last.ckpt"
        return torch.load(checkpoint, weights_only=True)

    whole, parts = end_of("whole", 8), end_of("parts", 3, 8)
    for name in ("state_dict", "live_state_dict"):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name]), name
    assert parts["global_step"] == 8
