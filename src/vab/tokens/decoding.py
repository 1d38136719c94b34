"""Filling hidden codes: a few parallel passes of the network instead of one per code.

One loop for every use: generation hides all codes, inpainting a span, continuation the future. It is a pure function
of a network (a callable), what is known, what is hidden, a `Sampler` and a key per record, and never waits for the
device.

Source: MaskGIT, Chang et al. 2022, section 3.2; as VAB, Su et al. 2024, applies it to audio tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vab.spec import UserError
from vab.tokens.noise import Stream, fold_in, gumbel, uniform

CodesToLogits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(codes (R, K, T) int64, mask (R, K, T) bool, drop_features (R,) bool) -> logits (R, K, T, S).

R = B * `Sampler.passes` rows: all records with their video and, for guidance, all records once more without; row r is
record r % B. Codes are unspecified where the mask is True; the network must not read them."""

# Above any log-probability plus noise: a known code is never hidden again.
_CONFIDENCE_OF_KNOWN = torch.inf


@dataclass(frozen=True)
class Sampler:
    """How hidden codes are filled: confidence with annealed noise. Saved with every output; defaults are the paper's.

    Source: VAB, Su et al. 2024 (guidance scale, as third parties report it); the other values: the authors' follow-up
    code.
    """

    decode_steps: int = 16
    """Passes of the network."""
    temperature: float = 1.0
    """Divides the logits before a code is drawn; 0 always takes the likeliest."""
    top_k: int | None = 256
    """Draw among this many likeliest codes only; None draws among all."""
    choice_temperature: float = 15.5
    """Gumbel noise added to the confidences at the start; falls linearly to 0. 0 keeps the most confident codes."""
    guidance_scale: float = 5.0
    """w in u + w (c - u), c the logits with the video, u without. 1 is plain conditioning, in one pass; 0 ignores the
    video."""

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.decode_steps < 1:
            raise UserError(f"sampler: decode_steps must be at least 1, got {self.decode_steps}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampler: top_k must be at least 1, or null for all codes, got {self.top_k}")
        if 0 < self.temperature < 1e-3:  # logits over less than this overflow
            raise UserError(f"sampler: temperature must be 0 (greedy) or at least 0.001, got {self.temperature}")
        for name in ("temperature", "choice_temperature", "guidance_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"sampler: {name} must be 0 or above, got {value}")

    @property
    def passes(self) -> int:
        """Rows that the network sees per record: 2 with guidance, else 1."""
        return 1 if self.guidance_scale == 1 else 2


@torch.no_grad()
def decode(
    codes_to_logits: CodesToLogits,
    codes: Tensor,
    mask: Tensor,
    sampler: Sampler,
    keys: Tensor,
    steps: Tensor | None = None,
) -> Tensor:
    """Fill the hidden codes.

    Each step draws every hidden code, then hides the least certain ones again, until none is hidden. A record's result
    depends on its own codes, mask and key, never on the batch around it.

    Args:
        codes_to_logits: The network; see `CodesToLogits`.
        codes: (B, K, T) int64 in [0, S). The known codes; unread where ``mask`` is True.
        mask: (B, K, T) bool. True where a code is to be filled. Records may differ in how many.
        sampler: How.
        keys: (B,) int64. Each record's chance, such as `record_keys` gives.
        steps: (B,) int64. How many steps of each record are sound; None if all. Padding is returned as it came.

    Returns:
        (B, K, T) int64: ``codes`` with the hidden ones filled.
    """
    if steps is not None:
        is_sound = torch.arange(codes.shape[-1], device=codes.device) < steps[:, None]  # (B, T)
        mask = mask & is_sound[:, None]
    shape = codes.shape[1:]  # (K, T)
    codes = codes.masked_fill(mask, 0)
    num_hidden = initial = mask.flatten(1).sum(1)  # (B,)
    for step in range(sampler.decode_steps):
        step_keys = fold_in(keys, step)
        log_p = _guided_logits(codes_to_logits, codes, mask, sampler).log_softmax(-1)  # (B, K, T, S)
        drawn = draw(log_p, uniform(step_keys, Stream.TOKEN, shape), sampler.temperature, sampler.top_k)
        codes = torch.where(mask, drawn, codes)
        num_hidden = num_hidden_after(step, sampler.decode_steps, initial, num_hidden)
        # As the network has it, whatever temperature and top-k made of it: greedy draws differ in certainty too.
        confidence = log_p.gather(-1, drawn[..., None])[..., 0]  # (B, K, T)
        if sampler.choice_temperature > 0:
            annealed = sampler.choice_temperature * (1 - (step + 1) / sampler.decode_steps)
            confidence = confidence + annealed * gumbel(uniform(step_keys, Stream.CHOICE, shape))
        mask = least_confident(confidence.masked_fill(~mask, _CONFIDENCE_OF_KNOWN), num_hidden)
    return codes


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Draw a code from each row of logits: one uniform number each, through the distribution function.

    Args:
        logits: (..., S) float32.
        uniform: (...) float in (0, 1).
        temperature: Divides the logits; 0 takes the likeliest.
        top_k: Only the k likeliest codes can be drawn; None for all.

    Returns:
        (...) int64 in [0, S).
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return _inverse_cdf(logits / temperature, uniform)
    likeliest, code = logits.topk(top_k, dim=-1)  # (..., top_k), falling
    return code.gather(-1, _inverse_cdf(likeliest / temperature, uniform)[..., None])[..., 0]


def num_hidden_after(step: int, decode_steps: int, initial: Tensor, current: Tensor) -> Tensor:
    """How many codes of each record stay hidden after a step: few are revealed at first, many at the end.

    floor(cos(pi/2 (step + 1) / decode_steps) * initial), but at least one code is revealed and, before the last
    step, at least one left, where that is possible.

    Args:
        step: 0 .. decode_steps - 1.
        decode_steps: Steps in all.
        initial: (B,) int64. Codes that were hidden before the first step.
        current: (B,) int64. Codes that are hidden before this step.

    Returns:
        (B,) int64 in [0, current]; 0 after the last step.
    """
    if step + 1 == decode_steps:
        return torch.zeros_like(initial)
    # A ratio in 32-bit fixed point: the same floor on every device, and cos(pi/3) is one half.
    ratio = round(math.cos(math.pi / 2 * (step + 1) / decode_steps) * (1 << 32))
    scheduled = (initial * ratio) >> 32
    return torch.minimum(scheduled.clamp(min=1), current - 1).clamp(min=0)


def least_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """Exactly ``count`` least confident codes of each record, ties by position.

    Args:
        confidence: (B, K, T) float.
        count: (B,) int64.

    Returns:
        (B, K, T) bool.
    """
    order = confidence.flatten(1).argsort(dim=1, stable=True)  # (B, K * T)
    rank = torch.arange(order.shape[1], device=order.device)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < count[:, None])
    return chosen.view_as(confidence)


def _guided_logits(codes_to_logits: CodesToLogits, codes: Tensor, mask: Tensor, sampler: Sampler) -> Tensor:
    """The network's logits, (B, K, T, S) float32, pushed away from what it says without the video."""
    drop_features = torch.zeros(codes.shape[0], dtype=torch.bool, device=codes.device)
    if sampler.passes == 1:
        return codes_to_logits(codes, mask, drop_features).float()
    both = codes_to_logits(codes.repeat(2, 1, 1), mask.repeat(2, 1, 1), torch.cat([drop_features, ~drop_features]))
    with_video, without_video = both.float().chunk(2)
    return without_video + sampler.guidance_scale * (with_video - without_video)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated probability reaches the uniform number, (...) int64."""
    cumulated = logits.softmax(-1).cumsum(-1)
    # Measured against the sum as rounded: the index stays in range, and none of probability 0 is drawn.
    return torch.searchsorted(cumulated, uniform[..., None] * cumulated[..., -1:])[..., 0]
