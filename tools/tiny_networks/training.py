"""What the makers of the tiny weights train on: sounds and pictures rendered once, and the clock they train by."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from tools.tiny_networks.broad_sounds import broad_sound
from vab.demo.world import Scene, describe, render_audio

TRAIN_SEED, UNSEEN_SEED = 7_000_001, 7_000_002
"""Worlds that the makers train on and report on. No recipe uses them, so that every recipe's data are unseen too."""

BROAD_SAMPLES = 32000
"""Length of a broad sound, samples."""


def world_sounds(seed: int, count: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes 0 to count - 1 of a world and their sounds, (count, 64000) int16 at 16 kHz."""
    scenes = [describe(seed, index) for index in range(count)]
    return scenes, np.stack([to_int16(render_audio(scene)) for scene in scenes])


def broad_sounds(seed: int, count: int) -> np.ndarray:
    """(count, BROAD_SAMPLES) int16 at 16 kHz: sounds of every sort, none of the demo world."""
    rng = np.random.default_rng(seed)
    return np.stack([to_int16(broad_sound(rng, BROAD_SAMPLES)) for _ in range(count)])


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as 16-bit integers, a quarter of the memory of what they were computed in."""
    return np.round(np.clip(waveform, -1, 1) * 32767).astype(np.int16)


class Clock:
    """Training by the minute: the schedule follows the time, so that every budget ends with an annealed network."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.start = time.monotonic()
        self.step = 0

    def progress(self) -> float:
        """Share of the time that is used, 0 to 1."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def steps(self, optimizer: torch.optim.Optimizer, peak_rate: float, report_every: int) -> Iterator[bool]:
        """Go on until the time is up, setting the learning rate: a short warm-up, then a half cosine to nothing.

        Yields:
            Whether this step is one to report on.
        """
        while (progress := self.progress()) < 1.0:
            rate = peak_rate * min(1.0, (self.step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.step += 1
            yield self.step % report_every == 0


AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Average:
    """A slowly following copy of a network, which is what is shipped: the last steps' noise averages out.

    It follows faster at first, so that it is usable early on.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move a small step towards the network."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)

    def of(self, network: AnyModule) -> AnyModule:
        """A copy of `network` that has the average's weights, in evaluation mode."""
        twin = copy.deepcopy(network)
        twin.load_state_dict(self.tensors)
        return twin.eval()
