"""Each flag of ``vab sweep`` changes the table or its files as it says."""

import itertools
import json

import pytest

import tone_shards
from flags import batches_seen, each_flag, flip
from small_media import save_model
from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.commands.sweep import sweep
from vab.data.reading.dataset import ShardDataset
from vab.frozen.judges import load_judge
from vab.spec import UserError


class Sweep:
    """Tries a setting or two on six of thirteen records, with an untrained model."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tone_shards, "LABELS", load_judge("tiny").classes[3:5])
            dataset = ShardDataset(write_shards(folder / "val", short_spec(), 13))
            write_shards(folder / "more", short_spec(), 13, seed=1)
        coarse = ShardDataset(folder / "val", levels=2)
        self.model = save_model(folder / "last.ckpt", dataset.spec, dataset.codebooks)
        self.second = save_model(folder / "other.ckpt", dataset.spec, dataset.codebooks, seed=1)
        self.coarse = save_model(folder / "coarse.ckpt", coarse.spec, coarse.codebooks)
        self.fine = save_model(folder / "fine.ckpt", dataset.spec, dataset.codebooks, conditioning_levels=2)
        (folder / "grid.yaml").write_text("decode_steps: [1]\n")
        (folder / "two.yaml").write_text("decode_steps: [1, 4]\ntemperature: [0.0, 8.0]\n")
        self.usual = self.kld()

    def run(self, **changes):
        """Run the command; gives its rows and what sweep.json says."""
        settings = {
            "checkpoint": self.model, "data": str(self.folder / "val"), "grid": str(self.folder / "grid.yaml"),
            "out": str(self.folder / str(next(self.numbers))), "num_records": 6, "device": "cpu",
        } | changes  # fmt: skip
        return sweep(**settings), json.loads((self.folder / settings["out"] / "sweep.json").read_text())["settings"]

    def kld(self, **changes):
        """The divergence of the only setting."""
        return self.run(**changes)[0][0].metrics["kld_tiny"]

    def checkpoint(self):
        assert self.kld(checkpoint=self.second) != self.usual

    def data(self):
        assert self.kld(data=str(self.folder / "more")) != self.usual

    def grid(self):
        rows = self.run(grid=str(self.folder / "two.yaml"))[0]
        assert sorted(row.setting.sampler.decode_steps for row in rows) == [1, 1, 4, 4]

    def out(self):
        self.run(out=str(self.folder / "mine"))
        assert {path.name for path in (self.folder / "mine").iterdir()} == {"sweep.json", "sweep.csv", "best.yaml"}

    def num_records(self):
        assert self.run(num_records=4)[1]["records"] == 4
        assert self.kld(num_records=4) != self.usual

    def batch_size(self):
        batches = []
        for size in (16, 2):
            with batches_seen(Backbone) as sizes:
                self.run(batch_size=size)
            batches.append(max(sizes))
        assert batches == [12, 4]  # guidance doubles them

    def metric(self):
        out = str(self.folder / "sorted")
        for metric in ("kld", "fad", "seconds"):
            rows = self.run(grid=str(self.folder / "two.yaml"), metric=metric, out=out)[0]
            column = metric if metric == "seconds" else f"{metric}_tiny"
            values = [row.metrics[column] for row in rows]
            assert values == sorted(values)
            assert f"# {column} " in (self.folder / "sorted" / "best.yaml").read_text()

    def seed(self):
        assert self.kld(seed=1) != self.usual
        assert self.run(seed=1)[1]["seed"] == 1

    def judge(self):
        with pytest.raises(UserError, match="unknown judge 'nobody'"):
            self.run(judge="nobody")

    def fine_checkpoint(self):
        alone, both = self.kld(checkpoint=self.coarse), self.kld(checkpoint=self.coarse, fine_checkpoint=self.fine)
        assert alone != both

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")


@pytest.fixture(scope="module")
def sweeping(tmp_path_factory):
    return Sweep(tmp_path_factory.mktemp("sweep_flags"))


@each_flag(sweep)
def test_sweep(request, sweeping, flag):
    flip(request, sweeping, flag)
