import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vab.metrics.frechet import frechet_distance, moments


def gaussian(seed, width, rank=None):
    """Some mean and covariance, of full rank or less."""
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, rank or width, generator=random, dtype=torch.float64)
    return torch.randn(width, generator=random, dtype=torch.float64), factor @ factor.T


def rotation(seed, width):
    return torch.linalg.qr(gaussian(seed, width)[1])[0]


def test_moments_are_those_of_a_second_implementation():
    embeddings = torch.randn(50, 7) * 3 + 1000  # far from 0, where float32 sums would lose the spread
    mean, covariance = moments(embeddings)
    assert mean.dtype == covariance.dtype == torch.float64
    torch.testing.assert_close(mean, embeddings.double().mean(0))
    torch.testing.assert_close(covariance, embeddings.double().T.cov())


def test_a_shift_of_2_in_8_dimensions_is_32():
    covariance = gaussian(0, 8)[1]
    zero = torch.zeros(8)
    assert float(frechet_distance(zero, covariance, zero + 2, covariance)) == pytest.approx(32, rel=1e-9)


@pytest.mark.parametrize("rotated", [False, True])
def test_gaussians_with_common_axes_differ_by_their_standard_deviations(rotated):
    first, second = torch.tensor([1.0, 2, 3, 0.5]).double(), torch.tensor([3.0, 1, 3, 2]).double()
    axes = rotation(1, 4) if rotated else torch.eye(4, dtype=torch.float64)
    zero = torch.zeros(4)
    got = frechet_distance(zero, axes @ first.square().diag() @ axes.T, zero, axes @ second.square().diag() @ axes.T)
    assert float(got) == pytest.approx(float((first - second).square().sum()), rel=1e-9)


def test_two_dimensions_with_other_axes_in_closed_form():
    # For 2 x 2 matrices tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB)).
    (mean1, cov1), (mean2, cov2) = gaussian(2, 2), gaussian(3, 2)
    product = cov1 @ cov2
    shared = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared
    torch.testing.assert_close(frechet_distance(mean1, cov1, mean2, cov2), expected)


@pytest.mark.parametrize("seed", range(4))
def test_as_by_eigenvalues_of_the_product(seed):
    (mean1, cov1), (mean2, cov2) = gaussian(seed, 16), gaussian(seed + 100, 16)
    eigenvalues = torch.linalg.eigvals(cov1 @ cov2)  # of a matrix that is not symmetric; real but for rounding
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().real.sum()
    torch.testing.assert_close(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-8, atol=0)


def test_as_by_scipys_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    (mean1, cov1), (mean2, cov2) = gaussian(7, 24), gaussian(8, 24)
    root = linalg.sqrtm((cov1 @ cov2).numpy())
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * root.trace().real
    assert float(frechet_distance(mean1, cov1, mean2, cov2)) == pytest.approx(expected, rel=1e-8)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 12), count=st.integers(2, 20), scale=st.floats(1e-3, 1e3))
def test_it_is_a_distance_also_without_full_rank(seed, width, count, scale):
    random = torch.Generator().manual_seed(seed)
    first, second = (moments(scale * torch.randn(count, width, generator=random)) for _ in range(2))
    there, back = frechet_distance(*first, *second), frechet_distance(*second, *first)
    size = float(first[1].trace() + second[1].trace())
    assert float(there) >= 0
    assert float(there) == pytest.approx(float(back), rel=1e-6, abs=1e-6 * size)
    assert float(frechet_distance(*first, *first)) == pytest.approx(0, abs=1e-6 * size)


def test_few_records_of_many_dimensions_are_at_no_distance_from_themselves():
    embeddings = torch.randn(20, 128)
    own = moments(embeddings)
    assert 0 <= float(frechet_distance(*own, *own)) < 1e-4
    assert float(frechet_distance(*own, *moments(torch.randn(20, 128)))) > 10


@pytest.mark.parametrize("embeddings", [torch.zeros(1, 4), torch.zeros(0, 4), torch.zeros(4), torch.zeros(4, 0)])
def test_what_has_no_covariance_is_refused(embeddings):
    with pytest.raises(ValueError, match="embedding"):
        moments(embeddings)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    embeddings = torch.randn(4, 3)
    embeddings[2, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        moments(embeddings)
    mean, covariance = gaussian(0, 3)
    for place in range(4):
        arguments = [mean.clone(), covariance.clone(), mean.clone(), covariance.clone()]
        arguments[place].view(-1)[0] = bad
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(*arguments)


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match="of one E"):
        frechet_distance(*gaussian(0, 3), *gaussian(0, 4))
