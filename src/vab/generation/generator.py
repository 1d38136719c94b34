"""A pretrained model with the frozen networks around it: pictures in, sound out."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vab.data.media import segments as media
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.frozen.protocols import Codec, VisionEncoder
from vab.frozen.vision import load_vision
from vab.generation.filling import Filling, Precision
from vab.generation.inpainting import FADE_SECONDS, splice
from vab.generation.request import (
    Prepared,
    Request,
    known_sound,
    length_of,
    watch_picture,
    watch_video,
    window_starts,
)
from vab.metrics.health import Health, health, warnings_for
from vab.spec import UserError
from vab.tasks import PretrainTask, load_task
from vab.tokens.noise import fold_in, record_keys
from vab.tokens.sampler import Sampler

_FINE = 1 << 32
"""Folded into the keys of the fine stage, apart from the numbers of windows."""
_DECODED_SECONDS = 320.0
"""Sound that the codec decodes at once, unless a single one is longer."""


@dataclass(frozen=True)
class Sound:
    """A generated sound."""

    waveform: Tensor
    """(N,) float32 at the codec's rate, on the CPU. What was made is within full scale; what is kept is as it was."""
    codes: Tensor
    """(K, T) int64, on the CPU."""
    health: Health
    """What it is like by numbers."""
    warnings: list[str]
    """What may be wrong with it, in words."""
    gain_db: float = 0.0
    """How far what was made was turned down, all of it alike, so that no file clips; ``health`` is of the sound
    before."""


