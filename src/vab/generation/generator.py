"""A pretrained model with the frozen networks around it: video in, sound out."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vab.frozen import device_named
from vab.frozen.loading import load_networks
from vab.frozen.protocols import Codec, VisionEncoder
from vab.generation.request import KnownSound, Prepared, Request, encode_video, length_of, read_known_sound
from vab.generation.sound import Sound, finished_sound
from vab.generation.windows import ChosenPrecision, Precision, Windows, decode_windows, precision_on, window_starts
from vab.precision import allow_tf32
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask, load_task
from vab.tokens.noise import fold_in, record_keys
from vab.tokens.sampler import Sampler

_FINE = 1 << 32
"""Folded into the keys of the fine stage; larger than the number of any window."""
_DECODED_SECONDS = 320.0
"""The codec decodes at most this much sound at once, except for a single longer sound."""


@dataclass(frozen=True)
class Generator:
    """A pretrained model, or a coarse and a fine one, with the codec and the vision encoder of its data."""

    task: PretrainTask
    """The model of all levels, or of the coarse ones."""
    codec: Codec
    """The codec of the training data."""
    vision: VisionEncoder
    """The vision encoder of the training data."""
    fine: PretrainTask | None = None
    """The model of the finer levels."""
    precision: Precision = "32-true"
    """Of the model's passes. The codec always runs in float32; the vision encoder has its own precision."""
    overlap_seconds: float | None = None
    """Overlap of the windows of a long video; a quarter of a segment by default."""
    compiled: bool = False
    """Whether the model is compiled; batches are then filled up, so that shapes do not change."""
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        weights: Literal["ema", "live"] = "ema",
        device: str = "auto",
        fine_checkpoint: str | Path | None = None,
        precision: ChosenPrecision = "auto",
        compile: bool = False,
        overlap_seconds: float | None = None,
    ) -> Generator:
        """Load checkpoints and the frozen networks that their training data were encoded with.

        Args:
            checkpoint: A .ckpt file, or a run's folder.
            weights: The averaged (EMA) weights, or the live ones.
            device: auto, cpu, cuda, cuda:1, ...
            fine_checkpoint: The fine stage that belongs to a coarse model.
            precision: Of the model's passes; auto: bf16-mixed on a GPU that computes in bfloat16, else 32-true.
            compile: Compile the model; worth it for some dozens of sounds or more.
            overlap_seconds: Overlap of the windows of a long video.

        Raises:
            UserError: If a checkpoint is of another task, the two do not belong together, the overlap is out of range,
                or a frozen network is not the one that encoded the data.
        """
        task = _load_pretrained(checkpoint, weights)
        fine = None if fine_checkpoint is None else _load_pretrained(fine_checkpoint, weights)
        if fine is not None:
            _require_pair(task, fine, checkpoint, str(fine_checkpoint))
        if overlap_seconds is not None and not 0 <= overlap_seconds < task.spec.segment_seconds:
            raise UserError(
                f"--overlap_seconds must be at least 0 and below a segment's {task.spec.segment_seconds:g} s, "
                f"got {overlap_seconds:g}"
            )
        where = device_named(device)
        allow_tf32(where)
        codec, vision = load_networks(task.spec, where)
        for stage in (task, fine):
            if stage is not None:
                stage.to(where)
                if compile:
                    stage.backbone.compile(dynamic=False)
        return cls(task, codec, vision, fine, precision_on(where, precision), overlap_seconds, compile)

    @property
    def audio_statistics(self) -> dict[str, float] | None:
        """Statistics of the training audio with all levels, if the checkpoint has them."""
        return (self.fine or self.task).audio_statistics

    @property
    def levels(self) -> int:
        """K of the generated sounds."""
        return (self.fine or self.task).spec.num_codebooks

    @torch.inference_mode()
    def prepare(self, request: Request, check: Callable[[], None] | None = None) -> Prepared:
        """Read a request's media and encode them. Several threads may do so at once, and while others generate.

        Args:
            request: What to generate.
            check: Called before frames are encoded; it may raise to stop.

        Raises:
            MediaError: If a file cannot be read or lacks what is needed.
            UserError: If the request is invalid.
        """
        spec = self.task.spec
        seconds = length_of(request, spec)
        samples = max(1, round(seconds * spec.sample_rate))
        steps = self.codec.steps_for(samples)
        overlap = spec.segment_seconds / 4 if self.overlap_seconds is None else self.overlap_seconds
        starts = window_starts(steps, spec.num_steps, min(spec.num_steps - 1, round(overlap * spec.code_rate)))
        known: KnownSound | None = None
        notes: list[str] = []
        if request.keeps_sound:
            known, notes = read_known_sound(request, samples, self.levels, self.codec, self._round_trip)
        given = self.task.conditioning_levels
        if given and (known is None or not bool(known.mask[:given].all())):
            raise UserError(
                f"the checkpoint is a fine stage, which makes levels for {given} given ones: give the coarse stage as "
                f"--checkpoint and this one as --fine_checkpoint; or --keep_levels {given} with a sound as long as the "
                f"picture"
            )

        def encode(frames: np.ndarray) -> Tensor:
            if check is not None:
                check()
            pixels = self.vision.preprocess(frames)  # (n, H, W, 3) uint8 to pixels of the network's own size
            with self._one_at_a_time:  # full precision is a switch of the whole process
                return self.vision.encode(pixels.to(self.task.device)).cpu()

        features, frames, more = encode_video(request.source, starts, seconds, spec, encode)
        return Prepared(steps, starts, features, frames, request, samples, known, notes + more)

    @torch.inference_mode()
    def make(
        self,
        prepared: Sequence[Prepared],
        seed: int = 0,
        sampler: Sampler | None = None,
        fine_sampler: Sampler | None = None,
        batch_size: int | None = None,
        on_window: Callable[[], None] | None = None,
    ) -> list[Sound]:
        """Generate sounds as one batch: the same window of all of them together.

        A video longer than a segment is generated window by window: the end of a window is known context of the next.
        A sound depends on its request, the seed and the settings; its batch changes it by float rounding only.

        Args:
            prepared: What to generate.
            seed: The random numbers depend on it and on each request's name and variation.
            sampler: Decoding settings; the checkpoint's own by default.
            fine_sampler: Decoding settings of the fine stage; its checkpoint's own by default.
            batch_size: With a compiled model, fill smaller batches up to this size.
            on_window: Called after each window of each stage, ``num_windows`` times for a batch.

        Returns:
            In the order of ``prepared``.
        """
        if not prepared:
            return []
        shapes = [(self.levels, max(item.steps, self.task.spec.num_steps)) for item in prepared]
        codes = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
        known = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
        for item, item_codes, item_known in zip(prepared, codes, known, strict=True):
            if item.known is not None:
                item_codes[:, : item.steps] = item.known.codes
                item_known[:, : item.steps] = item.known.mask
        codes = [item_codes.to(self.task.device) for item_codes in codes]
        keys = torch.tensor([_key(item.request, seed) for item in prepared], device=self.task.device)
        self._decode_stages(prepared, codes, known, keys, sampler, fine_sampler, batch_size, on_window)
        codes = [item_codes[:, : item.steps] for item, item_codes in zip(prepared, codes, strict=True)]
        waveforms = self._decode_codes(codes, [item.samples for item in prepared])
        return [
            finished_sound(item, waveform, item_codes.cpu(), self.task.spec, self.audio_statistics)
            for item, waveform, item_codes in zip(prepared, waveforms, codes, strict=True)
        ]

    @torch.inference_mode()
    def codes_of_records(
        self,
        batch: Batch,
        seed: int = 0,
        sampler: Sampler | None = None,
        fine_sampler: Sampler | None = None,
        keep_levels: int = 0,
    ) -> Tensor:
        """Generate codes for records of a data set, as ``make`` does for videos of one segment.

        Args:
            batch: Records, with all levels.
            seed: The random numbers depend on it and on each record's number.
            sampler: As in ``make``.
            fine_sampler: As in ``make``.
            keep_levels: Coarsest levels to keep from the records; at least those that a fine stage alone needs.

        Returns:
            (B, K, T) int64 on the model's device. Steps that are padding hold nothing.
        """
        batch = batch.to(self.task.device)
        lengths = zip(batch.features.unsqueeze(1), batch.steps.tolist(), batch.frames.tolist(), strict=True)
        records = [Windows(steps, [0], features, [frames]) for features, steps, frames in lengths]
        codes = torch.zeros_like(batch.codes[:, : self.levels])
        known = torch.zeros(codes.shape, dtype=torch.bool)
        keep = slice(0, max(keep_levels, self.task.conditioning_levels))
        codes[:, keep], known[:, keep] = batch.codes[:, keep], True
        keys = record_keys(seed, batch.index)
        self._decode_stages(records, list(codes), list(known), keys, sampler, fine_sampler)
        return codes

    def num_windows(self, prepared: Sequence[Prepared]) -> int:
        """How many windows ``make`` generates for a batch, over all stages."""
        return max(len(item.starts) for item in prepared) * (1 if self.fine is None else 2)

    def sound_for(self, source: str | Path, sampler: Sampler | None = None, seed: int = 0, **options: object) -> Sound:
        """The sound for one video or picture.

        Args:
            source: The file.
            sampler: Decoding settings; the checkpoint's own by default.
            seed: The random numbers depend on it and on the file's name.
            **options: Fields of ``Request``.
        """
        request = replace(Request(Path(source), Path(source).name), **options)  # type: ignore[arg-type]
        return self.make([self.prepare(request)], seed, sampler)[0]

    def _decode_stages(
        self,
        records: Sequence[Windows],
        codes: Sequence[Tensor],
        known: Sequence[Tensor],
        keys: Tensor,
        sampler: Sampler | None,
        fine_sampler: Sampler | None,
        batch_size: int | None = None,
        on_window: Callable[[], None] | None = None,
    ) -> None:
        """Decode all levels of a batch: those of the model, then those of the fine one. See ``decode_windows``."""
        stages = [(self.task, sampler, keys)]
        if self.fine is not None:
            stages.append((self.fine, fine_sampler, fold_in(keys, _FINE)))
        size = batch_size if self.compiled else None
        for task, own, task_keys in stages:
            decode_windows(task, own or task.sampler, task_keys, records, codes, known, self.precision, size, on_window)

    def _decode_codes(self, codes: list[Tensor], samples: list[int]) -> list[Tensor]:
        """(N,) waveforms; sounds of one length are decoded together, and none is padded."""
        waveforms: dict[int, Tensor] = {}
        for length in sorted(set(samples)):
            rows = [row for row, size in enumerate(samples) if size == length]
            at_once = max(1, int(_DECODED_SECONDS * self.codec.sample_rate / length))
            for start in range(0, len(rows), at_once):
                some = rows[start : start + at_once]
                with self._one_at_a_time:
                    decoded = self.codec.decode(torch.stack([codes[row] for row in some]), length)[:, 0].cpu()
                waveforms.update(zip(some, decoded, strict=True))
        return [waveforms[row] for row in range(len(codes))]

    def _round_trip(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) to (K of the codec, T) and (M,), all on the CPU."""
        with self._one_at_a_time:
            codes = self.codec.encode(waveform[None, None].to(self.task.device))
            return codes[0].cpu(), self.codec.decode(codes, len(waveform))[0, 0].cpu()


def _key(request: Request, seed: int) -> int:
    """The key of a request's randomness."""
    key = record_keys(seed, torch.tensor([zlib.crc32(request.name.encode(errors="surrogateescape"))]))
    # Negative, because windows and stages fold in other numbers.
    return int(key if request.variation == 0 else fold_in(key, -request.variation))


def _load_pretrained(checkpoint: str | Path, weights: Literal["ema", "live"]) -> PretrainTask:
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
