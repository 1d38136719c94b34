"""From what judges heard on two sides to figures, each with its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vab import __version__
from vab.data.extract.sounds import Listening
from vab.data.shards.format import library_versions
from vab.evaluation.sides import ONSET_RATE, Side
from vab.frozen.listening import Impressions
from vab.frozen.protocols import Judge
from vab.metrics.card import Figure, MetricCard
from vab.metrics.divergence import EPSILON, paired_kl
from vab.metrics.frechet import (
    STEPS,
    frechet_distance,
    frechet_error,
    frechet_infinity,
    frechet_infinity_fadtk,
    frechet_per_file,
    moments,
)
from vab.metrics.inception import inception_score
from vab.metrics.kernel import SCALE, kernel_distance, kernel_error, median_bandwidth
from vab.metrics.synchrony import COUNTS, TOLERANCE_SECONDS, chance_counts, onset_counts, onset_ratios
from vab.metrics.uncertainty import mean_and_error
from vab.spec import UserError

METRICS = (
    "fad", "fad_infinity", "fad_infinity_fadtk", "kad", "kad_kadtk", "kld", "kld_epsilon", "kld_sigmoid",
    "inception_score", "synchrony",
)  # fmt: skip
"""What can be asked for, of every judge (but synchrony, which needs none), or of one as ``fad_vggish``."""
MAX_OFFSET_SECONDS = 1.0
_VARIANTS = {"kld": "softmax", "kld_epsilon": "softmax_epsilon", "kld_sigmoid": "sigmoid"}
_WHOLE_SETS = "generated set against real set"
_PAIRS = "generated against real, pair by pair"
_ONSET_ERROR = "error over pairs by the delta method; chance: each generated sound with other sounds' real onsets"


@dataclass(frozen=True)
class Measured:
    """All figures of two sides."""

    figures: dict[str, Figure]
    left_out: dict[str, str]
    """Figures that there are not, and why."""
    warnings: list[str]


@dataclass(frozen=True)
class Comparison:
    """Two sides, and how they are compared."""

    real: Side
    generated: Side
    paired: bool
    """Whether sound n of one side is the counterpart of sound n of the other."""
    listening: Listening
    seed: int
    inception_splits: int

    def measure(self, judges: Sequence[Judge], metrics: Sequence[str]) -> Measured:
        """All of ``metrics``, as ``METRICS`` or figures name them, that these sides allow."""
        measured = Measured({}, {}, [])
        for judge in judges:
            for metric in METRICS[:-1]:
                if wanted(metric, judge.name, metrics):
                    self._one(measured, metric, judge)
            if f"fad_{judge.name}" in measured.figures:
                measured.warnings.extend(self._few(judge))
        if "synchrony" in metrics:
            self._synchrony(measured)
        return measured

    def _one(self, measured: Measured, metric: str, judge: Judge) -> None:
        name = f"{metric}_{judge.name}"
        if metric in _VARIANTS and not self.paired:
            measured.left_out[name] = "the two sides are not paired"
        elif (metric in _VARIANTS or metric == "inception_score") and not judge.classes:
            measured.left_out[name] = f"judge {judge.name} has no classes"
        else:
            try:
                measured.figures[name] = getattr(self, f"_{_METHODS[metric]}")(name, metric, judge)
            except ValueError as error:  # too few sounds, or all alike: this number does not exist
                measured.left_out[name] = str(error)

    def _fad(self, name: str, _: str, judge: Judge) -> Figure:
        real, heard = self.moments(judge.name), self.generated.heard[judge.name]
        value = frechet_distance(*real, *moments(heard.embedding))
        error = frechet_error(*real, heard.embedding, owners(heard))
        card = self._card(
            name,
            "squared Frechet distance of two Gaussians, unbiased covariances; error over files by the delta method",
            judge,
        )
        return Figure(float(value), float(error), card)

    def _fad_infinity(self, name: str, metric: str, judge: Judge) -> Figure:
        real, heard = self.moments(judge.name), self.generated.heard[judge.name]
        if metric == "fad_infinity":
            found = frechet_infinity(*real, heard.embedding, owners(heard), seed=self.seed)
            definition = (
                f"Frechet distance extrapolated to infinitely many generated files: line over 1/files, {STEPS} draws "
                "of half to all files without replacement; the bias by the number of real files stays"
            )
        else:
            found = frechet_infinity_fadtk(*real, heard.embedding, seed=self.seed)
            definition = (
                f"FAD-inf of fadtk: line over 1/N, {STEPS} draws of 500 to all embeddings with replacement; keeps the "
                "bias by the number of generated sounds"
            )
        card = self._card(name, definition, judge, seed=self.seed)
        return Figure(found.score, None, card, {"slope": found.slope, "r2": found.r2})

    def _kad(self, name: str, metric: str, judge: Judge) -> Figure:
        real, made = (side.heard[judge.name] for side in (self.real, self.generated))
        side, words = (real, "real") if metric == "kad" else (made, "generated")
        bandwidth = median_bandwidth(side.embedding)
        value = kernel_distance(real.embedding, made.embedding, bandwidth)
        error = kernel_error(real.embedding, made.embedding, bandwidth, owners(made))
        definition = (
            f"unbiased squared MMD times {SCALE:g}, Gaussian kernel, width the median distance of the {words} side"
        )
        return Figure(float(value), float(error), self._card(name, definition, judge), {"bandwidth": float(bandwidth)})

    def _kld(self, name: str, metric: str, judge: Judge) -> Figure:
        variant = _VARIANTS[metric]
        value, error = mean_and_error(self.divergences(judge.name, variant))
        link = {
            "softmax": "softmax, no epsilon",
            "softmax_epsilon": f"softmax, {EPSILON:g} added to the generated probabilities",
            "sigmoid": "sigmoid, summed over classes",
        }[variant]
        definition = f"mean over pairs of KL(real || generated), nats; {link}"
        return Figure(value, error, self._card(name, definition, judge, direction="real || generated, pair by pair"))

    def _inception_score(self, name: str, _: str, judge: Judge) -> Figure:
        logits, splits = self.generated.heard[judge.name].logits, self.inception_splits
        value, spread = inception_score(logits, splits, self.seed)
        definition = f"exp of mean KL(p(y|x) || p(y)), softmax; mean over {splits} shuffled parts"
        card = self._card(
            name, definition, judge, better="higher", direction="generated alone", alone=True, seed=self.seed
        )
        error = float(spread) / math.sqrt(splits - 1) if splits > 1 else None
        return Figure(float(value), error, card, {"deviation_over_parts": float(spread), "parts": float(splits)})

    def _synchrony(self, measured: Measured) -> None:
        names = ("onset_recall", "onset_precision", "onset_f1", "onset_offset_seconds")
        if not self.paired:
            measured.left_out.update(dict.fromkeys(names, "the two sides are not paired"))
            return
        pairs = list(zip(self.real.onsets, self.generated.onsets, strict=True))
        kept = [pair for pair in pairs if len(pair[0])]
        if not kept:
            measured.left_out.update(dict.fromkeys(names, "no real sound has an onset"))
            return
        limits = (TOLERANCE_SECONDS, MAX_OFFSET_SECONDS)
        counts = onset_counts(kept, *limits)
        found = onset_ratios(counts)
        chance = onset_ratios(chance_counts(kept, *limits)) if len(kept) > 1 else {}
        about = {
            "records": float(len(kept)),
            "records_aligned": float(counts[:, COUNTS.index("aligned")].sum()),
            "records_without_onsets": float(len(pairs) - len(kept)),
        }
        pooled = f"onsets by spectral flux, pooled over pairs, one to one within {TOLERANCE_SECONDS:g} s"
        definitions = {
            "onset_recall": f"share of real onsets that have a generated one; {pooled}",
            "onset_precision": f"share of generated onsets that have a real one; {pooled}",
            "onset_f1": f"harmonic mean of onset recall and precision; {pooled}",
            "onset_offset_seconds": f"mean absolute best shift of a pair's onsets, up to {MAX_OFFSET_SECONDS:g} s",
        }
        for name in names:
            source = name.removeprefix("onset_") if name.endswith("seconds") else name
            if source not in found:
                measured.left_out[name] = "no pair has onsets on both sides that a shift brings together"
                continue
            better = "lower" if name.endswith("seconds") else "higher"
            card = self._card(name, f"{definitions[name]}; {_ONSET_ERROR}", None, better=better, direction=_PAIRS)
            value, error = found[source]
            by_chance = dict(zip(("chance", "chance_error"), chance[source], strict=True)) if source in chance else {}
            details = about | {key: one for key, one in by_chance.items() if one is not None}
            measured.figures[name] = Figure(value, error, card, details)

    def moments(self, judge: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the real side."""
        return moments(self.real.heard[judge].embedding)

    def divergences(self, judge: str, variant: str = "softmax") -> Tensor:
        """(B,) nats of each pair."""
        return paired_kl(self.real.heard[judge].logits, self.generated.heard[judge].logits, variant)

    def distances(self, judge: str) -> Tensor:
        """(B,) Frechet distance of each generated file to the real side."""
        heard = self.generated.heard[judge]
        return frechet_per_file(*self.moments(judge), heard.embedding, heard.rows)

    def _few(self, judge: Judge) -> list[str]:
        return [
            f"fad_{judge.name} rests on {count} {side} embeddings, {judge.embedding_dim} wide: with so few it is far "
            f"too high, and compares with nothing of another number"
            for side, count in (
                ("real", len(self.real.heard[judge.name].embedding)),
                ("generated", len(self.generated.heard[judge.name].embedding)),
            )
            if count <= judge.embedding_dim
        ]

    def _card(
        self,
        name: str,
        definition: str,
        judge: Judge | None,
        *,
        better: str = "lower",
        direction: str = _WHOLE_SETS,
        alone: bool = False,
        seed: int | None = None,
    ) -> MetricCard:
        def rows(side: Side) -> int | None:
            return None if judge is None else len(side.heard[judge.name].embedding)

        return MetricCard(
            metric=name,
            definition=definition,
            better=better,
            direction=direction,
            judge=None if judge is None else judge.name,
            weight_hash=None if judge is None else judge.weight_hash,
            conventions={} if judge is None else dict(judge.conventions),
            sample_rate=ONSET_RATE if judge is None else judge.sample_rate,
            resampler="soxr HQ",
            mono=self.listening.mono,
            length=self.listening.length,
            num_real=None if alone else len(self.real),
            num_generated=len(self.generated),
            num_real_rows=None if alone else rows(self.real),
            num_generated_rows=rows(self.generated),
            real_set=None if alone else self.real.set_hash,
            generated_set=self.generated.set_hash,
            seed=seed,
            vab=__version__,
            libraries={name: found for name, found in library_versions().items() if name in _LIBRARIES},
        )


