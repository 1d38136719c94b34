"""Iterative parallel decoding: fill hidden codes in a few passes of the network instead of one pass per code.

One loop serves every use: generation hides all codes, inpainting a span, continuation the future, a fine stage the
finer levels. It is a pure function of a network (a callable), known codes, a mask, a `Sampler` and one key per record.
The host never waits for the device.

Source: MaskGIT, Chang et al. 2022, section 3.2; as VAB, Su et al. 2024, applies it to audio tokens. `Sampler` names the
sources of the other orders and schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from vab.tokens.noise import Stream, fold_in, gumbel, uniform
from vab.tokens.sampler import Order, Sampler, Stage

CodesToLogits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(codes (R, K, T) int64, mask (R, K, T) bool, drop_features (R,) bool) -> logits (R, K, T, S).

R = B * `Sampler.passes` rows: all records with their video and, for guidance, all records again without it; row r is
record r % B. Codes have no meaning where the mask is True, and the network must not read them."""

_CERTAIN = torch.inf  # above any log-probability plus noise: known codes are never hidden again


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

    Each pass samples every hidden code of its stage's levels, then hides all but the best of them again. After the last
    pass no code is hidden. A record's result depends on its own codes, mask and key, not on its batch.

    Args:
        codes_to_logits: The network; see `CodesToLogits`.
        codes: (B, K, T) int64 in [0, S): the known codes. Not read where ``mask`` is True.
        mask: (B, K, T) bool, True = fill this code. Records may differ in the number.
        sampler: The settings.
        keys: (B,) int64: each record's random key, such as `record_keys` returns.
        steps: (B,) int64: the codec steps of each record before its padding; None if no record has padding. Padding is
            returned unchanged.

    Returns:
        (B, K, T) int64: ``codes`` with the hidden ones filled.

    Raises:
        UserError: If the sampler lists more levels than there are.
    """
    if steps is not None:
        has_content = torch.arange(codes.shape[-1], device=codes.device) < steps[:, None]  # (B, T)
        mask = mask & has_content[:, None]
    codes = codes.masked_fill(mask, 0)
    number = 0
    for stage in sampler.stages(codes.shape[1]):
        levels = slice(stage.first_level, stage.end_level)
        ranks = _ranks(sampler.order, keys, stage, codes.shape[-1])
        to_fill = hidden = mask[:, levels]  # (B, k, T): all codes of this stage, and those still hidden
        for step in range(stage.steps):
            step_keys = fold_in(keys, number)
            scale = sampler.guidance_at(number, step, stage.steps)
            logits = guided_logits(codes_to_logits, codes, mask, sampler.passes, scale, levels)  # (B, k, T, S)
            numbers = uniform(step_keys, Stream.TOKEN, hidden.shape[1:])
            sampled = sample_codes(logits, numbers, sampler.temperature, sampler.top_k, sampler.top_p)
            confidence = _confidence(sampler, logits, sampled, step_keys, ranks, step, stage.steps)
            filled = torch.where(hidden, sampled, codes[:, levels])
            hidden = _hidden_after(sampler, to_fill, hidden, confidence, step_keys, step, stage.steps)
            codes = torch.cat([codes[:, : levels.start], filled, codes[:, levels.stop :]], dim=1)
            mask = torch.cat([mask[:, : levels.start], hidden, mask[:, levels.stop :]], dim=1)
            number += 1
    return codes


def _hidden_after(
    sampler: Sampler, to_fill: Tensor, hidden: Tensor, confidence: Tensor, step_keys: Tensor, step: int, steps: int
) -> Tensor:
    """(B, k, T) bool: the codes of a stage that are hidden after a pass. Arguments as in `decode`."""
    current = reduce(hidden, "B k T -> B", "sum")
    ratio, share = sampler.hidden_ratio(step, steps), sampler.remask_share(step, steps)
    holds = sampler.remask == "loop" and share > 0
    count = num_hidden_after(ratio, reduce(to_fill, "B k T -> B", "sum"), current, may_stay=holds)
    if share == 0:
        return least_confident(confidence.masked_fill(~hidden, _CERTAIN), count)
    filled = to_fill & ~hidden
    num_filled = reduce(filled, "B k T -> B", "sum")
    if sampler.remask == "rescale":
        num_remasked = floor_share(torch.minimum(num_filled, count), share)
    else:
        num_remasked = torch.minimum(floor_share(num_filled, share), count)
    numbers = uniform(step_keys, Stream.REMASK, hidden.shape[1:]).masked_fill(~filled, torch.inf)
    still_hidden = least_confident(confidence.masked_fill(~hidden, _CERTAIN), count - num_remasked)
    return still_hidden | least_confident(numbers, num_remasked)


def sample_codes(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float = 1.0) -> Tensor:
    """Sample one code from each row of logits, by the inverse of its distribution function.

    Args:
        logits: (..., S) float32.
        uniform: (...) float in (0, 1): one random number per code.
        temperature: Divides the logits; 0 takes the most likely code.
        top_k: Sample from the k most likely codes only; None for all.
        top_p: Of those, sample from the smallest set of most likely codes whose total probability reaches this.

    Returns:
        (...) int64 in [0, S).
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    size = logits.shape[-1]
    if top_p == 1 and (top_k is None or top_k >= size):
        return _inverse_cdf(logits / temperature, uniform, 1.0)
    top_logits, code = logits.topk(min(top_k or size, size), dim=-1)  # (..., top_k), descending
    return code.gather(-1, _inverse_cdf(top_logits / temperature, uniform, top_p)[..., None])[..., 0]


