import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vab.metrics.divergence import EPSILON, VARIANTS, PairedDivergence, paired_kl


@st.composite
def logit_pairs(draw):
    """(2, L) logits, hopeless classes and certain ones among them."""
    width = draw(st.integers(1, 6))
    values = st.lists(st.sampled_from([-1e4, -30.0, -1.0, 0.0, 0.5, 3.0, 40.0, 1e4]), min_size=width, max_size=width)
    return torch.tensor([draw(values), draw(values)])


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_closed_form_and_direction():
    real, generated = logits_of([0.5, 0.5], [0.9, 0.1]), logits_of([0.9, 0.1], [0.5, 0.5])
    forth = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    got = paired_kl(real, generated)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([forth, back], rel=1e-14)
    torch.testing.assert_close(paired_kl(real + 7, generated - 3), got)  # softmax knows no common offset


def test_epsilon_in_closed_form():
    real, generated = logits_of([0.5, 0.5]), logits_of([0.9, 0.1])
    expected = 0.5 * math.log(0.5 / (0.9 + EPSILON)) + 0.5 * math.log(0.5 / (0.1 + EPSILON))
    assert float(paired_kl(real, generated, "softmax_epsilon")) == pytest.approx(expected, rel=1e-14)
    equal = float(paired_kl(real, real, "softmax_epsilon"))
    assert equal == pytest.approx(-2 * EPSILON, rel=1e-5)  # as their tools have it: L * epsilon below 0


def test_sigmoid_in_closed_form():
    heard, made = (0.8, 0.3), (0.5, 0.6)
    real, generated = (torch.tensor([side], dtype=torch.float64).logit() for side in (heard, made))
    expected = sum(
        p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in zip(heard, made, strict=True)
    )
    assert float(paired_kl(real, generated, "sigmoid")) == pytest.approx(expected, rel=1e-13)


def test_as_av_benchmark_defines_it():
    real, generated = torch.randn(40, 527) * 4, torch.randn(40, 527) * 4
    table = F.kl_div(generated.double().log_softmax(1), real.double().log_softmax(1), reduction="none", log_target=True)
    torch.testing.assert_close(paired_kl(real, generated).mean(), table.sum(1).mean(), rtol=1e-13, atol=0)


def test_with_epsilon_as_audiocraft_and_audioldm_eval_define_it():
    real, generated = torch.randn(40, 527).double() * 4, torch.randn(40, 527).double() * 4
    table = F.kl_div((generated.softmax(1) + 1e-6).log(), real.softmax(1), reduction="sum") / 40
    torch.testing.assert_close(paired_kl(real, generated, "softmax_epsilon").mean(), table, rtol=1e-13, atol=0)


def test_sigmoid_as_binary_cross_entropies():
    real, generated = torch.randn(9, 20).double() * 5, torch.randn(9, 20).double() * 5
    crossed, own = (
        F.binary_cross_entropy_with_logits(side, real.sigmoid(), reduction="none").sum(1) for side in (generated, real)
    )
    torch.testing.assert_close(paired_kl(real, generated, "sigmoid"), crossed - own, rtol=1e-11, atol=1e-11)


@given(pair=logit_pairs(), variant=st.sampled_from(["softmax", "sigmoid"]))
def test_it_is_a_divergence(pair, variant):
    real, generated = pair[:1], pair[1:]
    assert float(paired_kl(real, real, variant)) == 0
    assert float(paired_kl(real, generated, variant)) >= 0
    assert math.isfinite(float(paired_kl(real, generated, variant)))


@given(pair=logit_pairs())
def test_with_epsilon_no_pair_is_farther_than_the_epsilon_allows(pair):
    got = float(paired_kl(pair[:1], pair[1:], "softmax_epsilon"))
    assert -2 * EPSILON * pair.shape[1] <= got <= -math.log(EPSILON)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pair_is_alone_in_its_row(variant):
    real, generated = torch.randn(5, 4), torch.randn(5, 4)
    whole = paired_kl(real, generated, variant)
    alone = torch.cat([paired_kl(real[i : i + 1], generated[i : i + 1], variant) for i in range(5)])
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    good = torch.zeros(2, 3)
    wrong = good.clone()
    wrong[1, 2] = bad
    for side, pair in (("real", (wrong, good)), ("generated", (good, wrong))):
        with pytest.raises(ValueError, match=f"{side} logits have numbers that are not finite"):
            paired_kl(*pair)


def test_what_does_not_fit_is_refused():
    for shapes in (((2, 2), (1, 2)), ((2, 0), (2, 0)), ((2,), (2,))):
        with pytest.raises(ValueError, match="row by row"):
            paired_kl(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match="there is softmax, softmax_epsilon, sigmoid"):
        paired_kl(torch.zeros(1, 2), torch.zeros(1, 2), "softmx")
    with pytest.raises(ValueError, match="unknown variant"):
        PairedDivergence("softmx")


def test_the_metric_is_the_mean_over_all_batches():
    real, generated = torch.randn(31, 6), torch.randn(31, 6)
    metric = PairedDivergence()
    for part in (slice(0, 10), slice(10, 10), slice(10, 31)):
        metric.update(real[part], generated[part])
    torch.testing.assert_close(metric.compute(), paired_kl(real, generated).mean(), rtol=1e-12, atol=0)


def test_the_metric_has_no_number_for_nothing():
    metric = PairedDivergence()
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no pair"):
        metric.compute()
