"""How well some validation records are generated: by a judge against their codec round trip, and by the sounds' health.

Against the round trip, not the original: it is the best that a model of these codes could do, so what is left is the
model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vab.data.reading.dataset import ShardDataset
from vab.frozen.listening import Impressions, class_columns, listen, resampled, sounds_of, true_classes
from vab.frozen.protocols import Judge
from vab.generation.generator import Generator
from vab.metrics.agreement import class_agreement
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments
from vab.metrics.health import Health, audio_statistics, health, warnings_for
from vab.metrics.uncertainty import mean_and_error
from vab.spec import Batch, UserError
from vab.tokens.noise import fold_in, record_keys
from vab.tokens.sampler import Sampler


@dataclass(frozen=True)
class Heard:
    """What a judge heard in some records, and what they are like."""

    judged: Impressions
    health: list[Health]
    """M of them."""


class Subset:
    """Some records of a data set, what they sound like, and how well a model generates them with given settings."""

    def __init__(
        self, generator: Generator, dataset: ShardDataset, judge: Judge, rows: Sequence[int], batch_size: int, seed: int
    ) -> None:
        """Listen to the round trip.

        Args:
            generator: The model with its codec.
            dataset: With as many levels as the generator makes.
            judge: Listens.
            rows: Numbers of at least two records.
            batch_size: Records at once.
            seed: Of the decoding; the same for all settings.

        Raises:
            UserError: If the judge cannot listen to these sounds.
        """
        self.generator, self.judge, self.seed = generator, judge, seed
        self.batches = [dataset.read(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        self.real = self._hear([batch.codes for batch in self.batches])
        self.reference = generator.audio_statistics or audio_statistics(self.real.health)
        self.truth = self._truth(dataset)
        """(M, L) bool true classes; None where records have no labels, or not the judge's."""

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @torch.inference_mode()
    def measure(self, sampler: Sampler) -> dict[str, float]:
        """Generate all records, and judge them.

        Returns:
            ``agreement`` (where classes are known) and ``kld_<judge>`` (nats, KL(round trip || generated)), each with
            its standard error as ``..._error``; ``fad_<judge>``; ``warnings``, the share of sounds with any;
            ``silence``, ``rms_db``, ``entropy``, ``longest_repeat_seconds``, means over sounds (and levels); and
            ``seconds``, the time of making the codes of a record, without the codec.
        """
        begun = time.perf_counter()
        codes = [self._generate(batch, sampler) for batch in self.batches]  # on the CPU, so all work is done
        seconds = time.perf_counter() - begun
        made = self._hear(codes)
        name = self.judge.name
        figures: dict[str, float] = {}
        if self.truth is not None:
            known = self.truth.any(1)
            agreement = class_agreement(made.judged.probabilities[known], self.truth[known])
            figures["agreement"], figures["agreement_error"] = mean_and_error(agreement)
        divergence = paired_kl(self.real.judged.logits, made.judged.logits)
        figures[f"kld_{name}"], figures[f"kld_{name}_error"] = mean_and_error(divergence)
        own, real = moments(made.judged.embedding), moments(self.real.judged.embedding)
        figures[f"fad_{name}"] = float(frechet_distance(*real, *own))
        warned = [bool(warnings_for(sound, self.reference)) for sound in made.health]
        figures["warnings"] = sum(warned) / len(warned)
        for value in ("silence", "rms_db", "longest_repeat_seconds"):
            figures[value] = sum(getattr(sound, value) for sound in made.health) / len(made.health)
        bits = [sum(sound.entropy) / len(sound.entropy) for sound in made.health]
        return figures | {"entropy": sum(bits) / len(bits), "seconds": seconds / len(self)}

    def warm_up(self) -> None:
        """Run once what a first run makes slow, so that it is in nobody's time."""
        self._generate(self.batches[0], Sampler(decode_steps=1))

    @torch.inference_mode()
    def _generate(self, batch: Batch, sampler: Sampler) -> Tensor:
        """(B, K, T) codes on the CPU; a fine stage follows with its own settings."""
        task, fine = self.generator.task, self.generator.fine
        codes = task.generate_for(batch, self.seed, sampler)
        if fine is not None:
            here = batch.to(task.device)
            steps, frames = here.lengths
            keys = fold_in(record_keys(self.seed, here.index), 1)
            codes = F.pad(codes, (0, 0, 0, fine.made_levels))
            codes = fine.generate(here.features, keys, codes=codes, steps=steps, frames=frames)
        return codes.cpu()

    def _hear(self, codes: Sequence[Tensor]) -> Heard:
        spec, rate = self.generator.task.spec, self.generator.codec.sample_rate
        judged, found = [], []
        for batch, part in zip(self.batches, codes, strict=True):
            sounds = sounds_of(self.generator.codec, part, batch.steps)
            judged.append(listen(self.judge, resampled(sounds, rate, self.judge.sample_rate), self.judge.sample_rate))
            for sound, record, steps in zip(sounds, part, batch.steps.tolist(), strict=True):
                found.append(health(sound, record[:, :steps], rate, spec.code_rate))
        return Heard(Impressions(*map(torch.cat, zip(*judged, strict=True))), found)

    def _truth(self, dataset: ShardDataset) -> Tensor | None:
        try:
            columns = class_columns(self.judge, dataset.labels)
        except UserError:
            return None
        truth = torch.cat([true_classes(self.judge, columns, batch.labels) for batch in self.batches])
        return truth if int(truth.any(1).sum()) > 1 else None
