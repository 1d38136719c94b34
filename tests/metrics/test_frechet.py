import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from vab.metrics.frechet import (
    FrechetDistance,
    frechet_distance,
    frechet_error,
    frechet_infinity,
    frechet_infinity_fadtk,
    frechet_per_file,
    moments,
)


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


CASES = [(0, 8, 100), (1, 32, 400), (2, 128, 1000), (3, 48, 20), (4, 64, 65)]  # the last two lack rank, or nearly


def sides(seed, width, count):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=random).double() / width**0.5
    real = torch.randn(count, width, generator=random).double() @ mixing
    return moments(real), moments(torch.randn(count, width, generator=random).double() + 0.2)


@pytest.mark.parametrize("case", CASES)
def test_five_cases_as_by_scipys_square_root(case):
    (mean1, cov1), (mean2, cov2) = sides(*case)
    shared = linalg.sqrtm((cov1 @ cov2).numpy().astype(complex)).trace().real
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * shared
    assert float(frechet_distance(mean1, cov1, mean2, cov2)) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def their_distance():
    """``calculate_frechet_distance`` of the package, without its networks."""
    with pytest.MonkeyPatch.context() as patch:
        # At its import the package looks for three tokenizers on the network, through this one.
        patch.setitem(sys.modules, "laion_clap", types.ModuleType("laion_clap"))
        package = pytest.importorskip("frechet_audio_distance")
    return object.__new__(package.FrechetAudioDistance).calculate_frechet_distance


@pytest.mark.parametrize("case", CASES)
def test_five_cases_as_by_the_package(case, their_distance):
    first, second = sides(*case)
    expected = their_distance(*(moment.numpy() for moment in (*first, *second)))
    assert float(frechet_distance(*first, *second)) == pytest.approx(expected, rel=1e-6)


def test_without_rank_another_order_of_the_sounds_changes_nothing():
    real, made = torch.randn(40, 200).double() @ torch.randn(200, 200).double(), torch.randn(40, 200).double()
    there = frechet_distance(*moments(real), *moments(made))
    turned = frechet_distance(*moments(real[torch.randperm(40)]), *moments(made[torch.randperm(40)]))
    assert float(turned) == pytest.approx(float(there), rel=1e-12)


@pytest.mark.parametrize("windows", [1, 4])
def test_the_standard_error_is_that_of_a_bootstrap_over_files(windows):
    reference = moments(torch.randn(2000, 5))
    sounds = torch.randn(300, 1, 5) * torch.tensor([1, 2, 0.5, 1, 3]) + 0.3 * torch.randn(300, windows, 5) + 0.4
    groups = torch.arange(300).repeat_interleave(windows)
    got = float(frechet_error(*reference, sounds.flatten(0, 1), groups))
    drawn = [sounds[torch.randint(300, (300,))].flatten(0, 1) for _ in range(400)]
    expected = float(torch.stack([frechet_distance(*reference, *moments(made)) for made in drawn]).std())
    assert got == pytest.approx(expected, rel=0.15)
    alone = float(frechet_error(*reference, sounds.flatten(0, 1)))
    assert alone == pytest.approx(got, rel=1e-12) if windows == 1 else alone < 0.7 * got


def test_the_standard_error_of_a_shift_in_closed_form():
    # Equal covariances: T = I, so only the means move the distance, by 2 (m2 - m1)^T c.
    made = torch.randn(200, 3).double()
    mean, cov = moments(made)
    shift = torch.tensor([0.5, -1, 2]).double()
    expected = 2 * (shift @ cov @ shift / 200).sqrt()
    torch.testing.assert_close(frechet_error(mean - shift, cov, made), expected, rtol=1e-9, atol=0)


def test_the_standard_error_without_rank_is_finite():
    assert 0 < float(frechet_error(*moments(torch.randn(30, 64)), torch.randn(20, 64) + 1)) < 100
    assert 0 < float(frechet_error(torch.zeros(4), torch.zeros(4, 4), torch.randn(20, 4))) < 100


def as_fadtk(mean, cov, embeddings, seed, min_n):
    """Its ``score_inf``, but for the seed, over numpy's fit."""
    random = torch.Generator().manual_seed(seed)
    sizes = [int(size) for size in np.linspace(min_n, len(embeddings), 25)]
    drawn = [embeddings[torch.randint(len(embeddings), (size,), generator=random)] for size in sizes]
    found = np.array([float(frechet_distance(mean, cov, *moments(part))) for part in drawn])
    inverse = 1 / np.array(sizes)
    slope, score = np.polyfit(inverse, found, 1)
    left = ((found - slope * inverse - score) ** 2).sum()
    return score, slope, 1 - left / ((found - found.mean()) ** 2).sum()


@pytest.mark.parametrize(("width", "min_n"), [(6, 50), (40, 20)])
def test_infinity_as_fadtk_defines_it(width, min_n):
    reference, made = moments(torch.randn(500, width)), torch.randn(300, width) * 1.2
    got = frechet_infinity_fadtk(*reference, made, seed=3, min_n=min_n)
    assert got == pytest.approx(as_fadtk(*reference, made, 3, min_n), rel=1e-9)
    assert got == frechet_infinity_fadtk(*reference, made, seed=3, min_n=min_n)
    assert got != frechet_infinity_fadtk(*reference, made, seed=4, min_n=min_n)


