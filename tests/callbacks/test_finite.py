"""Runs whose loss or gradients stop being finite."""

import functools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from command_line import parsed
from fit_runs import PYTHON, flags, said, start, status
from ranks import in_ranks
from tasks_help import quiet_trainer, small_backbone
from vab.callbacks import EMA, Checkpoints, FiniteCheck, NonFiniteError
from vab.cli import main
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import PretrainTask, load_task


class Spoil(Callback):
    """Puts a value into a step's batch or gradients; on one rank, where there are several."""

    def __init__(self, what, step, value=float("nan"), rank=0):
        self.what, self.step, self.value, self.rank = what, step, value, rank

    def is_due(self, trainer):
        return self.step in (None, trainer.global_step + 1) and trainer.global_rank == self.rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.what == "the loss" and self.is_due(trainer):
            batch.features.fill_(self.value)

    def on_after_backward(self, trainer, module):
        if self.what == "the gradient norm" and self.is_due(trainer):
            next(module.parameters()).grad.fill_(self.value)


def fit(folder, shards, *callbacks, steps=5, fused=True, **settings):
    """A short run that saves each step; gives the trainer."""
    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    task = PretrainTask(small_backbone(data.spec), optimizer, warmup_steps=2, schedule_steps=50)
    keep = Checkpoints(str(folder), "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, enable_checkpointing=True, callbacks=[*callbacks, keep],
        log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(task, data)
    return trainer


def live(folder, step):
    content = torch.load(folder / f"step={step}.ckpt", weights_only=True)
    return content.get("live_state_dict", content["state_dict"])


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("what", ["the loss", "the gradient norm"])
def test_a_run_ends_at_the_first_step_that_is_not_finite(what, shards, tmp_path):
    last = tmp_path / "last.ckpt"
    with pytest.raises(NonFiniteError) as stopped:
        fit(tmp_path, shards, EMA(0.9), Spoil(what, 3), FiniteCheck())
    words = f"{what} of step 3 is not finite: the run ends, its last good checkpoint is {last}; lower"
    assert str(stopped.value).startswith(words)
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 2
    assert all(
        weight.isfinite().all() for name in ("state_dict", "live_state_dict") for weight in content[name].values()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("what", ["the loss", "the gradient norm"])
def test_a_step_that_is_not_finite_is_skipped_by_choice(what, fused, shards, tmp_path):
    trainer = fit(tmp_path, shards, Spoil(what, 3), FiniteCheck("skip"), fused=fused, gradient_clip_val=1.0)
    assert not same(live(tmp_path, 1), live(tmp_path, 2))
    assert same(live(tmp_path, 2), live(tmp_path, 3))
    assert not same(live(tmp_path, 3), live(tmp_path, 4))
    moments = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in moments.values()} == {4}
    assert trainer.global_step == 5
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_a_run_that_skips_for_ever_ends(shards, tmp_path):
    with pytest.raises(NonFiniteError, match="the loss of step 1 is not finite"):
        fit(tmp_path, shards, Spoil("the loss", None), FiniteCheck("skip"), steps=200)


def of_rank(action, folder, shards):
    settings = {"devices": 2, "strategy": "ddp"}
    if action == "stop, scaled":
        settings |= {"plugins": [half_precision()], "fused": False}
    if action != "skip":
        with pytest.raises(NonFiniteError, match="the loss of step 3"):
            fit(folder, shards, Spoil("the loss", 3, rank=1), FiniteCheck(), **settings)
    else:
        trainer = fit(folder, shards, Spoil("the loss", 3, rank=1), FiniteCheck("skip"), **settings)
        assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.ddp
@pytest.mark.parametrize("action", ["stop", "skip", "stop, scaled"])
def test_all_ranks_decide_alike(action, shards, tmp_path):
    in_ranks(2, of_rank, action, tmp_path, shards)
    if action == "skip":
        assert same(live(tmp_path, 2), live(tmp_path, 3))
        assert not same(live(tmp_path, 3), live(tmp_path, 4))
    else:
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_loss_that_is_not_finite_makes_gradients_nan_for_all_ranks_to_see(shards, monkeypatch):
    task = PretrainTask(small_backbone())
    task.trainer = quiet_trainer()
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    weight = next(task.parameters())
    task.take_loss(weight.sum() + torch.inf).backward()
    assert weight.grad.isnan().all()
    assert not task.step_loss.isfinite()


def half_precision():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))


