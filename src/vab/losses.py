"""Training losses, and the sums behind the reported metrics: pure functions of tensors.

Logits are (B, K, T, S) and codes (B, K, T). Flattening one level by level and the other step by step would train on
noise: both are flattened by one pair of functions, at the end of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from torch.autograd.function import once_differentiable

from vab.precision import full_precision

_IGNORED = -100  # the target that cross_entropy skips by default


def masked_code_loss(logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Cross entropy of the hidden codes.

    Visible codes do not count: they are input, and their loss would reward copying. Each hidden code has the same
    weight, so a record with more hidden codes has more.

    Args:
        logits: (B, K, T, S) float.
        codes: (B, K, T) int64 in [0, S): the codec's output. Visible codes are not read.
        mask: (B, K, T) bool, True = hidden. At least one code is hidden.
        label_smoothing: Share of the target's probability that is spread evenly over the codebook.

    Returns:
        Scalar float32, nats per hidden code; log(S) for a uniform guess. NaN if no code is hidden.

    Source: VAB, Su et al. 2024 (hidden tokens only); label smoothing 0.1: the authors' follow-up code.
    """
    # Not logits[mask]: with a shape that depends on data, the host waits for the GPU, and compilation fails.
    return F.cross_entropy(_by_step(logits), _targets(codes, mask), label_smoothing=label_smoothing)


def hidden_code_loss(
    x: Tensor,
    heads: Tensor,
    codes: Tensor,
    mask: Tensor,
    label_smoothing: float = 0.1,
    select: bool | None = None,
) -> Tensor:
    """`masked_code_loss` of the logits of ``x`` and ``heads``, with its gradient, one level at a time.

    Logits are the largest tensor of a training step, and the plain loss makes four of their size: 4 GB for 64 records
    of the paper's size. This function holds two of the size of one level, for a moment.

    Args:
        x: (B, T, D) float: the input of the heads.
        heads: (K, S, D) float, as `vab.backbone.Backbone.heads`.
        codes: (B, K, T) int64 in [0, S). Visible codes are not read.
        mask: (B, K, T) bool, True = hidden. At least one code is hidden.
        label_smoothing: As for `masked_code_loss`.
        select: Compute logits of hidden codes only. This is less work, but with a shape that depends on data the host
            waits for the GPU. None: on a CPU only. The result is the same up to float rounding.

    Returns:
        As `masked_code_loss`. Under autocast, matrix products are computed in its dtype and the softmax in float32.
    """
    loss: Tensor = _HeadsAndLoss.apply(x, heads, codes, mask, label_smoothing, _selects(x, select), False)
    return loss


def hidden_code_loss_and_sums(
    x: Tensor,
    heads: Tensor,
    codes: Tensor,
    mask: Tensor,
    label_smoothing: float = 0.1,
    select: bool | None = None,
) -> tuple[Tensor, MaskedCodeSums]:
    """`hidden_code_loss`, and `masked_code_sums` of the same logits, which are computed once for both.

    Arguments as for `hidden_code_loss`. The sums have no gradient.
    """
    arguments = (x, heads, codes, mask, label_smoothing, _selects(x, select), True)
    loss, nll, correct = _HeadsAndLoss.apply(*arguments)
    return loss, MaskedCodeSums(nll, correct, mask.sum(-1))


def _selects(x: Tensor, select: bool | None) -> bool:
    return x.device.type == "cpu" if select is None else select


