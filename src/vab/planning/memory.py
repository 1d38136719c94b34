"""Bytes of tensors that are alive at once, counted while a program runs; tensors may be fake.

torch's own ``MemTracker`` attributes memory to modules with hooks on autograd's nodes, which `vab.planning.backward`
does not run. Live bytes need no hooks: each storage is counted once, until it is freed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_BLOCK = 512
"""Bytes: PyTorch's CUDA allocator rounds each size up to a multiple of it (``kMinBlockSize``)."""


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes of each storage which an operation in it returns, until the storage is freed.

    Workspaces of a kernel are not counted, nor the allocator's fragmentation.

    Args:
        device_type: Only tensors of this type of device are counted.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once since the last `reset_peak`."""
        self.peak_operation = ""
        """The operation that reached the peak."""
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset_peak(self) -> None:
        """Begin a new measurement of the peak."""
        self.peak, self.peak_operation = self.live, ""

    def count(self, tensor: Any, operation: str = "") -> None:
        """Count the storage of a tensor, if it is on the device and not counted yet."""
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK

        def freed(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_operation = self.live, operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self.count(value, str(func))
        return result
