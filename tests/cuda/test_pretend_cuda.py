"""Pretended CUDA does what a GPU does: it refuses mixed devices, and counts what makes the host wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="this torch needs a driver")
ONE_DEVICE = "Expected all tensors to be on the same device"
REFUSED = {
    "x + torch.ones(3)": ONE_DEVICE,
    "torch.ones(3).add_(x[0])": ONE_DEVICE,
    "torch.cat([x, torch.ones(3)])": ONE_DEVICE,
    "nn.Linear(3, 3)(x)": ONE_DEVICE,
    "nn.Linear(3, 3).cuda()(torch.ones(3))": ONE_DEVICE,
    "torch.stft(x.repeat(9), 8, window=torch.hann_window(8), return_complex=True)": ONE_DEVICE,
    "F.scaled_dot_product_attention(x[None], x[None], x[None], torch.ones(1, 1, device='cuda').half())": "attn_mask",
    "torch.rand(3, device='cuda', generator=torch.Generator())": "generator",
    "x.numpy()": "can't convert cuda:0",
    "np.asarray(x)": "can't convert cuda:0",
    "x.pin_memory()": "cannot pin",
}
WAITS = {
    "x[0].item()": ["item"],
    "float(x[0]) if x[0] > 0 else 0": ["item"],
    "x.tolist()": ["copy to host"],
    "x.cpu()": ["copy to host"],
    "x.to('cpu', non_blocking=True)": [],
    "torch.ones(3).copy_(x)": ["copy to host"],
    "torch.save(x, io.BytesIO())": ["copy to host"],
    "torch.ones(3).cuda()": ["copy from pageable memory"],
    "torch.ones(3).to(x, non_blocking=True)": ["copy from pageable memory"],
    "torch.ones(3).pin_memory().to(x)": ["copy from host"],
    "torch.ones(3, 2).pin_memory()[:, 0].to(x, non_blocking=True)": [],
    "torch.tensor([1.0], device='cuda')": ["copy from pageable memory"],
    "x.nonzero()": ["nonzero"],
    "x[x > 0]": ["boolean index"],
    "x[torch.tensor([0])]": ["copy from pageable memory"],
    "x.masked_fill(x > 0, 1.0)": [],
    "x.repeat_interleave(torch.ones(3, device='cuda', dtype=torch.int64))": ["repeat_interleave"],
    "torch.linalg.eigh(x[:, None] * x)": ["linalg"],
    "torch.cuda.synchronize()": ["synchronize"],
    "torch.zeros(3, device='cuda') + torch.arange(3, device='cuda') * 2 + torch.tensor(1)": [],
}
SCRIPT = """
import copy, io, json, sys
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
import pretend_cuda
pretend_cuda.install()
x = torch.zeros(3, device="cuda")
answers = {}
for inference in (False, True):
    for words in json.load(open(sys.argv[1])):
        pretend_cuda.waits.clear()
        try:
            with torch.inference_mode(inference):
                eval(words)
            error = ""
        except Exception as raised:
            error = str(raised)
        kinds = [kind.removesuffix(" elsewhere") for kind in pretend_cuda.waits.elements()]
        answers[f"{words} {inference}"] = [error, kinds]
def train(device, dtype):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(device)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 5, 8).to(device)
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(x).float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    twin.load_state_dict(net.state_dict())
    assert all(p.device.type == device for p in twin.parameters())
    return float(twin.eval()(x).sum())
z = torch.randn(3, dtype=torch.complex64)
assert torch.equal((z.cuda() * z.cuda().conj() + z.cuda().conj().imag).cpu(), z * z.conj() + z.conj().imag)
answers["trained"] = {dtype: [train("cpu", dtype), train("cuda", dtype)] for dtype in ("float32", "bfloat16")}
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    words = tmp_path_factory.mktemp("pretend") / "words.json"
    words.write_text(json.dumps([*REFUSED, *WAITS]))
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("inference", [False, True])
def test_mixed_devices_and_reading_without_a_copy_are_refused(answers, inference):
    for words, message in REFUSED.items():
        assert message in answers[f"{words} {inference}"][0], words


@pytest.mark.parametrize("inference", [False, True])
def test_waits_of_the_host_are_counted(answers, inference):
    assert {words: answers[f"{words} {inference}"] for words in WAITS} == {w: ["", kinds] for w, kinds in WAITS.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_trains_to_the_same_weights_as_on_the_cpu(answers, dtype):
    cpu, cuda = answers["trained"][dtype]
    assert cuda == pytest.approx(cpu, rel=1e-3)