def test_infinite_gradients_of_a_scaled_loss_are_the_scalers_to_skip(shards, tmp_path):
    spoil = Spoil("the gradient norm", 3, float("inf"))
    fit(tmp_path, shards, spoil, FiniteCheck(), fused=False, plugins=[half_precision()])
    assert same(live(tmp_path, 2), live(tmp_path, 3))
    assert not same(live(tmp_path, 3), live(tmp_path, 4))


def test_a_loss_scale_that_vanishes_ends_the_run(shards, tmp_path):
    spoil = Spoil("the gradient norm", None, float("inf"))
    with pytest.raises(NonFiniteError, match="the gradient norm of step 29 is not finite"):
        fit(tmp_path, shards, spoil, FiniteCheck(), steps=40, fused=False, plugins=[half_precision()])


class SpoilAverage(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            (average,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))
            average.weights[0].fill_(float("inf"))


def test_an_average_that_is_not_finite_is_not_saved(shards, tmp_path):
    with pytest.raises(NonFiniteError, match="a weight of step 3 is not finite"):
        fit(tmp_path, shards, EMA(0.9), SpoilAverage(), FiniteCheck())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.fixture(scope="module")
def diverged(shards, tmp_path_factory):
    """A checkpoint as a run that has become NaN left it."""
    folder = tmp_path_factory.mktemp("diverged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*flags(shards, "run", batch_size=8, steps=2, every=2)])
    content = torch.load(folder / "runs/run/version_0/checkpoints/last.ckpt", weights_only=True)
    for name in ("state_dict", "live_state_dict"):
        content[name]["backbone.audio_input.weight"].fill_(float("nan"))
    torch.save(content, folder / "nan.ckpt")
    return folder / "nan.ckpt"


@pytest.mark.parametrize("use", ["export", "init_from", "resume", "validate"])
def test_weights_that_are_not_finite_are_refused(use, diverged, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit_again = flags(shards, "run", batch_size=8, steps=4)
    arguments = {
        "export": ["export", f"--checkpoint={diverged}", "--out=model"],
        "init_from": [*fit_again, f"--model.init_from={diverged}"],
        "resume": [*fit_again, f"--ckpt_path={diverged}"],
        "validate": ["validate", *fit_again[1:], f"--ckpt_path={diverged}"],
    }[use]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    words = f"weights of {diverged} are not finite, backbone.audio_input.weight the first: its run diverged; give an"
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "model").exists()


def test_what_is_finite_loads(diverged):
    assert load_task(diverged.parent / "runs")


def test_vab_fit_says_so_in_a_line_and_ends_with_status_4(shards, tmp_path):
    command = [*PYTHON, "vab.cli", *flags(shards, "run", steps=8, every=8), "--model.optimizer.lr=1e30"]
    assert status(start(tmp_path, "run", command)) == 4
    (words,) = (line for line in said(tmp_path, "run").splitlines() if line.startswith("error: the "))
    assert "is not finite: the run ends, it has saved no checkpoint; lower --model.optimizer.lr" in words
    assert "Traceback" not in said(tmp_path, "run")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_skipping_is_chosen_on_the_command_line(shards, capsys):
    choice = ["--trainer.callbacks+=vab.callbacks.FiniteCheck", "--trainer.callbacks.action=skip"]
    chosen = parsed([*flags(shards, "run"), *choice], capsys)["trainer"]["callbacks"][-1]
    assert chosen == {"class_path": "vab.callbacks.FiniteCheck", "init_args": {"action": "skip"}}
