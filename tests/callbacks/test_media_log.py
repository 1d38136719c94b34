import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.callbacks import EMA, MediaLog
from vab.callbacks.media import _health_of
from vab.data.media.write import write_video
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.frozen.batches import decode_sounds
from vab.frozen.codec import load_codec
from vab.metrics.health import audio_statistics, health, warnings_for
from vab.spec import UserError
from vab.tasks import PretrainTask, load_task
from vab.tokens.sampler import Sampler


def test_each_record_is_a_group_of_reference_round_trip_and_generated_sound(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    frames = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    tone = 0.5 * np.sin(np.arange(10_240) / 5).astype(np.float32)
    write_video(tmp_path / "tone0.mp4", frames, 12.5, tone, 16_000)  # the file of the first record
    run(EMA(decay=0.5), MediaLog(num_records=2, media=str(tmp_path)), logger=logger, log_every_n_steps=2)
    found = events(logger)
    assert sorted(found.Tags()["audio"]) == [
        *(f"record_0/{name}" for name in ("1_reference", "2_codec_round_trip", "3_generated")),
        *(f"record_1/{name}" for name in ("2_codec_round_trip", "3_generated")),  # its file is not there
    ]
    assert sorted(found.Tags()["images"]) == ["record_0/spectrograms", "record_1/spectrograms"]
    heard = found.Audio("record_0/3_generated")
    assert [event.step for event in heard] == [2, 4]
    assert heard[0].sample_rate == 16_000
    assert [event.step for event in found.Audio("record_0/2_codec_round_trip")] == [2]
    with_video, without = found.Images("record_0/spectrograms"), found.Images("record_1/spectrograms")
    assert [event.step for event in with_video] == [event.step for event in without] == [2, 4]
    assert with_video[0].height > without[0].height
    scalars = set(found.Tags()["scalars"])
    assert {f"health/entropy_level_{level}" for level in range(4)} <= scalars
    for name in ("peak", "rms_db", "silence", "longest_repeat_seconds", "share_with_warnings"):
        assert [event.step for event in found.Scalars(f"health/{name}")] == [2, 4]


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


def test_health_is_of_what_the_model_generates(run, events, tmp_path, shards):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    _, task, checkpoint = run(MediaLog(num_records=1, num_checked=5), logger=logger, steps=2)
    events = events(logger)
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
    assert "record_0/3_generated" in events.Tags()["audio"]
    assert "record_1/3_generated" not in events.Tags()["audio"]


def test_padding_has_no_part_in_health(tmp_path):
    write_shards(tmp_path / "ragged", short_spec(), 6, ragged=True)
    dataset = ShardDataset(tmp_path / "ragged")
    batch = dataset.read([0, 1])
    assert batch.steps.tolist() == [16, 32]
    codec = load_codec("tiny")
    alone, whole = decode_sounds(codec, batch.codes, batch.steps)
    assert (len(alone), len(whole)) == (16 * 320, 32 * 320)
    task = PretrainTask(Backbone(dataset.spec, dim=16, num_heads=1, num_modality_layers=1, num_joint_layers=1))
    found = _health_of(batch.codes, batch, [alone, whole], task)
    assert [sound.seconds for sound in found] == [0.32, 0.64]
    assert found[0] == health(alone, batch.codes[0, :, :16], 16_000, 50)


def test_a_fine_and_a_coarse_model_are_checked_too(shards, events, tmp_path):
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
        tags = {tag for tag in events(logger).Tags()["scalars"] if tag.startswith("health/entropy")}
        assert tags == {f"health/entropy_level_{level}" for level in range(levels or 4)}
        assert f"entropy_level_{(levels or 4) - 1}_mean" in task.audio_statistics


def test_negative_counts_are_refused():
    with pytest.raises(UserError, match="num_checked"):
        MediaLog(num_checked=-1)
