"""A batch in one piece of memory: one gather fills it, one handle takes it from a worker, one copy pins it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

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

Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Type and shape of each array, by the name of the batch's tensor."""


@dataclass
class PackedBatch:
    """The tensors of a ``Batch`` behind each other, in the types in which they are stored."""

    buffer: Tensor
    """(bytes,) uint8."""
    layout: Layout
    """In the order of the buffer."""
    ragged: bool = False
    """As in the batch."""

    @classmethod
    def empty(cls, layout: Layout) -> PackedBatch:
        """Room for a batch; in a loader's worker in memory that the main process shares, so that nothing is copied."""
        size = sum(_room(dtype, shape) for dtype, shape in layout.values())
        if get_worker_info() is None:
            return cls(torch.from_numpy(np.empty(size, np.uint8)), layout)
        storage = torch.UntypedStorage._new_shared(size)
        return cls(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)), layout)

    @classmethod
    def of_records(
        cls, count: int, spec: SegmentSpec, num_labels: int, codes: np.dtype[Any], features: np.dtype[Any]
    ) -> PackedBatch:
        """Room for ``count`` records, codes and features in the types in which they are stored."""
        return cls.empty(
            {
                "codes": (codes, (count, spec.num_codebooks, spec.num_steps)),
                "features": (features, (count, spec.num_frames, spec.feature_dim)),
                "labels": (np.dtype(np.float32), (count, num_labels)),
                "valid": (np.dtype(bool), (count,)),
                **{name: (np.dtype(np.int64), (count,)) for name in ("steps", "frames", "index", "source", "draw")},
            }
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, which are parts of the buffer."""
        whole = self.buffer.numpy()
        return {name: whole[start:end].view(dtype).reshape(shape) for name, start, end, dtype, shape in self._parts()}

    def unpack(self) -> Batch:
        """The batch, whose tensors are parts of the buffer."""
        # Views by torch, not by numpy: a copy to a GPU must keep the page-locked buffer from being used anew.
        tensors = {
            name: self.buffer[start:end].view(_TYPES[dtype]).view(shape)
            for name, start, end, dtype, shape in self._parts()
        }
        return Batch(**tensors, ragged=self.ragged)

    def _parts(self) -> Iterator[tuple[str, int, int, np.dtype[Any], tuple[int, ...]]]:
        start = 0
        for name, (dtype, shape) in self.layout.items():
            yield name, start, start + prod(shape) * dtype.itemsize, dtype, shape
            start += _room(dtype, shape)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which copies to a GPU overlap with work there; ``DataLoader`` asks."""
        return PackedBatch(self.buffer.pin_memory(), self.layout, self.ragged)


def _room(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Bytes of an array, up to where the next one may begin."""
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
