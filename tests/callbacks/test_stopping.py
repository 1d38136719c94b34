"""Runs that are told to end, lose a rank, or have ranks that do not agree."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from fit_runs import PYTHON, flags, last, said, same_weights, start, status, torchrun, wait_for_steps, wait_for_words
from ranks import free_port, in_ranks
from tasks_help import quiet_trainer, small_backbone
from tone_shards import short_spec, write_shards
from vab.callbacks import EMA, Checkpoints, StopOnSignal, StoppedError
from vab.callbacks.stopping import folder_of_requeued_job, requeue_folder
from vab.data.reading.datamodule import ShardDataModule
from vab.errors import ctrl_c_ends_imports
from vab.tasks import PretrainTask
from vab.training.cli import how_to_resume, is_lost_rank
from vab.training.run_folder import name_of_run

VAB = [*PYTHON, "vab.cli"]
MANY = 100_000
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


class Signal(Callback):
    """Sends the process a signal in the middle of a batch."""

    def __init__(self, batch, signum=signal.SIGTERM):
        self.batch, self.signum = batch, signum

    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_bit_for_bit(accumulated, shards, tmp_path):
    def fit(name, *callbacks, resume=None):
        data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
        task = PretrainTask(small_backbone(data.spec, dropout=0.1), warmup_steps=2, schedule_steps=50)
        keep = Checkpoints(dirpath=str(tmp_path / name), save_last=True, save_top_k=0)
        trainer = quiet_trainer(
            max_steps=8, max_epochs=-1, enable_checkpointing=True, limit_val_batches=0,
            accumulate_grad_batches=accumulated, callbacks=[EMA(0.9), *callbacks, StopOnSignal(), keep],
        )  # fmt: skip
        trainer.fit(task, data, ckpt_path=resume, weights_only=True)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as stopped:
        fit("cut", Signal(2 * accumulated))  # within the third step
    assert signal.getsignal(signal.SIGTERM) == before
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert str(stopped.value) == "stopped by SIGTERM after step 3"
    checkpoint = stopped.value.checkpoint
    assert Path(checkpoint) == tmp_path / "cut" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    assert same_weights(fit("whole"), fit("on", resume=checkpoint))


def stop_one_rank(shards, folder):
    """In each of two processes: the second receives a signal within its third step."""
    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
    task = PretrainTask(small_backbone(data.spec), warmup_steps=2, schedule_steps=50)
    keep = Checkpoints(dirpath=str(folder), save_last=True, save_top_k=0)
    signals = [Signal(2)] if os.environ["LOCAL_RANK"] == "1" else []
    trainer = quiet_trainer(
        max_steps=8, max_epochs=-1, enable_checkpointing=True, limit_val_batches=0, devices=2, strategy="ddp",
        callbacks=[*signals, StopOnSignal(), keep],
    )  # fmt: skip
    with pytest.raises(StoppedError, match="after step 4"):
        trainer.fit(task, data)


@pytest.mark.ddp
def test_all_ranks_stop_after_the_same_step(shards, tmp_path):
    in_ranks(2, stop_one_rank, shards, tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_line_tells_how_to_resume():
    stopped = StoppedError(signal.SIGTERM, 7, Path("runs/a b/last.ckpt"), requeued=False)
    arguments = ["fit", "--config", "x.yaml", "--ckpt_path", "old.ckpt", "--data.seed", "1", "--ckpt_path=older.ckpt"]
    assert how_to_resume(arguments, stopped) == (
        "stopped by SIGTERM after step 7; resume with: vab fit --config x.yaml --data.seed 1"
        " --ckpt_path 'runs/a b/last.ckpt'"
    )
    nothing = StoppedError(signal.SIGTERM, 7, None, requeued=False)
    assert "nothing was saved" in how_to_resume(arguments, nothing)
    back = StoppedError(signal.SIGUSR1, 7, Path("slurm_5/last.ckpt"), requeued=True)
    assert back.exit_status == 0
    assert how_to_resume(arguments, back).endswith("the job is requeued and resumes from slurm_5/last.ckpt")


def test_a_lost_rank_is_told_from_other_faults():
    gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:21323"
    assert is_lost_rank(RuntimeError(gone))
    assert is_lost_rank(torch.distributed.DistNetworkError("the server is not there"))
    assert not is_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["one process", "two processes", "torchrun"])
def test_sigterm_ends_the_command_with_a_line_and_it_goes_on_bit_for_bit(kind, shards, tmp_path):
    command = torchrun() if kind == "torchrun" else VAB
    more = [] if kind == "one process" else TWO
    process = start(tmp_path, "cut", [*command, *flags(shards, "cut", steps=MANY), *more])
    wait_for_steps(process, tmp_path, "cut", 4)
    process.terminate()  # torchrun passes it on to the ranks, as Lightning's first process does
    assert status(process) == (1 if kind == "torchrun" else 143)  # torchrun has a status of its own
    words = said(tmp_path, "cut")
    assert "stopped by SIGTERM after step " in words
    assert "--ckpt_path runs/cut/version_0/checkpoints/last.ckpt" in words
    if kind != "torchrun":  # which shows where it was itself
        assert "Traceback" not in words
    stopped = last(tmp_path, "cut")["global_step"]
    end = stopped + 3
    resume = "--ckpt_path=runs/cut/version_0/checkpoints/last.ckpt"
    # Validation is left out: where it falls is no part of the weights.
    runs = {"on": [resume], "whole": []}
    for name, extra in runs.items():
        arguments = [*flags(shards, name, steps=end, every=MANY), *more, *extra]
        assert status(start(tmp_path, name, [*VAB, *arguments])) == 0, said(tmp_path, name)
    assert same_weights(last(tmp_path, "on"), last(tmp_path, "whole"))


def press_ctrl_c(process):
    """As a terminal does it: every process of the group hears it."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["workers", "two processes", "torchrun"])
