"""Vision encoders: one feature vector per video frame, one protocol for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vab.frozen import Frozen, full_precision
from vab.resizing import Resizer
from vab.spec import UserError


class VisionEncoder(Frozen, ABC):
    """Turns frames into feature vectors. Resizing is apart from encoding, so that decoding processes can do it.

    The same frames, given together, have the same features bit for bit, on a CPU with any number of threads.
    """

    feature_dim: int
    """C."""
    precision: str = "float32"
    """In which it computes."""
    encodes_frames_alone: bool = False
    """Whether a frame's features are the same, bit for bit, whichever frames are encoded with it."""
    preprocessing: str
    """In words, what `preprocess` does to a frame: part of what the features mean, so manifests record it."""
    resizer: Resizer
    """The first half of `preprocess`: frames (V, H, W, 3) uint8 to pixels (V, 3, h, w) uint8, without the network."""

    @abstractmethod
    def normalise(self, pixels: Tensor) -> Tensor:
        """The second half of `preprocess`: (M, 3, h, w) uint8 -> float32, on the device of the pixels."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) uint8, or normalised float32 -> (M, C) float32; on a CPU in one thread, or as if it were."""

    def preprocessor(self) -> Resizer:
        """What decoding processes do to frames."""
        return self.resizer

    def preprocess(self, frames: np.ndarray) -> Tensor:
        """Make frames into what the network reads.

        Args:
            frames: (V, H, W, 3) uint8 RGB, any height and width.

        Returns:
            (V, 3, h, w) float32.

        Raises:
            ValueError: If the shape or the dtype is another.
        """
        return self.normalise(torch.from_numpy(self.resizer(frames)))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of prepared frames.

        Args:
            pixels: (M, 3, h, w), uint8 from `resizer` or float32 from `preprocess`.

        Returns:
            (M, C) float32.

        Raises:
            ValueError: If the pixels are not (M, 3, h, w).
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"vision encoder {self.name} takes pixels (M, 3, h, w), got {tuple(pixels.shape)}")
        with full_precision(pixels.device):
            return self._encode(pixels)


def load_vision(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> VisionEncoder:
    """Get a vision encoder by name.

    Args:
        name: "tiny" ships with the package and needs no network. Any model of open_clip: "EVA02-L-14-336/TAG",
            "hf-hub:OWNER/NAME" or "local-dir:FOLDER", then, after commas, "pooled", "normalised", "float32", "bf16"
            or "fp16".
        device: Where it shall run.
        weights: Its published file, or folder for hf-hub:. If None, looked for as `vab.frozen.clip.OpenClip` says.

    Raises:
        UserError: If the name is unknown, or the package or the weights are absent.
    """
    encoder: VisionEncoder
    if name == "tiny":
        from vab.frozen.tiny import TinyVision  # here, since these files build on the class above

        if weights is not None:
            raise UserError(f"vision encoder tiny ships with its weights: leave out {weights}")
        encoder = TinyVision()
    else:
        from vab.frozen.clip import OpenClip

        encoder = OpenClip(name, None if weights is None else Path(weights).expanduser(), device)
    return encoder.freeze().to(device)
