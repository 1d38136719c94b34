"""What only a GPU can show: the choice of kernels, rounding, memory, graphs. ``make gpu-check`` runs these first."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_steps import LOGGED, RECORDS, TASKS, difference, make_task, predicted_peak, random_batch, train
from bench.measure import BF16, paper_spec
from vab.backbone import Backbone
from vab.frozen.codec import load_codec
from vab.tasks import PretrainTask
from vab.tokens.noise import record_keys
from vab.tokens.sampler import Sampler

pytestmark = pytest.mark.needs_cuda
SPEC = paper_spec(2.0)


def network(positions):
    torch.manual_seed(0)
    backbone = Backbone(SPEC, dim=128, num_heads=2, num_modality_layers=1, num_joint_layers=1, positions=positions)
    backbone.set_codebooks(torch.randn_like(backbone.codebooks))
    return backbone


@pytest.mark.parametrize("name", TASKS)
def test_gradients_in_bfloat16_are_near_those_in_float32(name):
    exact, rounded = (train(make_task(name, "tiny", SPEC, 0.0, False), RECORDS, kind, 1) for kind in ("32-true", BF16))
    assert 0 < difference(rounded, exact) < 0.05


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TASKS)
def test_gradients_of_a_compiled_network_are_near(name):
    eager, compiled = (train(make_task(name, "tiny", SPEC, 0.0, kind), RECORDS, "32-true", 1) for kind in (False, True))
    assert difference(compiled, eager) < 0.01  # TF32 at most


@pytest.mark.parametrize("name", TASKS)
def test_the_host_rarely_waits(name):
    ran = train(make_task(name, "tiny", SPEC, 0.1, False), RECORDS, BF16, LOGGED + 2)
    assert ran.waits == 0
    assert ran.waits_logged <= 2


@pytest.mark.parametrize(
    ("positions", "is_short", "kernel"),
    [
        ("rotary", False, SDPBackend.FLASH_ATTENTION),
        ("rotary", True, SDPBackend.EFFICIENT_ATTENTION),
        ("alibi", False, SDPBackend.EFFICIENT_ATTENTION),
        ("alibi", True, SDPBackend.EFFICIENT_ATTENTION),
    ],
)
def test_attention_has_a_fused_kernel(positions, is_short, kernel):
    backbone, batch = network(positions).cuda(), random_batch(SPEC, RECORDS)
    valid = {"steps": batch.steps // 2, "frames": batch.frames // 2} if is_short else {}
    codes, features, hidden = (x.cuda() for x in (batch.codes, batch.features, batch.codes % 2 == 0))
    valid = {key: count.cuda() for key, count in valid.items()}
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(kernel):  # raises where that kernel cannot be used
        loss = backbone(codes, features, hidden, **valid).float().square().mean()
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_peak_memory_is_what_vab_plan_counts():
    records = 64
    ran = train(make_task("pretrain", "base", paper_spec(), 0.1, False), records, BF16, LOGGED + 2)
    assert ran.peak_bytes == pytest.approx(predicted_peak("pretrain", "base", 10.0, records), rel=0.05)


def test_a_pass_can_be_captured_as_a_graph():
    backbone, batch = network("rotary").cuda().eval(), random_batch(SPEC, RECORDS)
    codes, features = batch.codes.cuda(), batch.features.cuda()
    other, hidden = codes.flip(0), codes % 2 == 0
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = backbone(other, features, hidden)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backbone(codes, features, hidden)  # libraries start outside of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = backbone(codes, features, hidden)
        codes.copy_(other)
        graph.replay()
    torch.testing.assert_close(logits, expected)


def test_generated_codes_are_those_of_the_cpu():
    made = []
    for device in ("cpu", "cuda"):
        task = PretrainTask(network("rotary")).to(device).eval()
        features, keys = (
            random_batch(SPEC, RECORDS).features.to(device),
            record_keys(0, torch.arange(RECORDS)).to(device),
        )
        made.append(task.generate(features, keys, Sampler(decode_steps=2)).cpu())
    same = (made[0] == made[1]).double().mean()
    assert same > 0.9  # a near tie may turn out otherwise, and what follows it


def test_sound_is_coded_as_on_the_cpu():
    torch.manual_seed(0)
    waveform, coded = 0.3 * torch.randn(2, 1, 16_000), []
    for device in ("cpu", "cuda"):
        codec = load_codec("tiny", torch.device(device))
        codes = codec.encode(waveform.to(device))
        coded.append((codes.cpu(), codec.decode(codes, 16_000).cpu()))
    assert (coded[0][0] == coded[1][0]).double().mean() > 0.999
    torch.testing.assert_close(coded[0][1], coded[1][1], atol=1e-3, rtol=0)
