import pytest
import torch

from vab.metrics.agreement import class_agreement


def test_one_class_is_top_1():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    truth = torch.tensor([[False, True, False], [False, True, False]])
    assert class_agreement(scores, truth).tolist() == [1.0, 0.0]


def test_two_classes_share_the_top_two():
    scores = torch.tensor([[0.5, 0.1, 0.4, 0.0]])
    assert class_agreement(scores, torch.tensor([[True, False, True, False]])).tolist() == [1.0]
    assert class_agreement(scores, torch.tensor([[True, True, False, False]])).tolist() == [0.5]
    assert class_agreement(scores, torch.tensor([[False, True, False, True]])).tolist() == [0.0]


def test_a_blind_guess_reaches_chance():
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(20_000, 16, dtype=torch.bool)
    truth[:, :2] = True
    agreement = class_agreement(torch.rand(20_000, 16, generator=generator), truth).mean()
    assert agreement == pytest.approx(2 / 16, abs=0.005)


def test_ties_go_to_the_lower_class():
    scores = torch.zeros(1, 4)
    assert class_agreement(scores, torch.tensor([[True, False, False, False]])).tolist() == [1.0]
    assert class_agreement(scores, torch.tensor([[False, False, False, True]])).tolist() == [0.0]


def test_no_true_class_is_an_error():
    with pytest.raises(ValueError, match="no agreement"):
        class_agreement(torch.rand(1, 4), torch.zeros(1, 4, dtype=torch.bool))
