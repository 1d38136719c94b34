"""What watches a run: averaged weights, meters, the progress line, and what the model sounds like so far."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vab.audio import log_mel
from vab.data.datamodule import ShardDataModule
from vab.data.format import write_atomically
from vab.data.media import read_audio
from vab.frozen.codec import Codec, load_codec
from vab.frozen.listening import sounds_of
from vab.metrics.health import Health, audio_statistics, health, warnings_for
from vab.spec import Batch, UserError
from vab.tasks import BaseTask, PretrainTask

_MEASURED = 64
"""Training records whose sound is measured at the start of a run: seconds on a GPU, and means to a few per cent."""
_DECODED_AT_ONCE = 8


class EMA(WeightAveraging):
    """Exponential moving average of the weights: used to validate and to generate, never to train.

    A checkpoint's ``state_dict`` holds the average and ``live_state_dict`` the weights that are being trained. Before
    the first update there is no average: nothing is swapped, and ``state_dict`` holds the live weights. (Lightning's
    own callback puts the initial weights there, and leaves a run that ends early with them.)
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        """Configure the average.

        Args:
            decay: Weight of the past at each step. 0.999 suits short runs; the paper prints none.
            start_step: Optimizer steps before the first update, which copies the weights.
        """
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay must be in [0, 1), got {decay}")
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.start_step = start_step
        self._swapped = False  # whether the module holds the average, and the average the live weights

    @property
    def started(self) -> bool:
        """Whether the average holds anything yet."""
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step from ``start_step`` on."""
        return step_idx is not None and step_idx >= self.start_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the average where the model will be: at this point of a run the model is still on the CPU."""
        self._device = self._device or trainer.strategy.root_device
        pl_module.trainer = None  # or the copy would hold a copy of the whole run
        super().setup(trainer, pl_module, stage)
        pl_module.trainer = trainer

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if self.started:
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the live weights."""
        self._swap_back(pl_module)

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the live weights in place: a checkpoint written from here on must continue the run exactly."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo a swap that an error in validation left behind, before anything is saved."""
        self._swap_back(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store both sets of weights."""
        if not self.started:
            return
        assert self._average_model is not None
        stored = self._average_model.state_dict()
        kept = {name.removeprefix("module."): value for name, value in stored.items() if name.startswith("module.")}
        module = checkpoint["state_dict"]
        # Within a validation, as when a cluster asks for the job back, the two have changed places.
        checkpoint["state_dict"], checkpoint["live_state_dict"] = (module, kept) if self._swapped else (kept, module)
        checkpoint["ema_updates"] = int(self._average_model.n_averaged)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up both sets where they were left."""
        if self._average_model is None or "live_state_dict" not in checkpoint:
            return
        self._average_model.module.load_state_dict(checkpoint["state_dict"])
        self._average_model.n_averaged.fill_(checkpoint["ema_updates"])
        pl_module.load_state_dict(checkpoint["live_state_dict"])


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints; and the run's last step is saved also where no validation fell on it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save ``last.ckpt`` if the run has gone on since."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class CodesWriter(BasePredictionWriter):
    """``vab predict`` leaves the codes of each rank in ``codes_rank_R.npz``: ``index`` (n,) and ``codes`` (n, K, T)."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write the records that count, each once over all ranks."""
        valid = torch.cat([batch["valid"] for batch in predictions]).cpu()
        arrays = {name: torch.cat([batch[name] for batch in predictions]).cpu()[valid] for name in ("index", "codes")}
        content = io.BytesIO()
        np.savez(content, index=arrays["index"].numpy(), codes=arrays["codes"].numpy().astype(np.uint16))
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"codes_rank_{trainer.global_rank}.npz"
        write_atomically(path, content.getbuffer())
        print(f"{path}: codes of {int(valid.sum())} records")


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own are written to the system's temporary folder and moved; onto another disk that is a copy, which a
    kill or a full disk leaves in halves under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the final place, then rename. Remote paths (``s3://...``) are left to Lightning.

        Raises:
            UserError: If the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content.getbuffer())


class Meters(Callback):
    """Positions per second, the share of time spent waiting for data, the gradient's norm, the learning rate."""

    def __init__(self) -> None:
        self._positions = 0
        self._waited = 0.0
        self._since = self._batch_end = 0.0
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = self._batch_end = time.perf_counter()
        self._positions, self._waited, self._interrupted = 0, 0.0, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Between two batches the trainer waits for the loader, if it was not validating or saving."""
        if self._interrupted:
            self.on_train_start(trainer, pl_module)
        self._waited += time.perf_counter() - self._batch_end

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the norm before it is clipped."""
        if isinstance(pl_module, BaseTask) and pl_module.logs_this_step:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            pl_module.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log rates over the steps since the last log."""
        self._positions += len(batch) * (batch.codes.shape[-1] + batch.features.shape[1])
        self._batch_end = time.perf_counter()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            elapsed = self._batch_end - self._since
            pl_module.log("meters/positions_per_second", self._positions * trainer.world_size / elapsed)
            pl_module.log("meters/data_wait_share", self._waited / elapsed)
            pl_module.log("meters/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])
            self._positions, self._waited, self._since = 0, 0.0, self._batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time spent validating, and saving after it, is not training time."""
        self._interrupted = True


class StepProgress(ProgressBar):
    """One line for the whole run: steps, rate, time left, the losses. Off a terminal, a line per validation."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._task: Any = None
        self._enabled = True
        self._console = Console(stderr=True)

    def disable(self) -> None:
        """Lightning's switch, used on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Lightning's switch."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the line."""
        if not (self._enabled and self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            redirect_stdout=False,
        )
        total = int(trainer.estimated_stepping_batches)
        self._task = self._bar.add_task("train", total=total, completed=trainer.global_step, rate="", metrics="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the line."""
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            rate = f"{speed:.2f} step/s" if speed else ""
            self._bar.update(self._task, completed=trainer.global_step, rate=rate, metrics=self._words(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Off a terminal: say how it stands."""
        if self._enabled and self._bar is None and trainer.state.fn == TrainerFn.FITTING:
            print(f"step {trainer.global_step}: {self._words(trainer)}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the line as it is."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _words(trainer: Trainer) -> str:
        shown = trainer.progress_bar_metrics
        return " ".join(f"{name} {value:.3f}" for name, value in shown.items() if isinstance(value, float))


class MediaLog(Callback):
    """At each validation the same few segments in TensorBoard, as sound and as log-mel spectrograms, and their health.

    Once the reference, where its file is at hand, and the codec's round trip, the best that the model could do; then
    what the model makes of the video. Of some more segments the health is measured: means are curves, what seems wrong
    is said in words.

    At the start of a run it measures what the training audio is like and leaves that with the task, which keeps it in
    its checkpoints: generated sound is held against it, here and wherever the checkpoint is used.
    """

    def __init__(
        self, num_records: int = 4, media: str | None = None, device: str = "auto", num_checked: int = 16
    ) -> None:
        """Configure the log.

        Args:
            num_records: How many records of the validation set, the first ones, are shown.
            media: Folder that the records' files are in, as it was extracted; no reference is shown without.
            device: Where the codec runs; auto is where the model is.
            num_checked: How many records of the validation set, the first ones, are generated for their health.
        """
        if num_records < 0 or num_checked < 0:
            raise UserError(f"MediaLog: num_records and num_checked are 0 or more, got {num_records}, {num_checked}")
        self.num_records = num_records
        self.media = media
        self.device = device
        self.num_checked = num_checked
        self._codec: Codec | None = None
        self._shown_references = False

    @rank_zero_only  # the rank that writes the checkpoints, and the one that generates
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training audio as the codec gives it back, unless a checkpoint has brought its figures."""
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule)):
            return
        if pl_module.audio_statistics is None:
            dataset = data.train_dataset
            count = min(_MEASURED, len(dataset))
            batch = dataset.read([number * len(dataset) // count for number in range(count)])
            sounds = self._decoded(batch.codes, batch, pl_module)
            pl_module.audio_statistics = audio_statistics(_health_of(batch.codes, batch, sounds, pl_module))

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate while the averaged weights are in place, which is until the end of validation's epoch."""
        logger = trainer.logger
        data = getattr(trainer, "datamodule", None)
        if batch_idx > 0 or trainer.sanity_checking or not isinstance(logger, TensorBoardLogger):
            return
        if not (isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule)):
            return
        dataset, step, rate = data.val_dataset, trainer.global_step, pl_module.spec.sample_rate
        count = min(max(self.num_records, self.num_checked), len(dataset))
        if not count:
            return
        few = dataset.read(range(count))
        groups = [dataset.read(part) for part in _parts(count, data.val_batch_size)]
        made = torch.cat([pl_module.predict_step(part.to(pl_module.device), 0)["codes"].cpu() for part in groups])
        sounds = self._decoded(made, few, pl_module)
        shown = self.num_records
        if not self._shown_references:
            self._show(logger, step, "reference", self._references(data, few.index[:shown]), rate)
            self._show(logger, step, "codec_round_trip", self._decoded(few.codes, few, pl_module)[:shown], rate)
            self._shown_references = True
        self._show(logger, step, "generated", sounds[:shown], rate)
        checked = _health_of(made, few, sounds, pl_module)[: self.num_checked]
        if checked:
            _show_health(logger, step, checked, pl_module.audio_statistics)

    def _decoded(self, codes: Tensor, batch: Batch, task: PretrainTask) -> list[Tensor]:
        """A few records at a time: a codec's decoder takes far more memory than its codes."""
        if self._codec is None:
            self._codec = load_codec(task.spec.codec, task.device if self.device == "auto" else self.device)
        parts = [slice(part.start, part.stop) for part in _parts(len(batch), _DECODED_AT_ONCE)]
        return [sound for part in parts for sound in sounds_of(self._codec, codes[part], batch.steps[part])]

    def _references(self, data: ShardDataModule, numbers: Tensor) -> list[Tensor]:
        """The records' own sound, of as many of the first records as have their file at hand."""
        waveforms = []
        for record in (data.val_dataset.record(number) for number in numbers.tolist()):
            file = Path(self.media or "", str(record["source"]).rsplit("@", 1)[0])
            if self.media is None or not file.is_file():
                break
            clip = read_audio(file, data.spec.sample_rate, record["start_seconds"], data.spec.segment_seconds)
            waveforms.append(torch.from_numpy(clip.waveform[: clip.valid_samples]))
        return waveforms

    @staticmethod
    def _show(logger: TensorBoardLogger, step: int, name: str, waveforms: list[Tensor], rate: int) -> None:
        for number, audio in enumerate(waveforms):
            # TensorBoard clips what leaves [-1, 1]; scaling keeps a loud mistake audible as one.
            logger.experiment.add_audio(f"{name}/{number}", audio / audio.abs().max().clamp(min=1), step, rate)
            logger.experiment.add_image(f"{name}/{number}", spectrogram_picture(audio, rate), step)


def _parts(count: int, size: int) -> list[range]:
    """The numbers below ``count`` in runs of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _health_of(codes: Tensor, batch: Batch, sounds: list[Tensor], task: PretrainTask) -> list[Health]:
    """Of each record, without its padding."""
    rates = task.spec.sample_rate, task.spec.code_rate
    triples = zip(codes, batch.steps.tolist(), sounds, strict=True)
    return [health(sound, record[:, :steps], *rates) for record, steps, sound in triples]


def _show_health(
    logger: TensorBoardLogger, step: int, sounds: list[Health], reference: dict[str, float] | None
) -> None:
    """Means as scalars, and what seems wrong as text, a line for each finding."""
    for name in ("peak", "rms_db", "silence", "longest_repeat_seconds"):
        mean = sum(getattr(sound, name) for sound in sounds) / len(sounds)
        logger.experiment.add_scalar(f"health/{name}", mean, step)
    for level, values in enumerate(zip(*(sound.entropy for sound in sounds), strict=True)):
        logger.experiment.add_scalar(f"health/entropy_level_{level}", sum(values) / len(values), step)
    warnings = [warnings_for(sound, reference) for sound in sounds]
    logger.experiment.add_scalar("health/share_with_warnings", sum(map(bool, warnings)) / len(sounds), step)
    lines = [f"- record {number}: {words}" for number, found in enumerate(warnings) for words in found]
    text = "\n".join(lines) or f"nothing seems wrong with the {len(sounds)} sounds"
    logger.experiment.add_text("health/warnings", text, step)


def spectrogram_picture(waveform: Tensor, sample_rate: int, floor: float = -9.0, ceiling: float = 1.0) -> np.ndarray:
    """A log-mel spectrogram as a picture with a fixed scale, so that pictures of a run compare.

    Args:
        waveform: (N,) float32.
        sample_rate: Hz.
        floor: Natural-log energy shown black.
        ceiling: Natural-log energy shown brightest.

    Returns:
        (3, bands, frames) float32 in [0, 1], low frequencies at the bottom.
    """
    import matplotlib as mpl

    mel = log_mel(waveform, sample_rate).numpy()[::-1]
    shade = np.clip((mel - floor) / (ceiling - floor), 0, 1)
    return mpl.colormaps["magma"](shade)[..., :3].transpose(2, 0, 1).astype(np.float32)
