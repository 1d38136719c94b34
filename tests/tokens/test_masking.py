"""The paper's law of mask ratios, independent hiding, and what no mask may do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vab.spec import UserError
from vab.tokens.masking import Masking, independent_mask, truncated_normal
from vab.tokens.noise import record_keys

NORMAL = torch.distributions.Normal(torch.tensor(0.55, dtype=torch.float64), 0.25)


def test_truncated_normal_inverts_its_distribution():
    numbers = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    ratios = truncated_normal(numbers, 0.55, 0.25, 0.5, 1.0)
    lowest, highest = NORMAL.cdf(torch.tensor([0.5, 1.0], dtype=torch.float64))
    back = (NORMAL.cdf(ratios) - lowest) / (highest - lowest)
    torch.testing.assert_close(back, numbers, rtol=0, atol=1e-12)


def test_paper_ratios_have_the_truncated_moments():
    ratios = Masking().ratios(record_keys(0, torch.arange(200_000))).double()
    low, high = (0.5 - 0.55) / 0.25, (1.0 - 0.55) / 0.25
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    shift = (density[0] - density[1]) / mass
    mean = 0.55 + 0.25 * shift
    variance = 0.25**2 * (1 + (low * density[0] - high * density[1]) / mass - shift**2)
    assert 0.5 <= ratios.min() < 0.501
    assert 0.999 < ratios.max() <= 1
    assert abs(ratios.mean().item() - mean) < 4 * math.sqrt(variance / 200_000)
    assert abs(ratios.var().item() - variance) < 0.0003
    assert abs(mean - 0.6936) < 1e-4  # what the paper's law hides on average
    assert Masking().mean_ratio == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    "law",
    [{}, {"mean": 0.2, "std": 0.1, "low": 0.1, "high": 0.6}, {"law": "cosine"}, {"law": "fixed", "ratio": 0.3}],
)
def test_the_mean_ratio_is_that_of_the_samples_and_the_integral(law):
    masking = Masking(**law)
    ratios = masking.ratios(record_keys(0, torch.arange(100_000))).double()
    error = ratios.std().item() / math.sqrt(100_000)
    assert abs(ratios.mean().item() - masking.mean_ratio) < 4 * error + 1e-6
    mask = masking.mask(record_keys(1, torch.arange(2_000)), 4, 50)
    assert abs(mask.double().mean().item() - masking.mean_ratio) < 0.03
    if masking.law == "truncated_normal":
        x = torch.linspace(masking.low, masking.high, 100_001, dtype=torch.float64)
        density = (-((x - masking.mean) / masking.std).square() / 2).exp()
        integral = (torch.trapezoid(x * density, x) / torch.trapezoid(density, x)).item()
        assert masking.mean_ratio == pytest.approx(integral, abs=1e-8)


def test_cosine_ratios():
    ratios = Masking(law="cosine").ratios(record_keys(0, torch.arange(100_000))).double()
    assert abs(ratios.mean().item() - 2 / math.pi) < 0.004
    assert abs(ratios.square().mean().item() - 0.5) < 0.004
    assert ratios.min() > 0
    assert ratios.max() <= 1


def test_fixed_ratio():
    assert torch.equal(Masking(law="fixed", ratio=0.3).ratios(torch.arange(5)), torch.full((5,), 0.3))


def test_hides_that_share_of_every_level_and_step():
    keys = record_keys(0, torch.arange(2000))
    mask = Masking(law="fixed", ratio=0.7).mask(keys, 4, 50).double()
    assert mask.shape == (2000, 4, 50)
    deviation = math.sqrt(0.7 * 0.3 / 2000)
    assert (mask.mean(0) - 0.7).abs().max() < 5 * deviation
    assert (mask.mean((0, 2)) - 0.7).abs().max() < 5 * deviation / math.sqrt(50)


def test_codes_are_hidden_independently():
    mask = Masking(law="fixed", ratio=0.5).mask(record_keys(0, torch.arange(2000)), 4, 50).double() - 0.5
    bound = 4 * 0.25 / math.sqrt(2000 * 4 * 49)
    assert abs((mask[:, :, 1:] * mask[:, :, :-1]).mean().item()) < bound  # neighbouring steps: no spans
    assert abs((mask[:, 1:] * mask[:, :-1]).mean().item()) < 4 * 0.25 / math.sqrt(2000 * 3 * 50)  # levels: no order


def test_ratio_and_pattern_are_unrelated():
    keys = record_keys(0, torch.arange(5000))
    ratios, mask = Masking().ratios(keys), Masking().mask(keys, 4, 50)
    share = mask.flatten(1).double().mean(1)
    residual = (share - ratios) / (ratios * (1 - ratios) / 200).sqrt().clamp(min=1e-4)
    inner = residual[ratios < 0.99]
    assert abs(inner.mean().item()) < 4 / math.sqrt(len(inner))
    assert abs(inner.var().item() - 1) < 0.1


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    law=st.sampled_from(["truncated_normal", "cosine", "fixed"]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    data=st.data(),
)
def test_something_is_hidden_and_never_padding(seed, law, shape, data):
    steps = torch.tensor(data.draw(st.lists(st.integers(1, shape[1]), min_size=1, max_size=6)))
    keys = record_keys(seed, torch.arange(len(steps)))
    mask = Masking(law=law, ratio=0.01).mask(keys, *shape, steps)
    assert mask.flatten(1).any(1).all()
    is_padding = torch.arange(shape[1]) >= steps[:, None]
    assert not (mask & is_padding[:, None]).any()


def test_a_ratio_of_nothing_hides_one_code_and_of_one_all():
    keys, steps = record_keys(0, torch.arange(100)), torch.arange(100) % 20 + 1
    assert independent_mask(keys, torch.zeros(100), 3, 20, steps).flatten(1).sum(1).eq(1).all()
    assert torch.equal(independent_mask(keys, torch.ones(100), 3, 20, steps).flatten(1).sum(1), 3 * steps)


def test_padding_changes_no_other_code():
    keys = record_keys(0, torch.arange(50))
    masking = Masking()
    whole = masking.mask(keys, 4, 30)
    part = masking.mask(keys, 4, 30, torch.full((50,), 20))
    assert torch.equal(part[:, :, :20], whole[:, :, :20])


def test_a_record_does_not_see_its_batch():
    keys, steps = record_keys(3, torch.arange(7)), torch.tensor([5, 9, 1, 9, 3, 4, 9])
    masking = Masking()
    whole = masking.mask(keys, 4, 9, steps)
    alone = torch.cat([masking.mask(keys[i : i + 1], 4, 9, steps[i : i + 1]) for i in range(7)])
    assert torch.equal(alone, whole)


@pytest.mark.slow
def test_compiles_without_a_break():
    masking, keys, steps = Masking(), record_keys(0, torch.arange(6)), torch.tensor([5, 9, 1, 9, 3, 4])
    compiled = torch.compile(masking.mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(keys, 4, 9, steps), masking.mask(keys, 4, 9, steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "uniform"}, "law must be one of truncated_normal, cosine, fixed"),
        ({"low": 0.9, "high": 0.5}, "low < high"),
        ({"high": 1.5}, "low < high"),
        ({"ratio": 0.0}, "ratio must be above 0"),
        ({"std": 0.0}, "std must be above 0"),
        ({"mean": -9.0}, "practically never"),
    ],
)
def test_refuses_nonsense(arguments, message):
    with pytest.raises(UserError, match=message):
        Masking(**arguments)
