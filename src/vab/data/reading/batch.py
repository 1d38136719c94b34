"""A batch in one buffer: filled in place, passed between processes as one handle, pinned by one copy."""

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
"""Bytes: a cache line, more than any array type needs."""

_TYPES = {
    np.dtype(kind): torch.from_numpy(np.empty(0, kind)).dtype for kind in ("?", "u1", "<u2", "<i4", "<i8", "<f2", "<f4")
}


class Part(NamedTuple):
    """Where one array of a batch lies in the buffer."""

    name: str
    """Field of ``Batch``."""
    start: int
    """Offset in bytes."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass
class PackedBatch:
    """The tensors of a ``Batch`` one after the other, in the types stored in the tars."""

    buffer: Tensor
    """(bytes,) uint8."""
    parts: tuple[Part, ...]
    """In the order of the buffer."""
    ragged: bool = False
    """``Batch.ragged``."""

    @classmethod
    def of_records(
        cls, count: int, spec: SegmentSpec, num_labels: int, codes: np.dtype[Any], features: np.dtype[Any]
    ) -> PackedBatch:
        """An uninitialised batch of ``count`` records, with codes and features of the given types.

        In a worker of a loader the buffer is shared memory, so that the main process need not copy it.
        """
        size, parts = _layout(count, spec, num_labels, codes, features)
        if get_worker_info() is None:
            return cls(torch.from_numpy(np.empty(size, np.uint8)), parts)
        storage = torch.UntypedStorage._new_shared(size)
        return cls(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)), parts)

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of the buffer as numpy arrays."""
        whole = self.buffer.numpy()
        return {part.name: np.ndarray(part.shape, part.dtype, whole, part.start) for part in self.parts}

    def unpack(self) -> Batch:
        """The batch, whose tensors are views of the buffer."""
        # Views by torch, not numpy: they keep the page-locked buffer alive until the copy to a GPU has finished.
        typed = {dtype: self.buffer.view(_TYPES[dtype]) for dtype in {part.dtype for part in self.parts}}
        tensors = {
            part.name: typed[part.dtype].as_strided(part.shape, part.strides, part.start // part.dtype.itemsize)
            for part in self.parts
        }
        return Batch(**tensors, ragged=self.ragged)

    def pin_memory(self) -> PackedBatch:
        """Copy to page-locked memory, so that copies to a GPU overlap with its work. ``DataLoader`` calls this."""
        return PackedBatch(self.buffer.pin_memory(), self.parts, self.ragged)


@lru_cache(maxsize=64)
def _layout(
    count: int, spec: SegmentSpec, num_labels: int, codes: np.dtype[Any], features: np.dtype[Any]
) -> tuple[int, tuple[Part, ...]]:
    """Size of a batch of ``count`` records in bytes, and the place of each array."""
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
