"""Whether two batches are one."""

from dataclasses import fields

import torch


def same(one, other):
    """Two batches are equal, tensor for tensor, types included."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name
