"""Each flag of ``vab retrieve`` and ``vab classify`` changes what is found as it says."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flags import batches_seen, each_flag, flip
from small_media import tone, video
from tasks_help import saved, small_backbone
from tone_shards import LABELS, short_spec, write_shards
from vab.commands.classify import classify
from vab.commands.retrieve import retrieve
from vab.data.media.write import write_wav
from vab.evaluation.embedding import embed_file, load_encoders
from vab.frozen.codec import load_codec
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, load_task

SECONDS = short_spec().segment_seconds
CPU = torch.device("cpu")


def network(seed):
    """An untrained backbone, of weights of its own."""
    backbone = small_backbone()
    backbone.set_codebooks(load_codec("tiny").codebooks())
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return backbone


class Retrieve:
    """Measures 20 records, and searches them with a video, by an untrained alignment."""

    def __init__(self, folder, shards):
        self.folder, self.shards = folder, shards
        self.model = saved(AlignTask(network(0), embedding_dim=8), folder / "align.ckpt")
        self.clip = video(folder / "media" / "clip.mp4", SECONDS, seed=1)
        video(folder / "media" / "other.mp4", SECONDS, seed=2)
        self.kept = str(folder / "kept.npz")
        self.usual = self.run(save_embeddings=self.kept)

    def run(self, **changes):
        settings = {"checkpoint": self.model, "data": str(self.shards / "val"), "device": "cpu"}
        return retrieve(**{name: value for name, value in (settings | changes).items() if value is not None})

    def nearest(self, by):
        """Cosines of all records with the clip, as (by whose side, of which side), the highest first."""
        task = load_task(self.model)
        encoders = load_encoders(task.spec, CPU, audio=True, video=True)
        query = embed_file(task, encoders, Path(self.clip), by).double()
        with np.load(self.kept) as content:
            rows = torch.from_numpy(content["video" if by == "audio" else "audio"]).double()
        return (rows @ query / rows.norm(dim=1) / query.norm()).sort(descending=True).values.tolist()

    def checkpoint(self):
        other = saved(AlignTask(network(1), embedding_dim=8), self.folder / "other.ckpt")
        assert self.run(checkpoint=other)["figures"] != self.usual["figures"]

    def data(self):
        assert (self.usual["N"], self.run(data=str(self.shards / "train"))["N"]) == (20, 48)

    def media(self):
        hits = self.run(data=None, media=str(self.folder / "media"), query=self.clip)
        assert {hit.name for hit in hits} == {"clip.mp4", "other.mp4"}

    def embeddings(self):
        rows = np.random.default_rng(0).standard_normal((2, 5, 8))
        np.savez(self.folder / "five.npz", keys=np.array(list("abcde")), audio=rows[0], video=rows[1])
        assert self.run(checkpoint=None, data=None, embeddings=str(self.folder / "five.npz"))["N"] == 5

    def pair(self, **changes):
        """Metrics of six random keys of two files; with another side where its name is given the number of its rows."""
        rows = np.random.default_rng(0).standard_normal((3, 6, 4))
        for number, side in enumerate(("audio", "video")):
            np.savez(self.folder / f"{side}.npz", keys=np.array(list("abcdef")), rows=rows[changes.get(side, number)])
        sides = {side: str(self.folder / f"{side}.npz") for side in ("audio", "video")}
        return self.run(checkpoint=None, data=None, **sides)["figures"]

    def audio(self):
        assert self.pair(audio=2) != self.pair()

    def video(self):
        assert self.pair(video=2) != self.pair()

    def query(self):
        hits = self.run(query=self.clip, top=20)
        assert [hit.cosine for hit in hits] == pytest.approx(self.nearest("video"), abs=1e-5)

    def query_by(self):
        hits = self.run(query=self.clip, query_by="audio", top=20)
        assert [hit.cosine for hit in hits] == pytest.approx(self.nearest("audio"), abs=1e-5)
        assert self.nearest("audio") != pytest.approx(self.nearest("video"), abs=1e-2)

    def top(self):
        assert [len(self.run(query=self.clip, top=top)) for top in (3, 4)] == [3, 4]

    def out(self):
        self.run(out=str(self.folder / "figures.json"))
        assert json.loads((self.folder / "figures.json").read_text())["figures"] == self.usual["figures"]

    def save_embeddings(self):
        with np.load(self.kept) as content:
            assert content["audio"].shape == content["video"].shape == (20, 8)

    def page(self):
        self.run(query=self.clip, top=2, page=str(self.folder / "page.html"))
        assert (self.folder / "page.html").read_text().count("<li>") == 2

    def listed(self, *more, keys=("tone0", "tone1", "tone2", "tone3")):
        """A list of keys, with classes, and the flags to read it."""
        path = self.folder / "list.csv"
        lines = [f"{key},{'ab'[n % 2]},tone{n + 9}" for n, key in enumerate([*keys, *more])]
        path.write_text("\n".join(["name,kind,other", *lines]))
        return {"keys": str(path), "key_column": "name"}

    def keys(self):
        assert self.run(**self.listed())["N"] == 4

    def key_column(self):
        galleries = [self.run(**self.listed() | {"key_column": name})["gallery_sha256"] for name in ("name", "other")]
        assert galleries[0] != galleries[1]

    def class_column(self):
        with pytest.raises(UserError, match="kinds"):
            self.run(**self.listed(), class_column="kinds", per_class=2)

    def per_class(self):
        assert self.run(**self.listed(), class_column="kind", per_class=2)["per_class"] == 2
        with pytest.raises(UserError, match="3"):
            self.run(**self.listed(), class_column="kind", per_class=3)

    def expected(self):
        with pytest.raises(UserError, match="the gallery has 20 items, --expected 19"):
            self.run(expected=19)

    def on_error(self):
        flags = self.listed("tone99")
        with pytest.raises(UserError, match="of 5 keys 1 are missing"):
            self.run(**flags)
        report = self.run(**flags, on_error="skip")
        assert (report["N"], report["missing"]) == (4, 1)

    def by(self):
        folder = write_shards(self.folder / "segments", short_spec(), 12, per_source=3)
        reports = [self.run(data=str(folder), by=choice) for choice in ("recording", "segment")]
        assert [report["by"] for report in reports] == ["recording", "segment"]
        assert reports[0]["figures"]["mrr_a2v"] > reports[1]["figures"]["mrr_a2v"]

    def batch_size(self):
        batches = []
        for size in (64, 8):
            with batches_seen(AlignTask) as sizes:
                self.run(batch_size=size)
            batches.append(sizes)
        assert batches == [[20], [8, 8, 4]]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")

    def overwrite(self):
        out = self.folder / "there.json"
        out.write_text("mine")
        with pytest.raises(UserError, match="is there already"):
            self.run(out=str(out))
        self.run(out=str(out), overwrite=True)
        assert json.loads(out.read_text())["N"] == 20


@pytest.fixture(scope="module")
def retrieving(tmp_path_factory, shards):
    return Retrieve(tmp_path_factory.mktemp("retrieve_flags"), shards)


@each_flag(retrieve)
def test_retrieve(request, retrieving, flag):
    flip(request, retrieving, flag)


class Classify:
    """Looks at a sound and a folder of two, by an untrained classification."""

    def __init__(self, folder):
        self.folder = folder
        self.model = self.saved("model", 0)
        (folder / "media").mkdir()
        for name, hertz in (("a", 300.0), ("b", 2000.0)):
            write_wav(folder / "media" / f"{name}.wav", tone(SECONDS, hertz), 16_000)
        self.usual = self.run()

    def saved(self, name, seed):
        return saved(ClassifyTask(network(seed), [*LABELS, "neither"], inputs="audio"), self.folder / f"{name}.ckpt")

    def run(self, **changes):
        settings = {"checkpoint": self.model, "media": str(self.folder / "media" / "a.wav"), "device": "cpu"}
        return classify(**settings | changes)

    def checkpoint(self):
        assert self.run(checkpoint=self.saved("other", 1)) != self.usual

    def media(self):
        guesses = self.run(media=str(self.folder / "media"))
        assert [guess.file for guess in guesses] == ["a.wav", "b.wav"]
        assert guesses[0].classes == self.usual[0].classes != guesses[1].classes

    def top(self):
        assert [len(self.run(top=top)[0].classes) for top in (1, 2)] == [1, 2]

    def out(self):
        self.run(out=str(self.folder / "classes.csv"))
        with (self.folder / "classes.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert row["class_1"] == self.usual[0].classes[0][0]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")

    def overwrite(self):
        out = self.folder / "there.csv"
        out.write_text("mine")
        with pytest.raises(UserError, match="is there already"):
            self.run(out=str(out))
        self.run(out=str(out), overwrite=True)
        assert out.read_text().startswith("file,")


@pytest.fixture
def classifying(tmp_path):
    return Classify(tmp_path)


@each_flag(classify)
def test_classify(request, classifying, flag):
    flip(request, classifying, flag)


def test_the_classes_of_a_long_file_are_those_of_all_its_segments(classifying, tmp_path):
    hertz = (300.0, 1000.0, 3000.0)
    parts = [tone(SECONDS, each) for each in hertz]
    for name, sound in (*zip("012", parts, strict=True), ("whole", np.concatenate(parts))):
        write_wav(tmp_path / f"{name}.wav", sound, 16_000)
    each = [dict(classifying.run(media=str(tmp_path / f"{name}.wav"))[0].classes) for name in "012"]
    whole = dict(classifying.run(media=str(tmp_path / "whole.wav"))[0].classes)
    for label, probability in whole.items():
        assert probability == pytest.approx(np.mean([one[label] for one in each]), abs=1e-5)
    assert any(abs(whole[label] - each[0][label]) > 1e-3 for label in whole)
