"""Listening to codes: what they sound like, and what a judge hears in them, record by record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vab.frozen.codec import Codec
from vab.frozen.judges import Judge, JudgeOutput
from vab.spec import UserError


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
    waveforms = codec.decode(codes.to(device)).cpu()  # (B, 1, N)
    lengths = (steps / codec.code_rate * codec.sample_rate).long().tolist()
    return [waveform[0, :length] for waveform, length in zip(waveforms, lengths, strict=True)]


def listen(judge: Judge, sounds: Sequence[Tensor], sample_rate: int) -> JudgeOutput:
    """Have a judge listen to sounds of any lengths, to equal ones at once.

    Args:
        judge: Listens where it is.
        sounds: At least one waveform (N,) float32.
        sample_rate: Hz.

    Returns:
        Embeddings (B, E) and probabilities (B, L) on the CPU.

    Raises:
        UserError: If the rate is not the judge's, or a sound is too short to judge.
    """
    device = next(judge.parameters()).device
    groups = [list(sounds)] if len({len(sound) for sound in sounds}) == 1 else [[sound] for sound in sounds]
    heard = [judge(torch.stack(group)[:, None].to(device), sample_rate) for group in groups]
    return JudgeOutput(*(torch.cat(parts).cpu() for parts in zip(*heard, strict=True)))


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
