"""`--trainer.deterministic true` does not raise: no operation that has no deterministic kernel on GPUs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tasks_help import small_backbone
from vab.frozen.loading import load_codec
from vab.metrics.classification import Classification
from vab.metrics.kernel import median_bandwidth
from vab.tasks import PretrainTask
from vab.tokens.noise import record_keys
from vab.tokens.sampler import Sampler


class OnGpu(TorchDispatchMode):
    """Raises for what torch.use_deterministic_algorithms lists as having no deterministic kernel on GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        is_float = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        has_weights = name == "bincount" and len(args) > 1 and args[1] is not None
        if (
            name in ("kthvalue", "histc", "put_", "nll_loss2d_forward")
            or has_weights
            or (name == "cumsum" and is_float)
        ):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    with OnGpu():
        yield
    torch.use_deterministic_algorithms(False)


def test_the_mode_refuses_a_running_sum_of_floats():
    with pytest.raises(RuntimeError, match="cumsum"):
        torch.ones(3).cumsum(0)


def test_the_tiny_codec_decodes():
    codec = load_codec("tiny")
    codes = torch.randint(256, (2, 4, 50), generator=torch.Generator().manual_seed(0))
    assert codec.decode(codes).abs().max() > 0.01


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_model_generates(top_p):
    task = PretrainTask(small_backbone(), sampler=Sampler(decode_steps=3, top_p=top_p)).eval()
    task.backbone.set_codebooks(torch.randn_like(task.backbone.codebooks))
    spec = task.spec
    features = torch.randn(2, spec.num_frames, spec.feature_dim, generator=torch.Generator().manual_seed(0))
    codes = task.generate(features, record_keys(0, torch.arange(2)))
    torch.use_deterministic_algorithms(False)
    with torch.utils._python_dispatch._disable_current_modes():
        plain = task.generate(features, record_keys(0, torch.arange(2)))
    assert (codes == plain).float().mean() > 0.99


def test_metrics_are_computed():
    metric = Classification(3)
    metric.update(torch.rand(8, 3), torch.eye(3)[torch.arange(8) % 3].bool(), torch.arange(8))
    assert 0 <= metric.compute()["top_1_macro"] <= 1
    assert median_bandwidth(torch.randn(20, 4)) > 0
