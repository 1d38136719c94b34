"""What promises float32 computes it under autocast too. `.float()` alone does not: products are cast back."""

import pytest
import torch
import torch.nn.functional as F

from vab.audio import log_mel
from vab.losses import info_nce, mask_ratio_bucket, masked_code_loss, masked_code_sums
from vab.metrics.frechet import frechet_distance
from vab.metrics.kernel import kernel_distance, median_bandwidth
from vab.metrics.recall import match_ranks, matching_loss
from vab.metrics.synchrony import find_onsets
from vab.tokens.expectation import expected_codes


def unit(rows, width):
    return F.normalize(torch.randn(rows, width), dim=1)


def contrastive(dtype=torch.float32):
    shared = unit(1, 64)  # all nearly alike, at CLIP's largest scale: bfloat16 cannot tell right from wrong
    audio, video = (F.normalize(shared + 0.2 * unit(48, 64), dim=1) for _ in range(2))
    return info_nce(audio.to(dtype), video.to(dtype), torch.tensor(100.0, dtype=dtype))


def contrastive_gradient():
    audio, video = unit(48, 64).requires_grad_(), unit(48, 64)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = info_nce(audio, video, scale)
    with torch.autocast("cpu", enabled=False):  # as trainers do
        loss.backward()
    return torch.cat([audio.grad.flatten(), scale.grad[None]])


def expected(dtype=torch.float32):
    probabilities, codebooks = (2 * torch.randn(2, 3, 40, 256)).softmax(-1), torch.randn(3, 256, 16)
    codes = torch.zeros(2, 3, 40, dtype=torch.int64)
    return expected_codes(probabilities.to(dtype), codebooks.to(dtype), codes, torch.ones_like(codes, dtype=torch.bool))


def code_sums():
    logits, codes, mask = torch.randn(2, 3, 40, 256), torch.randint(256, (2, 3, 40)), torch.rand(2, 3, 40) < 0.5
    sums = masked_code_sums(logits, codes, mask)
    return torch.stack([sums.nll, sums.correct, sums.hidden, mask_ratio_bucket(mask)[:, None].expand(2, 3)])


COMPUTED = {
    "info_nce": contrastive,
    "gradient of info_nce": contrastive_gradient,
    "expected_codes": expected,
    "masked_code_loss": lambda: masked_code_loss(
        torch.randn(2, 3, 40, 256), torch.randint(256, (2, 3, 40)), torch.rand(2, 3, 40) < 0.5
    ),
    "masked_code_sums": code_sums,
    "log_mel": lambda: log_mel(0.1 * torch.randn(16_000), 16_000),
    "find_onsets": lambda: find_onsets(torch.randn(16_000) * (torch.arange(16_000) % 4000 < 800), 16_000),
    "match_ranks": lambda: match_ranks(unit(300, 16), unit(300, 16)),
    "matching_loss": lambda: matching_loss(unit(100, 16), unit(100, 16), 100.0),
    "frechet_distance": lambda: frechet_distance(
        torch.randn(8).double(), torch.cov(torch.randn(8, 64).double()), torch.zeros(8).double(), torch.eye(8).double()
    ),
    "median_bandwidth": lambda: median_bandwidth(torch.randn(64, 8)),
    "kernel_distance": lambda: kernel_distance(torch.randn(64, 8), torch.randn(64, 8)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_result_in_float32_is_the_same_under_autocast(name):
    torch.manual_seed(0)
    plain = COMPUTED[name]()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = COMPUTED[name]()
    assert cast.dtype == plain.dtype
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compute", [contrastive, expected])
def test_inputs_in_bfloat16_are_computed_with_in_float32(compute):
    torch.manual_seed(0)
    narrow = compute(torch.bfloat16)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow, compute(torch.bfloat16))
    assert narrow.dtype in (torch.float32, torch.int64)
