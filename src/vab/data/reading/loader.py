"""Batches in our own order, prefetched by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vab.data.reading.augment import augment
from vab.data.reading.batch import PackedBatch
from vab.data.reading.mixed import Records
from vab.data.reading.order import Share, evaluation_batches, evaluation_steps
from vab.spec import Batch, UserError


class _Shares(Dataset[PackedBatch | UserError]):
    """The data set that workers read from: indexed by a rank's share of a step, it returns the batch."""

    def __init__(self, dataset: Records) -> None:
        self.dataset = dataset

    def __getitems__(self, share: Share) -> PackedBatch | UserError:
        try:
            packed = self.dataset.gather(share.numbers, share.valid)
            if share.draws is not None:
                packed.arrays()["draw"][:] = share.draws
            if share.changes is not None:
                augment(packed, self.dataset, share.changes)
        except UserError as error:
            return error  # if raised in a worker, it would arrive with the worker's traceback
        return packed


def _begin(worker: int) -> None:
    """Initialise a worker. Ctrl-C reaches all processes of a terminal; only the main process reacts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked(result: PackedBatch | UserError) -> PackedBatch:
    if isinstance(result, UserError):
        raise result
    return result


class Loader:
    """Batches in our own order. Not a ``DataLoader``, because the trainer replaces the samplers of those.

    Workers start at the first batch and are kept for later passes.
    """

    def __init__(self, dataset: Records, num_workers: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self._settings: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._workers: DataLoader[PackedBatch | UserError] | None = None

    def shares(self) -> Iterator[Share]:
        """This rank's shares of the pass that begins now."""
        raise NotImplementedError

    @property
    def _iterator(self) -> Any:
        # The trainer stops the workers of a DataLoader through this name, also after an exception. Workers that are
        # left to the garbage collector can delay those of the next run by many seconds.
        return None if self._workers is None else self._workers._iterator

    @_iterator.setter
    def _iterator(self, nothing: None) -> None:
        self._workers = None

    def batches(self) -> Iterator[Batch]:
        """The batches of those shares, in the stored types."""
        read = _Shares(self.dataset)
        if not self._settings["num_workers"]:  # about a tenth faster than a DataLoader without workers
            for share in self.shares():
                packed = _checked(read.__getitems__(share))
                yield (packed.pin_memory() if self._settings["pin_memory"] else packed).unpack()
            return
        if self._workers is None:
            self._workers = DataLoader(
                read,
                batch_sampler=_Sampler(self),  # type: ignore[arg-type]
                collate_fn=_as_it_is,
                worker_init_fn=_begin,
                persistent_workers=True,
                # Otherwise each pass draws a number from torch's global generator, which changes the dropout.
                generator=torch.Generator(),
                **self._settings,
            )
        for packed in self._workers:
            yield _checked(packed).unpack()


class EvaluationLoader(Loader):
    """Each of the first records once, over all ranks; ``plan`` holds the arguments of ``evaluation_batches``."""

    def __init__(self, dataset: Records, num_workers: int, pin_memory: bool, *plan: int) -> None:
        super().__init__(dataset, num_workers, pin_memory)
        self._plan = plan

    def __len__(self) -> int:
        return evaluation_steps(*self._plan[:3])

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def shares(self) -> Iterator[Share]:
        """This rank's records."""
        return evaluation_batches(*self._plan)


class _Sampler:
    """The loader's order as a batch sampler, which ``DataLoader`` iterates over once per pass."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Share]:
        return self._loader.shares()
