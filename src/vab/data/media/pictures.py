"""Pixels as a viewer shows them: still pictures, and the frames of a video in RGB."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from vab.data.media.content import explain_content
from vab.data.media.open import MediaError

PICTURE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Suffixes of files that are read as still pictures."""
_PICTURE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_SQUARE = 0.01
"""Pixels whose sides differ by less are square: 448/447 comes from a rounded size."""
_LONGEST_PIXEL = 5
"""A sample aspect ratio beyond this is taken for damage."""
_PQ, _HLG = 16, 18
"""Transfer characteristics of HDR. Source: ITU-T H.273, table 3."""
_WHITE = 203.0
"""cd/m2 of diffuse white in HDR. Source: ITU-R BT.2408."""
_KNEE = 0.75
"""Share of diffuse white. Brighter light is compressed into the rest of the range."""
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""Linear RGB. Source: ITU-R BT.2087."""


def is_picture(path: str | Path) -> bool:
    """Whether a file is read as a still picture, by its suffix."""
    return Path(path).suffix.lower() in PICTURE_SUFFIXES


def read_picture(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a still picture as a viewer shows it: upright, without transparency.

    Args:
        path: A PNG, JPEG, WebP, BMP, TIFF or PPM of any colour model that Pillow decodes.

    Returns:
        (H, W, 3) uint8 RGB, and whether parts of it were transparent: these are laid over white.

    Raises:
        MediaError: ``missing`` or ``unreadable``.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=_PICTURE_FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits; Pillow would clip them to 8
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            pixels = np.asarray(upright.convert("RGBA"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError("missing", path, "there is no such file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = (
            "is not a still picture" if isinstance(error, Image.UnidentifiedImageError) else f"cannot be read: {error}"
        )
        detail = (path.is_file() and explain_content(path)) or said
        raise MediaError("unreadable", path, " ".join(detail.split())) from error
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(colour), False
    opacity = alpha.astype(np.float32) / 255
    return (colour * opacity + 255 * (1 - opacity)).round().astype(np.uint8), True


def display_size(width: int, height: int, pixel: Fraction | None) -> tuple[int, int]:
    """Width and height of a picture with square pixels. One side is stretched, none is shrunk.

    Args:
        width: As stored.
        height: As stored.
        pixel: Width of a pixel by its height (sample aspect ratio); None or 0 if it is not known.
    """
    if not pixel or abs(pixel - 1) < _SQUARE or not 1 / _LONGEST_PIXEL <= pixel <= _LONGEST_PIXEL:
        return width, height
    return (round(width * pixel), height) if pixel > 1 else (width, round(height / pixel))


def to_rgb(frame: VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> np.ndarray:
    """Convert a frame to (H, W, 3) uint8: stretched to a size, tone-mapped if it is HDR, turned by its display matrix.

    Args:
        frame: Of any pixel format.
        size: Width and height before it is turned.
        reformatter: Reused for all frames, as making one takes time.
    """
    hdr = int(frame.color_trc or 0) in (_PQ, _HLG)
    # One thread: with several, swscale's last columns of a row can land in the row that another one has done.
    pixels = reformatter.reformat(frame, *size, format="rgb48le" if hdr else "rgb24", threads=1).to_ndarray()
    return _upright(tone_mapped(pixels, int(frame.color_trc)) if hdr else pixels, frame)


def tone_mapped(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Map HDR to a standard screen: light below white keeps its brightness, brighter light is compressed.

    FFmpeg's ``tonemap`` filter needs zscale, which PyAV's build does not have, and swscale's takes 9 s per file.

    Args:
        pixels: (H, W, 3) uint16 RGB with BT.2020 primaries.
        transfer: 16 for PQ, 18 for HLG.

    Returns:
        (H, W, 3) uint8 sRGB.
    """
    light = _linear(transfer)[pixels]
    if transfer == _HLG:  # the system gamma of a display of 1000 cd/m2
        luminance = light @ np.array([0.2627, 0.678, 0.0593], np.float32)
        light = light * (1000 / _WHITE * np.maximum(luminance, 1e-6) ** 0.2)[..., None]
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    brightest = light.max(axis=2, keepdims=True)
    over = np.maximum(brightest - _KNEE, 0) / (1 - _KNEE)
    light *= (np.minimum(brightest, _KNEE) + (1 - _KNEE) * (1 - np.exp(-over))) / np.maximum(brightest, 1e-6)
    encoded = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * encoded.clip(0, 1)).round().astype(np.uint8)


@lru_cache(maxsize=2)
def _linear(transfer: int) -> np.ndarray:
    """(65536,) float32: light of each code; of diffuse white for PQ, of the scene's brightest for HLG.

    Source: ITU-R BT.2100, tables 4 and 5.
    """
    code = np.arange(1 << 16) / ((1 << 16) - 1)
    if transfer == _PQ:
        root = code ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        return (light * 10_000 / _WHITE).astype(np.float32)
    a, b = 0.17883277, 0.28466892
    c = 0.5 - a * math.log(4 * a)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


def _upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Apply the frame's display matrix (FFmpeg's libavutil/display.h), rounded to quarter turns and mirrors."""
    try:
        matrix = cast(Mapping[SideDataType, Any], frame.side_data).get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 stumbles over side data that it does not know, such as EXIF
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    if matrix is None:
        return np.ascontiguousarray(pixels)  # rows can be padded, and Pillow copies padded rows ten times slower
    # (x, y) goes to (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5]
    if abs(int(a)) + abs(int(d)) < abs(int(b)) + abs(int(c)):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
