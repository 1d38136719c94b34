"""The count of floating-point operations against torch's own."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tasks_help import small_backbone
from tone_shards import short_spec
from vab.losses import masked_code_loss
from vab.tasks import AlignTask, ClassifyTask, PretrainTask

B = 3


def counted(work):
    """FLOPs as torch counts them, attention as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def batch():
    spec = short_spec()
    codes = torch.randint(0, spec.codebook_size, (B, spec.num_codebooks, spec.num_steps))
    return codes, torch.randn(B, spec.num_frames, spec.feature_dim)


@pytest.fixture(params=["rotary", "alibi"])
def backbone(request):
    backbone = small_backbone(positions=request.param, feedforward_ratio=3)
    backbone.set_codebooks(torch.randn_like(backbone.codebooks))
    return backbone


def test_a_step_of_pretraining(backbone, batch):
    codes, features = batch
    mask = torch.rand(codes.shape) < 0.5
    work = lambda: masked_code_loss(backbone(codes, features, mask), codes, mask).backward()  # noqa: E731
    assert PretrainTask(backbone).step_flops(B) == counted(work)


def test_a_step_of_alignment_but_for_the_projections(backbone, batch):
    codes, features = batch
    task = AlignTask(backbone)

    def work():
        visual, audio = backbone.encode(features=features)[0], backbone.encode(codes=codes)[1]
        (visual.sum() + audio.sum()).backward()

    assert task.step_flops(B) == counted(work)


@pytest.mark.parametrize("inputs", ["audio_video", "audio", "video"])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_of_classification_but_for_the_classifier(inputs, freeze, backbone, batch):
    codes, features = batch
    task = ClassifyTask(backbone, ["a", "b"], inputs=inputs, freeze_backbone=freeze)
    given = {"codes": None if inputs == "video" else codes, "features": None if inputs == "audio" else features}

    def work():
        found = [x for x in backbone.encode(**given) if x is not None]
        if not freeze:
            sum(x.sum() for x in found).backward()

    assert task.step_flops(B) == counted(work)
