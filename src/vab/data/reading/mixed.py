"""Several data sets read as one, with consecutive record numbers and one vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vab.data.reading.dataset import BatchDataset, ShardDataset, as_numbers
from vab.data.reading.labels import Vocabulary
from vab.spec import UserError


class MixedDataset(BatchDataset):
    """The records of several data sets: those of the second follow those of the first. Read like ``ShardDataset``.

    Records of one recording have equal ``source`` numbers even if they are in two data sets.

    Args:
        datasets: Two or more, in the order in which records are numbered.

    Attributes:
        folder: Names of all folders, for messages.
        spec: The numbers of every record.
        labels: The common vocabulary, or all labels in alphabetical order if the vocabularies differ.
        vocabulary: The same, to number the labels of other data sets.
        manifest_hash: SHA-256 over the hashes of all data sets.

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
        self._starts = np.cumsum([0, *map(len, datasets)])  # (data sets + 1,): number of the first record
        codes, features = zip(*(dataset.stored_types for dataset in datasets), strict=True)
        self._types = np.result_type(*codes), np.result_type(*features)
        names = first.labels
        if any(dataset.labels != names for dataset in datasets):
            names = tuple(sorted({label for dataset in datasets for label in dataset.labels}))
        numbers = {name.strip(): number for number, name in enumerate(names)}
        self.use_vocabulary(Vocabulary(self.folder, names, numbers))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Number the labels as in a vocabulary, which must contain all of them and may contain more.

        Raises:
            UserError: If the vocabulary lacks a label of a data set.
        """
        for dataset in self.datasets:
            dataset.use_vocabulary(vocabulary)
        self.labels, self.vocabulary = vocabulary.names, vocabulary

    @property
    def stored_types(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Array types of codes and features; the wider ones if they differ."""
        return self._types

    def fill(self, arrays: Mapping[str, np.ndarray], numbers: np.ndarray) -> bool:
        """Like ``ShardDataset.fill``."""
        owners, own = self._places(numbers)
        short = []
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            short.append(self.datasets[owner].fill(arrays, own[places], places))
        return any(short)

    def key(self, number: int) -> str:
        """The key of record ``number``."""
        dataset, own = self._place(number)
        return dataset.key(own)

    def record(self, number: int) -> dict[str, Any]:
        """The metadata of record ``number``."""
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
        """Number of records without video."""
        return sum(dataset.without_video() for dataset in self.datasets)

    def has_short_records(self) -> bool:
        """Whether a record has fewer steps or frames than the segment."""
        return any(dataset.has_short_records() for dataset in self.datasets)

    @property
    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32: codebooks of the codec, the same for all data sets."""
        return self.datasets[0].codebooks

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) position of each record's data set in ``datasets``, and (B,) its number there."""
        owners = np.searchsorted(self._starts, index, side="right") - 1
        return owners, index - self._starts[owners]

    def _place(self, number: int) -> tuple[ShardDataset, int]:
        owners, own = self._places(as_numbers([number], len(self)))
        return self.datasets[int(owners[0])], int(own[0])


Records = ShardDataset | MixedDataset
"""What training reads."""
