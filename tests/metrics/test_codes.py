import math

import pytest
import torch

from vab.metrics.codes import BUCKETS, GuessingQuality, guessing_table


def sums(levels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(1, 50, (levels, 1), generator=generator).double()
    per_level = torch.cat([hidden * 2.0, hidden * 0.25, hidden], dim=1)
    per_bucket = torch.zeros(BUCKETS, 3, dtype=torch.float64)
    per_bucket[5] = per_level.sum(0)
    return per_level, per_bucket


def test_means_by_hand():
    per_level = torch.tensor([[6.0, 1.0, 2.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    per_bucket = torch.zeros(BUCKETS, 3, dtype=torch.float64)
    per_bucket[7] = per_level.sum(0)
    table = {name: float(value) for name, value in guessing_table(per_level, per_bucket).items()}
    assert table == {
        "loss": 2.0,
        "accuracy": 0.75,
        "loss_level_0": 3.0,
        "accuracy_level_0": 0.5,
        "loss_level_1": 1.0,
        "accuracy_level_1": 1.0,
        "loss_hidden_70_80": 2.0,
        "accuracy_hidden_70_80": 0.75,
    }


def test_what_was_never_hidden_is_left_out():
    table = guessing_table(*sums())
    assert [name for name in table if "hidden" in name] == ["loss_hidden_50_60", "accuracy_hidden_50_60"]
    assert not any(math.isnan(float(value)) for value in table.values())


def test_two_batches_are_their_union():
    metric, union = GuessingQuality(2), GuessingQuality(2)
    first, second = sums(seed=1), sums(seed=2)
    metric.update(*first)
    metric.update(*second)
    union.update(first[0] + second[0], first[1] + second[1])
    assert {k: float(v) for k, v in metric.compute().items()} == {k: float(v) for k, v in union.compute().items()}
    assert metric.per_level.dtype == torch.float64


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="nothing to report"):
        GuessingQuality(2).compute()
