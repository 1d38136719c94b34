import pytest
import torch

from vab.metrics.records import each_once, joined


def test_each_record_once_in_order():
    index = torch.tensor([3, 1, 3, 0, 1])
    rows = torch.tensor([[30.0], [10.0], [31.0], [0.0], [11.0]])
    (once,) = each_once(index, rows)
    assert once.tolist() == [[0.0], [10.0], [30.0]]


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="equally many rows"):
        each_once(torch.tensor([1, 2]), torch.zeros(3, 1))


def test_a_state_is_one_tensor_before_and_after_ranks_are_gathered():
    parts = [torch.tensor([1, 2]), torch.tensor([3])]
    assert joined(parts).tolist() == joined(torch.cat(parts)).tolist() == [1, 2, 3]
    assert len(joined([])) == 0
