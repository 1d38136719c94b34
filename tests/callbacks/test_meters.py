import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from vab.callbacks import Checkpoints, Meters, StepProgress
from vab.callbacks.matmul_rate import known_matmul_rate, matmul_rate, precision_dtype
from vab.callbacks.meters import peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def logger(tmp_path):
    return TensorBoardLogger(tmp_path, default_hp_metric=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(found, name):
    return [event.value for event in found.Scalars(f"meters/{name}")]


def test_speed_memory_and_the_gradient_are_logged(run, events, logger):
    run(Meters(), logger=logger, log_every_n_steps=2)
    found = events(logger)
    scalars = set(found.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "meters/learning_rate", "meters/data_wait_share"} <= scalars
    assert {f"val/codes/loss_level_{level}" for level in range(4)} <= scalars
    assert {f"train/codes/accuracy_level_{level}" for level in range(4)} <= scalars
    assert any(name.startswith("val/codes/loss_hidden_") for name in scalars)
    assert "meters/mfu" not in scalars  # nobody asked for it, on a CPU
    assert len(found.Scalars("train/gradient_norm")) == 2
    seconds = values(found, "seconds_per_step")
    # A step takes 8 records of 32 codec steps and 8 frames.
    for name, each in {"records_per_second": 8, "positions_per_second": 8 * 40}.items():
        done = [rate * second for rate, second in zip(values(found, name), seconds, strict=True)]
        assert done == pytest.approx([each] * 2, rel=1e-4)
    peaks = values(found, "peak_memory_gib")
    assert all(0.05 < peak < 200 for peak in peaks)
    assert peaks == sorted(peaks)


class Slow(Callback):
    """Takes its time in validations, and in training batches."""

    def __init__(self, validation=0.0, batch=0.0):
        self.validation, self.batch = validation, batch

    def on_validation_batch_start(self, *_, **__):
        time.sleep(self.validation)

    def on_train_batch_start(self, *_, **__):
        time.sleep(self.batch)


def test_a_step_of_several_batches_counts_them_all_and_once(run, events, logger):
    run(Meters(), Slow(batch=0.02), logger=logger, steps=4, log_every_n_steps=2, accumulate_grad_batches=3)
    found = events(logger)
    assert [event.step for event in found.Scalars("meters/records_per_second")] == [1, 3]
    seconds = values(found, "seconds_per_step")
    done = [rate * second for rate, second in zip(values(found, "records_per_second"), seconds, strict=True)]
    assert done == pytest.approx([24, 24], rel=1e-4)
    assert all(second > 3 * 0.02 for second in seconds)


def test_pauses_are_no_training_time(run, capsys, tmp_path):
    meters = Meters()
    # Validation every second step, three batches of 8; a rate is logged after it and would hold it.
    saver = Checkpoints(tmp_path / "more", every_n_train_steps=1, save_top_k=1)
    begin = time.perf_counter()
    run(meters, Slow(validation=0.3), saver, steps=6, log_every_n_steps=3)
    whole = time.perf_counter() - begin
    training = float(capsys.readouterr().out.split("step 6, ")[1].split(" s ")[0])
    assert training < whole - 3 * 3 * 0.3


def test_waiting_for_data_is_told(run, events, logger, shards, monkeypatch):
    from vab.data.reading.loader import Loader

    batches = Loader.batches

    def slow(self):
        for batch in batches(self):
            time.sleep(0.6)
            yield batch

    monkeypatch.setattr(Loader, "batches", slow)
    run(Meters(), logger=logger, steps=4, log_every_n_steps=4)
    (share,) = values(events(logger), "data_wait_share")
    assert 0.5 < share < 1


def test_mfu_is_the_rate_over_the_ceiling(run, events, logger, tmp_path, capsys):
    meters = Meters(mfu=True)
    _, task, _ = run(meters, logger=logger, log_every_n_steps=2)
    found = events(logger)
    seconds = values(found, "seconds_per_step")
    (known,) = json.loads((tmp_path / "cache" / "vab" / "matmul_rates.json").read_text()).values()
    assert known == meters.ceiling
    expected = [task.step_flops(8) / second / known for second in seconds]
    assert values(found, "mfu") == pytest.approx(expected, rel=1e-4)
    assert 0 < expected[0] < 1
    out = capsys.readouterr().out
    assert "TFLOP/s of a plain float32 product" in out
    assert "4 steps to step 4" in out


def test_the_ceiling_is_measured_once_for_each_kind(tmp_path):
    cache = tmp_path / "rates.json"
    first = known_matmul_rate(CPU, torch.float32, cache)
    assert 0.2 < first / matmul_rate(1024, CPU, torch.float32) < 5
    assert known_matmul_rate(CPU, torch.float32, cache) == first
    other = known_matmul_rate(CPU, torch.bfloat16, cache)
    assert sorted(json.loads(cache.read_text()).values()) == sorted([first, other])
    cache.write_text("no json")
    assert known_matmul_rate(CPU, torch.float32, cache) > 0
    assert len(json.loads(cache.read_text())) == 1
    # A file that cannot be written is no error.
    assert known_matmul_rate(CPU, torch.float32, tmp_path / "rates.json" / "in_a_file.json") > 0


def test_precisions():
    names = {"bf16-mixed": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32, "64": torch.float64}
    assert {name: precision_dtype(name) for name in names} == names
    assert precision_dtype("transformer-engine") is None


def test_a_resumed_run_counts_its_own_steps(run, capsys):
    _, _, checkpoint = run(steps=4)
    run(Meters(), steps=7, resume=checkpoint, name="more")
    out = capsys.readouterr().out
    assert "3 steps to step 7" in out


def test_the_end_says_what_was_reached_and_where_it_is(run, capsys, tmp_path):
    best = Checkpoints(tmp_path / "kept", monitor="val/loss", save_top_k=1, save_last=True, filename="best-{step}")
    run(Meters(), best, steps=4)
    lines = capsys.readouterr().out.strip().splitlines()
    assert f"best checkpoint, val/loss {float(best.best_model_score):.4g}: {best.best_model_path}" in lines
    assert f"last checkpoint: {tmp_path / 'kept' / 'last.ckpt'}" in lines
    assert "peak memory" in lines[1]
    run(Meters(), steps=0, name="none")
    assert capsys.readouterr().out == ""


def test_the_progress_line_has_the_rates(run):
    progress, meters = StepProgress(), Meters()
    trainer, _, _ = run(meters, progress, enable_progress_bar=True, log_every_n_steps=2)
    words = progress.text(trainer)
    assert meters.text in words
    assert "records/s data " in words


PROGRAM = textwrap.dedent(
    """
    import sys, torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from vab.backbone import Backbone
    from vab.callbacks import Meters
    from vab.data.reading.datamodule import ShardDataModule
    from vab.tasks import PretrainTask

    shards, out = sys.argv[1:]
    torch.set_num_threads(1)
    data = ShardDataModule(train=shards + "/train", val=shards + "/val", batch_size=8, num_workers=0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", callbacks=[Meters(mfu=True)], logger=CSVLogger(out),
        max_steps=2, log_every_n_steps=2, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )
    task = PretrainTask(backbone, warmup_steps=1, schedule_steps=100)
    trainer.fit(task, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    done = logged["meters/records_per_second"] * logged["meters/seconds_per_step"]
    assert abs(done / data.global_batch_size - 1) < 1e-4, (done, data.global_batch_size)
    share = logged["meters/mfu"] * trainer.callbacks[0].ceiling * logged["meters/seconds_per_step"]
    assert abs(share / task.step_flops(data.global_batch_size // 2) - 1) < 1e-3, share
    """
)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(200)
def test_rates_are_of_all_ranks_together(shards, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(tmp_path / "program.py"), str(shards), str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=180, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps to step 2") == 1
    assert "of each of 2 ranks" in done.stdout


def test_peak_memory_of_the_process_counts_what_was_taken_and_given_back():
    before = peak_memory(CPU)
    ones = torch.ones(before // 4 + 2**24)  # as much again, and 64 MiB
    after = peak_memory(CPU)
    assert after > before + 2**25
    del ones
    assert peak_memory(CPU) >= after


@pytest.mark.needs_cuda
def test_peak_memory_of_a_gpu_is_that_of_its_tensors():
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory(device)
    torch.ones(2**26, device=device)
    assert peak_memory(device) - before >= 2**28


@pytest.mark.needs_cuda
def test_the_ceiling_of_a_gpu_is_above_what_a_smaller_product_reaches(tmp_path):
    device = torch.device("cuda", 0)
    torch.ones(8, 8, device=device, dtype=torch.bfloat16).mm(torch.ones(8, 8, device=device, dtype=torch.bfloat16))
    torch.cuda.synchronize()  # the first product starts CUDA
    begin = time.perf_counter()
    rate = known_matmul_rate(device, torch.bfloat16, tmp_path / "rates.json")
    assert time.perf_counter() - begin < 2
    assert rate > matmul_rate(256, device, torch.bfloat16)
