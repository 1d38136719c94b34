"""Trains the tiny judge to tell the demo world's sounds apart, through noise, level changes and dull recordings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny_networks.training import TRAIN_SEED, UNSEEN_SEED, Average, Clock, broad_sounds, world_sounds
from vab.demo.world import CLASSES, Scene
from vab.frozen.judges.tiny import JudgeConfig, JudgeNetwork
from vab.metrics.agreement import class_agreement

BATCH = 32
PEAK_RATE = 2e-3
UNSEEN = 400
"""Segments that progress is reported on, at most."""


def class_targets(scenes: list[Scene]) -> Tensor:
    """(len(scenes), L) float32: each row spread evenly over the kinds that sound in the scene."""
    targets = torch.zeros(len(scenes), len(CLASSES))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            targets[row, CLASSES.index(item.kind)] = 1.0
    return targets / targets.sum(dim=1, keepdim=True)


def draw_batch(
    rng: np.random.Generator, world: np.ndarray, targets: Tensor, broad: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Waveforms (BATCH, N), spoilt at random, and their targets (BATCH, L)."""
    rows, wanted = [], []
    for _ in range(BATCH):
        i = rng.integers(len(world))
        x, target = world[i] / np.float32(32767), targets[i]
        if rng.random() < 0.25 and (target > 0).sum() == 1:  # a second sound, to make more pairs than were rendered
            j = rng.integers(len(world))
            if (targets[j] > 0).sum() == 1 and not bool((targets[j] * target).any()):
                x, target = (
                    x + world[j] / np.float32(32767) * 10 ** (rng.uniform(-6, 6) / 20),
                    (target + targets[j]) / 2,
                )
        rows.append(spoil(rng, np.roll(x, rng.integers(len(x))), broad))
        wanted.append(target)
    waveform = np.stack(rows).astype(np.float32)
    if rng.random() < 0.2:  # all of a batch share a length
        waveform = waveform[:, : rng.integers(waveform.shape[1] * 3 // 4, waveform.shape[1])]
    heard = torch.from_numpy(waveform)
    some = slice(0, int(rng.integers(1, BATCH // 2)))
    heard[some] = blur_phase(heard[some], float(rng.uniform(0.3, 1.5)))
    return heard, torch.stack(wanted)


def blur_phase(waveform: Tensor, strength: float) -> Tensor:
    """Waveforms (B, N) with the phases of their short-time spectra disturbed, as codecs of a low rate do.

    Args:
        waveform: (B, N) float32.
        strength: Standard deviation of the disturbance, radians.
    """
    window = torch.hann_window(640)
    spectrum = torch.stft(waveform, 640, 320, window=window, return_complex=True)
    turned = spectrum * torch.polar(torch.ones(spectrum.shape), strength * torch.randn(spectrum.shape))
    return torch.istft(turned, 640, 320, window=window, length=waveform.shape[1])


def spoil(rng: np.random.Generator, x: np.ndarray, broad: np.ndarray) -> np.ndarray:
    """A waveform as a worse recording has it: dull or coloured, noisy, at another level, clipped or coarse."""
    if rng.random() < 0.6:
        frequency = np.fft.rfftfreq(len(x), 1 / 16000)
        tilt = np.interp(frequency, np.linspace(0, 8000, 6), rng.uniform(-5, 5, 6))  # dB
        if rng.random() < 0.4:
            tilt -= 60 * (frequency > rng.uniform(4000, 8000))
        x = np.fft.irfft(np.fft.rfft(x) * (10 ** (tilt / 20)).astype(np.float32), n=len(x))
    loudness = float(np.sqrt(np.mean(x**2))) + 1e-9
    if rng.random() < 0.6:
        noise = rng.standard_normal(len(x), dtype=np.float32)
        if rng.random() < 0.3:
            noise = np.resize(broad[rng.integers(len(broad))], len(x)).astype(np.float32)
        x = x + noise / (noise.std() + 1e-9) * loudness * 10 ** (-rng.uniform(8, 45) / 20)
    x = x * 10 ** (rng.uniform(-12, 12) / 20)
    return np.clip(x, -1, 1)


def make_judge(minutes: float, sounds: int, on_progress: Callable[[JudgeNetwork, int, str], None]) -> JudgeNetwork:
    """Train a judge for a time.

    Args:
        minutes: Of wall time, rendering the sounds not counted.
        sounds: How many segments of the demo world to render.
        on_progress: Called now and then with the averaged network, the step and a line of news.

    Returns:
        The averaged network.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes, world = world_sounds(TRAIN_SEED, sounds)
    targets, broad = class_targets(scenes), broad_sounds(1, -(-sounds // 10))
    unseen_scenes, unseen_sounds = world_sounds(UNSEEN_SEED, min(UNSEEN, sounds))
    unseen_targets, unseen = class_targets(unseen_scenes), torch.from_numpy(unseen_sounds / np.float32(32767))
    network = JudgeNetwork(JudgeConfig(classes=CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    clock, average = Clock(minutes), Average(network, decay=0.995)

    for report in clock.steps(optimizer, PEAK_RATE, report_every=100):
        waveform, target = draw_batch(rng, world, targets, broad)
        embedding, scores = network(waveform)
        # The embedding is kept to the size of a unit Gaussian's, so that distances between sets have a sane scale.
        loss = F.cross_entropy(scores, target) + 0.01 * (embedding.square().mean() - 1).square()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        average.update(network)
        if report:
            shipped = average.of(network)
            with torch.no_grad():
                guesses = torch.cat([shipped(rows)[1] for rows in unseen.split(50)])
            score = float(class_agreement(guesses, unseen_targets > 0).mean())
            on_progress(
                shipped, clock.step, f"loss {float(loss.detach()):.3f}, agreement on unseen segments {score:.4f}"
            )
    return average.of(network)
