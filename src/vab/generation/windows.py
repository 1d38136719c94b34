"""Decode the codes of sounds of any length: window by window, with the end of a window as context of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vab.frozen.precision import has_bfloat16
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.noise import fold_in
from vab.tokens.sampler import Sampler

Precision = Literal["32-true", "bf16-mixed"]
ChosenPrecision = Literal["auto", "32-true", "bf16-mixed"]


def precision_on(device: torch.device, chosen: ChosenPrecision) -> Precision:
    """The precision of a model's passes; auto: bf16-mixed on a GPU that computes in bfloat16, else 32-true."""
    if chosen == "auto":
        return "bf16-mixed" if has_bfloat16(device) else "32-true"
    return chosen


@dataclass(frozen=True)
class Windows:
    """The video of one sound of T codec steps, in W windows of a segment each."""

    steps: int
    """T of the sound."""
    starts: list[int]
    """First step of each window."""
    features: Tensor
    """(W, V, C) float32."""
    frames: list[int]
    """Frames of each window that are not padding, 1..V."""


def window_starts(total: int, window: int, overlap: int) -> list[int]:
    """First steps of windows that cover ``total`` steps, each overlapping the one before by ``overlap`` or more.

    Args:
        total: Steps to cover.
        window: Steps of a window.
        overlap: Steps that neighbours share; the last window is moved back to end at the end.

    Raises:
        UserError: If the overlap leaves nothing new in a window.
    """
    if not 0 <= overlap < window:
        raise UserError(f"the overlap must be at least 0 and below a window's {window} steps, got {overlap}")
    starts = list(range(0, max(1, total - overlap), window - overlap))
    starts[-1] = max(0, min(starts[-1], total - window))
    return starts


def decode_windows(
    task: PretrainTask,
    sampler: Sampler,
    keys: Tensor,
    records: Sequence[Windows],
    codes: Sequence[Tensor],
    known: Sequence[Tensor],
    precision: Precision = "32-true",
    fixed_size: int | None = None,
    on_window: Callable[[], None] | None = None,
) -> None:
    """Decode the unknown codes of a batch, the same window of all records together.

    Args:
        task: The model. It decodes its own levels; levels before them must be known.
        sampler: Decoding settings.
        keys: (B,) int64 on the device, the seed of each record's randomness.
        records: B of them.
        codes: (K, T or a segment) int64 of each record, on the device; what is decoded is written into them.
        known: (K, T or a segment) bool of each record, on the CPU; what is decoded is marked in them.
        precision: Of the model's passes.
        fixed_size: Fill every batch up to this size, for a compiled model, whose shapes must not change.
        on_window: Called after each window.
    """
    spec, device = task.spec, task.device
    own_levels = slice(task.conditioning_levels, spec.num_codebooks)
    for window in range(max(len(record.starts) for record in records)):
        rows = []  # records that have this window, and unknown codes in it
        for row, record in enumerate(records):
            if window < len(record.starts):
                start = record.starts[window]
                if not known[row][own_levels, start : min(start + spec.num_steps, record.steps)].all():
                    rows.append(row)
        if rows:
            at = {row: slice(records[row].starts[window], records[row].starts[window] + spec.num_steps) for row in rows}
            batch = rows if fixed_size is None else rows + [rows[-1]] * (fixed_size - len(rows))
            steps = [min(spec.num_steps, records[row].steps - at[row].start) for row in batch]
            frames = [records[row].frames[window] for row in batch]
            full = min(steps) == spec.num_steps and min(frames) == spec.num_frames
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                decoded = task.generate(
                    torch.stack([records[row].features[window] for row in batch]).to(device),
                    fold_in(keys[batch], window),
                    sampler,
                    codes=torch.stack([codes[row][: spec.num_codebooks, at[row]] for row in batch]),
                    mask=~torch.stack([known[row][: spec.num_codebooks, at[row]] for row in batch]).to(device),
                    steps=None if full else torch.tensor(steps, device=device),
                    frames=None if full else torch.tensor(frames, device=device),
                )
            for row, row_codes in zip(rows, decoded, strict=False):
                codes[row][: spec.num_codebooks, at[row]] = row_codes
                known[row][: spec.num_codebooks, at[row]] = True
        if on_window is not None:
            on_window()