def num_hidden_after(ratio: float, initial: Tensor, current: Tensor, may_stay: bool = False) -> Tensor:
    """The number of codes of each record that stay hidden after a pass.

    It is floor(ratio * initial). But, if possible, at least one code is revealed and, unless the ratio is 0, at least
    one stays hidden.

    Args:
        ratio: In [0, 1]; see `Sampler.hidden_ratio`.
        initial: (B,) int64: hidden codes before the first pass.
        current: (B,) int64: hidden codes before this pass.
        may_stay: Whether the number may stay the same, because other codes are hidden in exchange.

    Returns:
        (B,) int64 in [0, current].
    """
    if ratio == 0:
        return torch.zeros_like(initial)
    most = current if may_stay else current - 1
    return torch.minimum(floor_share(initial, ratio).clamp(min=1), most).clamp(min=0)


def floor_share(count: Tensor, share: float) -> Tensor:
    """floor(share * count) of an int64 tensor, for a share in [0, 1].

    The share is rounded to 32-bit fixed point: the result is the same on every device, and cos(pi / 3) is one half.
    """
    return (count * round(share * (1 << 32))) >> 32


def least_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """Exactly the ``count`` least confident codes of each record; ties are broken by position.

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
    """The rank of each code in the order in which a low-discrepancy sequence visits the codes of k levels.

    Args:
        order: ``van_der_corput``: level by level, steps by their reversed bits (van der Corput 1935). ``halton``: steps
            in base 2 and levels in base 3 together (Halton 1960); the first visit of a code counts.
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
        index = torch.arange(points).flip(0)  # backwards: the first visit is written last
        level = (_radical_inverse(index, 3) * num_levels).long()
        step = (_radical_inverse(index, 2) * num_steps).long()
        first[level * num_steps + step] = index
        points *= 2
    return first.argsort().argsort().view(num_levels, num_steps)


@lru_cache(maxsize=32)
def _cached_ranks(order: Order, num_levels: int, num_steps: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be used outside it
        return low_discrepancy_ranks(order, num_levels, num_steps)


def _ranks(order: Order, keys: Tensor, stage: Stage, num_steps: int) -> Tensor | None:
    """(B, k, T) int64: the ranks, shifted in time by a random offset per record; None for other orders."""
    if order not in ("van_der_corput", "halton"):
        return None
    ranks = _cached_ranks(order, stage.end_level - stage.first_level, num_steps).to(keys.device)
    offset = (uniform(keys, Stream.CHOICE) * num_steps).long()  # (B,)
    step = (torch.arange(num_steps, device=keys.device) + offset[:, None]) % num_steps  # (B, T)
    return rearrange(ranks[:, step], "k B T -> B k T")


def _radical_inverse(index: Tensor, base: int) -> Tensor:
    """The reversed digits of each number, after the radix point: int64 to float64 in [0, 1)."""
    value, scale = torch.zeros(index.shape, dtype=torch.float64), 1.0
    while bool((index > 0).any()):
        scale /= base
        value = value + scale * (index % base)
        index = index // base
    return value


def _confidence(
    sampler: Sampler, logits: Tensor, sampled: Tensor, step_keys: Tensor, ranks: Tensor | None, step: int, steps: int
) -> Tensor:
    """(B, k, T) float32: of the codes just sampled, those of the highest confidence are kept."""
    if ranks is not None:
        return -ranks.float()
    if sampler.order == "random":
        return uniform(step_keys, Stream.CHOICE, sampled.shape[1:])
    # Without temperature and top-k: greedily sampled codes differ in confidence too.
    confidence = logits.gather(-1, sampled[..., None])[..., 0] - logits.logsumexp(-1)
    annealed = sampler.choice_temperature * (1 - (step + 1) / steps)
    if annealed > 0:
        confidence = confidence + annealed * gumbel(uniform(step_keys, Stream.CHOICE, sampled.shape[1:]))
    return confidence


def guided_logits(
    codes_to_logits: CodesToLogits, codes: Tensor, mask: Tensor, passes: int, scale: float, levels: slice
) -> Tensor:
    """Logits with classifier-free guidance; both passes run as one batch.

    Args:
        codes_to_logits: The network.
        codes: (B, K, T) int64.
        mask: (B, K, T) bool.
        passes: 2 with guidance, 1 without.
        scale: w in u + w (c - u), c the logits with the video, u without.
        levels: The k levels to return.

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
    """(...) int64: the first index whose cumulative probability reaches ``uniform`` times that of the top-p set."""
    probabilities = logits.softmax(-1)
    if torch.are_deterministic_algorithms_enabled():  # GPUs have no deterministic kernel for a running sum of floats
        cumulative = (probabilities * 2**40).long().cumsum(-1).to(probabilities.dtype) / 2**40
    else:
        cumulative = probabilities.cumsum(-1)
    # Relative to the rounded total: the index stays in range, and no code of probability 0 is sampled.
    total = cumulative[..., -1:]
    if top_p < 1:
        last = torch.searchsorted(cumulative, top_p * total)
        total = cumulative.gather(-1, last)
    return torch.searchsorted(cumulative, uniform[..., None] * total)[..., 0]
