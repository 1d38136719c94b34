"""Trains the tiny vision encoder to see what the demo world's frames hold.

Its feature is read by linear maps alone: which kinds are there, which are moving, where, how large, and at what point
of their movement. What the maps can read off, a backbone can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny_networks.training import TRAIN_SEED, UNSEEN_SEED, Average, Clock
from vab.demo.pictures import FPS, NUM_FRAMES, render_frames
from vab.demo.scene import CLASSES, DISTRACTORS, LARGEST, SIDE, SMALLEST, Scene, SoundingObject, describe
from vab.frozen.vision.tiny import VisionConfig, VisionNetwork
from vab.resizing import Resizer

BATCH = 64
PEAK_RATE = 2e-3
FRAMES_PER_SCENE = 8
"""Of a rendered segment's frames, so many are kept: neighbours are nearly alike."""
UNSEEN = 100
"""Segments that progress is reported on, at most."""
NUMBERS = 8
"""What is read of an object: x, y, size, time since and before an event, two of its cycle, note."""


@dataclass
class Seen:
    """Frames and what is true of them."""

    pixels: Tensor
    """(M, 3, size, size) uint8."""
    present: Tensor
    """(M, L) float32: 1 for the kinds in the picture."""
    moving: Tensor
    """(M, L) float32: 1 for the kinds that move at that moment."""
    numbers: Tensor
    """(M, L, NUMBERS) float32, about -1 to 1; 0 for kinds that are absent."""
    distractors: Tensor
    """(M, number of sorts) float32."""


