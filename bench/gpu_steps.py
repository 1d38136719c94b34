"""Training steps of each task on random data on a GPU, measured: seconds, peak memory, gradients, waits of the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bench.generate import arguments_of
from bench.measure import BF16, paper_spec
from vab.backbone import Backbone
from vab.callbacks import EMA
from vab.spec import Batch, SegmentSpec
from vab.tasks import AlignTask, ClassifyTask, PretrainTask
from vab.tasks.base import BaseTask

ROOT = Path(__file__).parents[1]
TASKS: dict[str, Callable[..., BaseTask]] = {
    "pretrain": PretrainTask,
    "align": AlignTask,
    "classify": partial(ClassifyTask, labels=[f"class {number}" for number in range(309)]),
}
FIRST, LAST, LOGGED = 4, 10, 11
"""Training steps, from 0: the first that is timed, the first after those, and the one that logs."""
RECORDS = 4
"""Of the batch whose gradients are compared."""


@dataclass(eq=False)
class Measured(Callback):
    """What a training run measures: its first gradient, then seconds, peak memory and waits of the host."""

    seconds: float = 0.0
    """Of a step, mean of those from `FIRST` to before `LAST`."""
    flops: int = 0
    """Of a step."""
    peak_bytes: int = 0
    gradients: list[Tensor] = field(default_factory=list)
    waits: int = 0
    """Of all timed steps, none of which logs."""
    waits_logged: int = 0
    """Of the step that logs."""

    def __post_init__(self) -> None:
        self._caught: list[Any] = []
        self._start = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep the gradients of the first step, if no other step follows."""
        if trainer.max_steps == 1:
            self.gradients = [p.grad.float().cpu() for p in pl_module.parameters() if p.grad is not None]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start and stop the clock."""
        if batch_idx in (FIRST, LAST):
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self._start = (now - self._start) / (LAST - FIRST), now
        if batch_idx == FIRST:
            torch.cuda.reset_peak_memory_stats()
            self._caught.clear()
        if batch_idx == LAST:
            self.waits, self.peak_bytes = len(self._caught), torch.cuda.max_memory_allocated()
        if batch_idx in (LOGGED, LOGGED + 1):
            self.waits_logged = len(self._caught)
            self._caught.clear()


class _Batches:
    """A loader of one batch, again and again: a list of batches would be one batch of parts to Lightning."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.times)


@contextmanager
def counted_waits(caught: list[Any]) -> Iterator[None]:
    """Note each operation for which the host waits: torch warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: (
            caught.append(message) if "synchroniz" in str(message) else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def make_task(name: str, size: str, spec: SegmentSpec, dropout: float, compile: bool) -> BaseTask:
    """A task with a backbone of ``configs/backbone``; for all calls with the same weights."""
    torch.manual_seed(0)
    backbone = Backbone(spec, **(arguments_of(size) | {"dropout": dropout}))
    backbone.set_codebooks(torch.randn_like(backbone.codebooks))
    return TASKS[name](backbone=backbone, warmup_steps=0, schedule_steps=1000, compile=compile)


def random_batch(spec: SegmentSpec, records: int) -> Batch:
    """Whole records of one class each."""
    torch.manual_seed(1)
    return Batch(
        codes=torch.randint(0, spec.codebook_size, (records, spec.num_codebooks, spec.num_steps)),
        features=torch.randn(records, spec.num_frames, spec.feature_dim),
        steps=torch.full((records,), spec.num_steps),
        frames=torch.full((records,), spec.num_frames),
        labels=torch.eye(309)[torch.arange(records) % 309],
        index=torch.arange(records),
        valid=torch.ones(records, dtype=torch.bool),
        source=torch.arange(records),
        draw=torch.zeros(records, dtype=torch.int64),
        ragged=False,
    )


def train(task: BaseTask, records: int, precision: str, steps: int) -> Measured:
    """Train on one batch that is on the device already."""
    run = Measured(flops=task.step_flops(records))
    with tempfile.TemporaryDirectory() as folder, counted_waits(run._caught):
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_steps=steps,
            log_every_n_steps=LOGGED + 1,
            gradient_clip_val=1.0,
            callbacks=[run, EMA()],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        batch = random_batch(task.spec, records).to(trainer.strategy.root_device, False)
        trainer.fit(task, _Batches(batch, steps))
    return run


def difference(one: Measured, other: Measured) -> float:
    """Norm of the difference of two gradients, as a share of the second's."""
    pairs = zip(one.gradients, other.gradients, strict=True)
    square = sum(float((a - b).square().sum()) for a, b in pairs)
    return (square / sum(float(g.square().sum()) for g in other.gradients)) ** 0.5


def predicted_peak(name: str, size: str, seconds: float, records: int) -> int | None:
    """Bytes at the peak of a step as ``vab plan`` counts them, in a process that sees no GPU."""
    code = f"from bench.gpu_steps import plan; plan({name!r}, {size!r}, {seconds!r}, {records})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    if done.returncode:
        print(f"vab plan failed: {done.stderr[-500:]}", file=sys.stderr)
        return None
    return int(json.loads(done.stdout.splitlines()[-1]))


def plan(name: str, size: str, seconds: float, records: int) -> None:
    """Print the bytes of a step that does not log."""
    from vab.planning.rehearsal import rehearse

    dropout = arguments_of(size).get("dropout", 0.0)
    spec = paper_spec(seconds)
    found = rehearse(lambda: make_task(name, size, spec, dropout, False), records, BF16, callbacks=lambda: [EMA()])
    print(found.peaks["whole"])
