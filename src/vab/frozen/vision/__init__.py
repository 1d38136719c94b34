"""Vision encoders by name: one feature vector per video frame."""

from __future__ import annotations

from pathlib import Path

import torch

from vab.frozen.protocols import VisionEncoder
from vab.frozen.vision.clip import OpenClip
from vab.frozen.vision.tiny import TinyVision
from vab.spec import UserError


def load_vision(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> VisionEncoder:
    """Load a vision encoder by name.

    Args:
        name: "tiny" ships with the package and needs no network. Any model of open_clip: "EVA02-L-14-336/TAG",
            "hf-hub:OWNER/NAME" or "local-dir:FOLDER", then, after commas, "pooled", "normalised", "float32", "bf16"
            or "fp16".
        device: Device of the encoder.
        weights: Its published file, or folder for hf-hub:. If None, searched as `vab.frozen.vision.clip.OpenClip` says.

    Raises:
        UserError: If the name is unknown, or the package or the weights are absent.
    """
    if name == "tiny" and weights is not None:
        raise UserError(f"vision encoder tiny ships with its weights: leave out {weights}")
    own = None if weights is None else Path(weights).expanduser()
    encoder: VisionEncoder = TinyVision() if name == "tiny" else OpenClip(name, own, device)
    return encoder.freeze().to(device)
