"""Where float32 keeps all its digits, seen as a GPU would: CPUs have no TF32."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vab.audio import log_mel
from vab.frozen.codec import load_codec
from vab.losses import info_nce
from vab.precision import allow_tf32, full_precision
from vab.tasks.layers import linear_in_float32
from vab.tokens.expectation import expected_codes


@pytest.fixture(autouse=True)
def settings():
    """TF32 as a training run on a GPU allows it; the settings of the process come back at the end."""
    before = torch.get_float32_matmul_precision()
    allow_tf32(torch.device("cuda"))
    yield
    torch.set_float32_matmul_precision(before)


class Products(TorchDispatchMode):
    """The precision and the type of each matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen.add((torch.get_float32_matmul_precision(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def embed():
    rows = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    return info_nce(rows, rows.flip(0), torch.tensor(20.0))


def quantise():
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    return expected_codes(torch.rand(2, 3, 5, 7), torch.randn(3, 7, 4), torch.zeros(2, 3, 5, dtype=torch.int64), mask)


EXACT = {
    "contrastive scores": embed,
    "scores whose order is a metric": lambda: linear_in_float32(torch.nn.Linear(8, 3), torch.randn(4, 8)),
    "nearest codes": quantise,
    "mel bands": lambda: log_mel(torch.randn(1, 16_000), 16_000, num_bands=8),
    "codec": lambda: load_codec("tiny").encode(torch.randn(1, 1, 3200)),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_rounding_would_change_is_computed_in_full_float32(name):
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        EXACT[name]()
    assert products.seen == {("highest", torch.float32)}
    assert torch.get_float32_matmul_precision() == "high"


def test_other_products_may_use_tf32_on_a_gpu_alone():
    with Products() as products:
        torch.nn.Linear(8, 3)(torch.randn(4, 8))
    assert products.seen == {("high", torch.float32)}
    torch.set_float32_matmul_precision("highest")
    allow_tf32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_full_precision_lasts_until_the_last_thread_leaves():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with full_precision(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_precision(torch.device("cpu")):
        thread.start()
        assert inside.wait(10)
    assert torch.get_float32_matmul_precision() == "highest"  # the other thread still computes
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"
