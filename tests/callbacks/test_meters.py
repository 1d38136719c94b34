import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from vab.callbacks import Meters
from vab.callbacks.meters import peak_memory


def test_speed_memory_and_the_gradient_are_logged(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run(Meters(), logger=logger, log_every_n_steps=2)
    found = events(logger)
    scalars = set(found.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "meters/learning_rate", "meters/data_wait_share"} <= scalars
    assert {f"val/codes/loss_level_{level}" for level in range(4)} <= scalars
    assert {f"train/codes/accuracy_level_{level}" for level in range(4)} <= scalars
    assert any(name.startswith("val/codes/loss_hidden_") for name in scalars)
    assert len(found.Scalars("train/gradient_norm")) == 2
    rates = [event.value for event in found.Scalars("meters/positions_per_second")]
    seconds = [event.value for event in found.Scalars("meters/seconds_per_step")]
    # A step takes 8 records of 32 codec steps and 8 frames.
    assert [rate * second for rate, second in zip(rates, seconds, strict=True)] == pytest.approx([8 * 40] * 2, rel=1e-4)
    peaks = [event.value for event in found.Scalars("meters/peak_memory_gib")]
    assert all(0.05 < peak < 200 for peak in peaks)
    assert peaks == sorted(peaks)


def test_peak_memory_of_the_process_counts_what_was_taken_and_given_back():
    before = peak_memory(torch.device("cpu"))
    ones = torch.ones(before // 4 + 2**24)  # as much again, and 64 MiB
    after = peak_memory(torch.device("cpu"))
    assert after > before + 2**25
    del ones
    assert peak_memory(torch.device("cpu")) >= after


@pytest.mark.needs_cuda
def test_peak_memory_of_a_gpu_is_that_of_its_tensors():
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory(device)
    torch.ones(2**26, device=device)
    assert peak_memory(device) - before >= 2**28