class _HeadsAndLoss(torch.autograd.Function):
    """For each level: logits, loss and the gradients of x and heads, all in the forward pass.

    The gradient of a row of logits is its softmax minus the smoothed target. Gradients are those of the sum over codes,
    and are divided by the number of codes at the end: values between -1 and 1 keep their precision in 16 bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, heads: Tensor, codes: Tensor, mask: Tensor, smoothing: float, select: bool, sums: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        device, (num_records, num_steps, _) = x.device.type, x.shape
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(narrow, torch.float32)
        summed = wide if narrow == torch.float16 else narrow  # float16 may overflow in a sum over all rows
        all_nll, all_correct = [], []  # of each level: (B,)
        with torch.autocast(device, enabled=False):
            steps = rearrange(x, "B T D -> (B T) D").to(narrow)
            total = steps.new_zeros((), dtype=wide)
            grad_steps, grad_heads = steps.new_zeros(steps.shape, dtype=wide), torch.zeros_like(heads, dtype=wide)
            masks, targets = (rearrange(value, "B K T -> K (B T)") for value in (mask, codes))
            for level, (head, hidden, target) in enumerate(zip(heads.to(narrow), masks, targets, strict=True)):
                if select:
                    index = hidden.nonzero()[:, 0]
                    rows, target = steps[index], target[index][:, None]
                else:
                    rows, target = steps, target.masked_fill(~hidden, 0)[:, None]
                logits = F.linear(rows, head)  # (rows, S)
                guess = logits.argmax(-1, keepdim=True) if sums else None
                log_p = F.log_softmax(logits, -1, dtype=wide)
                del logits  # the next lines need the memory
                log_p_target = log_p.gather(-1, target)
                loss = -(1 - smoothing) * log_p_target[:, 0] - smoothing * log_p.mean(-1)
                total += (loss if select else torch.where(hidden, loss, 0)).sum()
                if guess is not None:
                    scores = torch.cat([-log_p_target, guess == target], dim=1).double()  # (rows, 2)
                    if select:
                        each = scores.new_zeros(num_records, 2).index_add_(0, index // num_steps, scores)
                    else:
                        each = reduce(scores * hidden[:, None], "(B T) two -> B two", "sum", B=num_records)
                    all_nll.append(each[:, 0])
                    all_correct.append(each[:, 1].long())
                if not any(ctx.needs_input_grad):
                    continue
                grad = log_p.exp_().sub_(smoothing / log_p.shape[-1])
                grad.scatter_add_(-1, target, grad.new_full(target.shape, smoothing - 1))
                grad = (grad if select else grad.mul_(hidden[:, None])).to(narrow)
                grad_rows = (grad @ head).to(wide)
                grad_steps = grad_steps.index_add_(0, index, grad_rows) if select else grad_steps.add_(grad_rows)
                grad_heads[level] = grad.T.to(summed) @ rows.to(summed)
                del log_p, grad, grad_rows  # the next level needs the memory
            count = mask.sum()
        ctx.save_for_backward(grad_steps.view(x.shape), grad_heads, count)
        ctx.dtypes = x.dtype, heads.dtype
        if not sums:
            return total / count
        nll, correct = torch.stack(all_nll, 1), torch.stack(all_correct, 1)
        ctx.mark_non_differentiable(nll, correct)
        return total / count, nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_heads, count = ctx.saved_tensors
        scale = grad / count
        grad_x, grad_heads = (grad_x * scale).to(ctx.dtypes[0]), (grad_heads * scale).to(ctx.dtypes[1])
        return grad_x, grad_heads, None, None, None, None, None


@dataclass(frozen=True)
class MaskedCodeSums:
    """Sums over the hidden codes of each record and level.

    Sums of several batches and ranks add up to those of one batch, which means would not.
    """

    nll: Tensor
    """(B, K) float64: the sum of -log p(true code), nats."""
    correct: Tensor
    """(B, K) int64: the number of hidden codes that have the highest logit."""
    hidden: Tensor
    """(B, K) int64: the number of hidden codes."""

    def per_level(self) -> Tensor:
        """(K, 3) float64: nll, correct and hidden of each level."""
        return self._stack().sum(0)

    def per_bucket(self, bucket: Tensor, num_buckets: int) -> Tensor:
        """(num_buckets, 3) float64: nll, correct and hidden of each bucket's records; zeros for an empty bucket.

        Args:
            bucket: (B,) int64 in [0, num_buckets), such as `mask_ratio_bucket` returns.
            num_buckets: Number of rows.
        """
        sums = self._stack().sum(1)  # (B, 3)
        return sums.new_zeros(num_buckets, 3).index_add(0, bucket, sums)

    def _stack(self) -> Tensor:
        return torch.stack([self.nll, self.correct.double(), self.hidden.double()], dim=-1)  # (B, K, 3)


@torch.no_grad()
def masked_code_sums(logits: Tensor, codes: Tensor, mask: Tensor) -> MaskedCodeSums:
    """Sums for the likelihood and accuracy of the hidden codes, without label smoothing and without gradient.

    Args:
        logits: (B, K, T, S) float.
        codes: (B, K, T) int64 in [0, S). Visible codes are not read.
        mask: (B, K, T) bool, True = hidden. All False for a record that must not be scored.
    """
    nll = F.cross_entropy(_by_step(logits), _targets(codes, mask), reduction="none")  # 0 for visible codes
    correct = (logits.argmax(-1) == codes) & mask  # (B, K, T)
    return MaskedCodeSums(
        nll=reduce(nll.double(), "(B T K) -> B K", "sum", B=codes.shape[0], K=codes.shape[1]),
        correct=correct.sum(-1),
        hidden=mask.sum(-1),
    )


def mask_ratio_bucket(mask: Tensor, steps: Tensor | None = None, num_buckets: int = 10) -> Tensor:
    """The bucket of each record's mask ratio, its share of hidden codes.

    Prediction is easier the more codes are visible, so a loss says little without the mask ratio.

    Args:
        mask: (B, K, T) bool, True = hidden.
        steps: (B,) int64: the codec steps of each record before its padding; None if no record has padding.
        num_buckets: Buckets of equal width: bucket i holds ratios in [i, i + 1) / num_buckets, the last one also 1.

    Returns:
        (B,) int64 in [0, num_buckets).
    """
    num_codebooks, num_steps = mask.shape[1:]
    num_codes = num_codebooks * (num_steps if steps is None else steps)
    # In integers: a ratio of exactly 0.7 must not round into the bucket below.
    return (reduce(mask, "B K T -> B", "sum") * num_buckets // num_codes).clamp(max=num_buckets - 1)


def info_nce(
    audio: Tensor,
    video: Tensor,
    scale: Tensor,
    gallery: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    same_source: Tensor | None = None,
) -> Tensor:
    """Contrastive loss in both directions: each sound against all videos, each video against all sounds.

    Args:
        audio: (B, E) float, of unit length.
        video: (B, E) float, of unit length; row i is the video of sound i.
        scale: Scalar that multiplies the cosines, the inverse of the temperature.
        gallery: Audio and video candidates, (M, E) each, which include these rows, such as those of all ranks. None for
            these rows only.
        first: Index of the first of these rows in the gallery.
        same_source: (B, M) bool, True = both rows are cut from one recording. Such a candidate is not a negative and is
            left out. The entry of a row's own partner is ignored.

    Returns:
        Scalar float32, nats: the mean over rows and directions; log(M) for a uniform guess.

    Source: van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021. VAB only names the loss.
    """
    all_audio, all_video = (audio, video) if gallery is None else gallery
    own = torch.arange(first, first + len(audio), device=audio.device)  # (B,)
    excluded = None if same_source is None else same_source.scatter(1, own[:, None], False)
    losses = []
    for queries, choices in ((audio, all_video), (video, all_audio)):
        with full_precision(audio.device):
            scores = scale.float() * (queries.float() @ choices.float().T)  # (B, M)
        if excluded is not None:
            scores = scores.masked_fill(excluded, -torch.inf)
        losses.append(F.cross_entropy(scores, own))
    return (losses[0] + losses[1]) / 2


def _by_step(logits: Tensor) -> Tensor:
    """(B, K, T, S) to (B * T * K, S) float32. The heads' logits have this memory layout, so nothing is copied."""
    return rearrange(logits, "B K T S -> (B T K) S").float()  # 8 bits of bfloat16 are too few for a sum over a codebook


def _targets(codes: Tensor, mask: Tensor) -> Tensor:
    """(B, K, T) to (B * T * K,): codes in the order of `_by_step`, `_IGNORED` for visible ones."""
    return rearrange(codes.masked_fill(~mask, _IGNORED), "B K T -> (B T K)")
