"""Listening: what codes sound like, and what a judge hears in sounds, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vab.audio import resample
from vab.frozen.protocols import Codec, Judge
from vab.spec import UserError

DECODED_AT_ONCE = 8
"""Records: a codec's decoder takes far more memory than its codes."""
USUAL_SECONDS = 10.0
"""Length of a sound that batch sizes are meant for."""


def sounds_of(codec: Codec, codes: Tensor, steps: Tensor) -> list[Tensor]:
    """Decode records, and cut the padding off.

    Args:
        codec: Decodes where it is.
        codes: (B, k, T) int64 on any device. Steps at and after ``steps`` are padding.
        steps: (B,) int64, 1..T.

    Returns:
        B waveforms (N,) float32 on the CPU, each as long as its steps.
    """
    device = next(codec.parameters()).device
    waveforms = [codec.decode(few.to(device)).cpu() for few in codes.split(DECODED_AT_ONCE)]  # (8, 1, N) each
    lengths = (steps * codec.samples_per_step).tolist()
    rows = itertools.chain.from_iterable(waveforms)
    return [waveform[0, :length] for waveform, length in zip(rows, lengths, strict=True)]


def resampled(sounds: Sequence[Tensor], from_rate: int, to_rate: int) -> list[Tensor]:
    """Waveforms (N,) on the CPU at another sample rate, such as a judge's; rates in Hz."""
    if from_rate == to_rate:
        return list(sounds)
    return [torch.from_numpy(resample(sound.numpy(), from_rate, to_rate)) for sound in sounds]


class Impressions(NamedTuple):
    """What a judge heard in B sounds, on the CPU; those of several batches are joined field by field."""

    embedding: Tensor
    """(M, E) float32: the windows of all sounds in order."""
    rows: Tensor
    """(B,) int64: how many of these are of each sound."""
    logits: Tensor
    """(B, L) float32."""

    @property
    def probabilities(self) -> Tensor:
        """(B, L) float32: softmax of the logits."""
        return self.logits.softmax(dim=-1)


def listen(judge: Judge, sounds: Sequence[Tensor], sample_rate: int, batch_size: int = 16) -> Impressions:
    """Have a judge listen to sounds of any lengths, to those of one prepared length in batches.

    No sound is padded because of a neighbour, so a judgement is the same in any company.

    Args:
        judge: Listens where it is.
        sounds: At least one waveform (N,) float32, N >= 1.
        sample_rate: Hz.
        batch_size: Sounds at once; fewer where they are longer than `USUAL_SECONDS`, so that memory stays the same.

    Raises:
        UserError: If the rate is not the judge's, or a sound has no samples, or some that are not finite.
    """
    device = next(judge.parameters()).device
    by_length: dict[int, list[int]] = {}
    prepared = [judge.prepare(sound) for sound in sounds]
    for number, waveform in enumerate(prepared):
        by_length.setdefault(len(waveform), []).append(number)
    heard: dict[int, tuple[Tensor, Tensor]] = {}
    for length, numbers in by_length.items():
        at_once = max(1, min(batch_size, int(batch_size * USUAL_SECONDS * sample_rate / length)))
        for start in range(0, len(numbers), at_once):
            chosen = numbers[start : start + at_once]
            output = judge(torch.stack([prepared[number] for number in chosen])[:, None].to(device), sample_rate)
            heard.update(zip(chosen, zip(output.embedding.cpu(), output.logits.cpu(), strict=True), strict=True))
    embeddings, logits = zip(*(heard[number] for number in range(len(prepared))), strict=True)
    rows = torch.tensor([len(embedding) for embedding in embeddings])
    return Impressions(torch.cat(embeddings), rows, torch.stack(logits))


def class_columns(judge: Judge, labels: Sequence[str]) -> list[int]:
    """Where the judge's list has each label of a data set.

    Raises:
        UserError: If there are no labels, or one that the judge does not know.
    """
    unknown = [name for name in labels if name not in judge.classes]
    if unknown or not labels:
        have = ", ".join(unknown) or "none at all"
        raise UserError(
            f"judge {judge.name} knows the classes {', '.join(judge.classes)}; the shards' labels are {have}"
        )
    return [judge.classes.index(name) for name in labels]


def true_classes(judge: Judge, columns: Sequence[int], labels: Tensor) -> Tensor:
    """The true classes of records in the judge's order.

    Args:
        judge: Whose classes.
        columns: As `class_columns` gives.
        labels: (B, number of columns) float of 0 and 1.

    Returns:
        (B, L) bool.
    """
    truth = torch.zeros(len(labels), len(judge.classes), dtype=torch.bool)
    truth[:, list(columns)] = labels > 0
    return truth
