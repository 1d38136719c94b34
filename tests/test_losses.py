"""The masked loss against closed forms and plain loops; sums that add up over batches."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vab.losses import (
    MaskedCodeSums,
    hidden_code_loss,
    hidden_code_loss_and_sums,
    mask_ratio_bucket,
    masked_code_loss,
    masked_code_sums,
)

B, K, T, S = 3, 4, 5, 7


@pytest.fixture
def guess():
    logits = torch.randn(B, T, K, S).transpose(1, 2)  # laid out as the backbone's heads do
    return logits, torch.randint(0, S, (B, K, T)), torch.rand(B, K, T) < 0.6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_a_plain_loop(guess, smoothing):
    logits, codes, mask = guess
    total, count = 0.0, 0
    for b in range(B):
        for k in range(K):
            for t in range(T):
                if mask[b, k, t]:
                    log_p = logits[b, k, t].double().log_softmax(0)
                    target = torch.full((S,), smoothing / S, dtype=torch.float64)
                    target[codes[b, k, t]] += 1 - smoothing
                    total -= (target * log_p).sum().item()
                    count += 1
    assert masked_code_loss(logits, codes, mask, smoothing).item() == pytest.approx(total / count, rel=1e-6)


def test_loss_is_selecting_before_the_softmax(guess):
    logits, codes, mask = guess
    torch.testing.assert_close(
        masked_code_loss(logits, codes, mask), F.cross_entropy(logits[mask], codes[mask], label_smoothing=0.1)
    )


@pytest.fixture
def heads():
    return torch.randn(B, T, 6), torch.randn(K, S, 6)


def of_all_logits(x, heads, codes, mask, smoothing):
    return masked_code_loss(torch.einsum("btd,ksd->bkts", x, heads), codes, mask, smoothing)


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_of_the_heads_is_that_of_their_logits(guess, heads, dtype, smoothing, select):
    _, codes, mask = guess
    mask[:, 1] = False  # a level that is given
    found = []
    for of in (of_all_logits, partial(hidden_code_loss, select=select)):
        x, weights = (value.to(dtype).requires_grad_() for value in heads)
        loss = of(x, weights, codes, mask, smoothing)
        (3 * loss).backward()
        found.append((loss, x.grad, weights.grad))
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found[1], found[0], **tolerance)


@pytest.mark.parametrize("select", [True, False])
def test_gradient_of_the_heads_loss_is_its_slope(guess, heads, select):
    _, codes, mask = guess
    given = [value.double().requires_grad_() for value in heads]
    assert torch.autograd.gradcheck(lambda x, w: hidden_code_loss(x, w, codes, mask, 0.1, select), given)


@pytest.mark.parametrize("select", [True, False])
def test_loss_of_the_heads_under_autocast_is_near_and_keeps_types(guess, heads, select):
    _, codes, mask = guess
    x, weights = (value.requires_grad_() for value in heads)
    with torch.autocast("cpu", torch.bfloat16):
        loss = hidden_code_loss(x.bfloat16(), weights, codes, mask, select=select)
    loss.backward()
    assert loss.dtype == weights.grad.dtype == torch.float32
    expected = of_all_logits(x, weights, codes, mask, 0.1)
    gradient = torch.autograd.grad(expected, weights)[0]
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(weights.grad, gradient, rtol=0.05, atol=0.02)


def test_codes_that_are_seen_are_not_read_by_the_heads_loss(guess, heads):
    _, codes, mask = guess
    rubbish = torch.where(mask, codes, -1)
    for select in (True, False):
        loss = hidden_code_loss(*heads, codes, mask, select=select)
        assert torch.equal(hidden_code_loss(*heads, rubbish, mask, select=select), loss)


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_the_heads_loss_are_those_of_their_logits(guess, heads, dtype, select):
    _, codes, mask = guess
    mask[:, 1] = mask[2] = False  # a level that is given, and a record without hidden codes
    x, weights = (value.requires_grad_() for value in heads)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, sums = hidden_code_loss_and_sums(x, weights, codes, mask, select=select)
        alone = hidden_code_loss(x, weights, codes, mask, select=select)
        logits = torch.einsum("btd,ksd->bkts", x, weights)
    expected = masked_code_sums(logits, codes, mask)
    torch.testing.assert_close(sums.nll, expected.nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(sums.correct, expected.correct)
    assert torch.equal(sums.hidden, expected.hidden)
    assert torch.equal(loss, alone)
    gradients = [torch.autograd.grad(value, [x, weights]) for value in (loss, alone)]
    assert all(map(torch.equal, *gradients))


def test_guessing_evenly_scores_log_s(guess):
    _, codes, mask = guess
    assert masked_code_loss(torch.zeros(B, K, T, S), codes, mask).item() == pytest.approx(math.log(S))


def test_each_code_meets_its_own_logits():
    # Every (level, step) has a code of its own: any exchange of axes would miss.
    codes = torch.arange(K * T).view(1, K, T)
    logits = 50 * F.one_hot(codes, K * T).float()
    mask = torch.ones(1, K, T, dtype=torch.bool)
    assert masked_code_loss(logits, codes, mask, 0.0).item() < 1e-6
    assert masked_code_sums(logits, codes, mask).correct.tolist() == [[T] * K]
    swapped = logits.transpose(1, 2).reshape(1, K, T, K * T)
    assert masked_code_loss(swapped, codes, mask, 0.0).item() > 40


def test_memory_layout_does_not_matter(guess):
    logits, codes, mask = guess
    torch.testing.assert_close(
        masked_code_loss(logits.contiguous(), codes, mask), masked_code_loss(logits, codes, mask)
    )


def test_visible_codes_get_no_gradient(guess):
    logits, codes, mask = guess
    logits.requires_grad_()
    masked_code_loss(logits, codes, mask).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_codes_are_unread_where_visible(guess):
    logits, codes, mask = guess
    rubbish = torch.where(mask, codes, -1)
    assert torch.equal(masked_code_loss(logits, rubbish, mask), masked_code_loss(logits, codes, mask))
    sums, rubbish_sums = masked_code_sums(logits, codes, mask), masked_code_sums(logits, rubbish, mask)
    assert torch.equal(sums.nll, rubbish_sums.nll)
    assert torch.equal(sums.correct, rubbish_sums.correct)


def test_bf16_logits_are_scored_in_float32(guess):
    logits, codes, mask = guess
    loss = masked_code_loss(logits.bfloat16(), codes, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_code_loss(logits.bfloat16().float(), codes, mask))


def test_sums_equal_a_plain_loop(guess):
    logits, codes, mask = guess
    sums = masked_code_sums(logits, codes, mask)
    for b in range(B):
        for k in range(K):
            hidden = [t for t in range(T) if mask[b, k, t]]
            nll = sum(-logits[b, k, t].log_softmax(0)[codes[b, k, t]].item() for t in hidden)
            assert sums.nll[b, k].item() == pytest.approx(nll, rel=1e-6)
            assert sums.correct[b, k] == sum(logits[b, k, t].argmax() == codes[b, k, t] for t in hidden)
            assert sums.hidden[b, k] == len(hidden)
    assert sums.nll.dtype == torch.float64


def test_sums_are_the_loss_without_smoothing(guess):
    sums = masked_code_sums(*guess)
    assert (sums.nll.sum() / sums.hidden.sum()).item() == pytest.approx(masked_code_loss(*guess, 0.0).item(), rel=1e-6)


def test_an_empty_mask_row_adds_nothing(guess):
    logits, codes, mask = guess
    mask[1] = False
    sums = masked_code_sums(logits, codes, mask)
    assert (sums.nll[1].tolist(), sums.correct[1].tolist(), sums.hidden[1].tolist()) == ([0.0] * K, [0] * K, [0] * K)


def test_per_level_and_per_bucket_count_everything_once(guess):
    sums = masked_code_sums(*guess)
    levels = sums.per_level()
    assert levels.shape == (K, 3)
    torch.testing.assert_close(levels[:, 0], sums.nll.sum(0))
    buckets = sums.per_bucket(torch.tensor([2, 0, 2]), 4)
    assert buckets.shape == (4, 3)
    assert buckets[[1, 3]].eq(0).all()
    torch.testing.assert_close(buckets[0], torch.stack([sums.nll[1], sums.correct[1], sums.hidden[1]]).sum(1))
    torch.testing.assert_close(buckets.sum(0), levels.sum(0))


def test_two_batches_add_up_to_one(guess):
    logits, codes, mask = guess
    whole = masked_code_sums(logits, codes, mask).per_level()
    parts = [masked_code_sums(logits[rows], codes[rows], mask[rows]).per_level() for rows in ([1], [0, 2])]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-14, atol=0)
    assert isinstance(masked_code_sums(logits, codes, mask), MaskedCodeSums)


def test_mask_ratio_buckets():
    mask = torch.zeros(12, 2, 10, dtype=torch.bool)
    for record, hidden in enumerate((0, 1, 2, 3, 4, 13, 14, 18, 19, 20)):
        mask[record].view(-1)[:hidden] = True
    mask[10, :, :3] = True  # 6 of the 8 codes of 4 sound steps
    mask[11, :, :4] = True  # all of them
    steps = torch.tensor([10] * 10 + [4, 4])
    assert mask_ratio_bucket(mask, steps).tolist() == [0, 0, 1, 1, 2, 6, 7, 9, 9, 9, 7, 9]
    assert mask_ratio_bucket(mask[:10]).tolist() == [0, 0, 1, 1, 2, 6, 7, 9, 9, 9]
    assert mask_ratio_bucket(mask, steps, 2).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_compiles_without_a_break(guess):
    compiled = torch.compile(masked_code_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*guess), masked_code_loss(*guess))
