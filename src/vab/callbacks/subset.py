"""A fixed subset of a validation set, shared over ranks: its codec round trips, and the sounds generated for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vab.callbacks.judge_metrics import JudgedRecords, JudgeMetrics, empty_outputs
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.order import Share, evaluation_batches, spread_evenly
from vab.frozen import device_named
from vab.frozen.batches import JudgeOutputs, decode_sounds, judge_sounds
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.metrics.recall import CUTS
from vab.metrics.synchrony import Synchrony, find_onsets
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask

_SYNCHRONY = {
    "onset_recall": "onset_recall_to_codec",
    "onset_precision": "onset_precision_to_codec",
    "offset_seconds": "onset_offset_to_codec",
}
KEPT = 3
"""Waveforms of each batch that are kept, for pictures; of the others only onsets and judges' outputs are kept."""


@dataclass(frozen=True)
class Settings:
    """What the metrics depend on, beside the model."""

    judges: tuple[str, ...]
    num_records: int
    seed: int
    device: str
    batch_size: int | None
    tolerance_seconds: float


@dataclass(frozen=True)
class Sounds:
    """The sounds of a batch of B records, B >= 0."""

    index: Tensor
    """(B,) int64 numbers of the records."""
    onsets: list[Tensor]
    """Seconds, of each record."""
    outputs: list[JudgeOutputs]
    """Of each judge, for all records."""
    first: list[Tensor]
    """Waveforms (N,) float32 of the first few."""


class SharedSubset:
    """A rank's share of the subset, with the codec and the judges."""

    def __init__(self, task: PretrainTask, data: ShardDataModule, settings: Settings, world: int, rank: int) -> None:
        """Load the codec and the judges, and run them on the codec's round trips.

        Args:
            task: It generates the sounds.
            data: The subset is of its validation set.
            settings: As the user gave them.
            world: Number of ranks.
            rank: This rank's number.

        Raises:
            UserError: If the codec or a judge cannot be loaded, or there are fewer than two records.
        """
        records = spread_evenly(settings.num_records, data.num_val_records)
        if len(records) < 2:
            raise UserError(f"GenerationEval needs at least 2 validation records, got {len(records)}")
        device = task.device if settings.device == "auto" else device_named(settings.device)
        self.dataset, self.settings, self.count = data.val_dataset, settings, len(records)
        self.codec = load_codec(task.spec.codec, device)
        self.judges = [JudgeMetrics(load_judge(name, device), data.labels, task.device) for name in settings.judges]
        self._task = task
        shares = evaluation_batches(len(records), settings.batch_size or data.val_batch_size, world, rank)
        self._shares = [share._replace(numbers=np.asarray(records)[share.numbers]) for share in shares]
        self._real = [self.analyse(batch.codes, batch) for batch in map(self._valid, self._shares)]

    @property
    def lead(self) -> JudgeMetrics | None:
        """The first judge that knows the labels, or else the first; None if there is no judge."""
        knowing = (judge for judge in self.judges if judge.label_columns is not None)
        return next(knowing, self.judges[0] if self.judges else None)

    @property
    def names(self) -> list[str]:
        """Names of the metrics; those without a value are not logged."""
        names = [name for judge in self.judges for name in judge.names()]
        if self.lead is not None:
            names += ["agreement"] if self.lead.label_columns is not None else []
            names += [f"recall_at_{cut}_g2r" for cut in CUTS if cut < self.count]
        return [*names, *_SYNCHRONY.values()]

    def generate(self, precision: AbstractContextManager) -> list[Sounds]:
        """Generate this rank's sounds and analyse them. No rank waits for another here.

        Args:
            precision: Context in which the network computes.
        """
        with precision:
            batches = (self.dataset.read(share.numbers, share.valid) for share in self._shares)
            codes = [self._task.generate_for(batch, self.settings.seed).cpu() for batch in batches]
        pairs = zip(codes, self._shares, strict=True)
        return [self.analyse(made[torch.from_numpy(share.valid)], self._valid(share)) for made, share in pairs]

    def add(self, generated: list[Sounds]) -> Synchrony:
        """Add this rank's sounds to its judges' metrics and to those of synchrony. No rank waits here."""
        synchrony = Synchrony(self.settings.tolerance_seconds).to(self._task.device)
        for judge in self.judges:
            judge.reset()
        for share, real, made in zip(self._shares, self._real, generated, strict=True):
            synchrony.update(list(zip(real.onsets, made.onsets, strict=True)))
            batch = self._valid(share)
            for judge, theirs, ours in zip(self.judges, real.outputs, made.outputs, strict=True):
                judge.update(theirs, ours, batch.index, batch.labels)
        return synchrony

    def compute(self, synchrony: Synchrony) -> tuple[dict[str, float], JudgedRecords | None]:
        """Metrics over all ranks, which must call this together after they have added.

        Returns:
            Metrics by name, those without a value left out; and the outputs of the leading judge.
        """
        metrics: dict[str, float] = {}
        records = None
        for judge in self.judges:
            own, outputs = judge.compute()
            metrics |= own
            if judge is self.lead:
                records = outputs
                metrics |= outputs.metrics()
        with synchrony.sync_context():
            known = bool(synchrony.records > 0)
        if known:
            timing = synchrony.compute()
            metrics |= {name: float(timing[kind]) for kind, name in _SYNCHRONY.items() if kind in timing}
        return metrics, records

    @torch.no_grad()
    def analyse(self, codes: Tensor, batch: Batch) -> Sounds:
        """Decode codes (B, K, T) int64 of B records, find onsets, and run the judges."""
        sounds, rate = self.decode(codes, batch), self.codec.sample_rate
        judges = [metrics.judge for metrics in self.judges]
        outputs = [judge_sounds(judge, sounds, rate) if sounds else empty_outputs(judge) for judge in judges]
        return Sounds(batch.index, [find_onsets(sound, rate) for sound in sounds], outputs, sounds[:KEPT])

    def decode(self, codes: Tensor, batch: Batch) -> list[Tensor]:
        """B waveforms (N,) float32 on the CPU."""
        return decode_sounds(self.codec, codes, batch.steps) if len(codes) else []

    def _valid(self, share: Share) -> Batch:
        """The records of a share without repeated ones; there may be none."""
        batch = self.dataset.read(share.numbers, share.valid)
        kept: dict[str, Any] = {
            name: value[batch.valid] for name, value in vars(batch).items() if isinstance(value, Tensor)
        }
        return replace(batch, **kept)
