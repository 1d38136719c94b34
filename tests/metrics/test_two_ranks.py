"""A metric's number does not depend on how the records are split over batches and ranks."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from ranks import in_ranks
from vab.metrics.classification import Classification
from vab.metrics.divergence import VARIANTS, PairedDivergence
from vab.metrics.frechet import FrechetDistance
from vab.metrics.recall import Retrieval
from vab.metrics.synchrony import Synchrony

RECORDS, WIDTH = 61, 12
TOLERANCE = 1e-10

random = torch.Generator().manual_seed(0)
REAL, MADE = (torch.randn(RECORDS, WIDTH, generator=random) * 2 for _ in range(2))
MADE = MADE @ torch.randn(WIDTH, WIDTH, generator=random) / 4 + 0.3
ONSETS = [(torch.rand(index % 4, generator=random), torch.rand(3, generator=random)) for index in range(RECORDS)]


class Case(NamedTuple):
    """A metric, and how it is given some records (numbers (n,), perhaps none)."""

    make: Callable[[], Metric]
    feed: Callable[[Metric, Tensor], None]


def both_sides(real: Tensor, made: Tensor):
    def feed(metric, index):
        metric.update(real[index], real=True)
        metric.update(made[index], real=False)

    return feed


CASES = {
    "frechet": Case(lambda: FrechetDistance(WIDTH), both_sides(REAL, MADE)),
    "frechet_far_from_zero": Case(lambda: FrechetDistance(WIDTH), both_sides(REAL + 1e4, MADE + 1e4)),
    "frechet_low_rank": Case(  # 61 embeddings of 192 numbers
        lambda: FrechetDistance(16 * WIDTH),
        both_sides(REAL.repeat(1, 16).sin_() + REAL.roll(1, 0).repeat_interleave(16, 1), MADE.repeat(1, 16).cos()),
    ),
    "retrieval": Case(Retrieval, lambda metric, index: metric.update(REAL[index], MADE[index], index)),
    "retrieval_by_recording": Case(
        Retrieval, lambda metric, index: metric.update(REAL[index], MADE[index], index, index // 4)
    ),
    "classification": Case(
        lambda: Classification(WIDTH), lambda metric, index: metric.update(MADE[index], REAL[index] > 1, index)
    ),
    "synchrony": Case(Synchrony, lambda metric, index: metric.update([ONSETS[record] for record in index.tolist()])),
} | {
    f"divergence_{variant}": Case(
        lambda variant=variant: PairedDivergence(variant),
        lambda metric, index: metric.update(REAL[index], MADE[index]),
    )
    for variant in VARIANTS
}


def numbers(read) -> list[list[float | None]]:
    """All tensors of what a metric says, flat, in one order; what does not exist (NaN) as None, for JSON."""
    if isinstance(read, dict):
        return [tensor for name in sorted(read) for tensor in numbers(read[name])]
    values = torch.as_tensor(read).double().flatten().tolist()
    return [[None if value != value else value for value in values]]


def measured(case: Case, index: Tensor, batch_size: int) -> list[list[float | None]]:
    metric = case.make()
    for batch in index.split(batch_size):
        case.feed(metric, batch)
    return numbers(metric.compute())


SHARES = {
    "uneven": [list(range(0, RECORDS, 3)), [index for index in range(RECORDS) if index % 3]],
    "one_has_none": [list(range(RECORDS)), []],
}
"""Ways of sharing the records between two ranks."""


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {
        way: {name: measured(case, torch.tensor(shares[rank], dtype=torch.int64), 5) for name, case in CASES.items()}
        for way, shares in SHARES.items()
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def same(got, expected):
    """Relative to the largest number of a tensor: one near 0 of a covariance is as exact as the others, not more."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        size = max((abs(value) for value in other if value is not None), default=0)
        assert one == [None if value is None else pytest.approx(value, rel=0, abs=TOLERANCE * size) for value in other]


@pytest.mark.parametrize("name", CASES)
def test_any_split_over_batches_is_one_batch(name):
    case, everything = CASES[name], torch.arange(RECORDS)
    expected = measured(case, everything, RECORDS)
    for batch_size in (1, 2, 17):
        same(measured(case, everything, batch_size), expected)
    same(measured(case, everything.flip(0), 7), expected)


@pytest.mark.parametrize("name", CASES)
def test_states_merge_and_start_anew(name):
    case = CASES[name]
    whole, first, second = (case.make() for _ in range(3))
    case.feed(first, torch.arange(RECORDS))
    first.reset()
    case.feed(first, torch.arange(20))
    case.feed(second, torch.arange(20, RECORDS))
    case.feed(whole, torch.arange(RECORDS))
    first.merge_state(second)
    same(numbers(first.compute()), numbers(whole.compute()))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found; started once, since starting takes longer than all metrics."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(2, lambda: run_rank(folder, int(os.environ["LOCAL_RANK"])))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.timeout(250)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", SHARES)
def test_two_ranks_are_one(ranks, way, name):
    expected = measured(CASES[name], torch.arange(RECORDS), RECORDS)
    for found in ranks:
        same(found[way][name], expected)