def truth_of(item: SoundingObject, times: np.ndarray) -> np.ndarray:
    """(len(times), NUMBERS) float32: what can be seen of an object at these moments (s)."""
    x, y = item.path.at(times)
    since = np.min([np.where(times >= e, times - e, np.inf) for e in item.events], axis=0)
    before = np.min([np.where(times < e, e - times, np.inf) for e in item.events], axis=0)
    latest = np.clip(np.searchsorted(item.events, times, side="right") - 1, 0, None)
    turn = 2 * np.pi * item.cycles(times)
    columns = [
        2 * x / SIDE - 1,
        2 * y / SIDE - 1,
        np.full(len(times), 2 * (item.size - SMALLEST) / (LARGEST - SMALLEST) - 1),
        2 * np.exp(-since / 0.15) - 1,
        2 * np.exp(-before / 0.15) - 1,
        np.sin(turn),
        np.cos(turn),
        np.take(item.notes, latest) / 2 - 1,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def render_seen(seed: int, count: int, size: int, rng: np.random.Generator) -> Seen:
    """Some frames of each of scenes 0 to `count - 1` of a world, at the network's size."""
    all_times = (np.arange(NUM_FRAMES) + 0.5) / FPS
    pixels, facts = [], []
    for index in range(count):
        scene = describe(seed, index)
        chosen = np.sort(rng.choice(len(all_times), FRAMES_PER_SCENE, replace=False))
        pixels.append(shrink(render_frames(scene)[chosen], size))
        facts.append(_facts(scene, all_times[chosen]))
    present, moving, numbers, distractors = (
        torch.from_numpy(np.concatenate(part)) for part in zip(*facts, strict=True)
    )
    return Seen(torch.cat(pixels), present, moving, numbers, distractors)


def shrink(frames: np.ndarray, size: int) -> Tensor:
    """Frames to pixels (V, 3, size, size) uint8 as `TinyVision` resizes them."""
    return torch.from_numpy(Resizer((size, size), "squash", "bilinear")(frames))


def _facts(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    present = np.zeros((len(times), len(CLASSES)), np.float32)
    moving = np.zeros_like(present)
    numbers = np.zeros((*present.shape, NUMBERS), np.float32)
    for item in scene.objects:
        kind = CLASSES.index(item.kind)
        present[:, kind] = 1.0
        moving[:, kind] = np.any([(times >= a) & (times < b) for a, b in item.intervals], axis=0)
        numbers[:, kind] = truth_of(item, times)
    distractors = np.zeros((len(times), len(DISTRACTORS)), np.float32)
    for other in scene.distractors:
        distractors[:, DISTRACTORS.index(other.kind)] = 1.0
    return present, moving, numbers, distractors


def spoil(pixels: Tensor) -> Tensor:
    """Frames (M, 3, h, w) in [-1, 1] as a video holds them: recoloured, blurred, noisy, colour at half resolution."""
    x = pixels
    gain = 1 + 0.1 * torch.randn(len(x), 3, 1, 1) + 0.15 * torch.randn(len(x), 1, 1, 1)
    x = x * gain + 0.12 * torch.randn(len(x), 1, 1, 1)
    luma = x.mean(dim=1, keepdim=True)
    colour = F.interpolate(F.avg_pool2d(x - luma, 2), scale_factor=2, mode="bilinear")
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, luma + colour, x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, 0.8 * torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.6))
    return (x + 0.06 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


class Readout(nn.Module):
    """The linear maps from a feature to all that is true of a frame; thrown away after training."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.sizes = (len(CLASSES), len(CLASSES), len(CLASSES) * NUMBERS, len(DISTRACTORS))
        self.linear = nn.Linear(feature_dim, sum(self.sizes))

    def forward(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Scores of presence, movement, the numbers and the distractors."""
        present, moving, numbers, distractors = self.linear(feature).split(self.sizes, dim=1)
        return present, moving, numbers.unflatten(1, (-1, NUMBERS)), distractors


def readout_loss(guess: tuple[Tensor, ...], seen: Seen, rows: Tensor) -> Tensor:
    """How badly the readout of frames `rows` fits the truth."""
    present, moving, numbers, distractors = guess
    truth = seen.present[rows]
    error = (numbers - seen.numbers[rows]).square() * truth[..., None]  # only of what is there
    is_moving = F.binary_cross_entropy_with_logits(moving, seen.moving[rows], reduction="none") * (0.1 + truth)
    return (
        10 * F.binary_cross_entropy_with_logits(present, truth)
        + 4 * is_moving.mean()
        + 4 * error.sum() / truth.sum() / NUMBERS
        + F.binary_cross_entropy_with_logits(distractors, seen.distractors[rows])
    )


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over kinds of the average precision of their ranking: (M, L) scores and 0/1 truth."""
    precisions = []
    for score, true in zip(scores.T, truth.T, strict=True):
        hits = true[score.argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        precisions.append(float((precision * hits).sum() / hits.sum()))
    return float(np.mean(precisions))


def make_vision(minutes: float, scenes: int, on_progress: Callable[[VisionNetwork, int, str], None]) -> VisionNetwork:
    """Train a vision encoder for a time.

    Args:
        minutes: Of wall time, rendering the frames not counted.
        scenes: How many segments of the demo world to render.
        on_progress: Called now and then with the averaged network, the step and a line of news.

    Returns:
        The averaged network.
    """
    torch.manual_seed(0)
    config = VisionConfig()
    seen = render_seen(TRAIN_SEED, scenes, config.size, np.random.default_rng(0))
    unseen = render_seen(UNSEEN_SEED, min(UNSEEN, scenes), config.size, np.random.default_rng(1))
    network, readout = VisionNetwork(config), Readout(config.feature_dim)
    optimizer = torch.optim.AdamW([*network.parameters(), *readout.parameters()], lr=PEAK_RATE, weight_decay=0.02)
    clock, average, average_readout = Clock(minutes), Average(network, decay=0.995), Average(readout, decay=0.995)

    for report in clock.steps(optimizer, PEAK_RATE, report_every=200):
        rows = torch.randint(len(seen.pixels), (BATCH,))
        loss = readout_loss(readout(network(spoil(_unit(seen.pixels[rows])))), seen, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(network)
        average_readout.update(readout)
        if report:
            shipped = average.of(network)
            on_progress(
                shipped,
                clock.step,
                f"loss {float(loss.detach()):.3f}, unseen frames: "
                + _news(shipped, average_readout.of(readout), unseen),
            )
    return average.of(network)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float().div(127.5).sub(1.0)


@torch.no_grad()
def _news(network: VisionNetwork, readout: Readout, unseen: Seen) -> str:
    present, moving, numbers, _ = readout(torch.cat([network(_unit(part)) for part in unseen.pixels.split(100)]))
    there = unseen.present > 0
    right = ((moving > 0) == (unseen.moving > 0))[there].float().mean()
    left = (numbers - unseen.numbers)[there].square().mean(0) / unseen.numbers[there].var(0)
    precision = average_precision(present, unseen.present)
    names = ("x", "y", "size", "since", "before", "sin", "cos", "note")
    explained = " ".join(f"{name} {1 - float(rest):.2f}" for name, rest in zip(names, left, strict=True))
    return f"mean AP {precision:.4f}, moving {float(right):.3f}, variance explained: {explained}"
