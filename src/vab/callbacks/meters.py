"""Speed, data wait, MFU and memory of a run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from vab.callbacks.matmul_rate import known_matmul_rate, precision_dtype
from vab.callbacks.run_info import run_info
from vab.callbacks.writing import finish_writing
from vab.lightning_internals import last_saved_step, loss_scale, unscales_gradients
from vab.spec import Batch
from vab.tasks import BaseTask


@dataclass
class Tally:
    """Sums over some steps, on this rank."""

    seconds: float = 0.0
    """Of training, without validation and saving."""
    waited: float = 0.0
    """Seconds of these between two batches."""
    records: int = 0
    positions: int = 0
    """Codec steps and frames, with padding."""
    flops: int = 0
    """Of the model, forward and backward (``vab.flops``), without recomputed activations."""

    def add(self, other: Tally) -> None:
        """Add the sums of other steps."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Meters(Callback):
    """Speed, the share of time spent waiting for data, MFU, memory, the gradient's norm, the learning rate.

    Rates are of all ranks together. The host waits for the GPU only where something is logged or training pauses, not
    after each step. MFU (model FLOPs utilisation) is the model's FLOP/s divided by those of a plain matrix product of
    the run's dtype, which is measured once for each kind of device (`known_matmul_rate`).
    """

    def __init__(self, mfu: bool | None = None) -> None:
        """Configure what is measured.

        Args:
            mfu: Whether to measure MFU. None: on GPUs only.
        """
        self.mfu = mfu
        self.ceiling: float | None = None
        """FLOP/s of a plain matrix product on one device; None if not measured."""
        self.text = ""
        """The last rates, for the progress bar."""
        self._window, self._total = Tally(), Tally()
        self._mark = 0.0  # the end of the last batch, or of a pause
        self._paused = True
        self._saved = 0
        self._first_step = self._logged_step = 0
        self._summary: list[str] = []
        self._validated_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the ceiling; start the clock."""
        device, dtype = pl_module.device, precision_dtype(str(trainer.precision))
        wanted = device.type == "cuda" if self.mfu is None else self.mfu
        if wanted and dtype is not None and isinstance(pl_module, BaseTask):
            rate = known_matmul_rate(device, dtype) if trainer.is_global_zero else None
            self.ceiling = trainer.strategy.broadcast(rate)
        self._window, self._total, self._paused = Tally(), Tally(), True
        self._first_step = self._logged_step = trainer.global_step
        self._saved = last_saved_step(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data, unless it was spent on validating or saving."""
        now = time.perf_counter()
        if self._paused or self._saved != last_saved_step(trainer):
            self._paused, self._saved, self._mark = False, last_saved_step(trainer), now
        self._window.waited += now - self._mark

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the gradient norm before clipping."""
        if isinstance(pl_module, BaseTask) and pl_module.logs_this_step:
            norm = pl_module.gradient_norm()
            scale = loss_scale(trainer)
            if scale is not None and unscales_gradients(optimizer):
                norm = norm / scale  # a fused optimizer unscales later, by itself
            pl_module.log_after_step(norm, "train/gradient_norm")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log rates over the steps since the last log."""
        self._window.records += len(batch)
        self._window.positions += len(batch) * (batch.codes.shape[-1] + batch.features.shape[1])
        if self.ceiling is not None and isinstance(pl_module, BaseTask):
            self._window.flops += pl_module.step_flops(len(batch))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # With accumulated gradients a step has several batches, and only the last of them changes global_step.
        logs = every > 0 and trainer.global_step > self._logged_step and trainer.global_step % every == 0
        self._end_batch()
        if logs and isinstance(pl_module, BaseTask):
            nothing = torch.empty(0, device=pl_module.device)
            pl_module.log_after_step(nothing, lambda _: self._rates_of_window(trainer, pl_module.device))

    def _end_batch(self) -> None:
        now = time.perf_counter()
        self._window.seconds += now - self._mark
        self._mark = now

    def _rates_of_window(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        """The metrics of the steps since the last log, once the device has finished the last of them."""
        if self._saved == last_saved_step(trainer):
            self._end_batch()
        steps, rates = trainer.global_step - self._logged_step, self._rates(self._window, trainer.world_size)
        self.text = _short(rates)
        self._total.add(self._window)
        rates["seconds_per_step"] = self._window.seconds / steps
        rates["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if (peak := peak_memory(device)) is not None:
            rates["peak_memory_gib"] = peak / 2**30
        self._window, self._logged_step = Tally(), trainer.global_step
        return {f"meters/{name}": value for name, value in rates.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, once the device has finished the training steps."""
        if not self._paused:
            _synchronize(pl_module.device)
            self._window.seconds += time.perf_counter() - self._mark
        self._paused = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step of the metrics."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._validated_step = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store information about the run, for the model card of ``vab export``."""
        checkpoint["run"] = run_info(trainer, self._validated_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the summary, while the model is still on its device."""
        self._total.add(self._window)
        steps, total = trainer.global_step - self._first_step, self._total
        self._summary = []
        if steps == 0 or total.seconds == 0:
            return
        rates = self._rates(total, trainer.world_size)
        peak = peak_memory(pl_module.device)
        self._summary = [
            f"{steps} steps to step {trainer.global_step}, {total.seconds:.1f} s of training without validation and "
            f"saving: {rates['records_per_second']:.4g} records/s, {rates['positions_per_second']:.4g} positions/s",
            f"waiting for data {100 * rates['data_wait_share']:.1f} % of the time"
            + (f"; peak memory {peak / 2**30:.2f} GiB" if peak is not None else "")
            + (f" of each of {trainer.world_size} ranks" if trainer.world_size > 1 else ""),
        ]
        if "mfu" in rates:
            assert self.ceiling is not None
            self._summary.append(
                f"MFU {100 * rates['mfu']:.1f} % of the {self.ceiling / 1e12:.4g} TFLOP/s of a plain "
                f"{precision_dtype(str(trainer.precision))} product".replace("torch.", "")
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary and the paths of the checkpoints, once they are written."""
        finish_writing(trainer)
        if not (self._summary and trainer.is_global_zero):
            return
        print("\n".join(self._summary + _checkpoint_lines(trainer)), flush=True)

    def _rates(self, tally: Tally, world_size: int) -> dict[str, float]:
        rates = {
            "positions_per_second": tally.positions * world_size / tally.seconds,
            "records_per_second": tally.records * world_size / tally.seconds,
            "data_wait_share": tally.waited / tally.seconds,
        }
        if self.ceiling is not None:
            rates["mfu"] = tally.flops / tally.seconds / self.ceiling
        return rates


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of this process's tensors on a GPU, else of the whole process. None on Windows' CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _short(rates: dict[str, float]) -> str:
    """The rates for the progress bar."""
    words = f"{rates['records_per_second']:.4g} records/s data {100 * rates['data_wait_share']:.0f} %"
    return words + (f" MFU {100 * rates['mfu']:.0f} %" if "mfu" in rates else "")


def _checkpoint_lines(trainer: Trainer) -> list[str]:
    """The lines of the summary about checkpoints."""
    lines = []
    for saver in trainer.checkpoint_callbacks:
        best, score = getattr(saver, "best_model_path", ""), getattr(saver, "best_model_score", None)
        if best and score is not None:
            lines.append(f"best checkpoint, {getattr(saver, 'monitor', '')} {float(score):.4g}: {best}")
        if last := getattr(saver, "last_model_path", ""):
            lines.append(f"last checkpoint: {last}")
    return lines


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
