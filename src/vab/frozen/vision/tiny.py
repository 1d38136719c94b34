"""The tiny vision encoder, which ships with the package and knows the demo world's objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.frozen.precision import single_threaded
from vab.frozen.protocols import VisionEncoder
from vab.frozen.tiny import halve, read_weights, shipped_weights
from vab.resizing import Resizer


@dataclass(frozen=True)
class VisionConfig:
    """Architecture of `VisionNetwork`; `size` is the side of the square it reads, pixels."""

    size: int = 64
    widths: tuple[int, int, int] = (32, 64, 96)
    place_channels: int = 16
    feature_dim: int = 128


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, height, width) -> the same shape."""
        return F.relu(x + self.body(x))


class VisionNetwork(nn.Module):
    """A small convolutional network whose feature keeps positions: its last map is flattened, not averaged."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.widths
        self.body = nn.Sequential(
            halve(3, first),
            halve(first, second),
            ResidualBlock(second),
            halve(second, third),
            ResidualBlock(third),
        )
        self.place = nn.Conv2d(third, config.place_channels, 1)
        side = config.size // 8
        self.project = nn.Linear(config.place_channels * side * side + third, config.feature_dim)
        # Without learned scale: each channel has about unit variance over the training frames.
        self.unit = nn.BatchNorm1d(config.feature_dim, affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, size, size) in [-1, 1] -> (M, feature_dim)."""
        x = self.body(pixels)  # (M, third, side, side)
        both = torch.cat([F.relu(self.place(x)).flatten(1), x.amax(dim=(2, 3))], dim=1)
        feature: Tensor = self.unit(self.project(both))
        return feature


class TinyVision(VisionEncoder):
    """128 numbers per frame: which objects of the demo world are visible, where, how large, and how they move.

    Frames of a call are encoded together; the last bits of a feature depend on the other frames.

    Args:
        weights: A file made by `tools/tiny_networks`; the shipped one if None.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        numbers, tensors, self.weight_hash = read_weights(weights or shipped_weights("vision"))
        config = VisionConfig(**numbers)
        self.name = "tiny"
        self.feature_dim = config.feature_dim
        # Squashed, not cropped: a sounding object may be at the edge of the frame.
        self.resizer = Resizer((config.size, config.size), "squash", "bilinear")
        self.preprocessing = (
            f"whole frame squashed to {config.size}x{config.size} (no crop, aspect ratio not kept), "
            "bilinear with antialiasing, RGB / 127.5 - 1"
        )
        self.network = VisionNetwork(config)
        self.network.load_state_dict(tensors)
        self.freeze()

    def normalise(self, pixels: Tensor) -> Tensor:
        """To [-1, 1]."""
        return pixels.float().div(127.5).sub(1.0)

    def _encode(self, pixels: Tensor) -> Tensor:
        with single_threaded(pixels.device):
            features: Tensor = self.network(self.normalise(pixels) if pixels.dtype == torch.uint8 else pixels.float())
        return features
