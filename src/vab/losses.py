"""What training minimises, and the sums behind what it reports: functions of tensors.

Logits are (B, K, T, S) and codes (B, K, T). To flatten one level by level and the other step by step is an easy mistake
that trains on noise: here both go through one pair of functions, at the end of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from torch.autograd.function import once_differentiable

_VISIBLE = -100  # what cross_entropy skips unless told otherwise


def masked_code_loss(logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """How badly the network guesses the hidden codes.

    Only hidden codes count: visible ones are input, and scoring them would reward copying. Each hidden code weighs
    the same, so a record with more hidden codes weighs more.

    Args:
        logits: (B, K, T, S) float. Scores over the codebook, before softmax.
        codes: (B, K, T) int64 in [0, S). What the codec produced; unread where nothing is hidden.
        mask: (B, K, T) bool. True where the code was hidden; at least one.
        label_smoothing: Share of the target's mass that is spread evenly over the codebook.

    Returns:
        Scalar float32, nats per hidden code; log(S) is the score of guessing evenly. NaN if nothing is hidden.

    Source: VAB, Su et al. 2024 (hidden tokens only); label smoothing 0.1: the authors' follow-up code.
    """
    # Not logits[mask]: a shape that depends on data makes a GPU wait and cannot be compiled.
    return F.cross_entropy(_by_step(logits), _targets(codes, mask), label_smoothing=label_smoothing)


def hidden_code_loss(
    x: Tensor,
    heads: Tensor,
    codes: Tensor,
    mask: Tensor,
    label_smoothing: float = 0.1,
    select: bool | None = None,
) -> Tensor:
    """`masked_code_loss` of the logits ``x @ heads``, without ever holding them: a level at a time, gradient and all.

    Logits are the largest tensor of a training step, and the plain loss makes four of their size: for 64 records of the
    paper's size 4 GB. Here it is two of a level's, for a moment.

    Args:
        x: (B, T, D) float. What the heads read.
        heads: (K, S, D) float. As `vab.backbone.Backbone.heads`.
        codes: (B, K, T) int64 in [0, S). Unread where nothing is hidden.
        mask: (B, K, T) bool. True where the code was hidden; at least one.
        label_smoothing: As for `masked_code_loss`.
        select: Score hidden codes alone. It is less work, but a shape that depends on data makes a GPU wait; on a CPU
            where not given. The result is the same to rounding.

    Returns:
        As `masked_code_loss`. Under autocast products are made in its type, and the softmax is float32.
    """
    select = x.device.type == "cpu" if select is None else select
    loss: Tensor = _HeadsAndLoss.apply(x, heads, codes, mask, label_smoothing, select)
    return loss


class _HeadsAndLoss(torch.autograd.Function):
    """Of each level the products, the loss and both gradients, which in a cross entropy do not wait for what follows.

    The gradient of a row of logits is its softmax less the smoothed target. Gradients are of the sum over codes and are
    divided by their number at the end: between -1 and 1 they keep their digits in 16 bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, heads: Tensor, codes: Tensor, mask: Tensor, smoothing: float, select: bool
    ) -> Tensor:
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(narrow, torch.float32)
        summed = wide if narrow == torch.float16 else narrow  # a sum over all rows, which float16 may be too short for
        learns = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            steps = rearrange(x, "B T D -> (B T) D").to(narrow)
            total = steps.new_zeros((), dtype=wide)
            of_steps, of_heads = steps.new_zeros(steps.shape, dtype=wide), torch.zeros_like(heads, dtype=wide)
            of_levels = (rearrange(value, "B K T -> K (B T)") for value in (mask, codes))
            for level, (head, hidden, target) in enumerate(zip(heads.to(narrow), *of_levels, strict=True)):
                if select:
                    at = hidden.nonzero()[:, 0]
                    given, target = steps[at], target[at][:, None]
                else:
                    given, target = steps, target.masked_fill(~hidden, 0)[:, None]
                log_p = F.log_softmax(F.linear(given, head), -1, dtype=wide)  # (rows, S)
                loss = -(1 - smoothing) * log_p.gather(-1, target)[:, 0] - smoothing * log_p.mean(-1)
                total += (loss if select else torch.where(hidden, loss, 0)).sum()
                if not learns:
                    continue
                off = log_p.exp_().sub_(smoothing / log_p.shape[-1])
                off.scatter_add_(-1, target, off.new_full(target.shape, smoothing - 1))
                off = (off if select else off.mul_(hidden[:, None])).to(narrow)
                back = (off @ head).to(wide)
                of_steps = of_steps.index_add_(0, at, back) if select else of_steps.add_(back)
                of_heads[level] = off.T.to(summed) @ given.to(summed)
            count = mask.sum()
        ctx.save_for_backward(of_steps.view(x.shape), of_heads, count)
        ctx.dtypes = x.dtype, heads.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, count = ctx.saved_tensors
        of_x, of_heads = (
            (value * (gradient / count)).to(dtype) for value, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return of_x, of_heads, None, None, None, None


@dataclass(frozen=True)
class MaskedCodeSums:
    """Sums over the hidden codes of each record and level, from which any mean is a division away.

    Sums, not means, so that numbers from several batches and ranks add up to exactly what one batch would have given.
    """

    nll: Tensor
    """(B, K) float64: -log p of the right code, nats, summed."""
    correct: Tensor
    """(B, K) int64: how often the likeliest code was the right one."""
    hidden: Tensor
    """(B, K) int64: how many codes were hidden."""

    def per_level(self) -> Tensor:
        """(K, 3) float64: nll, correct and hidden of each level."""
        return self._stack().sum(0)

    def per_bucket(self, bucket: Tensor, num_buckets: int) -> Tensor:
        """(num_buckets, 3) float64: nll, correct and hidden of the records of each bucket; zeros where none fell.

        Args:
            bucket: (B,) int64 in [0, num_buckets), such as `mask_ratio_bucket` gives.
            num_buckets: How many rows to return.
        """
        sums = self._stack().sum(1)  # (B, 3)
        return sums.new_zeros(num_buckets, 3).index_add(0, bucket, sums)

    def _stack(self) -> Tensor:
        return torch.stack([self.nll, self.correct.double(), self.hidden.double()], dim=-1)  # (B, K, 3)


@torch.no_grad()
def masked_code_sums(logits: Tensor, codes: Tensor, mask: Tensor) -> MaskedCodeSums:
    """Likelihood and accuracy of the hidden codes, without label smoothing.

    Args:
        logits: (B, K, T, S) float.
        codes: (B, K, T) int64 in [0, S); unread where nothing is hidden.
        mask: (B, K, T) bool, True = hidden. All False in a record that must not be scored.

    Returns:
        Sums for each record and level. No gradient flows.
    """
    nll = F.cross_entropy(_by_step(logits), _targets(codes, mask), reduction="none")  # 0 where visible
    correct = (logits.argmax(-1) == codes) & mask  # (B, K, T)
    return MaskedCodeSums(
        nll=reduce(nll.double(), "(B T K) -> B K", "sum", B=codes.shape[0], K=codes.shape[1]),
        correct=correct.sum(-1),
        hidden=mask.sum(-1),
    )


def mask_ratio_bucket(mask: Tensor, steps: Tensor | None = None, num_buckets: int = 10) -> Tensor:
    """Which tenth (for ten buckets) of the range 0..1 each record's share of hidden codes falls into.

    Guessing is easier the more is seen, so a loss says little without the share that was hidden.

    Args:
        mask: (B, K, T) bool, True = hidden.
        steps: (B,) int64. How many steps of each record are sound; None if all.
        num_buckets: Buckets of equal width; bucket i holds the shares in [i, i + 1) / num_buckets, the last one 1 too.

    Returns:
        (B,) int64 in [0, num_buckets).
    """
    num_codebooks, num_steps = mask.shape[1:]
    num_codes = num_codebooks * (num_steps if steps is None else steps)
    # In integers: a share of exactly 0.7 must not round into the bucket below.
    return (reduce(mask, "B K T -> B", "sum") * num_buckets // num_codes).clamp(max=num_buckets - 1)


def info_nce(
    audio: Tensor,
    video: Tensor,
    scale: Tensor,
    gallery: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    same_source: Tensor | None = None,
) -> Tensor:
    """How badly each sound tells its own video from the others, and each video its own sound.

    Args:
        audio: (B, E) float, of unit length.
        video: (B, E) float, of unit length; row i belongs with sound i.
        scale: Scalar: what cosines are multiplied by, the inverse of the temperature.
        gallery: Audio and video (M, E) each to choose among, which holds these rows, as all ranks' together do; the
            rows themselves if None.
        first: Row of the gallery at which these rows begin.
        same_source: (B, M) bool: True where two rows come from one recording. Such a row is no wrong answer, and is
            left out of the choice; a row's own place may be True or not.

    Returns:
        Scalar float32, nats: the mean over rows and over both ways. log(M) is the score of guessing evenly.

    Source: van den Oord et al. 2018; both ways, as CLIP, Radford et al. 2021. VAB prints only the name.
    """
    all_audio, all_video = (audio, video) if gallery is None else gallery
    own = torch.arange(first, first + len(audio), device=audio.device)  # (B,)
    barred = None if same_source is None else same_source.scatter(1, own[:, None], False)
    losses = []
    for queries, choices in ((audio, all_video), (video, all_audio)):
        with torch.autocast(audio.device.type, enabled=False):  # or the product of float32 tensors is bfloat16
            scores = scale.float() * (queries.float() @ choices.float().T)  # (B, M)
        if barred is not None:
            scores = scores.masked_fill(barred, -torch.inf)
        losses.append(F.cross_entropy(scores, own))
    return (losses[0] + losses[1]) / 2


def _by_step(logits: Tensor) -> Tensor:
    """(B, K, T, S) to (B * T * K, S) float32. The heads lay logits out step by step, so nothing is copied."""
    return rearrange(logits, "B K T S -> (B T K) S").float()  # bf16 has 8 bits: too few for a sum over a codebook


def _targets(codes: Tensor, mask: Tensor) -> Tensor:
    """(B, K, T) to (B * T * K): the hidden codes in the order of `_by_step`, `_VISIBLE` elsewhere."""
    return rearrange(codes.masked_fill(~mask, _VISIBLE), "B K T -> (B T K)")
