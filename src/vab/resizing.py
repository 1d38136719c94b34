"""Resize and crop frames to the input size of a vision encoder. Decoding processes import this, so it needs no torch.

The result is uint8, a quarter of the bytes of float32; the encoder normalises it on its own device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Resizer:
    """Resizes frames of any size to one size. It is small to pickle, for decoding processes.

    The result equals open_clip's evaluation transform (`open_clip.transform.image_transform_v2`) before its ToTensor.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    mode: str = "squash"
    """``squash``: resize to ``size``, ignoring the aspect ratio. ``shortest``: keep the aspect ratio, fill ``size`` and
    crop the centre. ``longest``: keep the aspect ratio, fit into ``size`` and pad."""
    interpolation: str = "bicubic"
    """``bilinear`` or ``bicubic``, with antialiasing."""
    fill: int = 0
    """Grey level of the padding."""

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Resize frames.

        Args:
            frames: (V, H, W, 3) uint8 RGB.

        Returns:
            (V, 3, h, w) uint8.

        Raises:
            ValueError: If the shape or the dtype is wrong.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames are (V, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
        pixels = np.empty((len(frames), 3, *self.size), np.uint8)
        for number, frame in enumerate(frames):
            pixels[number] = np.moveaxis(np.asarray(self._resize(Image.fromarray(frame))), 2, 0)
        return pixels

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        resized = self._size_before_crop(image.height, image.width)
        if resized != (image.height, image.width):
            # For a target that is not square, open_clip resizes the shortest side with its default, bicubic.
            name = "bicubic" if self.mode == "shortest" and height != width else self.interpolation
            image = image.resize(resized[::-1], INTERPOLATIONS[name])
        right, bottom = max(0, width - image.width), max(0, height - image.height)
        if right or bottom:
            border = (right // 2, bottom // 2, (right + 1) // 2, (bottom + 1) // 2)
            image = ImageOps.expand(image, border, (self.fill,) * 3)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _size_before_crop(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before cropping and padding, rounded as in torchvision and timm."""
        if self.mode == "squash":
            return self.size
        if self.mode == "shortest" and self.size[0] == self.size[1]:
            short, side = min(height, width), self.size[0]
            return (side, int(side * width / short)) if height <= width else (int(side * height / short), side)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)
