"""Load the codec and the vision encoder that a checkpoint names, and compare their weights with those it records."""

from __future__ import annotations

from typing import overload

import torch

from vab.frozen.codec import load_codec
from vab.frozen.protocols import Codec, VisionEncoder
from vab.frozen.vision import load_vision
from vab.spec import SegmentSpec, UserError


@overload
def load_networks(spec: SegmentSpec, device: torch.device | str = "cpu") -> tuple[Codec, VisionEncoder]: ...


@overload
def load_networks(
    spec: SegmentSpec, device: torch.device | str = "cpu", *, audio: bool = True, video: bool = True
) -> tuple[Codec | None, VisionEncoder | None]: ...


def load_networks(
    spec: SegmentSpec, device: torch.device | str = "cpu", *, audio: bool = True, video: bool = True
) -> tuple[Codec | None, VisionEncoder | None]:
    """Load the frozen networks with which the training data of a checkpoint were encoded.

    Args:
        spec: Of the checkpoint's task: the names of both networks and the hashes of their weights.
        device: Device of the networks.
        audio: Whether the codec is needed.
        video: Whether the vision encoder is needed.

    Returns:
        The codec and the vision encoder; None for one that is not needed.

    Raises:
        UserError: If the spec does not state the weights, a network cannot be loaded, or its weights have another hash.
    """
    spec.require_stated(audio=audio, video=video)
    codec = load_codec(spec.codec, device) if audio else None
    vision = load_vision(spec.vision, device) if video else None
    for kind, network, expected in (("codec", codec, spec.codec_hash), ("vision encoder", vision, spec.vision_hash)):
        if network is not None and network.weight_hash != expected:
            raise UserError(
                f"the checkpoint was trained with {kind} {network.name} of weights {expected[:12]}, but "
                f"{network.weight_hash[:12]} is installed: install the weights it was trained with, or extract its "
                "data again and train on that"
            )
    return codec, vision