def test_ctrl_c_saves_the_step_and_the_run_goes_on_bit_for_bit(kind, shards, tmp_path):
    more = {"workers": ["--data.num_workers=2"], "two processes": TWO, "torchrun": TWO}.get(kind, [])
    command = torchrun() if kind == "torchrun" else VAB
    process = start(tmp_path, "cut", [*command, *flags(shards, "cut", steps=MANY), *more])
    wait_for_steps(process, tmp_path, "cut", 4)
    press_ctrl_c(process)
    assert status(process) == (1 if kind == "torchrun" else 130)  # torchrun has a status of its own
    words = said(tmp_path, "cut")
    assert words.count("stopping after this step; Ctrl-C again stops at once") == 1
    assert "stopped by SIGINT after step " in words
    if kind != "torchrun":  # which shows where it was itself
        assert "Traceback" not in words
    end = last(tmp_path, "cut")["global_step"] + 3
    resume = "--ckpt_path=runs/cut/version_0/checkpoints/last.ckpt"
    for name, extra in {"on": [resume], "whole": []}.items():
        arguments = [*flags(shards, name, steps=end, every=MANY), *more, *extra]
        assert status(start(tmp_path, name, [*VAB, *arguments])) == 0, said(tmp_path, name)
    assert same_weights(last(tmp_path, "on"), last(tmp_path, "whole"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_ctrl_c_does_not_wait_for_a_validation(shards, tmp_path):
    endless = ["--trainer.callbacks+=fit_runs.EndlessValidation", "--data.num_workers=2"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = start(tmp_path, "cut", [*VAB, *flags(shards, "cut"), *endless], PYTHONPATH=path)
    wait_for_words(process, tmp_path, "cut", "validating for ever")
    press_ctrl_c(process)
    wait_for_words(process, tmp_path, "cut", "Ctrl-C again stops at once")
    time.sleep(1.5)
    assert process.poll() is None
    press_ctrl_c(process)
    assert status(process, 60) == 130
    words = said(tmp_path, "cut")
    assert words.endswith("stopped\n")
    assert "Traceback" not in words


def ctrl_c_after_import_of(module, *arguments):
    """Status and words of a command that gets SIGINT when it has just imported a module; only those after it."""
    command = [sys.executable, "-X", "importtime", "-m", "vab.cli", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # Python tells of each module when it has imported it
        if line.startswith("import time:") and line.rpartition("|")[2].strip() == module:
            process.send_signal(signal.SIGINT)
            break
    else:
        pytest.fail(f"{module} was not imported")
    rest = process.stderr.read()
    return process.wait(60), [line for line in rest.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("numpy.version", ["fit"]),
        pytest.param("torch._C", ["fit"], marks=pytest.mark.slow),
        pytest.param("lightning.pytorch.cli", ["fit"], marks=pytest.mark.slow),
        pytest.param("numpy.version", ["folds", "--config", "x"], marks=pytest.mark.slow),
        pytest.param("jsonargparse", ["extract"], marks=pytest.mark.slow),
        pytest.param("torch._C", ["extract", "--media", "x", "--out", "y"], marks=pytest.mark.slow),
        pytest.param("torch._C", ["classify", "--checkpoint", "x", "--media", "y"], marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_word(module, arguments):
    """Some of them swallow an interrupt, and are broken then."""
    assert ctrl_c_after_import_of(module, *arguments) == (130, ["stopped"])


def test_ctrl_c_is_as_it_was_after_imports():
    def own(*_):
        raise AssertionError

    for handler in (signal.default_int_handler, signal.SIG_IGN, own):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with ctrl_c_ends_imports():
                assert (signal.getsignal(signal.SIGINT) is handler) == (handler is not signal.default_int_handler)
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)


def slurm_job(folder):
    """What SLURM tells the one task of a job, with a queue that writes down what it is asked."""
    queue = folder / "bin" / "scontrol"
    queue.parent.mkdir()
    queue.write_text(f'#!/bin/sh\necho "$@" >> {folder}/queue.txt\n')
    queue.chmod(queue.stat().st_mode | stat.S_IXUSR)
    return {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
        "PATH": f"{queue.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("warned", [True, False], ids=["warned", "node lost"])
def test_a_job_that_slurm_starts_again_is_one_run(warned, shards, tmp_path):
    job = slurm_job(tmp_path)
    process = start(tmp_path, "job", [*VAB, *flags(shards, "job", steps=MANY)], **job)
    wait_for_steps(process, tmp_path, "job", 8)
    (link,) = tmp_path.glob("slurm_77_*")
    checkpoints = tmp_path / "runs" / "job" / "version_0" / "checkpoints"
    assert link.resolve() == checkpoints
    if warned:
        process.send_signal(signal.SIGUSR1)
        assert status(process) == 0
        assert "the job is requeued and resumes from" in said(tmp_path, "job")
        assert (tmp_path / "queue.txt").read_text() == "requeue 77\n"
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    end = last(tmp_path, "job")["global_step"] + 3
    again = [*VAB, *flags(shards, "job", steps=end)]
    assert status(start(tmp_path, "job", again, **job, SLURM_RESTART_COUNT="1")) == 0
    assert f"job 77 was requeued: resuming the run in {checkpoints}" in said(tmp_path, "job")
    assert [path.name for path in (tmp_path / "runs" / "job").iterdir()] == ["version_0"]
    assert not link.is_symlink()
    assert status(start(tmp_path, "whole", [*VAB, *flags(shards, "whole", steps=end)])) == 0
    assert same_weights(last(tmp_path, "job"), last(tmp_path, "whole"))


def under_slurm(monkeypatch, **more):
    places = {"JOB_ID": "5", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (places | more).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_a_job_goes_on_only_when_slurm_has_started_it_again(monkeypatch, tmp_path):
    under_slurm(monkeypatch)
    folder = requeue_folder(tmp_path, "mine")
    folder.mkdir()
    assert folder_of_requeued_job(tmp_path, "mine") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert folder_of_requeued_job(tmp_path, "mine") is None  # it had saved nothing yet
    (folder / "last.ckpt").touch()
    assert folder_of_requeued_job(tmp_path, "mine") == folder == tmp_path / "slurm_5_mine"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert folder_of_requeued_job(tmp_path, "mine") is None
    assert requeue_folder(tmp_path, "mine") == tmp_path / "slurm_4_2_mine"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert folder_of_requeued_job(tmp_path, "mine") is None


def test_a_job_of_several_runs_goes_on_with_its_own(monkeypatch, tmp_path):
    under_slurm(monkeypatch, RESTART_COUNT="1")
    for run in ("first", "second"):
        requeue_folder(tmp_path, run).mkdir()
        (requeue_folder(tmp_path, run) / "last.ckpt").touch()
    assert folder_of_requeued_job(tmp_path, "second") == tmp_path / "slurm_5_second"
    with pytest.warns(UserWarning, match=r"starts a new run, because its run in .*slurm_5_second has"):
        assert folder_of_requeued_job(tmp_path, "third") is None


def test_a_run_has_a_name_by_its_settings():
    config = {"trainer": {"max_steps": 8, "logger": {"init_args": {"name": "a", "version": None}}}, "ckpt_path": None}
    name = name_of_run(config)
    longer = {"trainer": {"max_steps": 9, "logger": {"init_args": {"name": "a", "version": "v"}}}, "ckpt_path": "c"}
    assert name_of_run(longer) == name
    assert name_of_run(config | {"seed_everything": 1}) != name


@pytest.mark.parametrize("keeps", [True, False])
def test_a_job_leaves_its_state_where_it_finds_it_again(keeps, monkeypatch, shards, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol: the job is not put back
    under_slurm(monkeypatch, RESTART_COUNT="1")

    def fit(*callbacks):
        data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
        task = PretrainTask(small_backbone(data.spec), warmup_steps=2, schedule_steps=50)
        if keeps:
            callbacks = (*callbacks, Checkpoints(dirpath=str(tmp_path / "run"), save_last=True, save_top_k=0))
        settings = {"max_steps": 4, "max_epochs": -1, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = quiet_trainer(callbacks=[*callbacks, StopOnSignal("mine")], default_root_dir=tmp_path, **settings)
        trainer.fit(task, data)

    with pytest.raises(StoppedError) as stopped:
        fit(Signal(2, signal.SIGUSR1))
    assert not stopped.value.requeued
    assert stopped.value.exit_status == 128 + signal.SIGUSR1
    folder = folder_of_requeued_job(tmp_path, "mine")
    assert folder == tmp_path / ("run" if keeps else "slurm_5_mine")
    assert Path(stopped.value.checkpoint) == folder / "last.ckpt"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    fit()
    assert folder_of_requeued_job(tmp_path, "mine") is None
    assert (tmp_path / "run").exists() == keeps


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(600)
def test_a_rank_that_dies_ends_the_other_with_a_line(shards, tmp_path):
    """Two processes that the test starts itself, as a cluster does, so that nothing else ends the second."""
    ranks = []
    place = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2",
             "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    for rank in range(2):
        command = [*VAB, *flags(shards, "both", steps=MANY), *TWO]
        ranks.append(start(tmp_path, f"rank{rank}", command, RANK=str(rank), LOCAL_RANK=str(rank), **place))
    wait_for_steps(ranks[0], tmp_path, "rank0", 4)
    ranks[1].kill()
    assert status(ranks[0], seconds=60) == 2
    words = said(tmp_path, "rank0").splitlines()[-1]
    assert words.startswith("error: rank 0 lost the connection to another rank")
    assert "--ckpt_path" in words
    assert "Traceback" not in said(tmp_path, "rank0")


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["records", "accumulation"])
def test_ranks_that_do_not_agree_end_with_a_line_before_the_first_step(what, shards, tmp_path):
    for name, count in (("here", 48), ("there", 40)):
        write_shards(tmp_path / name / "train", short_spec(), count)
        write_shards(tmp_path / name / "val", short_spec(), 20, seed=1)
    place = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2",
             "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    ranks = []
    for rank in range(2):
        folder = tmp_path / ("there" if rank and what == "records" else "here")
        more = ["--trainer.accumulate_grad_batches=2"] if rank and what == "accumulation" else []
        command = [*VAB, *flags(folder, "both"), *TWO, *more]
        ranks.append(start(tmp_path, f"rank{rank}", command, RANK=str(rank), LOCAL_RANK=str(rank), **place))
    for rank, process in enumerate(ranks):
        assert status(process, seconds=200) == 2
        words = said(tmp_path, f"rank{rank}").splitlines()[-1]
        assert words.startswith("error: ranks [1] see other data than rank 0, or have other settings (")
        wanted = {"records": "40 records') != ", "accumulation": "trainer.accumulate_grad_batches: 2 != 1"}
        assert wanted[what] in words


def test_a_second_signal_changes_nothing(shards, tmp_path):
    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
    task = PretrainTask(small_backbone(data.spec), warmup_steps=2, schedule_steps=50)
    keep = Checkpoints(dirpath=str(tmp_path), save_last=True, save_top_k=0)
    settings = {"max_steps": 8, "max_epochs": -1, "enable_checkpointing": True, "limit_val_batches": 0}
    trainer = quiet_trainer(callbacks=[Signal(2), Signal(2), StopOnSignal(), keep], **settings)
    with pytest.raises(StoppedError, match="after step 3"):
        trainer.fit(task, data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
