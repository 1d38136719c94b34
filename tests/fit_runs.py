"""``vab fit`` on small shards as a user starts it: one process, several, torchrun, two machines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

from ranks import free_port
from vab.tasks.checkpoints import find_checkpoint

RECIPE = Path(__file__).parents[1] / "configs" / "demo" / "pretrain.yaml"
PYTHON = [sys.executable, "-m"]


def flags(shards, name, *, batch_size=4, dropout=0.1, steps=24, every=4):
    """A recipe as a matter of seconds; validation and a checkpoint after each ``every`` steps."""
    return [
        *("fit", f"--config={RECIPE}", f"--data.train={shards / 'train'}", f"--data.val={shards / 'val'}"),
        *("--data.num_workers=0", f"--data.batch_size={batch_size}", "--model.backbone.dim=32"),
        *("--model.backbone.num_heads=2", "--model.backbone.num_modality_layers=1"),
        *("--model.backbone.num_joint_layers=1", f"--model.backbone.dropout={dropout}", "--model.warmup_steps=2"),
        *("--model.schedule_steps=100000", "--model.sampler.decode_steps=1", "--trainer.accelerator=cpu"),
        *(f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={every}"),
        f"--trainer.logger.init_args.name={name}",
    ]


def start(folder, name, command, **environment):
    """Start it in a process group of its own; what it says goes to ``folder/name.log``."""
    with (folder / f"{name}.log").open("a") as log:
        settings = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"} | environment
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=folder, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True,
        )  # fmt: skip


def torchrun(*, nodes=1, node=0, ranks=2, host="127.0.0.1", port=None):
    place = [
        f"--nnodes={nodes}",
        f"--node_rank={node}",
        f"--master_addr={host}",
        f"--master_port={port or free_port()}",
    ]
    return [*PYTHON, "torch.distributed.run", f"--nproc_per_node={ranks}", *place, "-m", "vab.cli"]


def wait_for_steps(process, folder, name, steps):
    """Until the run has validated after so many."""
    wait_for_words(process, folder, name, f"step {steps}:")


def wait_for_words(process, folder, name, words):
    """Until the run has said so."""
    limit = time.monotonic() + 300
    while words not in said(folder, name):
        assert process.poll() is None, said(folder, name)
        assert time.monotonic() < limit, said(folder, name)
        time.sleep(0.05)


class EndlessValidation(Callback):
    """A validation that never ends, after the sanity check."""

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            print("validating for ever", flush=True)
            while True:
                time.sleep(0.1)


class EndAfterValidation(Callback):
    """The run is cut off once it has validated."""

    def on_validation_end(self, trainer, module):
        raise SystemExit(3)


def status(process, seconds=300):
    """How it ended; it and its like are killed where it does not."""
    try:
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def said(folder, name):
    return (folder / f"{name}.log").read_text()


def last(folder, name):
    return torch.load(find_checkpoint(folder / "runs" / name), weights_only=True)


def same_weights(one, other):
    """Whether two checkpoints hold the same weights, average and live, bit for bit."""
    for name in ("state_dict", "live_state_dict"):
        assert one[name].keys() == other[name].keys()
        if not all(torch.equal(one[name][key], other[name][key]) for key in one[name]):
            return False
    return one["global_step"] == other["global_step"]
