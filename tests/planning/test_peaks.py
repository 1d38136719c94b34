"""Peaks at other batch sizes, from two measurements and a line, against measurements there."""

import signal

import pytest
import torch
from lightning.pytorch import Callback

from tasks_help import small_backbone
from tone_shards import short_spec
from vab.callbacks import EMA
from vab.planning.fake_cuda import TORCH
from vab.planning.peaks import TRAINING, find_peaks
from vab.planning.rehearsal import rehearse
from vab.tasks import AlignTask, PretrainTask

pytestmark = pytest.mark.skipif(torch.__version__ < TORCH, reason=f"fake CUDA needs torch {TORCH}")

SPEC = short_spec()


@pytest.mark.parametrize("recompute", [False, True])
def test_peaks_are_linear_in_the_batch(recompute):
    def make():
        sizes = {"num_modality_layers": 1, "dropout": 0.1, "positions": "alibi"}
        return PretrainTask(small_backbone(SPEC, activation_checkpointing=recompute, **sizes))

    found = find_peaks(make, 64, "bf16-mixed", callbacks=lambda: (EMA(0.9),))
    larger = rehearse(make, 200, "bf16-mixed", callbacks=lambda: (EMA(0.9),))
    for situation in TRAINING:
        assert found.at(situation, 200) == pytest.approx(larger.peaks[situation], rel=2e-3), situation
    room = max(larger.peaks[situation] for situation in TRAINING)
    assert found.largest_batch(room * 1.003) in range(199, 203)
    assert found.largest_batch(0) == 0


def test_a_batch_of_many_parts_is_extrapolated_from_few():
    def make():
        backbone = small_backbone(SPEC, num_modality_layers=1)
        return AlignTask(backbone, embedding_dim=16, micro_batch_size=8, warmup_steps=0)

    found = find_peaks(make, 48, "bf16-mixed", at_once=8, callbacks=tuple)
    assert found.rehearsed == (16, 24)
    whole = rehearse(make, 48, "bf16-mixed", callbacks=tuple)
    for situation in TRAINING:
        assert found.at_batch[situation] == pytest.approx(whole.peaks[situation], rel=0.01), situation


def test_ctrl_c_ends_it():
    class Interrupt(Callback):
        def on_train_batch_start(self, *unused):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        rehearse(lambda: PretrainTask(small_backbone(SPEC)), 4, callbacks=lambda: (Interrupt(),))
    assert signal.getsignal(signal.SIGINT) is before
