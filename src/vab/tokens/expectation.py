"""Codes whose sum is nearest to what a network expects, instead of codes drawn from what it thinks possible.

A draw is one of the possible sounds; the expectation is their middle, which is nearer to the true one on average
whenever much is uncertain: half of a random vector's expected squared error is the draw's own. It suits the finer
levels of a residual quantiser, which correct what is there already; a whole sound made so would be blurred.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor


def expected_codes(probabilities: Tensor, codebooks: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Fill the hidden codes, all at once, with those whose sum comes nearest to the expected one.

    Args:
        probabilities: (B, K, T, S) float. What the network thinks of each code; read where ``mask`` is True.
        codebooks: (K, S, C) float. The vectors whose sum over levels the codec's decoder reads, coarse to fine.
        codes: (B, K, T) int64. The known codes.
        mask: (B, K, T) bool. True where a code is to be filled.

    Returns:
        (B, K, T) int64: of each step, the hidden levels' expected sum of vectors, quantised level by level as an
        encoder would; known codes as they came.
    """
    codebooks, filled = codebooks.float(), codes.clone()
    with torch.autocast(codes.device.type, enabled=False):  # in bfloat16 another entry would often be the nearest
        left = einsum(probabilities.float() * mask[..., None], codebooks, "B K T S, K S d -> B T d")
        for level, entries in enumerate(codebooks):  # (S, C)
            nearest = (entries.square().sum(-1) - 2 * left @ entries.T).argmin(-1)  # (B, T)
            hidden = mask[:, level]
            filled[:, level] = torch.where(hidden, nearest, codes[:, level])
            left = left - entries[nearest] * hidden[..., None]
    return filled