_METHODS = (
    {name: name for name in METRICS}
    | dict.fromkeys(_VARIANTS, "kld")
    | {"fad_infinity_fadtk": "fad_infinity", "kad_kadtk": "kad"}
)
_LIBRARIES = ("torch", "numpy", "av", "soxr")


def owners(heard: Impressions) -> Tensor:
    """(M,) int64: of each embedding the number of its sound."""
    return torch.arange(len(heard.rows)).repeat_interleave(heard.rows)


def wanted(metric: str, judge: str, metrics: Sequence[str]) -> bool:
    """Whether a metric is asked for, of every judge or of this one."""
    return metric in metrics or f"{metric}_{judge}" in metrics


def check_metrics(metrics: Sequence[str], judges: Sequence[str]) -> None:
    """Refuse names of metrics that there are not.

    Raises:
        UserError: Naming the first.
    """
    known = [*METRICS, *(f"{metric}_{judge}" for metric in METRICS[:-1] for judge in judges)]
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(
            f"--metrics {unknown[0]}: there is {', '.join(METRICS)}, or one of a judge, as in fad_{judges[0]}"
        )
    idle = [name for name in judges if not any(wanted(metric, name, metrics) for metric in METRICS[:-1])]
    if idle and set(metrics) != {"synchrony"}:
        raise UserError(f"judge {idle[0]} has no metric to make: leave it out of --judges, or add to --metrics")
