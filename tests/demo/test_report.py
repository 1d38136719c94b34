"""The demo's report: its controls, its page, what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from flags import batches_seen, each_flag, flip
from vab.backbone import Backbone
from vab.commands.extract import extract
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.demo.report import report
from vab.demo.report.measures import chance, classification
from vab.demo.report.page import Example, Found, page
from vab.demo.report.players import spread
from vab.demo.world import CLASSES, write_world
from vab.evaluation.embedding import embed_records
from vab.metrics.recall import match_ranks, retrieval_table
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, PretrainTask, load_task
from vab.tokens.sampler import Sampler

SIZE = {"dim": 16, "num_heads": 1, "num_modality_layers": 1, "num_joint_layers": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small world, and one-step runs of all three tasks on another of its sets."""
    folder = tmp_path_factory.mktemp("report")
    write_world(folder / "videos", num_train=16, num_val=24, num_workers=0)
    names = folder / "names.csv"
    names.write_text("\n".join(CLASSES) + "\n")
    for part in ("train", "val"):
        media, out = str(folder / "videos" / f"{part}.csv"), str(folder / part)
        extract(media, out, segment_seconds=4.0, video_fps=8.0, num_workers=0, vocabulary=str(names))
    dataset = ShardDataset(folder / "train")
    several = {"warmup_steps": 0, "multi_label": True}
    makers = {
        "pretrain": lambda network: PretrainTask(network, warmup_steps=0, sampler=Sampler(decode_steps=1)),
        "align": lambda network: AlignTask(network, warmup_steps=0),
        "classify": lambda network: ClassifyTask(network, CLASSES, **several),
        "classify_audio": lambda network: ClassifyTask(network, CLASSES, **several, inputs="audio"),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        task = make(Backbone(dataset.spec, **SIZE))
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_model_summary=False, **settings)
        data = ShardDataModule(str(folder / "train"), str(folder / "val"), batch_size=8, num_workers=0)
        trainer.fit(task, data)
        trainer.save_checkpoint(folder / name / "checkpoints" / "last.ckpt")
    return folder


def asked(folder, **changes):
    """Arguments of ``report``."""
    usual = {
        "data": str(folder / "val"),
        "videos": str(folder / "videos"),
        "out": str(folder / "page.html"),
        "pretrain": str(folder / "pretrain"),
        "align": str(folder / "align"),
        "classify": [str(folder / "classify"), str(folder / "classify_audio")],
        "num_generated": 8,
        "overwrite": True,
    }
    return usual | changes


def test_one_page_with_figures_controls_and_players(runs, capsys):
    found = report(**asked(runs))
    assert json.loads((runs / "page.json").read_text()) == json.loads(json.dumps(found))
    text = (runs / "page.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(links) >= 6 * 3 + 4
    assert all(link.startswith(("data:video/mp4;base64,", "data:image/png;base64,")) for link in links)
    assert "synthetic" in text
    assert found["retrieval"]["N"] == 24
    assert "page.html" in capsys.readouterr().out

    sounds = found["generation"]["sounds"]
    kld = {name: figures["kld_tiny"]["value"] for name, figures in sounds.items()}
    assert kld["round_trip"] < min(kld["none"], kld["other"])
    assert sounds["round_trip"]["fad_tiny"]["value"] < sounds["true"]["fad_tiny"]["value"]
    assert "fad_tiny" not in sounds["other"]
    assert sounds["true"]["kld_tiny"]["card"]["num_generated"] == 8
    classified = found["classification"]
    assert set(classified["inputs"]) == {"audio_video", "audio"}
    assert sum(classified["records_per_class"]) == 24 + found["retrieval"]["two_objects"]
    assert classified["single"] == 24 - found["retrieval"]["two_objects"]


def test_names_in_the_page_are_text_and_no_elements(runs):
    figures = report(**asked(runs))
    name = "<script>alert(1)</script>"
    figures["runs"] = {name: next(iter(figures["runs"].values())) | {"init_from": name}}
    figures["data"]["folder"] = figures["generation"]["judge"] = name
    figures["classification"]["labels"][0] = name
    text = page(figures, {name: "<svg></svg>"}, [Example(name, *"abc")], [Found(name, "a", 1, [(name, "b", True)])])
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 10
    assert '<div class="plot"><svg></svg></div>' in text


def test_ranks_in_the_page_begin_with_1_and_agree_with_what_is_shown(runs):
    found = report(**asked(runs))
    text = (runs / "page.html").read_text()
    cards = re.findall(r"came at rank (\d+)</figcaption></figure>(.*?)</div></div>", text)
    assert len(cards) == 4
    for rank, hits in cards:
        titles = re.findall(r'figcaption class="(right|wrong)">(\d)\.', hits)
        assert [number for kind, number in titles if kind == "right"] == ([rank] if int(rank) <= 3 else [])
    figures = found["retrieval"]["aligned"]
    dataset = ShardDataset(runs / "val")
    two = [len(dataset.label_names(number)) > 1 for number in range(len(dataset))]
    audio, video = embed_records(load_task(runs / "align"), dataset, range(len(dataset)), 8, torch.device("cpu"))
    order = (audio.double() @ video.double().T).argsort(1, descending=True)
    within = [number in order[number, :10].tolist() for number in range(len(dataset)) if two[number]]
    assert figures["recall_at_10_a2v_two_objects"] == pytest.approx(sum(within) / len(within))


def test_chance_is_what_random_embeddings_come_to():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 400, 16)))
    table = retrieval_table(match_ranks(rows[0], rows[1]), match_ranks(rows[1], rows[0]))
    expected = chance(400)
    assert expected["recall_at_10"] == 0.025
    assert expected["median_rank"] == 200.5
    assert float(table["recall_at_10_a2v"]) == pytest.approx(0.025, abs=0.02)
    assert float(table["median_rank_a2v"]) == pytest.approx(200.5, abs=30)
    assert float(table["mrr_v2a"]) == pytest.approx(expected["mrr"], abs=0.01)


