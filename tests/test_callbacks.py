import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.callbacks import EMA, MediaLog, Meters, StepProgress, _health_of, spectrogram_picture
from vab.data.datamodule import ShardDataModule
from vab.data.media import write_video
from vab.data.records import ShardDataset
from vab.frozen.codec import load_codec
from vab.frozen.listening import sounds_of
from vab.metrics.health import audio_statistics, health, warnings_for
from vab.spec import UserError
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
    assert {f"health/entropy_level_{level}" for level in range(4)} <= scalars
    for name in ("peak", "rms_db", "silence", "longest_repeat_seconds", "share_with_warnings"):
        assert [event.step for event in events.Scalars(f"health/{name}")] == [2, 4]


def test_a_run_measures_its_training_audio_and_a_resumed_one_keeps_the_figures(run, shards):
    _, task, checkpoint = run(MediaLog())
    content = torch.load(checkpoint, weights_only=True)
    assert content["audio_statistics"] == task.audio_statistics == load_task(checkpoint).audio_statistics
    dataset, codec = ShardDataset(shards / "train"), load_codec("tiny")
    codes = dataset.read(range(len(dataset))).codes
    sounds = [health(sound[0], record, 16_000, 50) for sound, record in zip(codec.decode(codes), codes, strict=True)]
    assert task.audio_statistics == pytest.approx(audio_statistics(sounds))

    content["audio_statistics"]["rms_db_mean"] = -33.0
    torch.save(content, checkpoint)
    _, resumed, _ = run(MediaLog(), steps=6, resume=checkpoint, name="resumed")
    assert resumed.audio_statistics == content["audio_statistics"]


def test_without_the_log_nothing_is_measured(run):
    _, task, checkpoint = run()
    assert task.audio_statistics is None
    assert load_task(checkpoint).audio_statistics is None


def test_health_is_of_what_the_model_generates(run, tmp_path, shards):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    _, task, checkpoint = run(MediaLog(num_records=1, num_checked=5), logger=logger, steps=2)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    task = load_task(checkpoint)
    few = ShardDataset(shards / "val").read(range(5))
    made = task.predict_step(few, 0)["codes"]
    rebuilt = zip(load_codec("tiny").decode(made), made, strict=True)
    expected = [health(sound[0], codes, 16_000, 50) for sound, codes in rebuilt]
    silence = sum(sound.silence for sound in expected) / 5
    entropy = sum(sound.entropy[3] for sound in expected) / 5
    assert events.Scalars("health/silence")[0].value == pytest.approx(silence, rel=1e-5)
    assert events.Scalars("health/entropy_level_3")[0].value == pytest.approx(entropy, rel=1e-5)
    warned = [warnings_for(sound, task.audio_statistics) for sound in expected]
    assert events.Scalars("health/share_with_warnings")[0].value == pytest.approx(sum(map(bool, warned)) / 5)
    (text,) = events.Tensors("health/warnings/text_summary")
    words = text.tensor_proto.string_val[0].decode()
    assert warned[0]  # an untrained model's noise
    assert all(f"- record {number}: {line}" in words for number, found in enumerate(warned) for line in found)
    assert "generated/0" in events.Tags()["audio"]
    assert "generated/1" not in events.Tags()["audio"]


def test_padding_has_no_part_in_health(tmp_path):
    write_shards(tmp_path / "ragged", short_spec(), 6, ragged=True)
    dataset = ShardDataset(tmp_path / "ragged")
    batch = dataset.read([0, 1])
    assert batch.steps.tolist() == [16, 32]
    codec = load_codec("tiny")
    alone, whole = sounds_of(codec, batch.codes, batch.steps)
    assert (len(alone), len(whole)) == (16 * 320, 32 * 320)
    task = PretrainTask(Backbone(dataset.spec, dim=16, num_heads=1, num_modality_layers=1, num_joint_layers=1))
    found = _health_of(batch.codes, batch, [alone, whole], task)
    assert [sound.seconds for sound in found] == [0.32, 0.64]
    assert found[0] == health(alone, batch.codes[0, :, :16], 16_000, 50)


def test_a_fine_and_a_coarse_model_are_checked_too(shards, tmp_path):
    for name, levels, conditioning in (("coarse", 2, 0), ("fine", None, 2)):
        data = ShardDataModule(
            train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0, levels=levels
        )
        backbone = Backbone(data.spec, dim=16, num_heads=1, num_modality_layers=1, num_joint_layers=1)
        task = PretrainTask(
            backbone,
            warmup_steps=1,
            schedule_steps=9,
            sampler=Sampler(decode_steps=1),
            conditioning_levels=conditioning,
        )
        logger = TensorBoardLogger(tmp_path, name=name, default_hp_metric=False)
        trainer = Trainer(accelerator="cpu", max_steps=1, logger=logger, callbacks=[MediaLog(1, num_checked=2)],
                          use_distributed_sampler=False, enable_model_summary=False, enable_progress_bar=False,
                          enable_checkpointing=False, num_sanity_val_steps=0, val_check_interval=1)  # fmt: skip
        trainer.fit(task, data)
        logger.finalize("success")
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("health/entropy")}
        assert tags == {f"health/entropy_level_{level}" for level in range(levels or 4)}
        assert f"entropy_level_{(levels or 4) - 1}_mean" in task.audio_statistics


def test_negative_counts_are_refused():
    with pytest.raises(UserError, match="num_checked"):
        MediaLog(num_checked=-1)


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
