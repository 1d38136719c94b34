import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vab.metrics import kernel
from vab.metrics.kernel import SCALE, kernel_distance, kernel_error, median_bandwidth


def by_loops(real, generated):
    """The definition, pair by pair, in Python's own arithmetic."""
    real, generated = real.double().tolist(), generated.double().tolist()
    width = statistics.median_low([math.dist(a, b) for a, b in itertools.combinations(real, 2)])

    def k(a, b):
        return math.exp(-(math.dist(a, b) ** 2) / (2 * width**2))

    def within(side):
        return sum(k(a, b) for a, b in itertools.permutations(side, 2)) / (len(side) * (len(side) - 1))

    across = sum(k(a, b) for a in real for b in generated) / (len(real) * len(generated))
    return 100 * (within(real) + within(generated) - 2 * across)


def test_two_points_each_in_closed_form():
    # Distances: 2 within the real (so s = 2), 0 within the generated, sqrt(2) across.
    real, generated = torch.tensor([[-1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    expected = 100 * (math.exp(-0.5) + 1 - 2 * math.exp(-2 / 8))
    assert float(kernel_distance(real, generated)) == pytest.approx(expected, rel=1e-14)
    assert SCALE == 100


@pytest.mark.parametrize("piece", [1, 7, 40, 1 << 22])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_as_a_double_loop(piece, offset, monkeypatch):
    monkeypatch.setattr(kernel, "PIECE", piece)
    real, generated = torch.randn(30, 5).double() + offset, torch.randn(21, 5).double() * 1.5 + offset
    assert float(kernel_distance(real, generated)) == pytest.approx(by_loops(real, generated), rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 40), piece=st.integers(9, 200), bins=st.integers(8, 64))
def test_the_median_is_exact_also_when_searched(seed, count, piece, bins):
    random = torch.Generator().manual_seed(seed)
    reference = torch.randint(0, 4, (count, 3), generator=random).double()  # many equal distances
    reference[0] += 10
    expected = statistics.median_low(torch.pdist(reference).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PIECE", piece)
        patch.setattr(kernel, "BINS", bins)
        if expected == 0:
            with pytest.raises(ValueError, match="half of the reference's pairs are equal"):
                median_bandwidth(reference)
        else:
            assert float(median_bandwidth(reference)) == pytest.approx(expected, rel=1e-12)


def test_the_width_is_the_references():
    real, generated = torch.randn(20, 3), 5 * torch.randn(20, 3)
    own = kernel_distance(real, generated, median_bandwidth(real))
    assert kernel_distance(real, generated) == own
    assert abs(float(kernel_distance(generated, real)) - float(own)) > 1


def test_unbiased_for_sets_of_one_distribution():
    distances = torch.stack([kernel_distance(torch.randn(20, 4), torch.randn(20, 4), 2.0) for _ in range(300)])
    error = float(distances.std()) / math.sqrt(300)
    assert abs(float(distances.mean())) < 4 * error
    assert float(distances.min()) < 0


def test_it_grows_with_the_shift():
    real, generated = torch.randn(60, 4), torch.randn(60, 4)
    distances = [float(kernel_distance(real, generated + shift)) for shift in (0, 0.5, 1, 2)]
    assert distances == sorted(distances)


def test_the_standard_error_is_that_of_a_bootstrap_over_files():
    real = torch.randn(100, 3)
    sounds = torch.randn(150, 1, 3) + 0.3 * torch.randn(150, 4, 3) + 0.8  # windows of a sound are alike
    groups = torch.arange(150).repeat_interleave(4)
    got = float(kernel_error(real, sounds.flatten(0, 1), 2.0, groups))
    drawn = [sounds[torch.randint(150, (150,))].flatten(0, 1) for _ in range(200)]
    expected = float(torch.stack([kernel_distance(real, made, 2.0) for made in drawn]).std())
    assert got == pytest.approx(expected, rel=0.2)
    assert float(kernel_error(real, sounds.flatten(0, 1), 2.0)) < 0.7 * got  # not all windows are news


@pytest.mark.parametrize(
    ("real", "generated", "bandwidth", "words"),
    [
        (torch.zeros(1, 3), torch.randn(4, 3), 1.0, "real embeddings: 1"),
        (torch.randn(4, 3), torch.zeros(0, 3), 1.0, "generated embeddings: 0"),
        (torch.randn(4, 3), torch.randn(4, 2), 1.0, "3 and 2 wide"),
        (torch.randn(4), torch.randn(4, 2), 1.0, r"\(N, E\)"),
        (torch.full((4, 3), torch.nan), torch.randn(4, 3), 1.0, "not finite"),
        (torch.randn(4, 3), torch.randn(4, 3), 0.0, "above 0"),
        (torch.ones(4, 3) / 3, torch.randn(4, 3), None, "are equal"),
    ],
)
def test_what_has_no_distance_is_refused(real, generated, bandwidth, words):
    with pytest.raises(ValueError, match=words):
        kernel_distance(real, generated, bandwidth)


def test_an_error_needs_files():
    real, generated = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="at least 2 files"):
        kernel_error(real, generated, groups=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"groups are \(M,\)"):
        kernel_error(real, generated, groups=torch.zeros(3, dtype=torch.int64))
