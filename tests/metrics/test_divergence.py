import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vab.metrics.divergence import SMALLEST, paired_kl


@st.composite
def distributions(draw):
    """(B, L) rows of probabilities, zeros among them."""
    width = draw(st.integers(2, 6))
    weights = st.lists(st.sampled_from([0.0, 1e-9, 1e-6, 0.1, 1.0, 3.0]), min_size=width, max_size=width)
    rows = draw(st.lists(weights.filter(lambda row: sum(row) > 0), min_size=2, max_size=2))
    table = torch.tensor(rows, dtype=torch.float64)
    return table / table.sum(1, keepdim=True)


def test_closed_form_and_direction():
    real, generated = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    forth = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    got = paired_kl(real, generated)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([forth, back], rel=1e-5)


def test_certain_and_wrong_is_far_but_finite():
    got = float(paired_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])))
    assert got == pytest.approx(-math.log(SMALLEST), abs=1e-3)


@given(table=distributions())
def test_it_is_a_divergence(table):
    real, generated = table[:1], table[1:]
    assert float(paired_kl(real, real)) == 0
    assert float(paired_kl(real, generated)) >= 0
    assert math.isfinite(float(paired_kl(real, generated)))


def test_a_pair_is_alone_in_its_row():
    real, generated = torch.rand(5, 4).softmax(1), torch.rand(5, 4).softmax(1)
    whole = paired_kl(real, generated)
    torch.testing.assert_close(whole, torch.cat([paired_kl(real[i : i + 1], generated[i : i + 1]) for i in range(5)]))


@pytest.mark.parametrize("bad", [[[2.0, -1.0]], [[0.9, 0.9]], [[math.nan, 1.0]]])
def test_what_is_no_distribution_is_refused(bad):
    good = torch.tensor([[0.5, 0.5]])
    for pair in ((torch.tensor(bad), good), (good, torch.tensor(bad))):
        with pytest.raises(ValueError, match="probabilities"):
            paired_kl(*pair)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="row by row"):
        paired_kl(torch.full((2, 2), 0.5), torch.full((1, 2), 0.5))