@dataclass(frozen=True)
class Generator:
    """A pretrained model, or a coarse and a fine one, with the codec and the vision encoder of their data."""

    task: PretrainTask
    """Makes all levels of the codes, or the coarse ones."""
    codec: Codec
    """Of the task's data."""
    vision: VisionEncoder
    """Likewise."""
    fine: PretrainTask | None = None
    """Makes the levels that ``task`` does not know."""
    precision: Precision = "32-true"
    """Of the model's passes; codec and vision encoder are always in full precision."""
    overlap_seconds: float | None = None
    """Context that a window of a long video takes from the one before; a quarter of a segment by default."""
    compiled: bool = False
    """Whether the model is compiled; then batches are filled up, so that shapes stay."""
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        weights: Literal["ema", "live"] = "ema",
        device: str = "auto",
        fine_checkpoint: str | Path | None = None,
        precision: Precision = "32-true",
        compile: bool = False,
        overlap_seconds: float | None = None,
    ) -> Generator:
        """Read checkpoints and the networks that their data was made with.

        Args:
            checkpoint: A .ckpt file, or a run's folder.
            weights: The averaged weights, or the live ones.
            device: auto, cpu, cuda, cuda:1, ...
            fine_checkpoint: Of the fine stage that belongs to a coarse model.
            precision: Of the model's passes.
            compile: Compile the model, which pays off from some dozens of sounds on.
            overlap_seconds: Context that a window of a long video takes from the one before.

        Raises:
            UserError: If a checkpoint is of another task, the two do not belong together, the overlap is no part of a
                segment, or a frozen network is not the one that made the data.
        """
        task = _pretrained(checkpoint, weights)
        fine = None if fine_checkpoint is None else _pretrained(fine_checkpoint, weights)
        spec = task.spec
        if fine is not None:
            _require_pair(task, fine, checkpoint, str(fine_checkpoint))
        if overlap_seconds is not None and not 0 <= overlap_seconds < spec.segment_seconds:
            raise UserError(
                f"--overlap_seconds must be at least 0 and below a segment's {spec.segment_seconds:g} s, "
                f"got {overlap_seconds:g}"
            )
        where = device_named(device)
        spec.require_stated()
        codec, vision = load_codec(spec.codec, where), load_vision(spec.vision, where)
        for kind, name, expected, got in (
            ("codec", spec.codec, spec.codec_hash, codec.weight_hash),
            ("vision encoder", spec.vision, spec.vision_hash, vision.weight_hash),
        ):
            if expected != got:
                raise UserError(
                    f"the checkpoint was trained with {kind} {name} of weights {expected[:12]}, but {got[:12]} is "
                    f"installed: codes and features would mean something else. Train again on newly extracted shards, "
                    f"or install the weights it was trained with"
                )
        for stage in (task, fine):
            if stage is not None:
                stage.to(where)
                if compile:
                    stage.backbone.compile(dynamic=False)
        return cls(task, codec, vision, fine, precision, overlap_seconds, compile)

    @property
    def audio_statistics(self) -> dict[str, float] | None:
        """What the training audio is like, with all levels, where the checkpoint says so."""
        return (self.fine or self.task).audio_statistics

    @property
    def levels(self) -> int:
        """K of the sounds made."""
        return (self.fine or self.task).spec.num_codebooks

    @torch.inference_mode()
    def prepare(self, request: Request) -> Prepared:
        """Read a request's media and encode them. Several threads may do so at once, also while sounds are made.

        Raises:
            MediaError: If a file cannot give what is asked for.
            UserError: If the request does not make sense.
        """
        spec = self.task.spec
        seconds = length_of(request, spec)
        samples = max(1, round(seconds * spec.sample_rate))
        steps = self.codec.steps_for(samples)
        overlap = spec.segment_seconds / 4 if self.overlap_seconds is None else self.overlap_seconds
        overlap_steps = min(spec.num_steps - 1, round(overlap * spec.code_rate))
        starts = window_starts(steps, spec.num_steps, overlap_steps)
        notes: list[str] = []
        known = None
        if request.knows_sound:
            known, notes = known_sound(request, samples, self.levels, self.codec, self._round_trip)
        given = self.task.conditioning_levels
        if given and (known is None or not bool(known.mask[:given].all())):
            raise UserError(
                f"the checkpoint is a fine stage, which makes levels for {given} given ones: give the coarse stage as "
                f"--checkpoint and this one as --fine_checkpoint; or --keep_levels {given} with a sound as long as the "
                f"picture"
            )
        if media.is_picture(request.source):
            features, frames, more = watch_picture(request.source, starts, seconds, spec, self._encode_frames)
            notes = notes + more
        else:
            features, frames = watch_video(request.source, starts, seconds, spec, self._encode_frames)
        return Prepared(request, samples, steps, starts, features, frames, known, notes)

    @torch.inference_mode()
    def make(
        self,
        prepared: Sequence[Prepared],
        seed: int = 0,
        sampler: Sampler | None = None,
        fine_sampler: Sampler | None = None,
        batch_size: int | None = None,
        on_pass: Callable[[], None] | None = None,
    ) -> list[Sound]:
        """Make sounds, as one batch: the same window of all of them together.

        A video longer than a segment is made window by window: the end of what is there already is known context of
        the next window. A sound depends on its request, the seed and the settings, and on the batch around it up to
        the network's rounding alone.

        Args:
            prepared: What to make sound for.
            seed: With each request's name and variation the source of all randomness.
            sampler: Decoding settings; the checkpoint's own by default.
            fine_sampler: Of the fine stage, likewise.
            batch_size: With a compiled model, fill smaller batches up to this size.
            on_pass: Called after each window of each stage, ``passes_of`` times for a batch.

        Returns:
            In the order of ``prepared``.
        """
        if not prepared:
            return []
        device = self.task.device
        width = [max(item.steps, self.task.spec.num_steps) for item in prepared]
        codes = [torch.zeros(self.levels, size, dtype=torch.int64) for size in width]
        known = [torch.zeros(self.levels, size, dtype=torch.bool) for size in width]
        for item, item_codes, item_known in zip(prepared, codes, known, strict=True):
            if item.known is not None:
                item_codes[:, : item.steps] = item.known.codes
                item_known[:, : item.steps] = item.known.mask
        codes = [item.to(device) for item in codes]
        batch = Filling(list(prepared), codes, known, self.precision, batch_size if self.compiled else None)
        keys = torch.tensor([_key(item.request, seed) for item in prepared], device=device)
        batch.fill(self.task, sampler or self.task.sampler, keys, on_pass)
        if self.fine is not None:
            batch.fill(self.fine, fine_sampler or self.fine.sampler, fold_in(keys, _FINE), on_pass)
        codes = [made[:, : item.steps] for item, made in zip(prepared, codes, strict=True)]
        waveforms = self._decode(codes, [item.samples for item in prepared])
        return [
            self._sound(item, waveform, made.cpu())
            for item, waveform, made in zip(prepared, waveforms, codes, strict=True)
        ]

    def passes_of(self, prepared: Sequence[Prepared]) -> int:
        """How many windows ``make`` goes through for a batch, over all stages."""
        return max(len(item.starts) for item in prepared) * (1 if self.fine is None else 2)

    def sound_for(self, source: str | Path, sampler: Sampler | None = None, seed: int = 0, **options: object) -> Sound:
        """The sound for one video or picture.

        Args:
            source: The file.
            sampler: Decoding settings; the checkpoint's own by default.
            seed: Together with the file's name the source of all randomness.
            **options: Fields of ``Request``.
        """
        request = replace(Request(Path(source), Path(source).name), **options)  # type: ignore[arg-type]
        return self.make([self.prepare(request)], seed, sampler)[0]

    def _sound(self, item: Prepared, waveform: Tensor, codes: Tensor) -> Sound:
        rate, spans = self.task.spec.sample_rate, item.known.spans if item.known is not None else []

        def joined(made: Tensor) -> Tensor:
            return made if item.known is None else splice(made, item.known.waveform, spans, round(FADE_SECONDS * rate))

        whole = joined(waveform)
        found = health(whole, codes, rate, self.task.spec.code_rate)
        warnings = warnings_for(found, self.audio_statistics)
        is_made = torch.ones(len(waveform), dtype=torch.bool)
        for first, last in spans:
            is_made[first:last] = False
        gain = 1.0
        if is_made.any():
            gain = min(1.0, 1 / max(float(whole[is_made].abs().max()), 1e-9))
        if not is_made.all() and (peak := float(whole[~is_made].abs().max())) > 1:
            warnings.append(f"the kept sound peaks at {peak:.2f}, beyond full scale: 16-bit files and video clip it")
        if gain == 1:
            return Sound(whole, codes, found, warnings)
        # A cross-fade holds a little of the kept sound too, which may go beyond full scale where the rest does not.
        turned = torch.where(is_made, joined(waveform * gain).clamp(-1, 1), whole)
        return Sound(turned, codes, found, warnings, 20 * math.log10(gain))

    def _decode(self, codes: list[Tensor], samples: list[int]) -> list[Tensor]:
        """(N,) waveforms; sounds of one length are decoded together, never padded to a common one."""
        waveforms: list[Tensor | None] = [None] * len(codes)
        for length in sorted(set(samples)):
            rows = [row for row, size in enumerate(samples) if size == length]
            together = max(1, int(_DECODED_SECONDS * self.codec.sample_rate / length))
            for start in range(0, len(rows), together):
                some = rows[start : start + together]
                with self._one_at_a_time:
                    decoded = self.codec.decode(torch.stack([codes[row] for row in some]), length)[:, 0].cpu()
                for row, waveform in zip(some, decoded, strict=True):
                    waveforms[row] = waveform
        return [waveform for waveform in waveforms if waveform is not None]

    def _encode_frames(self, frames: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 to (n, C) float32 on the CPU."""
        pixels = self.vision.preprocess(frames)
        with self._one_at_a_time:  # what keeps the precision full is a switch of the whole process
            return self.vision.encode(pixels.to(self.task.device)).cpu()

    def _round_trip(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) to (K of the codec, T) and (M,), all on the CPU."""
        with self._one_at_a_time:
            codes = self.codec.encode(waveform[None, None].to(self.task.device))
            return codes[0].cpu(), self.codec.decode(codes, len(waveform))[0, 0].cpu()


def _key(request: Request, seed: int) -> int:
    """Of a record's randomness."""
    key = record_keys(seed, torch.tensor([zlib.crc32(request.name.encode(errors="surrogateescape"))]))
    # Negative: apart from windows and stages, which are folded in after it.
    return int(key if request.variation == 0 else fold_in(key, -request.variation))


def _pretrained(checkpoint: str | Path, weights: Literal["ema", "live"]) -> PretrainTask:
    task = load_task(checkpoint, weights)
    if not isinstance(task, PretrainTask):
        raise UserError(f"{checkpoint} holds a {type(task).__name__}; sound is generated by a PretrainTask")
    if not all(bool(parameter.isfinite().all()) for parameter in task.parameters()):
        raise UserError(f"{checkpoint} has weights that are not finite: its run has diverged, take an earlier one")
    return task


def _require_pair(coarse: PretrainTask, fine: PretrainTask, coarse_path: str | Path, fine_path: str) -> None:
    """Refuse a fine stage that does not go on where the coarse one stops."""
    if not fine.conditioning_levels:
        raise UserError(
            f"--fine_checkpoint {fine_path} is no fine stage: it makes all its {fine.spec.num_codebooks} levels alone. "
            f"Give it as --checkpoint, or train a fine stage with --model.conditioning_levels"
        )
    if coarse.conditioning_levels:
        raise UserError(
            f"--checkpoint {coarse_path} is itself a fine stage, for {coarse.conditioning_levels} given levels: "
            f"give a coarse one"
        )
    replace(coarse.spec, num_codebooks=fine.spec.num_codebooks).require(
        fine.spec, "coarse checkpoint", "fine checkpoint"
    )
    if fine.conditioning_levels != coarse.spec.num_codebooks:
        raise UserError(
            f"the fine stage goes on from {fine.conditioning_levels} levels, but the coarse one makes "
            f"{coarse.spec.num_codebooks}: {fine_path} and {coarse_path} do not belong together"
        )
