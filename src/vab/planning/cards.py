"""GPUs by name: their memory and the rate of their matrix products, from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CardName = Literal["A100", "H100", "H200", "L40S", "4090", "T4"]
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One model of GPU."""

    memory_gb: float
    """As the maker names it; a card of "80 GB" has about 79 GiB."""
    tflops: float
    """Dense products in bfloat16 with float32 sums (T4: float16), 10^12 operations a second, without sparsity."""


CARDS: dict[CardName, Card] = {
    "A100": Card(80, 312),
    "H100": Card(80, 989),
    "H200": Card(141, 989),
    "L40S": Card(48, 362),
    "4090": Card(24, 165),
    "T4": Card(16, 65),
}
USABLE = {16: 14.6, 24: 23.5, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}
"""GiB that a program can use on a card of so many GB, as ``torch.cuda.mem_get_info`` states them; ECC is on."""


def usable_bytes(memory_gb: float) -> int:
    """Bytes that a program can use on a card of so many GB; 0.97 GiB for each GB of a card that is not listed."""
    return round(USABLE.get(round(memory_gb), 0.97 * memory_gb) * GIB)


CONTEXT_BYTES = round(1.5 * GIB)
"""Allowance for the CUDA context, cuBLAS workspaces and NCCL's buffers; they are not in the allocator's statistics."""
FRAGMENTATION = 0.03
"""Allowance for memory that the allocator holds and cannot use, as a share of the peak."""
