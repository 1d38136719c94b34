"""Expected codes: instead of sampling, take the codes whose vectors sum to nearly what the network expects.

A sample is one of the possible sounds; the expectation is their mean. On average the mean is nearer to the true sound:
half of a random vector's expected squared error is its own variance. This suits the finer levels of a residual
quantiser, which correct the coarser ones; a sound made this way from nothing would be blurred.
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from vab.precision import full_precision


def expected_codes(probabilities: Tensor, codebooks: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Fill the hidden codes of each step: quantise their expected sum of vectors, level by level, as an encoder would.

    Args:
        probabilities: (B, K, T, S) float: the network's probabilities. Read where ``mask`` is True.
        codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads, coarse to fine.
        codes: (B, K, T) int64: the known codes.
        mask: (B, K, T) bool, True = fill this code.

    Returns:
        (B, K, T) int64: ``codes`` with the hidden ones filled.
    """
    codebooks, filled = codebooks.float(), codes.clone()
    with full_precision(codes.device):  # bfloat16 would often choose another nearest entry
        residual = einsum(probabilities.float() * mask[..., None], codebooks, "B K T S, K S d -> B T d")
        for level, entries in enumerate(codebooks):  # (S, code_dim)
            nearest = (entries.square().sum(-1) - 2 * residual @ entries.T).argmin(-1)  # (B, T)
            hidden = mask[:, level]
            filled[:, level] = torch.where(hidden, nearest, codes[:, level])
            residual = residual - entries[nearest] * hidden[..., None]
    return filled
