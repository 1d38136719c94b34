"""What convolutional codecs share: long sounds in pieces, folded weight norm, the check of the sample rate."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from vab.frozen.weight_files.catalogue import CODEC_NUMBERS
from vab.spec import UserError

Weights = dict[str, Tensor]
PIECE_SECONDS = 30
"""s. Longer sounds go through a codec's convolutions in pieces: less memory, the same result."""
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
"""Names of length and direction in torch's older and newer weight norm."""


def reach(network: nn.Module) -> int:
    """How many positions of the input an output depends on, at most, to either side of its own.

    Args:
        network: A down- or upsampling network whose one-dimensional convolutions are defined in the order in which
            they run.
    """
    total, step = Fraction(0), Fraction(1)  # step: input positions per position of the present layer
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            step /= layer.stride[0]
            total += (layer.kernel_size[0] - 1) * step
        elif isinstance(layer, nn.Conv1d):
            total += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
            step *= layer.stride[0]
    return math.ceil(total)


def in_pieces(network: nn.Module, x: Tensor, scale: Fraction, rate: float) -> Tensor:
    """Run a convolutional network piece by piece: the result for the whole, in bounded memory.

    Each piece is extended by the network's `reach` on either side, and the outputs of the extension are cut off. At the
    ends of ``x`` the network pads as it does for the whole.

    Args:
        network: (..., n) to (..., n * scale), the last begun output included.
        x: (..., N).
        scale: Outputs per input: 1 / hop for an encoder, hop for a decoder.
        rate: Positions of ``x`` per second.

    Returns:
        (..., N * scale).
    """
    length, whole = x.shape[-1], scale.denominator  # positions that make an output
    size = int(PIECE_SECONDS * rate) // whole * whole
    if length <= size:
        out: Tensor = network(x)
        return out
    margin = -(-reach(network) // whole) * whole
    outputs = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = max(0, begin - margin)
        piece = network(x[..., first : min(length, end + margin)])
        skip = int((begin - first) * scale)
        outputs.append(piece[..., skip:] if end == length else piece[..., skip : skip + int((end - begin) * scale)])
    return torch.cat(outputs, dim=-1)


def check_sample_rate(name: str, rate: int, path: Path) -> None:
    """Refuse weights of another sample rate than the codec's.

    Args:
        name: Name of the codec.
        rate: Sample rate of the network in the file, Hz.
        path: Path of the file, for the message.

    Raises:
        UserError: If they differ.
    """
    expected = CODEC_NUMBERS[name][0]
    if rate != expected:
        others = [
            other
            for other, numbers in CODEC_NUMBERS.items()
            if numbers[0] == rate and other.startswith("dac") == name.startswith("dac")
        ]
        advice = f"load it as codec {others[0]}" if others else "take another file"
        raise UserError(f"{path} is for {rate} Hz, codec {name} for {expected} Hz: {advice}")


def fold_weight_norm(weights: Weights) -> Weights:
    """Weights by name, with each length and direction that ``weight_norm`` stores multiplied to one weight."""
    folded = dict(weights)
    for length, direction in _WEIGHT_NORM:
        for name in [name for name in weights if name.endswith(length)]:
            stem = name.removesuffix(length)
            folded[f"{stem}weight"] = torch._weight_norm(folded.pop(stem + direction), folded.pop(name), 0)
    return folded
