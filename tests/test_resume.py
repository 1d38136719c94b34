"""A run that is killed and taken up again ends with the weights of a run that was left alone, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tasks_help import quiet_trainer, small_backbone
from vab.callbacks import EMA, Checkpoints
from vab.data.datamodule import ShardDataModule
from vab.data.records import ShardDataset
from vab.tasks import AlignTask, ClassifyTask
from vab.tasks.base import find_checkpoint

RECIPE = Path(__file__).parents[1] / "configs" / "demo" / "pretrain.yaml"
STEPS = 24


def start(shards, folder, name, workers, *flags):
    """``vab fit`` in a process of its own group; validation and a checkpoint every 4 steps, dropout on."""
    command = [
        *(sys.executable, "-m", "vab.cli", "fit", "--config", str(RECIPE)),
        *(f"--data.train={shards / 'train'}", f"--data.val={shards / 'val'}", f"--data.num_workers={workers}"),
        *("--data.batch_size=8", "--model.backbone.dim=32", "--model.backbone.num_heads=2"),
        *("--model.backbone.num_modality_layers=1", "--model.backbone.num_joint_layers=1"),
        *("--model.backbone.dropout=0.1", "--model.warmup_steps=2", "--model.sampler.decode_steps=1"),
        *(f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=4", "--trainer.accelerator=cpu"),
        *(f"--trainer.logger.init_args.name={name}", *flags),
    ]
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finish(process, folder, name):
    assert process.wait(timeout=300) == 0, (folder / f"{name}.log").read_text()[-3000:]
    return torch.load(find_checkpoint(folder / "runs" / name), weights_only=True)


def kill_after_a_checkpoint(process, run, delay):
    """Kill hard, a random moment after the first checkpoint is there."""
    limit = time.monotonic() + 200
    while not list(run.rglob("last.ckpt")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def assert_same_weights(one, other):
    for name in ("state_dict", "live_state_dict"):
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])
    assert one["global_step"] == other["global_step"] == STEPS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_runs_end_like_one_that_was_left_alone(shards, tmp_path):
    whole = finish(start(shards, tmp_path, "whole", 0), tmp_path, "whole")
    with_workers = finish(start(shards, tmp_path, "workers", 2), tmp_path, "workers")
    assert_same_weights(whole, with_workers)

    moments = random.Random(0)
    for first, second in ((0, 2), (2, 0)):
        name = f"killed_{first}_{second}"
        process = start(shards, tmp_path, name, first)
        kill_after_a_checkpoint(process, tmp_path / "runs" / name, moments.uniform(0, 0.4))
        checkpoint = find_checkpoint(tmp_path / "runs" / name)
        stopped_at = torch.load(checkpoint, weights_only=True)["global_step"]
        assert 0 < stopped_at < STEPS
        process = start(shards, tmp_path, name, second, f"--ckpt_path={checkpoint}")
        assert_same_weights(whole, finish(process, tmp_path, name))


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

    def end(name, *parts):
        checkpoint = None
        for steps in parts:
            data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=4, num_workers=0)
            keep = Checkpoints(dirpath=str(tmp_path / name), every_n_train_steps=1, save_last=True)
            settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": True}
            trainer = quiet_trainer(callbacks=[EMA(0.9), keep], **settings)
            trainer.fit(task(), data, ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / name / "last.ckpt"
        return torch.load(checkpoint, weights_only=True)

    whole, parts = end("whole", 8), end("parts", 3, 8)
    for name in ("state_dict", "live_state_dict"):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name]), name
    assert parts["global_step"] == 8
