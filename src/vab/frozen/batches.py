"""Run codecs and judges on batches of sounds of different lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vab.audio import resample
from vab.frozen.protocols import Codec, Judge
from vab.spec import UserError

DECODE_BATCH_SIZE = 8
"""Records: a codec's decoder takes far more memory than its codes."""
USUAL_SECONDS = 10.0
"""Length of the sounds for which batch sizes are given."""


def decode_sounds(codec: Codec, codes: Tensor, steps: Tensor) -> list[Tensor]:
    """Decode records, and cut the padding off.

    Args:
        codec: On the device where it decodes.
        codes: (B, k, T) int64 on any device. Steps at and after ``steps`` are padding.
        steps: (B,) int64, 1..T.

    Returns:
        B waveforms (N,) float32 on the CPU, each as long as its steps.
    """
    device = next(codec.parameters()).device
    batches = [codec.decode(batch.to(device)).cpu() for batch in codes.split(DECODE_BATCH_SIZE)]  # (8, 1, N) each
    lengths = (steps * codec.samples_per_step).tolist()
    rows = itertools.chain.from_iterable(batches)
    return [waveform[0, :length] for waveform, length in zip(rows, lengths, strict=True)]


class JudgeOutputs(NamedTuple):
    """A judge's outputs for B sounds, on the CPU; those of several batches are concatenated field by field."""

    embedding: Tensor
    """(M, E) float32: the windows of all sounds, in the order of the sounds."""
    rows: Tensor
    """(B,) int64: the number of windows of each sound."""
    logits: Tensor
    """(B, L) float32."""

    @property
    def probabilities(self) -> Tensor:
        """(B, L) float32: softmax of the logits."""
        return self.logits.softmax(dim=-1)


def judge_sounds(judge: Judge, sounds: Sequence[Tensor], sample_rate: int, batch_size: int = 16) -> JudgeOutputs:
    """Judge sounds of any lengths at any rate; sounds of one prepared length are batched.

    No sound is padded to the length of another, so an output does not depend on the other sounds.

    Args:
        judge: On the device where it runs.
        sounds: At least one waveform (N,) float32 on the CPU, N >= 1.
        sample_rate: Of the sounds, Hz; they are resampled to the judge's rate.
        batch_size: Sounds of a batch; fewer if they are longer than `USUAL_SECONDS`, to bound the memory.

    Raises:
        UserError: If a sound has no samples, or some that are not finite.
    """
    device = next(judge.parameters()).device
    if sample_rate != judge.sample_rate:
        sounds = [torch.from_numpy(resample(sound.numpy(), sample_rate, judge.sample_rate)) for sound in sounds]
    prepared = [judge.prepare(sound) for sound in sounds]
    by_length: dict[int, list[int]] = {}
    for number, waveform in enumerate(prepared):
        by_length.setdefault(len(waveform), []).append(number)
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    for length, numbers in by_length.items():
        size = max(1, min(batch_size, int(batch_size * USUAL_SECONDS * judge.sample_rate / length)))
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            output = judge(torch.stack([prepared[number] for number in batch])[:, None].to(device))
            outputs.update(zip(batch, zip(output.embedding.cpu(), output.logits.cpu(), strict=True), strict=True))
    embeddings, logits = zip(*(outputs[number] for number in range(len(prepared))), strict=True)
    rows = torch.tensor([len(embedding) for embedding in embeddings])
    return JudgeOutputs(torch.cat(embeddings), rows, torch.stack(logits))


def class_columns(judge: Judge, labels: Sequence[str]) -> list[int]:
    """The index of each label of a data set among the judge's classes.

    Raises:
        UserError: If there are no labels, or one that is not among the judge's classes.
    """
    unknown = [name for name in labels if name not in judge.classes]
    if unknown or not labels:
        have = ", ".join(unknown) or "none at all"
        raise UserError(
            f"judge {judge.name} knows the classes {', '.join(judge.classes)}; the shards' labels are {have}"
        )
    return [judge.classes.index(name) for name in labels]


def true_classes(judge: Judge, columns: Sequence[int], labels: Tensor) -> Tensor:
    """The true classes of records in the order of the judge's classes.

    Args:
        judge: The judge.
        columns: As `class_columns` returns.
        labels: (B, number of columns) float of 0 and 1.

    Returns:
        (B, L) bool.
    """
    truth = torch.zeros(len(labels), len(judge.classes), dtype=torch.bool)
    truth[:, list(columns)] = labels > 0
    return truth
