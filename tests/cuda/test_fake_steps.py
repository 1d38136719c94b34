"""Every task's steps on fake CUDA: devices, dtypes and what makes the host wait, without a card."""

import pytest
import torch

from tasks_help import small_backbone
from tone_shards import LABELS, short_spec
from vab.callbacks import EMA
from vab.planning.fake_cuda import TORCH, fake_cuda
from vab.planning.rehearsal import fake_batch, rehearse
from vab.tasks import AlignTask, ClassifyTask, PretrainTask
from vab.tokens.sampler import Sampler

pytestmark = pytest.mark.skipif(torch.__version__ < TORCH, reason=f"fake CUDA needs torch {TORCH}")

SPEC = short_spec()  # made here, because it reads real weights
SCHEDULE = {"warmup_steps": 1, "schedule_steps": 10}


def small(**settings):
    return small_backbone(SPEC, **({"num_modality_layers": 1} | settings))


TASKS = {
    "pretrain rotary": lambda: PretrainTask(small(dropout=0.1), **SCHEDULE),
    "pretrain alibi": lambda: PretrainTask(small(dropout=0.1, positions="alibi"), **SCHEDULE),
    "pretrain recomputed": lambda: PretrainTask(small(dropout=0.1, activation_checkpointing=True), **SCHEDULE),
    "pretrain fine": lambda: PretrainTask(small(), conditioning_levels=2, **SCHEDULE),
    "align": lambda: AlignTask(small(dropout=0.1), **SCHEDULE),
    "align in parts": lambda: AlignTask(small(dropout=0.1), micro_batch_size=2, **SCHEDULE),
    "classify": lambda: ClassifyTask(small(dropout=0.1), LABELS, head_dropout=0.1, **SCHEDULE),
    "classify audio": lambda: ClassifyTask(small(), LABELS, inputs="audio", multi_label=True, **SCHEDULE),
    "classify video": lambda: ClassifyTask(small(positions="alibi"), LABELS, inputs="video", **SCHEDULE),
    "classify frozen": lambda: ClassifyTask(small(), LABELS, freeze_backbone=True, **SCHEDULE),
}
SAMPLERS = [
    Sampler(2),
    Sampler([2, 1, 1, 1]),
    Sampler(2, guidance_scale=1.0),
    Sampler(2, top_p=0.9),
    Sampler(2, temperature=0),
    *(Sampler(2, order=order) for order in ("halton", "van_der_corput", "random")),
    *(Sampler(2, remask=remask) for remask in ("cap", "loop", "rescale")),
    Sampler(1, expected=True, guidance_scale=1.0),
]


def steps():
    for name in TASKS:
        for precision in ("bf16-mixed", "32-true", "16-mixed", "bf16-true"):
            is_quick = precision == "bf16-mixed" or name in ("pretrain alibi", "align", "classify")
            yield pytest.param(name, precision, marks=[] if is_quick else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "precision"), steps())
def test_training_and_validation_mix_no_devices_or_dtypes_and_read_no_value(name, precision):
    val_batch_size = 3 if precision == "bf16-mixed" else 0
    found = rehearse(TASKS[name], 4, precision, val_batch_size=val_batch_size, callbacks=lambda: (EMA(0.9),))
    waits = {situation: len(reads) for situation, reads in found.reads.items()}
    assert waits["whole"] == 0
    assert waits["ragged, logged"] <= 2


def generations():
    for number, sampler in enumerate(SAMPLERS):
        for precision in (torch.bfloat16, torch.float32):
            is_quick = number == 0 or precision == torch.bfloat16
            yield pytest.param(
                sampler, precision, id=f"{number}-{precision}", marks=[] if is_quick else [pytest.mark.slow]
            )


@pytest.mark.parametrize(("sampler", "precision"), generations())
def test_generation_with_every_sampler_reads_no_value(sampler, precision):
    if sampler.order in ("halton", "van_der_corput"):  # its table is computed once, on the CPU
        real = PretrainTask(small(), sampler=sampler).eval()
        real.backbone.has_codebooks = True
        real.generate(fake_batch(SPEC, 1).features, torch.arange(1))
    with fake_cuda():
        with torch.device("cuda"):
            task = PretrainTask(small(), sampler=sampler).eval()
        task.backbone.has_codebooks = True
        for ragged in (False, True):
            batch = fake_batch(task.spec, 2, ragged=ragged).to("cuda")
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                codes = task.generate(batch.features, batch.index, steps=batch.lengths[0], frames=batch.lengths[1])
            assert codes.device.type == "cuda"
            assert codes.shape == batch.codes.shape


@pytest.mark.parametrize("left", ["codes", "features", "steps", "frames"])
def test_a_tensor_that_was_left_on_the_cpu_is_found(left):
    with fake_cuda():
        with torch.device("cuda"):
            task = PretrainTask(small())
        task.backbone.has_codebooks = True
        batch = fake_batch(task.spec, 2, ragged=True)
        moved = batch.to("cuda")
        setattr(moved, left, getattr(batch, left))
        with pytest.raises(RuntimeError, match=r"two different devices|is on cpu"):
            task.trunk(moved, torch.zeros(batch.codes.shape, dtype=torch.bool, device="cuda"))


def test_reading_a_value_or_a_shape_from_the_device_is_found():
    with fake_cuda():
        x = torch.ones(3, device="cuda")
        for read in (lambda: float(x[0]), x.nonzero, lambda: x[x > 0], lambda: bool(x.any())):
            with pytest.raises(RuntimeError):
                read()


def test_torch_is_as_before_after_it():
    before = torch.nn.functional.scaled_dot_product_attention, torch.autograd.backward
    with fake_cuda():
        assert torch.autocast("cuda", torch.bfloat16)._enabled
    assert before == (torch.nn.functional.scaled_dot_product_attention, torch.autograd.backward)
    x = torch.ones(1, requires_grad=True)
    (2 * x).backward()
    assert x.grad == 2


@pytest.mark.parametrize(("keys", "copies"), [(512, 0), (510, 1)])
def test_attention_copies_a_mask_whose_rows_are_not_aligned(keys, copies):
    with fake_cuda():
        q = torch.randn(2, 4, keys, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        mask = torch.zeros(1, 4, keys, keys, device="cuda", dtype=torch.bfloat16)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        saved = out.grad_fn._saved_attn_bias
        assert saved.shape == (2, 4, keys, keys)
        assert (saved.untyped_storage()._cdata != mask.untyped_storage()._cdata) == bool(copies)
        with pytest.raises(RuntimeError, match="the attention mask is"):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.float())
        assert "Flash" in type(torch.nn.functional.scaled_dot_product_attention(q, q, q).grad_fn).__name__
