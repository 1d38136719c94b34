"""Filling hidden codes: a few parallel passes of the network instead of one per code.

One loop for every use: generation hides all codes, inpainting a span, continuation the future, a fine stage the finer
levels. It is a pure function of a network (a callable), what is known, what is hidden, a `Sampler` and a key per
record, and never waits for the device.

Source: MaskGIT, Chang et al. 2022, section 3.2; as VAB, Su et al. 2024, applies it to audio tokens. The other orders
and schedules name theirs in `Sampler`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from vab.tokens.noise import Stream, fold_in, gumbel, uniform
from vab.tokens.sampler import Order, Sampler, Stage, sampler_from

__all__ = [
    "CodesToLogits",
    "Sampler",
    "decode",
    "draw",
    "guided_logits",
    "least_confident",
    "num_hidden_after",
    "sampler_from",
    "share_of",
]

CodesToLogits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(codes (R, K, T) int64, mask (R, K, T) bool, drop_features (R,) bool) -> logits (R, K, T, S).

R = B * `Sampler.passes` rows: all records with their video and, for guidance, all records once more without; row r is
record r % B. Codes are unspecified where the mask is True; the network must not read them."""

# Above any log-probability plus noise: a known code is never hidden again.
_CONFIDENCE_OF_KNOWN = torch.inf


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

    Each pass draws every hidden code of its stage's levels, then hides all but the best of them again, until none is
    hidden. A record's result depends on its own codes, mask and key, never on the batch around it.

    Args:
        codes_to_logits: The network; see `CodesToLogits`.
        codes: (B, K, T) int64 in [0, S). The known codes; unread where ``mask`` is True.
        mask: (B, K, T) bool. True where a code is to be filled. Records may differ in how many.
        sampler: How.
        keys: (B,) int64. Each record's chance, such as `record_keys` gives.
        steps: (B,) int64. How many steps of each record are sound; None if all. Padding is returned as it came.

    Returns:
        (B, K, T) int64: ``codes`` with the hidden ones filled.

    Raises:
        UserError: If the sampler lists more levels than there are.
    """
    if steps is not None:
        is_sound = torch.arange(codes.shape[-1], device=codes.device) < steps[:, None]  # (B, T)
        mask = mask & is_sound[:, None]
    codes = codes.masked_fill(mask, 0)
    number = 0
    for stage in sampler.stages(codes.shape[1]):
        levels = slice(stage.first_level, stage.end_level)
        ranks = _ranks(sampler.order, keys, stage, codes.shape[-1])
        wanted = hidden = mask[:, levels]  # (B, k, T): what this stage fills, and what of it is hidden yet
        for step in range(stage.steps):
            step_keys = fold_in(keys, number)
            scale = sampler.guidance_at(number, step, stage.steps)
            logits = guided_logits(codes_to_logits, codes, mask, sampler.passes, scale, levels)  # (B, k, T, S)
            numbers = uniform(step_keys, Stream.TOKEN, hidden.shape[1:])
            drawn = draw(logits, numbers, sampler.temperature, sampler.top_k, sampler.top_p)
            confidence = _confidence(sampler, logits, drawn, step_keys, ranks, step, stage.steps)
            kept = torch.where(hidden, drawn, codes[:, levels])
            hidden = _hidden_after(sampler, wanted, hidden, confidence, step_keys, step, stage.steps)
            codes = torch.cat([codes[:, : levels.start], kept, codes[:, levels.stop :]], dim=1)
            mask = torch.cat([mask[:, : levels.start], hidden, mask[:, levels.stop :]], dim=1)
            number += 1
    return codes


def _hidden_after(
    sampler: Sampler, wanted: Tensor, hidden: Tensor, confidence: Tensor, step_keys: Tensor, step: int, steps: int
) -> Tensor:
    """(B, k, T) bool: what of a stage's codes is hidden after a pass; arguments as `decode` has them."""
    current = reduce(hidden, "B k T -> B", "sum")
    ratio, again = sampler.hidden_ratio(step, steps), sampler.remask_share(step, steps)
    pauses = sampler.remask == "loop" and again > 0
    count = num_hidden_after(ratio, reduce(wanted, "B k T -> B", "sum"), current, may_stay=pauses)
    if again == 0:
        return least_confident(confidence.masked_fill(~hidden, _CONFIDENCE_OF_KNOWN), count)
    filled = wanted & ~hidden
    num_filled = reduce(filled, "B k T -> B", "sum")
    if sampler.remask == "rescale":
        num_again = share_of(torch.minimum(num_filled, count), again)
    else:
        num_again = torch.minimum(share_of(num_filled, again), count)
    chance = uniform(step_keys, Stream.REMASK, hidden.shape[1:]).masked_fill(~filled, torch.inf)
    left = least_confident(confidence.masked_fill(~hidden, _CONFIDENCE_OF_KNOWN), count - num_again)
    return left | least_confident(chance, num_again)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float = 1.0) -> Tensor:
    """Draw a code from each row of logits: one uniform number each, through the distribution function.

    Args:
        logits: (..., S) float32.
        uniform: (...) float in (0, 1).
        temperature: Divides the logits; 0 takes the likeliest.
        top_k: Only the k likeliest codes can be drawn; None for all.
        top_p: Of those, only the fewest likeliest that together have this probability.

    Returns:
        (...) int64 in [0, S).
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    size = logits.shape[-1]
    if top_p == 1 and (top_k is None or top_k >= size):
        return _inverse_cdf(logits / temperature, uniform, 1.0)
    likeliest, code = logits.topk(min(top_k or size, size), dim=-1)  # (..., top_k), falling
    return code.gather(-1, _inverse_cdf(likeliest / temperature, uniform, top_p)[..., None])[..., 0]


def num_hidden_after(ratio: float, initial: Tensor, current: Tensor, may_stay: bool = False) -> Tensor:
    """How many codes of each record stay hidden after a pass.

    floor(ratio * initial), but at least one code is revealed and, unless the ratio is 0, at least one left, where that
    is possible.

    Args:
        ratio: In [0, 1]; see `Sampler.hidden_ratio`.
        initial: (B,) int64. Codes that were hidden before the first pass.
        current: (B,) int64. Codes that are hidden before this pass.
        may_stay: The count need not fall, as other codes are hidden in exchange.

    Returns:
        (B,) int64 in [0, current].
    """
    if ratio == 0:
        return torch.zeros_like(initial)
    most = current if may_stay else current - 1
    return torch.minimum(share_of(initial, ratio).clamp(min=1), most).clamp(min=0)


def share_of(count: Tensor, share: float) -> Tensor:
    """floor(share * count) of an int64 tensor, share in [0, 1].

    The share is rounded to 32-bit fixed point: the same floor on every device, and cos(pi / 3) is one half.
    """
    return (count * round(share * (1 << 32))) >> 32


def least_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """Exactly ``count`` least confident codes of each record, ties by position.

    Args:
        confidence: (B, K, T) float.
        count: (B,) int64.

    Returns:
        (B, K, T) bool.
    """
    order = rearrange(confidence, "B K T -> B (K T)").argsort(dim=1, stable=True)
    rank = torch.arange(order.shape[1], device=order.device)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < count[:, None])
    return chosen.view_as(confidence)


def low_discrepancy_ranks(order: Order, num_levels: int, num_steps: int) -> Tensor:
    """In which order a low-discrepancy sequence visits the codes of some levels.

    Args:
        order: ``van_der_corput``: level by level, moments by their bits read backwards (van der Corput 1935).
            ``halton``: moments in base 2 and levels in base 3 at once (Halton 1960), each code at its first visit.
        num_levels: k.
        num_steps: T.

    Returns:
        (k, T) int64: a permutation of 0 .. k * T - 1, on the CPU.
    """
    if order == "van_der_corput":
        by_time = _radical_inverse(torch.arange(num_steps), 2).argsort(stable=True).argsort()  # (T,)
        return torch.arange(num_levels)[:, None] * num_steps + by_time
    cells = num_levels * num_steps
    first = torch.full((cells,), -1)
    points = 4 * cells
    while bool((first < 0).any()):
        index = torch.arange(points).flip(0)  # backwards, so that the first visit is the one that stays
        level = (_radical_inverse(index, 3) * num_levels).long()
        moment = (_radical_inverse(index, 2) * num_steps).long()
        first[level * num_steps + moment] = index
        points *= 2
    return first.argsort().argsort().view(num_levels, num_steps)


@lru_cache(maxsize=32)
def _cached_ranks(order: Order, num_levels: int, num_steps: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used outside it
        return low_discrepancy_ranks(order, num_levels, num_steps)


def _ranks(order: Order, keys: Tensor, stage: Stage, num_steps: int) -> Tensor | None:
    """(B, k, T) int64: each record's own turn of the sequence in time, for variety; None for other orders."""
    if order not in ("van_der_corput", "halton"):
        return None
    ranks = _cached_ranks(order, stage.end_level - stage.first_level, num_steps).to(keys.device)
    turn = (uniform(keys, Stream.CHOICE) * num_steps).long()  # (B,)
    moment = (torch.arange(num_steps, device=keys.device) + turn[:, None]) % num_steps  # (B, T)
    return rearrange(ranks[:, moment], "k B T -> B k T")


