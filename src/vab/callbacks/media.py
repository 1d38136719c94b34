"""Sounds of the model during training: some segments to hear and see, and the health of some more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vab.callbacks.pictures import spectrograms_figure
from vab.callbacks.tensorboard import tensorboards
from vab.data.media.segments import MediaError, read_audio, read_frames
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.order import spread_evenly
from vab.engines import is_sharded
from vab.frozen.batches import decode_sounds
from vab.frozen.codec import load_codec
from vab.frozen.protocols import Codec
from vab.metrics.health import Health, audio_statistics, health, warnings_for
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask

_MEASURED = 64
"""Training records that are measured at the start of a run: seconds on a GPU, and means within a few per cent."""
_FRAMES_SHOWN = 8


class MediaLog(Callback):
    """At each validation, the same segments in TensorBoard as sound and as pictures, and their health.

    Each segment has a group of its own: the reference (if its file is at hand) and the codec round trip, the best that
    the model could reach, both logged once; the generated sound; and a picture with some frames and the spectrograms of
    all three. The health of some more segments is measured: means are curves, warnings are text.

    At the start of a run it measures the training audio and stores the statistics in the task, whose checkpoints carry
    them: generated sound is compared with them, here and wherever the checkpoint is used.
    """

    def __init__(
        self, num_records: int = 4, media: str | None = None, device: str = "auto", num_checked: int = 16
    ) -> None:
        """Configure the log.

        Args:
            num_records: How many records are shown, the first of the validation set.
            media: Folder with the records' files, as it was extracted; without it no reference is shown.
            device: Where the codec runs; auto is where the model is.
            num_checked: How many records are generated to check their health, the first of the validation set.
        """
        if num_records < 0 or num_checked < 0:
            raise UserError(f"MediaLog: num_records and num_checked are 0 or more, got {num_records}, {num_checked}")
        self.num_records = num_records
        self.media = media
        self.device = device
        self.num_checked = num_checked
        self._codec: Codec | None = None
        self._shown: list[_Shown] = []

    @rank_zero_only  # the rank that writes the checkpoints, and the one that generates
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure codec round trips of the training audio, unless a checkpoint has brought the statistics."""
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule)):
            return
        if pl_module.audio_statistics is None:
            dataset = data.train_dataset
            batch = dataset.read(spread_evenly(_MEASURED, len(dataset)))
            sounds = self._decoded(batch.codes, batch, pl_module)
            pl_module.audio_statistics = audio_statistics(_health_of(batch.codes, batch, sounds, pl_module))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate at the first batch, with the averaged weights: on the first rank, or on all if sharded."""
        if not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        loggers = tensorboards(trainer)
        data = getattr(trainer, "datamodule", None)
        if batch_idx > 0 or trainer.sanity_checking or not loggers:
            return
        if not (isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule)):
            return
        dataset, step, rate = data.val_dataset, trainer.global_step, pl_module.spec.sample_rate
        count = min(max(self.num_records, self.num_checked), len(dataset))
        if not count:
            return
        few = dataset.read(range(count))
        size = data.val_batch_size
        groups = [dataset.read(range(start, min(start + size, count))) for start in range(0, count, size)]
        made = torch.cat([pl_module.predict_step(part.to(pl_module.device), 0)["codes"].cpu() for part in groups])
        if not trainer.is_global_zero:
            return
        sounds = self._decoded(made, few, pl_module)
        if not self._shown:
            self._shown = self._references(data, few, pl_module)
            for number, shown in enumerate(self._shown):
                for name, audio in shown.sounds:
                    _add_sound(loggers, f"record_{number}/{name}", audio, step, rate)
        for number, (shown, audio) in enumerate(zip(self._shown, sounds, strict=False)):
            _add_sound(loggers, f"record_{number}/3_generated", audio, step, rate)
            rows = [(name[2:].replace("_", " "), sound) for name, sound in (*shown.sounds, ("3_generated", audio))]
            picture = spectrograms_figure(rows, rate, f"{shown.title}, step {step}", shown.frames)
            for logger in loggers:
                logger.experiment.add_image(f"record_{number}/spectrograms", picture, step, dataformats="HWC")
        checked = _health_of(made, few, sounds, pl_module)[: self.num_checked]
        if checked:
            for logger in loggers:
                _show_health(logger, step, checked, pl_module.audio_statistics)

    def _decoded(self, codes: Tensor, batch: Batch, task: PretrainTask) -> list[Tensor]:
        if self._codec is None:
            self._codec = load_codec(task.spec.codec, task.device if self.device == "auto" else self.device)
        return decode_sounds(self._codec, codes, batch.steps)

    def _references(self, data: ShardDataModule, few: Batch, task: PretrainTask) -> list[_Shown]:
        """What of the first records does not depend on the model."""
        count, spec = min(self.num_records, len(few)), data.spec
        shown = []
        for number, round_trip in zip(range(count), self._decoded(few.codes, few, task), strict=False):
            record = data.val_dataset.record(int(few.index[number]))
            sounds, frames = [("2_codec_round_trip", round_trip)], None
            file = Path(self.media or "", str(record["source"]).rsplit("@", 1)[0])
            if self.media is not None and file.is_file():
                span = read_audio(file, spec.sample_rate, record["start_seconds"], spec.segment_seconds)
                sounds.insert(0, ("1_reference", torch.from_numpy(span.waveform[: span.valid_samples])))
                seconds = len(round_trip) / spec.sample_rate
                frames = _frames(file, record["start_seconds"], seconds)
            title = f"{record['id']}: {', '.join(data.val_dataset.label_names(int(few.index[number]))) or 'no label'}"
            shown.append(_Shown(title, sounds, frames))
        return shown


@dataclass(frozen=True)
class _Shown:
    """What is shown of a record at each validation."""

    title: str
    sounds: list[tuple[str, Tensor]]
    """Names, which sort in the order of the sounds, and waveforms (N,) float32."""
    frames: np.ndarray | None
    """(V, H, W, 3) uint8, evenly spaced over the segment."""


def _frames(file: Path, start: float, seconds: float) -> np.ndarray | None:
    """A few frames; None if the file has no video."""
    try:
        return read_frames(file, _FRAMES_SHOWN / seconds, start, _FRAMES_SHOWN).frames
    except MediaError as error:
        if error.reason != "no_video":
            raise
        return None


def _add_sound(loggers: list[TensorBoardLogger], tag: str, audio: Tensor, step: int, rate: int) -> None:
    """Scale sounds that leave [-1, 1], where TensorBoard would clip them."""
    for logger in loggers:
        logger.experiment.add_audio(tag, audio / audio.abs().max().clamp(min=1), step, rate)


def _health_of(codes: Tensor, batch: Batch, sounds: list[Tensor], task: PretrainTask) -> list[Health]:
    """Health of each record, without its padding."""
    rates = task.spec.sample_rate, task.spec.code_rate
    triples = zip(codes, batch.steps.tolist(), sounds, strict=True)
    return [health(sound, record[:, :steps], *rates) for record, steps, sound in triples]


def _show_health(
    logger: TensorBoardLogger, step: int, sounds: list[Health], reference: dict[str, float] | None
) -> None:
    """Means as scalars, and warnings as text, one a line."""
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
