"""Some records of a validation set, shared over ranks: what they sound like, and what a model makes of their videos."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vab.callbacks.heard import Ear, Rows, nobody, shared_figures
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.order import Share, evaluation_batches, spread_evenly
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.frozen.listening import Impressions, listen, resampled, sounds_of
from vab.frozen.protocols import Judge
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
"""Of each batch the first so many sounds are kept, for pictures; of the others only what was heard."""


@dataclass(frozen=True)
class Settings:
    """What fixes the figures, beside the model."""

    judges: tuple[str, ...]
    num_records: int
    seed: int
    device: str
    batch_size: int | None
    tolerance_seconds: float


@dataclass(frozen=True)
class Sounds:
    """What the records of a batch sound like; B of them, or none."""

    index: Tensor
    """(B,) int64 numbers of the records."""
    onsets: list[Tensor]
    """Seconds, of each record."""
    impressions: list[Impressions]
    """Of each judge, of all records."""
    first: list[Tensor]
    """Waveforms (N,) float32 of the first few."""


class SharedSubset:
    """A rank's share of the records, with the codec and the judges."""

    def __init__(self, task: PretrainTask, data: ShardDataModule, settings: Settings, world: int, rank: int) -> None:
        """Get the codec and the judges, and listen to the codec's round trips.

        Args:
            task: Makes the sounds.
            data: Its validation set is taken from.
            settings: As the user gave them.
            world: Ranks.
            rank: This one.

        Raises:
            UserError: If the codec or a judge cannot be had, or there are fewer than two records.
        """
        records = spread_evenly(settings.num_records, data.num_val_records)
        if len(records) < 2:
            raise UserError(f"GenerationEval needs at least 2 validation records, got {len(records)}")
        device = task.device if settings.device == "auto" else device_named(settings.device)
        self.dataset, self.settings, self.count = data.val_dataset, settings, len(records)
        self.codec = load_codec(task.spec.codec, device)
        self.ears = [Ear(load_judge(name, device), data.labels, task.device) for name in settings.judges]
        self._task = task
        shares = evaluation_batches(len(records), settings.batch_size or data.val_batch_size, world, rank)
        self._shares = [share._replace(numbers=np.asarray(records)[share.numbers]) for share in shares]
        self._real = [self.hear(batch.codes, batch) for batch in map(self._valid, self._shares)]

    @property
    def lead(self) -> Ear | None:
        """The first judge that knows the labels, or else the first; None where there is no judge."""
        return next((ear for ear in self.ears if ear.columns is not None), self.ears[0] if self.ears else None)

    @property
    def names(self) -> list[str]:
        """Of the figures, as far as they have a value."""
        names = [name for ear in self.ears for name in ear.names()]
        if self.lead is not None:
            names += ["agreement"] if self.lead.columns is not None else []
            names += [f"recall_at_{cut}_g2r" for cut in CUTS if cut < self.count]
        return [*names, *_SYNCHRONY.values()]

    def make(self, precision: AbstractContextManager) -> list[Sounds]:
        """This rank's part: generate, and listen. No rank waits for another here.

        Args:
            precision: In which the network computes.
        """
        with precision:
            batches = (self.dataset.read(share.numbers, share.valid) for share in self._shares)
            codes = [self._task.generate_for(batch, self.settings.seed).cpu() for batch in batches]
        pairs = zip(codes, self._shares, strict=True)
        return [self.hear(made[torch.from_numpy(share.valid)], self._valid(share)) for made, share in pairs]

    def add(self, made: list[Sounds]) -> Synchrony:
        """Hold this rank's part against the round trips; the judges' part stays in ``ears``. No rank waits here."""
        synchrony = Synchrony(self.settings.tolerance_seconds).to(self._task.device)
        for ear in self.ears:
            ear.reset()
        for share, real, sounds in zip(self._shares, self._real, made, strict=True):
            synchrony.update(list(zip(real.onsets, sounds.onsets, strict=True)))
            batch = self._valid(share)
            for ear, theirs, ours in zip(self.ears, real.impressions, sounds.impressions, strict=True):
                ear.update(theirs, ours, batch.index, batch.labels)
        return synchrony

    def compute(self, synchrony: Synchrony) -> tuple[dict[str, float], Rows | None]:
        """Figures over all ranks, which must ask together after they have added.

        Returns:
            Figures by name, those without a value left out; and what the leading judge heard.
        """
        figures: dict[str, float] = {}
        lead = None
        for ear in self.ears:
            own, rows = ear.compute()
            figures |= own
            if ear is self.lead:
                lead = rows
                figures |= shared_figures(rows)
        with synchrony.sync_context():
            known = bool(synchrony.records > 0)
        if known:
            timing = synchrony.compute()
            figures |= {name: float(timing[kind]) for kind, name in _SYNCHRONY.items() if kind in timing}
        return figures, lead

    @torch.no_grad()
    def hear(self, codes: Tensor, batch: Batch) -> Sounds:
        """Decode, and listen.

        Args:
            codes: (B, K, T) int64 on the CPU.
            batch: B records, whose lengths count.
        """
        sounds = self.decode(codes, batch)
        rate = self.codec.sample_rate
        impressions = [_listen(ear.judge, sounds, rate) for ear in self.ears]
        return Sounds(batch.index, [find_onsets(sound, rate) for sound in sounds], impressions, sounds[:KEPT])

    def decode(self, codes: Tensor, batch: Batch) -> list[Tensor]:
        """B waveforms (N,) float32 on the CPU."""
        return sounds_of(self.codec, codes, batch.steps) if len(codes) else []

    def _valid(self, share: Share) -> Batch:
        """The records of a share that count, which may be none."""
        batch = self.dataset.read(share.numbers, share.valid)
        kept: dict[str, Any] = {
            name: value[batch.valid] for name, value in vars(batch).items() if isinstance(value, Tensor)
        }
        return replace(batch, **kept)


def _listen(judge: Judge, sounds: Sequence[Tensor], rate: int) -> Impressions:
    """As `listen`, at the judge's rate; sounds may be none."""
    if not sounds:
        return nobody(judge)
    return listen(judge, resampled(sounds, rate, judge.sample_rate), judge.sample_rate)
