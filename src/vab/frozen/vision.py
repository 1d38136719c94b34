"""Vision encoders: one feature vector per video frame, one protocol for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vab.frozen import Frozen, full_precision
from vab.spec import UserError


class VisionEncoder(Frozen, ABC):
    """Turns frames into feature vectors. Preparing pixels is apart from encoding, so that decode workers can do it."""

    feature_dim: int
    """C."""
    preprocessing: str
    """In words, what `preprocess` does to a frame: part of what the features mean, so manifests record it."""

    @abstractmethod
    def preprocessor(self) -> Callable[[np.ndarray], Tensor]:
        """`preprocess` as a function that can be pickled and sent to a worker without the network."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) float32 -> (M, C) float32."""

    def preprocess(self, frames: np.ndarray) -> Tensor:
        """Make frames into what the network reads.

        Args:
            frames: (V, H, W, 3) uint8 RGB, any height and width.

        Returns:
            (V, 3, h, w) float32.

        Raises:
            ValueError: If the shape or the dtype is another.
        """
        return self.preprocessor()(frames)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of prepared frames.

        Args:
            pixels: (M, 3, h, w) float32 from `preprocess`.

        Returns:
            (M, C) float32.

        Raises:
            ValueError: If the pixels are not (M, 3, h, w).
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"vision encoder {self.name} takes pixels (M, 3, h, w), got {tuple(pixels.shape)}")
        with full_precision(pixels.device):
            return self._encode(pixels.float())


def _tiny() -> VisionEncoder:
    from vab.frozen.tiny import TinyVision  # here, since tiny.py builds on the class above

    return TinyVision()


_ENCODERS: dict[str, Callable[[], VisionEncoder]] = {"tiny": _tiny}


def load_vision(name: str, device: torch.device | str = "cpu") -> VisionEncoder:
    """Get a vision encoder by name.

    Args:
        name: "tiny" ships with the package and needs no network.
        device: Where it shall run.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in _ENCODERS:
        raise UserError(f"unknown vision encoder {name!r}: there is {', '.join(sorted(_ENCODERS))}")
    return _ENCODERS[name]().freeze().to(device)
