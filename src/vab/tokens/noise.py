"""Random numbers that belong to a record: a pure hash of (key, stream, position) instead of a generator's state.

A generator's numbers depend on everything drawn before: the batch of a record, the rank, the order of calls. The hash
depends on nothing else. A record gets the same numbers, bit for bit, for any batch size, number of processes or device:
its mask and its generated codes can be reproduced from its key.

The arithmetic is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with
Stafford's mix 13) in int64, whose products wrap around on every device of torch.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from vab.spec import UserError


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd: spreads consecutive counters
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)

# 23 bits and a half fill float32's 24-bit significand: every value is exact, none is 0 or 1.
_BITS = 23


class Stream(IntEnum):
    """The purpose of a random number. Streams are independent; other values would change every result."""

    MASK_RATIO = 0
    """The mask ratio of a record in training."""
    MASK = 1
    """The codes of a record that training hides."""
    FEATURE_DROPOUT = 2
    """Whether training ignores a record's video."""
    TOKEN = 3
    """The codes that decoding samples."""
    CHOICE = 4
    """The sampled codes that decoding keeps."""
    REMASK = 5
    """The filled codes that decoding hides again."""
    MIX = 6
    """Whether mixup mixes a record with another."""
    MIX_SHARE = 7
    """The weight of each of the two."""


def record_keys(seed: int, index: Tensor) -> Tensor:
    """One key per record: a hash of the seed and the record's number.

    Args:
        seed: The run's seed, any int64.
        index: (B,) int64: the records' numbers.

    Returns:
        (B,) int64, on the device of ``index``.

    Raises:
        UserError: If the seed does not fit into 64 bits.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise UserError(f"seed must be a signed 64-bit number, got {seed}")
    return fold_in(torch.full_like(index, seed), index)


def fold_in(keys: Tensor, data: int | Tensor) -> Tensor:
    """New keys that also depend on ``data``, such as an epoch or a decoding step.

    Args:
        keys: (B,) int64.
        data: Any int64, or an int64 tensor that broadcasts with ``keys``.

    Returns:
        (B,) int64. Different keys stay different for the same ``data``, and different data for the same key.
    """
    return _mix(_mix(keys + _GOLDEN) ^ data)


def uniform(keys: Tensor, stream: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Independent numbers, uniform over (0, 1), for each key.

    Args:
        keys: (B,) int64.
        stream: Their purpose: one of `Stream`, or any int64.
        shape: Shape of one record's numbers. Row-major: a longer first axis does not change the earlier numbers.

    Returns:
        (B, *shape) float32 on the keys' device: odd multiples of 2^-24, so never 0 or 1.
    """
    position = torch.arange(1, math.prod(shape) + 1, device=keys.device, dtype=torch.int64)
    word = fold_in(keys, stream)[:, None] + position * _GOLDEN  # (B, positions): SplitMix64's counters
    word = (word ^ _shift(word, 30)) * _MIX_1
    word = (word ^ _shift(word, 27)) * _MIX_2
    # The last step of the mix, word ^ (word >> 31), does not change the top 31 bits, and only those are read.
    numbers = (_shift(word, 64 - _BITS).to(torch.float32) + 0.5) * 2.0**-_BITS
    return numbers.view(keys.shape[0], *shape)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones: -log(-log u), in [-2.9, 16.7] for numbers from `uniform`.

    Args:
        uniform: Any shape, float in (0, 1).

    Returns:
        The same shape. Mean 0.577, variance pi^2 / 6.
    """
    return -torch.log(-torch.log(uniform))


def _mix(word: Tensor) -> Tensor:
    """A bijection of int64 in which each input bit flips each output bit half of the time."""
    word = (word ^ _shift(word, 30)) * _MIX_1
    word = (word ^ _shift(word, 27)) * _MIX_2
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; torch's shift copies the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