def _radical_inverse(index: Tensor, base: int) -> Tensor:
    """The digits of each number read backwards behind the point: int64 to float64 in [0, 1)."""
    value, scale = torch.zeros(index.shape, dtype=torch.float64), 1.0
    while bool((index > 0).any()):
        scale /= base
        value = value + scale * (index % base)
        index = index // base
    return value


def _confidence(
    sampler: Sampler, logits: Tensor, drawn: Tensor, step_keys: Tensor, ranks: Tensor | None, step: int, steps: int
) -> Tensor:
    """(B, k, T) float32: the higher, the sooner a code that was just drawn is kept."""
    if ranks is not None:
        return -ranks.float()
    if sampler.order == "random":
        return uniform(step_keys, Stream.CHOICE, drawn.shape[1:])
    # As the network has it, whatever temperature and top-k made of it: greedy draws differ in certainty too.
    confidence = logits.gather(-1, drawn[..., None])[..., 0] - logits.logsumexp(-1)
    annealed = sampler.choice_temperature * (1 - (step + 1) / steps)
    if annealed > 0:
        confidence = confidence + annealed * gumbel(uniform(step_keys, Stream.CHOICE, drawn.shape[1:]))
    return confidence


def guided_logits(
    codes_to_logits: CodesToLogits, codes: Tensor, mask: Tensor, passes: int, scale: float, levels: slice
) -> Tensor:
    """The network's logits, pushed away from what it says without the video: both as one batch.

    Args:
        codes_to_logits: The network.
        codes: (B, K, T) int64.
        mask: (B, K, T) bool.
        passes: 2 with guidance, 1 without.
        scale: w in u + w (c - u).
        levels: The k levels wanted.

    Returns:
        (B, k, T, S) float32.
    """
    drop_features = torch.zeros(codes.shape[0], dtype=torch.bool, device=codes.device)
    if passes == 1:
        return codes_to_logits(codes, mask, drop_features)[:, levels].float()
    twice = "B K T -> (2 B) K T"
    both = codes_to_logits(repeat(codes, twice), repeat(mask, twice), torch.cat([drop_features, ~drop_features]))
    both = both[:, levels].float()
    with_video, without_video = rearrange(both, "(two B) k T S -> two B k T S", two=2)
    return torch.lerp(without_video, with_video, scale)


def _inverse_cdf(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The first index whose cumulated probability reaches the uniform number's share of ``top_p``, (...) int64."""
    cumulated = logits.softmax(-1).cumsum(-1)
    # Measured against the sum as rounded: the index stays in range, and none of probability 0 is drawn.
    total = cumulated[..., -1:]
    if top_p < 1:
        last = torch.searchsorted(cumulated, top_p * total)
        total = cumulated.gather(-1, last)
    return torch.searchsorted(cumulated, uniform[..., None] * total)[..., 0]
