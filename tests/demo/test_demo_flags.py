"""Each flag of ``vab demo`` changes what is written or scored as it says."""

import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest

from flags import arguments_of, batches_seen, each_flag, flip
from small_media import save_model
from vab.backbone import Backbone
from vab.commands.extract import extract
from vab.data.reading.dataset import ShardDataset
from vab.demo.score import score
from vab.demo.world import write_world
from vab.spec import UserError


class World:
    """Worlds of one segment to train on and one to validate on."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()

    def run(self, **changes):
        """Write a world; gives its events by file."""
        out = self.folder / f"world{next(self.numbers)}"
        settings = {"out": out, "num_train": 1, "num_val": 1, "num_workers": 0} | changes
        write_world(**settings)
        return json.loads((Path(settings["out"]) / "events.json").read_text())

    @cached_property
    def usual(self):
        return self.run()

    def out(self):
        self.run(out=self.folder / "mine")
        assert (self.folder / "mine" / "train.csv").is_file()

    def seed(self):
        other = self.run(seed=1)
        assert other.keys() == self.usual.keys()
        assert other != self.usual

    def num_train(self):
        assert sorted(self.run(num_train=2)) == ["train/0000000.mp4", "train/0000001.mp4", "val/1000000.mp4"]

    def num_val(self):
        assert sorted(self.run(num_val=2)) == ["train/0000000.mp4", "val/1000000.mp4", "val/1000001.mp4"]

    def num_workers(self):
        with arguments_of(ProcessPoolExecutor) as (arguments, _):
            self.run(num_workers=2)
        assert arguments[0] == 2


@pytest.fixture(scope="module")
def making(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world_flags"))


@each_flag(write_world)
def test_demo_world(request, making, flag):
    flip(request, making, flag)


class Score:
    """Scores an untrained model on three segments of a world."""

    def __init__(self, folder):
        self.folder = folder
        write_world(folder / "videos", num_train=3, num_val=2, num_workers=0)
        for part in ("train", "val"):
            extract(
                str(folder / "videos" / f"{part}.csv"), str(folder / part),
                segment_seconds=4.0, video_fps=8.0, num_workers=0, device="cpu",
            )  # fmt: skip
        dataset = ShardDataset(folder / "train")
        self.model, self.second = (
            save_model(folder / str(seed) / "last.ckpt", dataset.spec, dataset.codebooks, seed=seed) for seed in (0, 1)
        )

    def run(self, **changes):
        return score(**{"checkpoint": self.model, "data": str(self.folder / "train"), "device": "cpu"} | changes)

    @cached_property
    def usual(self):
        return self.run()

    def checkpoint(self):
        assert self.run(checkpoint=self.second).loss != self.usual.loss
        assert json.loads((self.folder / "1" / "score.json").read_text())["records"] == 3

    def data(self):
        assert (self.usual.records, self.run(data=str(self.folder / "val")).records) == (3, 2)

    def num_generated(self):
        assert (self.usual.generated, self.run(num_generated=2).generated) == (3, 2)

    def batch_size(self):
        batches = []
        for size in (32, 1):
            with batches_seen(Backbone) as sizes:
                self.run(batch_size=size, num_generated=2)
            batches.append(max(sizes))
        assert batches == [4, 2]  # guidance doubles them

    def videos(self):
        assert self.usual.onset_f1 is None
        assert self.timed().keys() > {"real", "true"}

    def timed(self, **changes):
        """F1 of onsets."""
        return self.run(videos=str(self.folder / "videos"), **changes).onset_f1

    def seed(self):
        first, second = self.timed(), self.timed(seed=1)
        assert first["real"] == second["real"]
        assert first["true"] != second["true"]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")


@pytest.fixture(scope="module")
def scoring(tmp_path_factory):
    return Score(tmp_path_factory.mktemp("score_flags"))


@each_flag(score)
def test_demo_score(request, scoring, flag):
    flip(request, scoring, flag)
