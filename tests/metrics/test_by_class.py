import pytest
import torch

from vab.metrics.by_class import frechet_by_class, kld_by_class
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments

NAMES = ("bell", "rain", "silence")


def classes(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_a_record_of_two_classes_counts_for_both_and_few_are_named():
    real, generated = torch.randn(6, 4), torch.randn(6, 4)
    truth = classes([1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0])
    found = kld_by_class(real, generated, truth, NAMES)
    each = paired_kl(real, generated)
    assert found.figures["bell"]["kld"] == pytest.approx(float(each[[0, 1, 4]].mean()))
    assert found.figures["bell"]["kld_error"] == pytest.approx(float(each[[0, 1, 4]].std()) / 3**0.5)
    assert found.figures["rain"]["kld"] == pytest.approx(float(each[[1, 2, 3]].mean()))
    assert [figures["pairs"] for figures in found.figures.values()] == [3, 3]
    assert found.left_out == {"silence": "1 pairs, fewer than 2"}
    other = kld_by_class(real, generated, truth, NAMES, variant="sigmoid", min_count=3)
    assert other.figures["bell"]["kld"] == pytest.approx(float(paired_kl(real, generated, "sigmoid")[[0, 1, 4]].mean()))


def test_frechet_of_a_class_is_that_of_its_embeddings():
    real, generated = torch.randn(9, 2), torch.randn(7, 2) + 1
    real_truth = classes(*[[1, 0, 1]] * 4, *[[0, 1, 0]] * 5)
    generated_truth = classes(*[[1, 1, 0]] * 3, *[[0, 1, 0]] * 4)
    found = frechet_by_class(real, generated, real_truth, generated_truth, NAMES, min_count=3)
    bell = frechet_distance(*moments(real[:4]), *moments(generated[:3]))
    rain = frechet_distance(*moments(real[4:]), *moments(generated))
    assert found.figures["bell"] == {"frechet": pytest.approx(float(bell)), "real": 4, "generated": 3}
    assert found.figures["rain"] == {"frechet": pytest.approx(float(rain)), "real": 5, "generated": 7}
    assert found.left_out == {"silence": "4 real and 0 generated embeddings, fewer than 3"}
    assert not frechet_by_class(real, generated, real_truth, generated_truth, NAMES).figures  # 32 by default


def test_what_does_not_fit_is_refused():
    rows, truth = torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one name"):
        kld_by_class(rows, rows, truth, ("a", "b", "a"))
    with pytest.raises(ValueError, match="2 or more"):
        kld_by_class(rows, rows, truth, NAMES, min_count=1)
    for wrong in (truth[:3], truth[:, :2], truth.float()):
        with pytest.raises(ValueError, match=r"\(4, 3\) bool"):
            frechet_by_class(rows, rows, truth, wrong, NAMES)
