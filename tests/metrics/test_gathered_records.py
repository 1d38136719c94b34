import pytest
import torch

from vab.metrics.records import RecordRows, each_once


def test_each_record_once_in_order():
    index = torch.tensor([3, 1, 3, 0, 1])
    rows = torch.tensor([[30.0], [10.0], [31.0], [0.0], [11.0]])
    (once,) = each_once(index, rows)
    assert once.tolist() == [[0.0], [10.0], [30.0]]


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="equally many rows"):
        each_once(torch.tensor([1, 2]), torch.zeros(3, 1))


class Rows(RecordRows):
    columns = ("values",)

    def update(self, index, values):
        self.keep(index, values=values)

    def compute(self):
        return self.rows()


def test_rows_are_kept_by_record_number():
    metric = Rows()
    for index in ([4, 2], [], [2, 0]):
        metric.update(torch.tensor(index, dtype=torch.int64), 10.0 * torch.tensor(index))
    index, values = metric.compute()
    assert (index.tolist(), values.tolist()) == ([0, 2, 4], [0.0, 20.0, 40.0])


def test_no_record_is_an_error():
    metric = Rows()
    with pytest.raises(ValueError, match="nothing to report"):
        metric.rows()
    metric.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    with pytest.raises(ValueError, match="nothing to report"):
        metric.compute()
