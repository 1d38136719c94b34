"""The whole chain at 86.13 codec steps per second (DAC of 44.1 kHz, random weights): no second is whole in steps."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from frozen.codec_weights import DAC44, dac_of_hub
from small_media import tone
from vab.backbone import Backbone
from vab.callbacks.generation_eval import GenerationEval
from vab.callbacks.media import MediaLog
from vab.commands.evaluate import evaluate
from vab.commands.extract import extract
from vab.commands.generate import generate
from vab.commands.sweep import sweep
from vab.data.media.segments import read_audio
from vab.data.media.write import write_video, write_wav
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.verify import verify
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler

RATE = 44_100
SECONDS = {"a": 2.0, "b": 4.0, "c": 2.7}


@pytest.mark.slow
def test_extract_train_generate_and_score(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dac_of_hub(tmp_path / "weights" / "dac_44khz", DAC44)
    for folder in ("in", "real"):
        (tmp_path / folder).mkdir()
    for number, (name, seconds) in enumerate(SECONDS.items()):
        frames = np.random.default_rng(number).integers(0, 255, (round(seconds * 16), 48, 64, 3), dtype=np.uint8)
        sound = tone(seconds, 300.0 * (number + 1), RATE)
        write_video(tmp_path / "in" / f"{name}.mp4", frames, 16, sound, RATE)
        write_wav(tmp_path / "real" / f"{name}.wav", sound, RATE)

    settings = {"segment_seconds": 2.0, "video_fps": 4.0, "min_seconds": 0.5, "num_workers": 0, "device": "cpu"}
    report = extract(str(tmp_path / "in"), str(tmp_path / "shards"), codec="dac_44khz", **settings)
    assert (report.kept, report.records) == (3, 5)
    assert verify(tmp_path / "shards") == []
    data = ShardDataset(tmp_path / "shards")
    assert (data.spec.sample_rate, data.spec.code_rate) == (RATE, 44100 / 512)
    assert (data.spec.num_steps, data.spec.num_frames, data.spec.num_codebooks) == (173, 8, 9)
    lengths = sorted(zip(data.read(range(5)).steps.tolist(), data.read(range(5)).frames.tolist(), strict=True))
    assert lengths[1:] == [(173, 8)] * 4
    assert 57 < lengths[0][0] < 64  # 0.7 s and what AAC adds

    torch.manual_seed(0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    backbone.set_codebooks(data.codebooks)
    task = PretrainTask(backbone, sampler=Sampler(decode_steps=2))
    module = ShardDataModule(
        str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=2, num_workers=0, splice=1.0, roll=1.0,
        allow_tiny=True,
    )  # fmt: skip
    log = TensorBoardLogger(tmp_path / "log")
    callbacks = [MediaLog(2, str(tmp_path / "in"), num_checked=4), GenerationEval(num_records=4)]
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=log, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=module)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/kld_tiny_to_codec"] >= 0
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    generate(
        str(tmp_path / "last.ckpt"), str(tmp_path / "in"), str(tmp_path / "made"), keep="0-0.5", format="wav",
        device="cpu",
    )  # fmt: skip
    for name, seconds in SECONDS.items():
        made = read_audio(tmp_path / "made" / f"{name}.wav", RATE, 0.0, seconds + 1)
        assert made.valid_samples == pytest.approx(seconds * RATE, abs=RATE / 16)
    evaluate(str(tmp_path / "real"), str(tmp_path / "made"), str(tmp_path / "report.json"), device="cpu")
    assert json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "grid.yaml").write_text("decode_steps: [1]")
    rows = sweep(
        str(tmp_path / "last.ckpt"), str(tmp_path / "shards"), str(tmp_path / "grid.yaml"), str(tmp_path / "sweep"),
        num_records=4, device="cpu",
    )  # fmt: skip
    assert rows[0].metrics["kld_tiny"] >= 0  # the judge takes 16 kHz
