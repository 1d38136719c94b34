import math

import pytest
import torch
from scipy import stats
from sklearn import metrics

from vab.metrics.classification import (
    Classification,
    average_precision,
    confusion_matrix,
    d_prime,
    roc_auc,
    top_k_accuracy,
    top_k_correct,
)


def scored(count=60, classes=5, levels=None, seed=0):
    """Scores that say something about the targets; with ``levels`` there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, classes, generator=generator) < 0.3
    targets[0], targets[1] = True, False
    scores = torch.randn(count, classes, generator=generator) + targets
    return (scores if levels is None else (scores * levels).round() / levels), targets


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_precision_and_area_are_those_of_scikit_learn(levels, seed):
    scores, targets = scored(levels=levels, seed=seed)
    precision = metrics.average_precision_score(targets.numpy(), scores.numpy(), average=None)
    area = metrics.roc_auc_score(targets.numpy(), scores.numpy(), average=None)
    assert average_precision(scores, targets).tolist() == pytest.approx(precision.tolist(), rel=1e-12)
    assert roc_auc(scores, targets).tolist() == pytest.approx(area.tolist(), rel=1e-12)


def test_precision_by_hand():
    scores = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    targets = torch.tensor([[True], [False], [True], [False]])
    assert float(average_precision(scores, targets)) == pytest.approx((1 + 2 / 3) / 2)
    assert float(roc_auc(scores, targets)) == 0.75


def test_equal_scores_are_chance():
    _, targets = scored()
    flat = torch.zeros(targets.shape)
    assert roc_auc(flat, targets).tolist() == [0.5] * 5
    assert average_precision(flat, targets).tolist() == pytest.approx(targets.double().mean(0).tolist())


def test_order_of_records_and_monotone_changes_do_not_matter():
    scores, targets = scored(levels=2)
    order = torch.randperm(len(scores))
    for change in (lambda x: x[order], lambda x: x):
        same = change(scores.double().exp())
        for metric in (average_precision, roc_auc):
            torch.testing.assert_close(metric(same, change(targets)), metric(scores, targets), rtol=1e-12, atol=0)


def test_d_prime():
    areas = torch.tensor([0.5, 0.9, 0.97, 0.2], dtype=torch.float64)
    expected = (math.sqrt(2) * stats.norm.ppf(areas.numpy())).tolist()
    assert d_prime(areas).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(d_prime(torch.tensor(0.5))) == 0
    assert d_prime(torch.tensor([1.0, 0.0])).tolist() == [math.inf, -math.inf]


def test_d_prime_is_the_distance_of_two_normal_distributions():
    distance = 1.7
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    targets = torch.arange(200_000)[:, None] % 2 == 0
    assert float(d_prime(roc_auc(scores + distance * targets, targets))) == pytest.approx(distance, abs=0.02)


def whole(scores, targets):
    metric = Classification(scores.shape[1])
    metric.update(scores, targets, torch.arange(len(scores)))
    return metric.compute()


def test_classes_without_positives_or_negatives_are_left_out():
    scores, targets = scored()
    targets[:, 1], targets[:, 3] = False, True
    found = whole(scores, targets)
    for name in ("average_precision", "roc_auc", "d_prime"):
        assert found[f"{name}_per_class"].isnan().tolist() == [False, True, False, True, False]
    assert int(found["classes_counted"]) == 3
    kept = [0, 2, 4]
    assert found["map"] == average_precision(scores[:, kept], targets[:, kept]).mean()
    assert found["d_prime"] == d_prime(roc_auc(scores[:, kept], targets[:, kept]).mean())
    with pytest.raises(ValueError, match="no class has both"):
        whole(scores, torch.zeros_like(targets))


def test_large_logits_keep_their_order():
    """A sigmoid in float32 makes all of these 1, as torchmetrics does."""
    scores, targets = torch.arange(30.0, 90.0)[:, None], torch.arange(60)[:, None] >= 30
    assert float(average_precision(scores, targets)) == float(roc_auc(scores, targets)) == 1


def test_top_k_is_that_of_scikit_learn_without_ties():
    scores, labels = torch.randn(50, 6), torch.arange(50) % 6
    for k in (1, 3, 5):
        expected = metrics.top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(6))
        assert float(top_k_accuracy(scores, labels, k)) == pytest.approx(expected, rel=1e-12)


def test_ties_count_against():
    scores = torch.tensor([[1.0, 1.0, 0.0]])
    assert top_k_correct(scores, torch.tensor([0]), 1).tolist() == [False]
    assert top_k_correct(scores, torch.tensor([0]), 2).tolist() == [True]
    assert float(top_k_accuracy(torch.zeros(8, 10), torch.arange(8), 5)) == 0


def test_confusion_is_that_of_scikit_learn():
    true, predicted = torch.randint(0, 4, (50,)), torch.randint(0, 4, (50,))
    expected = metrics.confusion_matrix(true.numpy(), predicted.numpy(), labels=range(4)).tolist()
    assert confusion_matrix(predicted, true, 4).tolist() == expected
    assert confusion_matrix(torch.tensor([2]), torch.tensor([0]), 3).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: average_precision(torch.full((2, 1), math.nan), torch.ones(2, 1).bool()), "NaN"),
        (lambda: roc_auc(torch.zeros(2, 1), torch.ones(2, 1)), "bool targets"),
        (lambda: average_precision(torch.zeros(0, 1), torch.zeros(0, 1).bool()), "bool targets"),
        (lambda: top_k_accuracy(torch.zeros(1, 2), torch.tensor([2])), r"\[0, 2\)"),
        (lambda: top_k_accuracy(torch.full((1, 2), math.nan), torch.tensor([0])), "NaN"),
        (lambda: confusion_matrix(torch.tensor([3]), torch.tensor([0]), 3), r"\[0, 3\)"),
        (lambda: Classification(1).update(torch.zeros(2, 2), torch.ones(2, 2).bool(), torch.arange(2)), r"\(B, 1\)"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_metric_on_batches_is_the_functions_on_the_whole():
    scores, labels = torch.randn(50, 6), torch.arange(50) % 5  # class 5 has no record
    metric = Classification([*"abcdef"])
    order = torch.randperm(50)
    for rows in (*order.split(9), order[:4]):
        metric.update(scores[rows], labels[rows], rows)
    found = metric.compute()
    targets = torch.nn.functional.one_hot(labels, 6).bool()
    assert int(found["classes_counted"]) == 5
    assert float(found["map"]) == float(average_precision(scores, targets)[:5].mean())
    assert float(found["roc_auc"]) == float(roc_auc(scores, targets)[:5].mean())
    assert found["average_precision_per_class"].isnan().tolist() == [False] * 5 + [True]
    assert float(found["top_1"]) == float(top_k_accuracy(scores, labels))
    assert float(found["top_1_macro"]) == pytest.approx(
        metrics.balanced_accuracy_score(labels.numpy(), scores.argmax(1).numpy()), rel=1e-12
    )
    assert math.isnan(float(found["top_1_per_class"][5]))
    assert torch.equal(found["confusion_matrix"], confusion_matrix(scores.argmax(1), labels, 6))
    assert "top_5" in found


def test_several_labels_have_no_top_k():
    scores, targets = scored()
    found = whole(scores, targets)
    assert "top_1" not in found
    assert torch.equal(found["average_precision_per_class"], average_precision(scores, targets))


def test_nothing_is_an_error():
    metric = Classification(5)
    metric.update(torch.zeros(0, 5), torch.zeros(0, 5).bool(), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to report"):
        metric.compute()


@pytest.mark.parametrize("width", [3, 7])
def test_the_confusion_matrix_has_top_1_on_its_diagonal_also_with_ties(width):
    scores, labels = torch.randint(0, 3, (60, width)).float(), torch.randint(0, width, (60,))
    scores[:width], labels[:width] = 0.0, torch.arange(width)  # every class has a record, with all scores equal
    metric = Classification(width)
    metric.update(scores, labels, torch.arange(60))
    found = metric.compute()
    matrix = found["confusion_matrix"].double()
    assert float(matrix.trace() / 60) == float(found["top_1"]) == float(top_k_accuracy(scores, labels))
    torch.testing.assert_close(matrix.diagonal() / matrix.sum(1), found["top_1_per_class"], rtol=0, atol=1e-12)
    assert matrix.sum(1).tolist() == labels.bincount(minlength=width).tolist()
