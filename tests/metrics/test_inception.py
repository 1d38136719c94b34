import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vab.metrics.inception import inception_score


def test_sure_and_even_is_the_number_of_classes():
    mean, std = inception_score(100 * torch.eye(8))
    assert float(mean) == pytest.approx(8, rel=1e-12)
    assert float(std) == 0


def test_always_the_same_is_1():
    assert float(inception_score(torch.randn(1, 5).repeat(9, 1))[0]) == pytest.approx(1, rel=1e-14)


def test_two_sounds_in_closed_form():
    share = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)  # mean 0.6, 0.4
    divergences = [
        0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4),
        0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4),
    ]
    assert float(inception_score(share.log())[0]) == pytest.approx(math.exp(sum(divergences) / 2), rel=1e-14)


@pytest.mark.parametrize(("count", "splits"), [(40, 10), (37, 10), (12, 1), (5, 5)])
def test_as_torch_fidelity_does_it(count, splits):
    logits = torch.randn(count, 7) * 3
    order = np.random.RandomState(2020).permutation(count)
    shares = logits.double().softmax(1).numpy()[order]
    scores = []
    for part in range(splits):
        p = shares[part * count // splits : (part + 1) * count // splits]
        divergence = (p * (np.log(p) - np.log(p.mean(0, keepdims=True)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    mean, std = inception_score(logits, splits)
    assert float(mean) == pytest.approx(np.mean(scores), rel=1e-12)
    assert float(std) == pytest.approx(np.std(scores), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 999), count=st.integers(1, 20), width=st.integers(1, 9), scale=st.floats(0, 1e4))
def test_it_lies_between_1_and_the_classes(seed, count, width, scale):
    logits = scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    whole = float(inception_score(logits)[0])
    assert 1 <= whole <= min(count, width) * (1 + 1e-12)


def test_what_has_no_score_is_refused():
    for bad, words in ((torch.zeros(4), "logits are"), (torch.zeros(4, 0), "logits are"),
                       (torch.full((4, 2), math.inf), "not finite")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            inception_score(bad)
    for splits in (0, 5):
        with pytest.raises(ValueError, match="every part needs one"):
            inception_score(torch.zeros(4, 2), splits)
