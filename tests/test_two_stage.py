"""The score of two stages in bench/: what is compared with what, and that a fine stage which has learned shows it."""

import json
from functools import cached_property
from itertools import combinations
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from bench.two_stage import _distances, _versions, main, two_stage
from flags import batches_seen, each_flag, flip
from small_media import save_model
from tone_shards import short_spec, write_shards
from vab.audio import log_mel_distance
from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.frozen.codec import load_codec
from vab.generation.generator import Generator
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


def save(path, shards, levels, conditioning_levels, steps):
    """A small model of the first levels, trained for some steps."""
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=16, num_workers=0, levels=levels)
    torch.manual_seed(0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    backbone.set_codebooks(data.codebooks)
    task = PretrainTask(
        backbone,
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        warmup_steps=5,
        sampler=Sampler(guidance_scale=1.0, expected=conditioning_levels > 0),
        conditioning_levels=conditioning_levels,
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, data)
    path.parent.mkdir(exist_ok=True)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def stages(shards, tmp_path_factory):
    """Checkpoints of a coarse stage of 1 of 4 levels, which has learned little, and of a fine stage."""
    folder = tmp_path_factory.mktemp("stages")
    return (
        save(folder / "coarse" / "last.ckpt", shards, 1, 0, 1),
        save(folder / "fine" / "last.ckpt", shards, None, 1, 60),
    )


def test_what_is_heard_and_how_far_it_is(stages, shards):
    generator = Generator.load(stages[0], fine_checkpoint=stages[1])
    batch = ShardDataset(shards / "val").read(range(5))
    versions = _versions(generator, batch, seed=0)
    assert [len(codes[0]) for codes in versions.values()] == [1, 2, 4, 4, 4, 4, 1, 4]
    for name in versions.keys() - {"generated_coarse", "generated_fine"}:
        assert torch.equal(versions[name][:, :1], batch.codes[:, :1])
    assert torch.equal(versions["reference_next"], batch.codes[:, :2])
    assert torch.equal(versions["generated_fine"][:, :1], versions["generated_coarse"])
    four = [versions[f"reference_{kind}"] for kind in ("fine", "likeliest", "drawn", "random")]
    assert not any(torch.equal(a, b) for a, b in combinations(four, 2))
    assert not torch.equal(versions["generated_coarse"], batch.codes[:, :1])
    again = _versions(generator, ShardDataset(shards / "val").read([3]), seed=0)
    assert all(torch.equal(again[name][0], codes[3]) for name, codes in versions.items())
    codec = load_codec("tiny")
    expected = log_mel_distance(codec.decode(batch.codes[:, :1]), codec.decode(batch.codes), 16000)[:, 0]
    torch.testing.assert_close(_distances(codec, batch.codes[:, :1], batch), expected.double(), atol=1e-4, rtol=1e-4)
    assert not _distances(codec, batch.codes, batch).any()


def test_padding_is_not_heard(tmp_path):
    batch = ShardDataset(write_shards(tmp_path / "ragged", short_spec(), 4, ragged=True)).read([0, 3])
    assert batch.steps.tolist() == [16, 16]
    other = batch.codes.clone()
    other[..., 16:] = 0
    assert not _distances(load_codec("tiny"), other, batch).any()


def test_a_fine_stage_that_has_learned_brings_the_sound_nearer(stages, shards, capsys):
    coarse, fine = stages
    main(["--coarse", coarse, "--fine", fine, "--data", str(shards / "val"), "--batch_size", "8"])
    printed = capsys.readouterr().out
    result = json.loads(Path(fine).with_name("two_stage.json").read_text())
    assert result["records"] == 20
    distance = {name: mean for name, (mean, _) in result["distance"].items()}
    assert distance["reference_fine"] < distance["reference_coarse"] < distance["reference_random"]
    for kind in ("fine", "likeliest", "drawn", "random"):
        gain = distance["reference_coarse"] - distance[f"reference_{kind}"]
        assert result["gain"][f"reference_{kind}"][0] == pytest.approx(gain)
    assert result["nearer"]["reference_fine"] > 0.5 > result["nearer"]["reference_random"]
    for mean, error in result["distance"].values():
        assert f"{mean:.4f} +- {error:.4f}" in printed


def test_models_and_shards_that_do_not_belong_together_are_refused(stages, shards, tmp_path):
    coarse, fine = stages
    data = str(shards / "val")
    with pytest.raises(UserError, match="num_records"):
        two_stage(coarse, fine, data, num_records=1)
    with pytest.raises(UserError, match="is no fine stage"):
        two_stage(coarse, coarse, data)
    other = write_shards(tmp_path / "one", short_spec(), 1)
    with pytest.raises(UserError, match="no standard error of one"):
        two_stage(coarse, fine, str(other))


def test_a_mistake_is_one_line(stages, shards, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--coarse", stages[0], "--fine", stages[1], "--data", str(shards / "val"), "--num_records", "1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: need num_records of 2 or more")


class TwoStage:
    """Scores untrained stages of two and two levels on four records."""

    def __init__(self, folder):
        self.folder = folder
        spec = short_spec()
        dataset = ShardDataset(write_shards(folder / "four", spec, 4))
        write_shards(folder / "three", spec, 3, seed=1)
        first = ShardDataset(folder / "four", levels=2)
        self.coarse_models, self.fine_models = [], []
        for seed in (0, 1):
            for models, levels, given in ((self.coarse_models, first, 0), (self.fine_models, dataset, 2)):
                path = folder / f"{seed}{given}" / "last.ckpt"
                more = {"conditioning_levels": given} if given else {}
                models.append(save_model(path, levels.spec, levels.codebooks, seed=seed, **more))

    def run(self, **changes):
        settings = {
            "coarse": self.coarse_models[0], "fine": self.fine_models[0], "data": str(self.folder / "four"),
            "device": "cpu",
        }  # fmt: skip
        return two_stage(**settings | changes)

    @cached_property
    def usual(self):
        return self.run()

    def coarse(self):
        changed = self.run(coarse=self.coarse_models[1]).distance
        assert changed["generated_coarse"] != self.usual.distance["generated_coarse"]
        assert changed["reference_coarse"] == self.usual.distance["reference_coarse"]

    def fine(self):
        changed = self.run(fine=self.fine_models[1]).distance
        assert changed["reference_fine"] != self.usual.distance["reference_fine"]

    def data(self):
        assert (self.usual.records, self.run(data=str(self.folder / "three")).records) == (4, 3)

    def num_records(self):
        assert self.run(num_records=2).records == 2

    def batch_size(self):
        batches = []
        for size in (32, 2):
            with batches_seen(Backbone) as sizes:
                self.run(batch_size=size)
            batches.append(max(sizes))
        assert batches == [8, 4]  # guidance doubles them

    def seed(self):
        changed = self.run(seed=1).distance
        assert changed["reference_random"] != self.usual.distance["reference_random"]
        assert changed["generated_coarse"] != self.usual.distance["generated_coarse"]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    return TwoStage(tmp_path_factory.mktemp("two_stage_flags"))


@each_flag(two_stage)
def test_each_flag_of_two_stage(request, staging, flag):
    flip(request, staging, flag)