def test_a_perfect_classifier_is_perfect_and_its_shuffled_control_is_not(runs):
    dataset = ShardDataset(runs / "val")

    class Oracle(ClassifyTask):
        def probabilities(self, codes=None, features=None, steps=None, frames=None):
            rows = self.truth[: len(codes)]
            self.truth = self.truth[len(codes) :]
            return rows

    torch.manual_seed(0)
    oracle = Oracle(Backbone(dataset.spec, **SIZE), dataset.labels)
    oracle.truth = dataset.read(range(len(dataset))).labels.float()
    figures = classification({"audio_video": oracle}, dataset, 8)["inputs"]["audio_video"]
    assert figures["map"] == 1
    assert figures["top_1"] == 1
    assert figures["map_shuffled"] < 0.5


def test_what_is_shown_is_spread_over_both_kinds(runs):
    dataset = ShardDataset(runs / "val")
    shown = spread(dataset, 6, len(dataset))
    assert len(set(shown)) == 6
    counts = [len(dataset.label_names(number)) for number in shown]
    assert counts.count(2) == 3
    assert spread(dataset, 6, 3) == [0, 1, 2]


def test_wrong_runs_and_seen_data_are_refused(runs, tmp_path):
    cases = [
        ({"align": str(runs / "pretrain")}, "is a run of PretrainTask, not of AlignTask"),
        ({"data": str(runs / "train")}, "was trained on .*: give shards that no run has seen"),
        ({"videos": str(tmp_path)}, "--videos is the folder of the CSV"),
        ({"classify": [str(runs / "classify")] * 2}, "two runs that look at audio_video"),
        ({"out": str(tmp_path / "page.txt")}, "html"),
        ({"out": str(runs / "page.html"), "overwrite": False}, "there already"),
    ]
    (runs / "page.html").touch()
    for changes, words in cases:
        with pytest.raises(UserError, match=words):
            report(**asked(runs, **changes))


def test_a_score_keeps_what_it_heard(runs):
    from vab.demo.score import CONDITIONS, measure
    from vab.generation.generator import Generator

    kept = []
    generator = Generator.load(str(runs / "pretrain"))
    found = measure(generator, str(runs / "val"), 4, 2, keep=lambda *heard: kept.append(heard))
    assert found.generated == 4
    assert {name for name, _, _ in kept} == {"round_trip", *CONDITIONS}
    assert [rows for name, rows, _ in kept if name == "true"] == [[0, 1], [2, 3]]
    assert all(len(sound) == 4 * generator.codec.sample_rate for _, _, sounds in kept for sound in sounds)
    assert dataclasses.asdict(found)["records"] == 24


class Report:
    """Pages about runs of one step; each flag gives another."""

    def __init__(self, folder, out):
        self.folder, self.place = folder, out
        out.mkdir()

    def run(self, **changes):
        return report(**asked(self.folder, out=str(self.place / "page.html"), **changes))

    def saved_again(self, name):
        """A checkpoint with other weights."""
        path = self.folder / name / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        for weights in content["state_dict"].values():
            if weights.is_floating_point():
                weights.add_(0.05 * torch.randn_like(weights))
        torch.save(content, self.place / "other.ckpt")
        return str(self.place / "other.ckpt")

    def data(self):
        with pytest.raises(UserError, match="was trained on"):
            self.run(data=str(self.folder / "train"))

    def videos(self):
        with pytest.raises(UserError, match=r"nowhere.* is not there"):
            self.run(videos="nowhere")

    def out(self):
        report(**asked(self.folder, out=str(self.place / "mine.html")))
        assert (self.place / "mine.json").is_file()

    def pretrain(self):
        losses = [self.run(**more)["generation"]["loss"] for more in ({}, {"pretrain": self.saved_again("pretrain")})]
        assert losses[0] != losses[1]

    def align(self):
        figures = [self.run(**change)["retrieval"]["aligned"] for change in ({}, {"align": self.saved_again("align")})]
        assert figures[0] != figures[1]

    def classify(self):
        assert set(self.run(classify=[str(self.folder / "classify")])["classification"]["inputs"]) == {"audio_video"}

    def num_generated(self):
        assert [self.run(num_generated=count)["generation"]["generated"] for count in (8, 6)] == [8, 6]

    def batch_size(self):
        batches = []
        for size in (32, 5):
            with batches_seen(ClassifyTask, AlignTask) as sizes:
                self.run(batch_size=size)
            batches.append(max(sizes))
        assert batches == [24, 5]

    def seed(self):
        results = [self.run(seed=seed) for seed in (0, 1)]
        assert [result["seed"] for result in results] == [0, 1]
        assert results[0]["generation"]["sounds"]["true"] != results[1]["generation"]["sounds"]["true"]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")

    def overwrite(self):
        self.run()
        with pytest.raises(UserError, match="there already"):
            self.run(overwrite=False)


@pytest.mark.slow  # each makes a page or two
@each_flag(report)
def test_demo_report(request, runs, tmp_path, flag):
    flip(request, Report(runs, tmp_path / "report"), flag)
