"""CUDA without a card: tensors that have a shape, a dtype and the device ``cuda``, but no values.

torch's ``FakeTensorMode`` has such tensors, but some parts of torch ask the driver all the same. They are replaced
here while the context is open, and put back after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vab.extras import pip_install
from vab.planning.backward import backward_in_python
from vab.spec import UserError

TORCH = "2.11"
"""The lowest version of torch that can do this: 2.8 asks the driver in more places, and aborts."""

_ALIGNMENT = 8
"""Elements. The memory-efficient kernel wants rows of the mask to begin at multiples of it; torch copies others."""


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """In this context new tensors are fake, and those on ``cuda`` need no card: steps, gradients, autocast.

    Operations whose operands are on different devices raise an error, as on a card, and so does whatever reads a value
    of a tensor, for which a card would make the host wait. Real tensors become fake ones where they are used.

    Raises:
        UserError: If torch is older than the version on which this was tested.
    """
    if torch.__version__ < TORCH:
        needed = f"planning needs torch {TORCH} or later, found {torch.__version__}"
        raise UserError(f"{needed}: {pip_install(f'torch>={TORCH}')}")
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # autocast("cuda") is let on
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        copied = lambda tensor, memo: tensor.detach().clone()  # noqa: E731 torch's would ask for the address of the data
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", copied, create=True))
        stack.enter_context(backward_in_python())
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def _attention(original: Any) -> Any:
    """``scaled_dot_product_attention`` with the kernels that torch chooses on CUDA (sm80 and later).

    Flash attention in 16 bits without a mask; else the memory-efficient kernel, which takes a mask of the dtype of the
    queries. torch's own choice asks the driver. Source: ``_fused_sdp_choice_cuda`` and ``preprocess_mask`` in torch.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if q.device.type != "cuda":
            attended: Tensor = original(q, k, v, attn_mask=attn_mask, **options)
            return attended
        if any(options.values()):
            raise NotImplementedError(f"attention on fake CUDA tensors: {options}")
        if torch.is_autocast_enabled("cuda"):
            narrow = torch.get_autocast_dtype("cuda")
            q, k, v = (x.to(narrow) for x in (q, k, v))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(narrow)
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
            raise RuntimeError(f"the attention mask is {attn_mask.dtype}, the queries are {q.dtype}")
        with torch.autocast("cuda", enabled=False):
            if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
                scale = 1 / math.sqrt(q.shape[-1])
                return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
            bias = None if attn_mask is None else _aligned(attn_mask, q.dtype).expand(*q.shape[:3], k.shape[2])
            keeps_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keeps_sums)[0]

    return attention


def _aligned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as the memory-efficient kernel takes it: float, and copied if its rows are not aligned."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    if mask.stride(-1) == 1 and all(stride % _ALIGNMENT == 0 for stride in mask.stride()[:-1]):
        return mask
    keys = mask.shape[-1]
    return F.pad(mask, (0, _ALIGNMENT - keys % _ALIGNMENT))[..., :keys]
