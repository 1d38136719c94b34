"""Filling the codes of a batch of sounds, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vab.generation.request import Prepared
from vab.tasks import PretrainTask
from vab.tokens.noise import fold_in
from vab.tokens.sampler import Sampler

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Filling:
    """The codes of a batch on their way."""

    prepared: list[Prepared]
    codes: list[Tensor]
    """(K, T or more) int64 of each record, on the device."""
    known: list[Tensor]
    """(K, T or more) bool of each record, on the CPU: what is there already."""
    precision: Precision
    fixed_size: int | None
    """Records of every batch, where shapes must not change."""

    def fill(self, task: PretrainTask, sampler: Sampler, keys: Tensor, on_pass: Callable[[], None] | None) -> None:
        """Make the levels that a task makes, window by window."""
        for window in range(max(len(item.starts) for item in self.prepared)):
            rows = [row for row in range(len(self.prepared)) if self._is_open(row, window, task)]
            if rows:
                self._fill_window(task, sampler, keys, rows, window)
            if on_pass is not None:
                on_pass()

    def _span(self, row: int, window: int, task: PretrainTask) -> slice:
        start = self.prepared[row].starts[window]
        return slice(start, start + task.spec.num_steps)

    def _is_open(self, row: int, window: int, task: PretrainTask) -> bool:
        """Whether a record has that window, and something is to be made in it."""
        item = self.prepared[row]
        if window >= len(item.starts):
            return False
        span, levels = self._span(row, window, task), slice(task.conditioning_levels, task.spec.num_codebooks)
        return not bool(self.known[row][levels, span.start : min(span.stop, item.steps)].all())

    def _fill_window(self, task: PretrainTask, sampler: Sampler, keys: Tensor, rows: list[int], window: int) -> None:
        spec, device = task.spec, task.device
        levels = slice(0, spec.num_codebooks)
        spans = [self._span(row, window, task) for row in rows]
        places = list(range(len(rows)))
        if self.fixed_size is not None:
            places += [places[-1]] * (self.fixed_size - len(rows))
        items = [self.prepared[rows[place]] for place in places]
        codes = torch.stack([self.codes[rows[place]][levels, spans[place]] for place in places])
        known = torch.stack([self.known[rows[place]][levels, spans[place]] for place in places])
        steps = [min(spec.num_steps, item.steps - item.starts[window]) for item in items]
        frames = [item.frames[window] for item in items]
        full = min(steps) == spec.num_steps and min(frames) == spec.num_frames
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            made = task.generate(
                torch.stack([item.features[window] for item in items]).to(device),
                fold_in(keys[[rows[place] for place in places]], window),
                sampler,
                codes=codes,
                mask=~known.to(device),
                steps=None if full else torch.tensor(steps, device=device),
                frames=None if full else torch.tensor(frames, device=device),
            )
        for place, row in enumerate(rows):
            self.codes[row][levels, spans[place]] = made[place]
            self.known[row][levels, spans[place]] = True
