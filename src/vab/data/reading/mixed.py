"""Several data sets read as one: their records are numbered through, and their labels brought together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.utils.data import Dataset

from vab.data.reading.batch import PackedBatch
from vab.data.reading.dataset import ShardDataset, as_numbers
from vab.data.reading.labels import Vocabulary
from vab.data.reading.order import apportion
from vab.spec import Batch, UserError


class MixedDataset(Dataset[Batch]):
    """The records of several data sets: those of the second follow on those of the first. Read as ``ShardDataset``.

    Records that are cut from one recording have equal ``source`` numbers also where they are in two data sets.

    Args:
        datasets: Two or more, in the order in which records are numbered.

    Attributes:
        folder: Names of all folders, for messages.
        spec: The numbers of every record.
        labels: The vocabulary that all share, or else all their labels in alphabetical order.
        vocabulary: The same, to number other data sets' labels by.
        manifest_hash: SHA-256 over the hashes of all.

    Raises:
        UserError: If the data sets differ in a number or in their codebooks.
    """

    def __init__(self, datasets: Sequence[ShardDataset]) -> None:
        self.datasets = list(datasets)
        self.folder = " + ".join(str(dataset.folder) for dataset in datasets)
        first = datasets[0]
        self.spec = first.spec
        codebooks = first.codebooks
        for other in datasets[1:]:
            if differences := self.spec.differences(other.spec):
                raise UserError(
                    f"{first.folder} and {other.folder} cannot be mixed ({'; '.join(differences)}): extract both with "
                    "the same settings"
                )
            if not torch.equal(codebooks, other.codebooks):
                raise UserError(
                    f"{first.folder} and {other.folder} cannot be mixed: their codebooks differ, so their codes mean "
                    "different things: extract both with the same codec"
                )
        self.manifest_hash = hashlib.sha256("+".join(one.manifest_hash for one in datasets).encode()).hexdigest()
        self._starts = np.cumsum([0, *map(len, datasets)])  # (data sets + 1,): number of the first record of each
        types = zip(*(dataset.stored_types for dataset in datasets), strict=True)
        self._types = tuple(np.result_type(*kinds) for kinds in types)
        names = first.labels
        if any(dataset.labels != names for dataset in datasets):
            names = tuple(sorted({label for dataset in datasets for label in dataset.labels}))
        numbers = {name.strip(): number for number, name in enumerate(names)}
        self.use_vocabulary(Vocabulary(self.folder, names, numbers))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Batch:
        """Record ``number`` as a batch of one."""
        return self.read([number])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these records."""
        return self.read(numbers)

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Number the labels as a vocabulary does, which has them all and may have more.

        Raises:
            UserError: If a label of a data set is not in it.
        """
        for dataset in self.datasets:
            dataset.use_vocabulary(vocabulary)
        self.labels, self.vocabulary = vocabulary.names, vocabulary

    def read(self, numbers: Sequence[int] | np.ndarray, valid: np.ndarray | None = None) -> Batch:
        """The batch of these records, in this order. As ``ShardDataset.read``."""
        return self.gather(numbers, valid).unpack().widened()

    def gather(self, numbers: Sequence[int] | np.ndarray, valid: np.ndarray | None = None) -> PackedBatch:
        """As ``read``, in the types that are stored (the wider one where they differ) and in one piece of memory."""
        index = as_numbers(numbers)
        packed = PackedBatch.of_records(len(index), self.spec, len(self.labels), *self._types)
        arrays = packed.arrays()
        arrays["index"][:], arrays["valid"][:], arrays["draw"][:] = index, True if valid is None else valid, 0
        owners, own = self._places(index)
        short = []
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            short.append(self.datasets[owner].fill(arrays, own[places], places))
        packed.ragged = any(short)
        return packed

    def key(self, number: int) -> str:
        """The key of record ``number``."""
        dataset, own = self._place(number)
        return dataset.key(own)

    def record(self, number: int) -> dict[str, Any]:
        """What is known of record ``number``."""
        dataset, own = self._place(number)
        return dataset.record(own)

    def label_names(self, number: int) -> list[str]:
        """The labels of record ``number``."""
        dataset, own = self._place(number)
        return dataset.label_names(own)

    def label_counts(self) -> np.ndarray:
        """(L,) int64: how many records have each label."""
        return np.sum([dataset.label_counts() for dataset in self.datasets], axis=0)

    def labels_per_record(self) -> np.ndarray:
        """(records,) int64: how many labels each record has."""
        return np.concatenate([dataset.labels_per_record() for dataset in self.datasets])

    def without_video(self) -> int:
        """How many records are of sound alone."""
        return sum(dataset.without_video() for dataset in self.datasets)

    def frames(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,) int64: how many frames of these records are picture; 0 for a record of sound alone."""
        owners, own = self._places(as_numbers(numbers))
        frames = np.empty(len(owners), dtype=np.int64)
        for owner in np.unique(owners).tolist():
            frames[owners == owner] = self.datasets[owner].frames(own[owners == owner])
        return frames

    @property
    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32 of the codec that made all of the data."""
        return self.datasets[0].codebooks

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) data set of each record, (B,) its number there."""
        if not len(index) or index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"record numbers must be in 0..{len(self) - 1}, got {index[:8].tolist()}")
        owners = np.searchsorted(self._starts, index, side="right") - 1
        return owners, index - self._starts[owners]

    def _place(self, number: int) -> tuple[ShardDataset, int]:
        owners, own = self._places(np.array([number]))
        return self.datasets[int(owners[0])], int(own[0])


Records = ShardDataset | MixedDataset
"""What training reads from."""


def open_training(
    train: str | Mapping[str, float], records_per_epoch: int | None, open_one: Callable[[str], ShardDataset]
) -> tuple[Records, list[ShardDataset], tuple[int, ...]]:
    """Open the data that ``data.train`` names.

    Args:
        train: A folder, or folders and their weights.
        records_per_epoch: How many records an epoch has; as many as there are where not given.
        open_one: Opens a folder.

    Returns:
        What is read from, the data sets of which it consists, and how many records of each make an epoch.

    Raises:
        UserError: If a folder is no data set, a weight is no number above 0 or so small that its data set would give
            no record, or the data sets do not go together.
    """
    if isinstance(train, str) and train.lstrip().startswith("{"):
        raise UserError(f"data.train must be a folder, or folders and numbers as in {{A: 3, B: 1}}; got {train}")
    if isinstance(train, str):
        dataset = open_one(train)
        return dataset, [dataset], (records_per_epoch or len(dataset),)
    if not train:
        raise UserError("data.train names no folder")
    for name, weight in train.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"data.train: the weight of {name} must be a number above 0, got {weight}")
    datasets = [open_one(_resolved(name)) for name in train]
    if twice := {one.folder for one in datasets if sum(one.folder == other.folder for other in datasets) > 1}:
        raise UserError(f"data.train names {twice.pop()} more than once: give it one weight")
    total = records_per_epoch or sum(map(len, datasets))
    counts = apportion(list(train.values()), total)
    if 0 in counts:
        dataset = datasets[counts.index(0)]
        raise UserError(
            f"data.train: {dataset.folder} would give no record to an epoch of {total}: raise its weight, or "
            "--data.records_per_epoch"
        )
    return datasets[0] if len(datasets) == 1 else MixedDataset(datasets), datasets, counts


def _resolved(name: str) -> str:
    """A folder's name with ``${oc.env:...}`` read from the environment, which YAML readers do for values alone."""
    try:
        return str(OmegaConf.create([name])[0])
    except OmegaConfBaseException as error:
        raise UserError(f"data.train: {name}: {str(error).splitlines()[0]}") from error
