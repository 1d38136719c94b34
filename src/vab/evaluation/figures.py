"""The metrics of two sides, each with its card."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vab import __version__
from vab.data.extract.sounds import Listening
from vab.data.shards.format import library_versions
from vab.evaluation.report import Measured
from vab.evaluation.sides import ONSET_RATE, Side
from vab.frozen.batches import JudgeOutputs
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

MAX_OFFSET_SECONDS = 1.0
_LIBRARIES = ("torch", "numpy", "av", "soxr")
_WHOLE_SETS = "generated set against real set"
_PAIRS = "generated against real, pair by pair"
_ONSET_ERROR = "error over pairs by the delta method; chance: each generated sound with other sounds' real onsets"


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
            for metric, function in _BY_JUDGE.items():
                if not is_wanted(metric, judge.name, metrics):
                    continue
                name = f"{metric}_{judge.name}"
                if metric.startswith("kld") and not self.paired:
                    measured.left_out[name] = "the two sides are not paired"
                elif metric.startswith(("kld", "inception_score")) and not judge.classes:
                    measured.left_out[name] = f"judge {judge.name} has no classes"
                else:
                    try:
                        measured.figures[name] = function(self, name, judge)
                    except ValueError as error:  # too few sounds, or all alike: this number does not exist
                        measured.left_out[name] = str(error)
            if f"fad_{judge.name}" in measured.figures:
                measured.warnings.extend(self._too_few(judge))
        if "synchrony" in metrics:
            _synchrony(self, measured)
        return measured

    def moments(self, judge: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the real side."""
        return moments(self.real.outputs[judge].embedding)

    def divergences(self, judge: str, variant: str = "softmax") -> Tensor:
        """(B,) nats of each pair."""
        return paired_kl(self.real.outputs[judge].logits, self.generated.outputs[judge].logits, variant)

    def distances(self, judge: str) -> Tensor:
        """(B,) Frechet distance of each generated file to the real side."""
        made = self.generated.outputs[judge]
        return frechet_per_file(*self.moments(judge), made.embedding, made.rows)

    def _too_few(self, judge: Judge) -> list[str]:
        return [
            f"fad_{judge.name} rests on {count} {side} embeddings, {judge.embedding_dim} wide: with so few it is far "
            f"too high, and compares with nothing of another number"
            for side, count in (
                ("real", len(self.real.outputs[judge.name].embedding)),
                ("generated", len(self.generated.outputs[judge.name].embedding)),
            )
            if count <= judge.embedding_dim
        ]

    def card(
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
        """A metric's card; with ``alone`` the real side does not enter, without a judge neither do embeddings."""

        def rows(side: Side) -> int | None:
            return None if judge is None else len(side.outputs[judge.name].embedding)

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


def _fad(sides: Comparison, name: str, judge: Judge) -> Figure:
    real, made = sides.moments(judge.name), sides.generated.outputs[judge.name]
    value = frechet_distance(*real, *moments(made.embedding))
    error = frechet_error(*real, made.embedding, owners(made))
    definition = "squared Frechet distance of two Gaussians, unbiased covariances; error over files by the delta method"
    return Figure(float(value), float(error), sides.card(name, definition, judge))


def _fad_infinity(sides: Comparison, name: str, judge: Judge) -> Figure:
    made = sides.generated.outputs[judge.name]
    found = frechet_infinity(*sides.moments(judge.name), made.embedding, owners(made), seed=sides.seed)
    definition = (
        f"Frechet distance extrapolated to infinitely many generated files: line over 1/files, {STEPS} draws "
        "of half to all files without replacement; the bias by the number of real files stays"
    )
    card = sides.card(name, definition, judge, seed=sides.seed)
    return Figure(found.score, None, card, {"slope": found.slope, "r2": found.r2})


def _fad_infinity_fadtk(sides: Comparison, name: str, judge: Judge) -> Figure:
    found = frechet_infinity_fadtk(
        *sides.moments(judge.name), sides.generated.outputs[judge.name].embedding, seed=sides.seed
    )
    definition = (
        f"FAD-inf of fadtk: line over 1/N, {STEPS} draws of 500 to all embeddings with replacement; keeps the "
        "bias by the number of generated sounds"
    )
    card = sides.card(name, definition, judge, seed=sides.seed)
    return Figure(found.score, None, card, {"slope": found.slope, "r2": found.r2})


def _kad(sides: Comparison, name: str, judge: Judge, width_of: str) -> Figure:
    outputs = {"real": sides.real.outputs[judge.name], "generated": sides.generated.outputs[judge.name]}
    real, made = outputs["real"], outputs["generated"]
    bandwidth = median_bandwidth(outputs[width_of].embedding)
    value = kernel_distance(real.embedding, made.embedding, bandwidth)
    error = kernel_error(real.embedding, made.embedding, bandwidth, owners(made))
    definition = (
        f"unbiased squared MMD times {SCALE:g}, Gaussian kernel, width the median distance of the {width_of} side"
    )
    return Figure(float(value), float(error), sides.card(name, definition, judge), {"bandwidth": float(bandwidth)})


def _kld(sides: Comparison, name: str, judge: Judge, variant: str, words: str) -> Figure:
    value, error = mean_and_error(sides.divergences(judge.name, variant))
    definition = f"mean over pairs of KL(real || generated), nats; {words}"
    return Figure(value, error, sides.card(name, definition, judge, direction="real || generated, pair by pair"))


def _inception_score(sides: Comparison, name: str, judge: Judge) -> Figure:
    splits = sides.inception_splits
    value, spread = inception_score(sides.generated.outputs[judge.name].logits, splits, sides.seed)
    definition = f"exp of mean KL(p(y|x) || p(y)), softmax; mean over {splits} shuffled parts"
    card = sides.card(
        name, definition, judge, better="higher", direction="generated alone", alone=True, seed=sides.seed
    )
    error = float(spread) / math.sqrt(splits - 1) if splits > 1 else None
    return Figure(float(value), error, card, {"deviation_over_parts": float(spread), "parts": float(splits)})


_BY_JUDGE: dict[str, Callable[[Comparison, str, Judge], Figure]] = {
    "fad": _fad,
    "fad_infinity": _fad_infinity,
    "fad_infinity_fadtk": _fad_infinity_fadtk,
    "kad": partial(_kad, width_of="real"),
    "kad_kadtk": partial(_kad, width_of="generated"),
    "kld": partial(_kld, variant="softmax", words="softmax, no epsilon"),
    "kld_epsilon": partial(
        _kld, variant="softmax_epsilon", words=f"softmax, {EPSILON:g} added to the generated probabilities"
    ),
    "kld_sigmoid": partial(_kld, variant="sigmoid", words="sigmoid, summed over classes"),
    "inception_score": _inception_score,
}
METRICS = (*_BY_JUDGE, "synchrony")
"""What can be asked for, of every judge (but synchrony, which needs none), or of one as ``fad_vggish``."""


def _synchrony(sides: Comparison, measured: Measured) -> None:
    names = ("onset_recall", "onset_precision", "onset_f1", "onset_offset_seconds")
    if not sides.paired:
        measured.left_out.update(dict.fromkeys(names, "the two sides are not paired"))
        return
    pairs = list(zip(sides.real.onsets, sides.generated.onsets, strict=True))
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
        card = sides.card(name, f"{definitions[name]}; {_ONSET_ERROR}", None, better=better, direction=_PAIRS)
        value, error = found[source]
        by_chance = dict(zip(("chance", "chance_error"), chance[source], strict=True)) if source in chance else {}
        details = about | {key: one for key, one in by_chance.items() if one is not None}
        measured.figures[name] = Figure(value, error, card, details)


def owners(outputs: JudgeOutputs) -> Tensor:
    """(M,) int64: of each embedding the number of its sound."""
    return torch.arange(len(outputs.rows)).repeat_interleave(outputs.rows)


def is_wanted(metric: str, judge: str, metrics: Sequence[str]) -> bool:
    """Whether a metric is asked for, of every judge or of this one."""
    return metric in metrics or f"{metric}_{judge}" in metrics


def check_metrics(metrics: Sequence[str], judges: Sequence[str]) -> None:
    """Refuse unknown names of metrics, and judges without a metric.

    Raises:
        UserError: Naming the first.
    """
    known = [*METRICS, *(f"{metric}_{judge}" for metric in _BY_JUDGE for judge in judges)]
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(
            f"--metrics {unknown[0]}: there is {', '.join(METRICS)}, or one of a judge, as in fad_{judges[0]}"
        )
    idle = [name for name in judges if not any(is_wanted(metric, name, metrics) for metric in _BY_JUDGE)]
    if idle and set(metrics) != {"synchrony"}:
        raise UserError(f"judge {idle[0]} has no metric to make: leave it out of --judges, or add to --metrics")