@pytest.mark.parametrize("truth", [0.0, 1.28])
def test_infinity_removes_the_bias_by_few_sounds(truth):
    reference, made = (torch.zeros(128), torch.eye(128)), torch.randn(1000, 128) + math.sqrt(truth / 128)
    plain = float(frechet_distance(*reference, *moments(made)))
    assert plain - truth > 4
    got = frechet_infinity(*reference, made)
    assert abs(got.score - truth) < 0.1 * (plain - truth)
    assert got.r2 > 0.95
    # Draws with replacement lead back to the distance of these 1,000.
    assert frechet_infinity_fadtk(*reference, made).score - truth > 0.9 * (plain - truth)


def test_infinity_draws_whole_files():
    # Ten windows of a sound are nearly equal: the bias is that of 120 sounds, not of 1,200.
    sounds = torch.randn(120, 1, 32) + 0.3 * torch.randn(120, 10, 32)
    reference, windows = (torch.zeros(32), 1.09 * torch.eye(32)), sounds.flatten(0, 1)
    plain = float(frechet_distance(*reference, *moments(windows)))
    groups = torch.arange(120).repeat_interleave(10)
    assert abs(frechet_infinity(*reference, windows, groups).score) < 0.3 * plain
    assert frechet_infinity(*reference, windows).score > 0.7 * plain


def test_infinity_of_a_seed_is_one_number():
    reference, made = moments(torch.randn(100, 4)), torch.randn(60, 4)
    assert frechet_infinity(*reference, made, seed=3) == frechet_infinity(*reference, made, seed=3)
    assert frechet_infinity(*reference, made, seed=3) != frechet_infinity(*reference, made, seed=4)
    with pytest.raises(ValueError, match=r"groups are \(M,\)"):
        frechet_infinity(*reference, made, torch.zeros(59, dtype=torch.int64))


@pytest.mark.parametrize(
    ("count", "width", "windows", "words"),
    [
        (399, 100, 1, r"400 embeddings \(4 times their width\) of 50 sounds or more, there are 399 of 399"),
        (490, 3, 10, r"12 embeddings \(4 times their width\) of 50 sounds or more, there are 490 of 49"),
    ],
)
def test_infinity_of_too_few_is_refused_in_one_line(count, width, windows, words):
    groups = torch.arange(count // windows).repeat_interleave(windows)
    with pytest.raises(ValueError, match=f"^it needs {words}: give more sounds$"):
        frechet_infinity(torch.zeros(width), torch.eye(width), torch.randn(count, width), groups)


def test_infinity_of_fadtk_refuses_too_few():
    with pytest.raises(ValueError, match=r"^it needs more than 500 embeddings, and there are 500: give more sounds$"):
        frechet_infinity_fadtk(torch.zeros(3), torch.eye(3), torch.randn(500, 3))
    with pytest.raises(ValueError, match="min_n must be 2 or more"):
        frechet_infinity_fadtk(torch.zeros(3), torch.eye(3), torch.randn(500, 3), min_n=1)


def test_each_file_by_its_own_moments():
    reference, made = moments(torch.randn(100, 6)), torch.randn(12, 6) + 1
    got = frechet_per_file(*reference, made, torch.tensor([1, 8, 3]))
    zero = torch.zeros(6, 6)
    expected = [frechet_distance(*reference, made[0], zero)]
    expected += [frechet_distance(*reference, *moments(part)) for part in (made[1:9], made[9:])]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=0)
    assert got[0] == pytest.approx(float((made[0] - reference[0]).square().sum() + reference[1].trace()))
    assert frechet_per_file(*reference, made[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("rows", [[2, 2], [5, 0], [[5]]])
def test_rows_that_are_not_those_of_the_files_are_refused(rows):
    with pytest.raises(ValueError, match="sum to the 5 embeddings"):
        frechet_per_file(torch.zeros(3), torch.eye(3), torch.randn(5, 3), torch.tensor(rows))


def test_error_of_what_does_not_fit_is_refused():
    zero, one = torch.zeros(3), torch.eye(3)
    for groups, words in ((torch.zeros(4), r"groups are \(M,\)"), (torch.zeros(5, dtype=torch.int64), "2 files")):
        with pytest.raises(ValueError, match=words):
            frechet_error(zero, one, torch.randn(5, 3), groups)
    with pytest.raises(ValueError, match="4 wide"):
        frechet_error(zero, one, torch.randn(5, 4))


@pytest.mark.parametrize("offset", [0, 1e4])
def test_the_metric_is_the_function_on_all_batches(offset):
    real, made = torch.randn(50, 6).double() + offset, torch.randn(40, 6).double() * 2 + offset
    metric = FrechetDistance(6)
    for part in (*made.split(9), made[:0]):
        metric.update(part, real=False)
    for part in real.split(11):
        metric.update(part, real=True)
    expected = float(frechet_distance(*moments(real), *moments(made)))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-10)
    for got, wanted in zip(metric.moments(real=True), moments(real), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_plain_sums_would_lose_what_the_metric_keeps():
    rows = torch.randn(2000, 3).double() + 1e6
    metric = FrechetDistance(3)
    for part in rows.split(7):
        metric.update(part, real=True)
    exact = moments(rows - 1e6)[1]
    summed = (rows.T @ rows - rows.sum(0)[:, None] * rows.sum(0) / 2000) / 1999
    assert float((metric.moments(real=True)[1] - exact).abs().max()) < 1e-9
    assert float((summed - exact).abs().max()) > 1e-5


def test_the_metric_has_no_number_for_too_few():
    metric = FrechetDistance(3)
    metric.update(torch.randn(4, 3), real=True)
    metric.update(torch.randn(1, 3), real=False)
    with pytest.raises(ValueError, match="generated embeddings: 1, but 2 are needed"):
        metric.compute()
    with pytest.raises(ValueError, match="4 wide"):
        metric.update(torch.randn(4, 4), real=True)
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.full((4, 3), torch.nan), real=True)
