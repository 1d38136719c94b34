"""Random numbers that belong to a record: a pure hash of (key, stream, position), not the state of a generator.

A generator's numbers depend on everything drawn before: on the batch a record landed in, the rank, the order of calls.
A hash has no before. Whatever the batch size, number of processes or device, a record gets the same numbers bit for
bit, so its mask and its generated codes can be had again from its key alone.

The arithmetic is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with
Stafford's mix 13) in int64, whose products wrap around on every device that torch knows.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from vab.spec import UserError


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, made odd: spreads consecutive counters
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)

# 23 bits and a half fill float32's 24-bit significand: every value is exact, none is 0 or 1.
_BITS = 23


class Stream(IntEnum):
    """What a random number is for. Numbers of different streams are unrelated; the values are part of every result."""

    MASK_RATIO = 0
    """The share of a record's codes that training hides."""
    MASK = 1
    """Which codes of a record training hides."""
    FEATURE_DROPOUT = 2
    """Whether training withholds a record's video."""
    TOKEN = 3
    """Which code decoding draws."""
    CHOICE = 4
    """Which drawn codes decoding keeps."""
    REMASK = 5
    """Which filled codes decoding hides again."""
    MIX = 6
    """Whether training mixes a record with another."""
    MIX_SHARE = 7
    """How much of each."""


def record_keys(seed: int, index: Tensor) -> Tensor:
    """One key for each record of a run: equal for equal (seed, record), unrelated otherwise.

    Args:
        seed: Of the run, any int64.
        index: (B,) int64. The records' numbers.

    Returns:
        (B,) int64, on the device of ``index``.

    Raises:
        UserError: If the seed does not fit into 64 bits.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise UserError(f"seed must be a signed 64-bit number, got {seed}")
    return fold_in(torch.full_like(index, seed), index)


def fold_in(keys: Tensor, data: int | Tensor) -> Tensor:
    """New keys that depend on ``data`` too, such as an epoch or a decoding step.

    Args:
        keys: (B,) int64.
        data: Any int64, or an int64 tensor that broadcasts with ``keys``.

    Returns:
        (B,) int64. For a fixed ``data`` different keys stay different, and the other way round.
    """
    return _mix(_mix(keys + _GOLDEN) ^ data)


def uniform(keys: Tensor, stream: int | Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Independent numbers, uniform over (0, 1), for each key.

    Args:
        keys: (B,) int64.
        stream: What they are for; one of `Stream`, or any int64.
        shape: Of one record's numbers. Row-major: a longer first axis leaves the earlier numbers as they were.

    Returns:
        (B, *shape) float32 on the keys' device: odd multiples of 2^-24, so never 0 or 1.
    """
    count = 1
    for size in shape:
        count *= size
    position = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    word = fold_in(keys, stream)[:, None] + position * _GOLDEN  # (B, count): SplitMix64's counters
    word = (word ^ _shift(word, 30)) * _MIX_1
    word = (word ^ _shift(word, 27)) * _MIX_2
    # The last step of the mix, word ^ (word >> 31), does not reach the top 31 bits, and only those are read.
    numbers = (_shift(word, 64 - _BITS).to(torch.float32) + 0.5) * 2.0**-_BITS
    return numbers.view(keys.shape[0], *shape)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones: -log(-log u). From `uniform` they lie in [-2.9, 16.7].

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
    """Right shift that fills with zeros; torch's own copies the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
