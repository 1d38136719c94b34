import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vab.backbone import Backbone
from vab.callbacks import EMA, MediaLog, Meters, StepProgress, spectrogram_picture
from vab.data.datamodule import ShardDataModule
from vab.data.media import write_video
from vab.tasks import PretrainTask, load_task
from vab.tokens.decoding import Sampler


@pytest.fixture
def run(shards, tmp_path):
    """Train a small network; gives the trainer, the task and the checkpoint's path."""

    def train(*callbacks, steps=4, resume=None, logger=False, name="run", **flags):
        torch.manual_seed(0)
        data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0)
        backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
        task = PretrainTask(backbone, warmup_steps=1, schedule_steps=100, sampler=Sampler(decode_steps=2))
        saver = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[*callbacks, saver],
            logger=logger,
            use_distributed_sampler=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            **({"enable_progress_bar": False} | flags),
        )
        trainer.fit(task, data, ckpt_path=resume)
        return trainer, task, tmp_path / name / "last.ckpt"

    return train


class History(Callback):
    """The live weights after each step, and those in place while validating."""

    def __init__(self):
        self.live, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.live.append(copy.deepcopy(module.backbone.state_dict()))

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(copy.deepcopy(module.backbone.state_dict()))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_ema_is_the_average_in_closed_form(run):
    history = History()
    _, task, checkpoint = run(history, EMA(decay=0.5), steps=4)
    name = "audio_input.weight"
    expected = history.live[0][name]
    for weights in history.live[1:]:
        expected = 0.5 * expected + 0.5 * weights[name]
    saved = torch.load(checkpoint, weights_only=True)
    torch.testing.assert_close(saved["state_dict"][f"backbone.{name}"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(saved["live_state_dict"][f"backbone.{name}"], history.live[-1][name])
    assert torch.equal(task.backbone.state_dict()[name], history.live[-1][name])  # the live weights stay in place


def test_validation_sees_the_average_and_training_goes_on_with_the_live_weights(run):
    history, plain = History(), History()
    run(history, EMA(decay=0.5), steps=4)
    run(plain, steps=4, name="plain")
    assert not same(history.validated[-1], history.live[-1])
    assert same(plain.validated[-1], plain.live[-1])
    assert same(history.live[-1], plain.live[-1])


def test_a_run_that_ends_before_the_average_starts_keeps_its_trained_weights(run):
    history = History()
    _, task, checkpoint = run(history, EMA(decay=0.5, start_step=100), steps=4)
    saved = torch.load(checkpoint, weights_only=True)
    assert "live_state_dict" not in saved
    assert same({f"backbone.{k}": v for k, v in history.live[-1].items()},
                {k: v for k, v in saved["state_dict"].items() if k.startswith("backbone.")})  # fmt: skip
    assert same(task.backbone.state_dict(), history.live[-1])
    assert same(history.validated[-1], history.live[-1])


@pytest.mark.parametrize("start_step", [0, 3])
def test_a_resumed_run_has_the_same_average_bit_for_bit(run, start_step):
    _, _, whole = run(EMA(decay=0.9, start_step=start_step), steps=6, name="whole")
    _, _, half = run(EMA(decay=0.9, start_step=start_step), steps=2, name="half")
    _, _, resumed = run(EMA(decay=0.9, start_step=start_step), steps=6, resume=half, name="resumed")
    first, second = torch.load(whole, weights_only=True), torch.load(resumed, weights_only=True)
    assert same(first["state_dict"], second["state_dict"])
    assert same(first["live_state_dict"], second["live_state_dict"])
    assert first["ema_updates"] == second["ema_updates"] == 6 - start_step


def test_both_sets_of_weights_load_by_name(run):
    _, _, checkpoint = run(EMA(decay=0.5), steps=4)
    saved = torch.load(checkpoint, weights_only=True)
    name = "backbone.audio_input.weight"
    assert torch.equal(load_task(checkpoint).state_dict()[name], saved["state_dict"][name])
    assert torch.equal(load_task(checkpoint, weights="live").state_dict()[name], saved["live_state_dict"][name])


def test_tensorboard_holds_losses_meters_pictures_and_sound(run, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    frames = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    tone = 0.5 * np.sin(np.arange(10_240) / 5).astype(np.float32)
    write_video(tmp_path / "tone0.mp4", frames, 12.5, tone, 16_000)  # the file of the first record
    media_log = MediaLog(num_records=2, media=str(tmp_path))
    run(EMA(decay=0.5), media_log, Meters(), logger=logger, log_every_n_steps=2)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "train/gradient_norm", "meters/learning_rate"} <= scalars
    assert {"meters/positions_per_second", "meters/data_wait_share"} <= scalars
    assert {f"val/codes/loss_level_{level}" for level in range(4)} <= scalars
    assert {f"train/codes/accuracy_level_{level}" for level in range(4)} <= scalars
    assert any(name.startswith("val/codes/loss_hidden_") for name in scalars)
    media = {"codec_round_trip/0", "codec_round_trip/1", "generated/0", "generated/1"}
    assert media <= set(events.Tags()["audio"])
    assert media <= set(events.Tags()["images"])
    assert "reference/0" in events.Tags()["audio"]
    assert "reference/1" not in events.Tags()["audio"]  # its file is not there
    heard = events.Audio("generated/0")
    assert [event.step for event in heard] == [2, 4]
    assert heard[0].sample_rate == 16_000
    assert [event.step for event in events.Audio("codec_round_trip/0")] == [2]
    rates = [event.value for event in events.Scalars("meters/positions_per_second")]
    assert all(rate > 0 for rate in rates)
    assert len(events.Scalars("train/gradient_norm")) == 2


def test_off_a_terminal_progress_is_a_line_per_validation(run, capsys):
    run(StepProgress(), steps=4, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "val/loss" in lines[-1]


def test_a_spectrogram_picture_shows_low_frequencies_at_the_bottom():
    seconds = torch.arange(16_000) / 16_000
    picture = spectrogram_picture(0.5 * torch.sin(2 * torch.pi * 200 * seconds), 16_000)
    assert picture.shape[0] == 3
    assert picture.min() >= 0
    assert picture.max() <= 1
    brightness = picture.sum(0).mean(1)
    assert brightness.argmax() > len(brightness) * 0.75
