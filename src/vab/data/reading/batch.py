"""A batch in one piece of memory: filled in place, handed over by a worker as one handle, pinned by one copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vab.spec import Batch, SegmentSpec

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any type of an array needs."""

_TYPES = {
    np.dtype(kind): torch.from_numpy(np.empty(0, kind)).dtype for kind in ("?", "u1", "<u2", "<i4", "<i8", "<f2", "<f4")
}


class Part(NamedTuple):
    """Where one array of a batch lies in the buffer."""

    name: str
    """Of the batch's tensor."""
    start: int
    """Of its first byte."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass
class PackedBatch:
    """The tensors of a ``Batch`` one after the other, in the types in which they are stored."""

    buffer: Tensor
    """(bytes,) uint8."""
    parts: tuple[Part, ...]
    """In the order of the buffer."""
    ragged: bool = False
    """As in the batch."""

    @classmethod
    def of_records(
        cls, count: int, spec: SegmentSpec, num_labels: int, codes: np.dtype[Any], features: np.dtype[Any]
    ) -> PackedBatch:
        """Room for ``count`` records, codes and features in the types in which they are stored.

        In a loader's worker it is memory that the main process shares, so that nothing is copied.
        """
        size, parts = _layout(count, spec, num_labels, codes, features)
        if get_worker_info() is None:
            return cls(torch.from_numpy(np.empty(size, np.uint8)), parts)
        storage = torch.UntypedStorage._new_shared(size)
        return cls(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)), parts)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, which are parts of the buffer."""
        whole = self.buffer.numpy()
        return {part.name: np.ndarray(part.shape, part.dtype, whole, part.start) for part in self.parts}

    def unpack(self) -> Batch:
        """The batch, whose tensors are parts of the buffer."""
        # Views by torch, not by numpy: they keep the page-locked buffer in use until the copy to a GPU is done.
        typed = {dtype: self.buffer.view(_TYPES[dtype]) for dtype in {part.dtype for part in self.parts}}
        tensors = {
            part.name: typed[part.dtype].as_strided(part.shape, part.strides, part.start // part.dtype.itemsize)
            for part in self.parts
        }
        return Batch(**tensors, ragged=self.ragged)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which copies to a GPU overlap with work there; ``DataLoader`` asks."""
        return PackedBatch(self.buffer.pin_memory(), self.parts, self.ragged)


@lru_cache(maxsize=64)
def _layout(
    count: int, spec: SegmentSpec, num_labels: int, codes: np.dtype[Any], features: np.dtype[Any]
) -> tuple[int, tuple[Part, ...]]:
    """Bytes of a batch of so many records, and where its arrays lie."""
    arrays = {
        "codes": (codes, (count, spec.num_codebooks, spec.num_steps)),
        "features": (features, (count, spec.num_frames, spec.feature_dim)),
        "labels": (np.dtype(np.float32), (count, num_labels)),
        "valid": (np.dtype(bool), (count,)),
        **{name: (np.dtype(np.int64), (count,)) for name in ("steps", "frames", "index", "source", "draw")},
    }
    parts, start = [], 0
    for name, (dtype, shape) in arrays.items():
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        parts.append(Part(name, start, dtype, shape, strides))
        start += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return start, tuple(parts)
