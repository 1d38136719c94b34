"""Convolutional networks over long sounds: in pieces that give what the whole gives; weight norm folded."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from vab.frozen.weight_files.catalogue import CODEC_NUMBERS
from vab.spec import UserError

Weights = dict[str, Tensor]
PIECE_SECONDS = 30
"""s. Longer sounds go through a codec's convolutions in pieces: less memory, the same result."""


def down_reach(network: nn.Module) -> int:
    """How far an output of a downsampling network sees, at most, samples of the input to either side.

    Args:
        network: Its one-dimensional convolutions stand in the order in which they run.
    """
    reach, rate = 0, 1  # rate: input samples per position
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d):
            reach += (layer.kernel_size[0] - 1) * layer.dilation[0] * rate
            rate *= layer.stride[0]
    return reach


def up_reach(network: nn.Module) -> int:
    """How far an output of an upsampling network sees, at most, steps of the input to either side.

    Args:
        network: Its one-dimensional convolutions stand in the order in which they run.
    """
    reach, rate = Fraction(0), 1  # rate: positions per input step
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            rate *= layer.stride[0]
            reach += Fraction(layer.kernel_size[0] - 1, rate)
        elif isinstance(layer, nn.Conv1d):
            reach += Fraction((layer.kernel_size[0] - 1) * layer.dilation[0], rate)
    return math.ceil(reach)


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, scale: Fraction, size: int, reach: int) -> Tensor:
    """Run a convolutional network piece by piece: what it gives is what it gives for the whole, in bounded memory.

    Each piece is given with ``reach`` more on either side, and what these make is cut off. At the ends of ``x`` the
    network pads as it does for the whole.

    Args:
        run: (..., n) to (..., n * scale), the last begun position included.
        x: (..., N).
        scale: Outputs per input: 1 / hop for an encoder, hop for a decoder.
        size: Positions of a piece; a multiple of what makes a whole output.
        reach: To how many positions on either side an output of ``run`` may listen.

    Returns:
        (..., N * scale).
    """
    length = x.shape[-1]
    if length <= size:
        return run(x)
    whole = scale.denominator  # positions that make an output
    margin = -(-reach // whole) * whole
    outputs = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = max(0, begin - margin)
        given = run(x[..., first : min(length, end + margin)])
        skip = int((begin - first) * scale)
        outputs.append(given[..., skip:] if end == length else given[..., skip : skip + int((end - begin) * scale)])
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
    """Weights with what ``weight_norm`` keeps apart, length and direction, put together again.

    Args:
        weights: By name; ``weight_g`` and ``weight_v``, or ``parametrizations.weight.original0`` and ``original1``.
    """
    folded = {}
    for name, value in weights.items():
        for length, direction in (("weight_g", "weight_v"), (_NEW_LENGTH, _NEW_DIRECTION)):
            if name.endswith(length):
                stem = name.removesuffix(length)
                folded[stem + "weight"] = torch._weight_norm(weights[stem + direction], value, 0)
                break
            if name.endswith(direction):
                break
        else:
            folded[name] = value
    return folded


_NEW_LENGTH, _NEW_DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
