"""The score of a model: which video is given, and what is printed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from tone_shards import short_spec
from vab.backbone import Backbone
from vab.commands.extract import extract
from vab.data.reading.dataset import ShardDataset
from vab.demo.score import CONDITIONS, Events, Score, _with_video, measure, print_score, score
from vab.demo.world import write_world
from vab.frozen.batches import decode_sounds
from vab.generation.generator import Generator
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of a few demo segments, and an untrained model."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", num_train=24, num_val=1, num_workers=0)
    extract(
        str(folder / "videos" / "train.csv"), str(folder / "shards"), segment_seconds=4.0, video_fps=8.0, num_workers=0
    )
    dataset = ShardDataset(folder / "shards")
    torch.manual_seed(0)
    backbone = Backbone(dataset.spec, dim=16, num_heads=1, num_modality_layers=1, num_joint_layers=1)
    backbone.set_codebooks(dataset.codebooks)
    task = PretrainTask(backbone, sampler=Sampler(decode_steps=1))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder


def test_the_score_of_an_untrained_model_is_chance(world, capsys):
    result = score(str(world / "last.ckpt"), str(world / "shards"), num_generated=16, batch_size=8)
    assert result.agreement["round_trip"][0] > 0.8
    assert set(result.loss) == set(CONDITIONS)
    assert all(result.agreement[video][0] < 0.4 for video in CONDITIONS)
    assert 1 / 16 <= result.chance <= 2 / 16
    assert json.loads((world / "score.json").read_text())["records"] == 24
    assert "codec round trip" in capsys.readouterr().out


def test_a_name_that_looks_like_markup_is_printed_as_it_is(capsys):
    losses = dict.fromkeys(CONDITIONS, 1.0)
    agreement = dict.fromkeys(["round_trip", *CONDITIONS], (0.5, 0.1))
    print_score(Score(8, 8, "tiny", losses, agreement, 0.1, 0.01), Path("runs/[/red]"))
    assert "runs/[/red]" in capsys.readouterr().out


def test_onsets_are_scored_against_the_true_events_beside_their_controls(world, capsys):
    result = score(str(world / "last.ckpt"), str(world / "shards"), str(world / "videos"), num_generated=8)
    onsets = result.onset_f1
    assert set(onsets) == {"real", "round_trip", *CONDITIONS, "shifted", "chance"}
    assert onsets["real"][0] > 0.8
    assert onsets["round_trip"][0] > 0.6
    assert all(onsets[name][0] < 0.6 for name in (*CONDITIONS, "shifted", "chance"))
    assert all(0 < error < 0.2 for name, (_, error) in onsets.items() if name in ("real", "round_trip", "chance"))
    assert json.loads((world / "score.json").read_text())["onset_f1"]["real"] == list(onsets["real"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "onset F1",
        "(real sound)",
        "sound shifted by 0.25 s",
        "within 100 ms",
        f"{onsets['real'][0]:.3f} +-",
    ):
        assert words in printed


def test_onsets_of_the_true_events_themselves_score_1_and_moved_ones_less(world):
    dataset = ShardDataset(world / "shards")
    events = Events(dataset, world / "videos")
    rows = list(range(len(dataset)))
    rate = dataset.spec.sample_rate
    clicks = []
    for row in rows:
        clicks.append(torch.zeros(4 * rate))
        clicks[-1][(events._true(row, 4.0).clamp(min=0.03) * rate).long()] = 1.0
    events.add("round_trip", rows, clicks, rate)
    events.add("true", rows, clicks, rate)
    found = events.f1()
    assert found["true"][0] > 0.97  # events within 50 ms of each other are one onset
    assert found["shifted"][0] < 0.7
    assert found["chance"][0] < 0.6


def test_the_videos_are_looked_for_beside_the_shards(world, capsys):
    arguments = {"num_generated": 2, "batch_size": 2}
    data = world / "demo" / "shards" / "val"
    data.parent.mkdir(parents=True)
    data.symlink_to(world / "shards")
    assert score(str(world / "last.ckpt"), str(data), **arguments).onset_f1 is None
    assert f"there is no {world / 'demo' / 'videos' / 'events.json'}; give --videos" in capsys.readouterr().err
    (world / "demo" / "videos").symlink_to(world / "videos")
    assert score(str(world / "last.ckpt"), str(data), **arguments).onset_f1
    assert "no onset F1" not in capsys.readouterr().err


def test_another_folder_as_videos_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"has no events\.json: --videos is the folder that vab demo world wrote"):
        score(str(world / "last.ckpt"), str(world / "shards"), str(tmp_path))
    (tmp_path / "events.json").write_text("{}")
    with pytest.raises(UserError, match=r"events\.json has no train/0000000\.mp4"):
        score(str(world / "last.ckpt"), str(world / "shards"), str(tmp_path))


def test_shuffled_video_is_another_records(world):
    dataset = ShardDataset(world / "shards")
    rows = [0, 1, 23]
    batch = dataset.__getitems__(rows)
    other = _with_video(dataset, batch, rows, "shuffled")
    assert torch.equal(other.codes, batch.codes)
    assert torch.equal(other.features, dataset.__getitems__([12, 13, 11]).features)
    assert _with_video(dataset, batch, rows, "true") is batch


def test_each_row_is_of_the_video_that_it_names(world):
    generator, made = Generator.load(world / "last.ckpt", device="cpu"), {}
    result = measure(
        generator, str(world / "shards"), 2, 2, keep=lambda name, _, sounds: made.setdefault(name, []).extend(sounds)
    )
    batch = ShardDataset(world / "shards").read([0, 1])
    for name, dropped in (("true", False), ("none", True)):
        codes = generator.task.generate_for(batch, 0, drop_features=dropped)
        for sound, expected in zip(made[name], decode_sounds(generator.codec, codes, batch.steps), strict=True):
            assert torch.equal(sound, expected)
    assert not torch.equal(made["none"][0], made["true"][0])
    assert len(set(result.loss.values())) == 3


def test_too_few_records_and_other_classes_are_refused(world, shards):
    with pytest.raises(UserError, match="num_generated"):
        score(str(world / "last.ckpt"), str(world / "shards"), num_generated=1)
    spec = dataclasses.asdict(short_spec())
    assert spec["num_steps"] != ShardDataset(world / "shards").spec.num_steps
    with pytest.raises(UserError, match="checkpoint and shards do not fit"):
        score(str(world / "last.ckpt"), str(shards / "val"))
