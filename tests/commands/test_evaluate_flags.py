"""Each flag of ``vab evaluate`` and ``vab compare`` changes the figures, their cards or the files as it says."""

import csv
import itertools
import json
import re
from dataclasses import asdict, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flags import arguments_of, batches_seen, each_flag, flip
from sound_folders import demo_sound, noisy, write_folder, write_sound
from vab.commands.compare import compare
from vab.commands.evaluate import evaluate
from vab.data.extract.decoders import DecodingPool
from vab.data.extract.sounds import Listening
from vab.evaluation.sides import find_folder, judge_folder
from vab.frozen.judges import load_judge
from vab.frozen.judges.tiny import TinyJudge
from vab.metrics.kernel import kernel_distance, median_bandwidth
from vab.metrics.synchrony import find_onsets
from vab.spec import UserError


class Evaluate:
    """Compares seven demo sounds with noisy ones that have an offset."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        self.originals = write_folder(folder / "real", count=7)
        self.made = write_folder(
            folder / "made", count=7, change=lambda sound, index: noisy(sound, index, 20 - 4 * index) + 0.1
        )

    def run(self, **changes):
        """Run the command; gives what it measured and the report."""
        out = self.folder / f"{next(self.numbers)}.json"
        settings = {
            "real": str(self.originals), "generated": str(self.made), "out": str(out),
            "metrics": "fad,kad,kld,inception_score", "seconds": 4.0, "num_workers": 0, "device": "cpu",
        }  # fmt: skip
        measured = evaluate(**settings | changes)
        return measured.figures, json.loads(out.read_text()) if out.exists() else None

    @cached_property
    def usual(self):
        """With no flag but those that must be."""
        return self.run()[0]

    def real(self):
        assert self.run(real=str(self.made))[0]["fad_tiny"].value < 0.1 * self.usual["fad_tiny"].value

    def generated(self):
        assert self.run(generated=str(self.originals))[0]["fad_tiny"].value < 0.1 * self.usual["fad_tiny"].value

    def out(self):
        self.run(out=str(self.folder / "mine.json"))
        assert "fad_tiny" in json.loads((self.folder / "mine.json").read_text())["figures"]

    def judges(self):
        with pytest.MonkeyPatch.context() as patch:
            (self.folder / "none").mkdir()
            for name in ("VAB_WEIGHTS", "TORCH_HOME"):
                patch.setenv(name, str(self.folder / "none"))
            patch.setenv("HF_HUB_OFFLINE", "1")
            with pytest.raises(UserError, match="vggish"):
                self.run(judges="vggish")

    def metrics(self):
        assert list(self.run(metrics="kld")[0]) == ["kld_tiny"]

    def pair(self):
        figures, report = self.run(pair="none")
        assert "kld_tiny" in self.usual
        assert "kld_tiny" not in figures
        assert report["left_out"]["kld_tiny"] == "the two sides are not paired"

    def seconds(self):
        figures = self.run(seconds=2.0)[0]
        assert figures["fad_tiny"].card.length.startswith("first 2 s")
        assert figures["fad_tiny"].value != self.usual["fad_tiny"].value

    def short(self):
        kept, padded = (self.run(short=short, seconds=8.0)[0]["fad_tiny"] for short in ("keep", "pad"))
        assert padded.card.length == "first 8 s; shorter ones followed by silence"
        assert padded.value != kept.value

    def remove_mean(self):
        figure = self.run(remove_mean=True)[0]["fad_tiny"]
        assert figure.card.mono != self.usual["fad_tiny"].card.mono == "channels mixed as ffmpeg -ac 1"
        assert figure.value != self.usual["fad_tiny"].value

    def inception_splits(self):
        figure = self.run(inception_splits=3)[0]["inception_score_tiny"]
        assert figure.details["parts"] == 3
        assert "mean over 3 shuffled parts" in figure.card.definition
        assert figure.value < self.usual["inception_score_tiny"].value
        assert figure.error == pytest.approx(figure.details["deviation_over_parts"] / 2**0.5)  # of 3 parts

    def labels(self):
        (self.folder / "labels.csv").write_text("file,labels\n" + "".join(f"s{n:02},{'ab'[n % 2]}\n" for n in range(7)))
        assert self.run(labels=str(self.folder / "labels.csv"))[1]["by_class"]["classes"] == ["a", "b"]

    def csv(self):
        self.run(csv=str(self.folder / "each.csv"))
        with (self.folder / "each.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 7

    def plots(self):
        with pytest.MonkeyPatch.context() as patch:
            titles, print_png = [], FigureCanvasAgg.print_png

            def noting(canvas, *arguments, **options):
                titles.append([axes.get_title() for axes in canvas.figure.axes])
                return print_png(canvas, *arguments, **options)

            patch.setattr(FigureCanvasAgg, "print_png", noting)
            self.run(plots=str(self.folder / "plots"))
        assert (self.folder / "plots" / "pairs_tiny.png").is_file()
        # The best pair comes first and the worst last: made with ever more noise.
        shown = [float(re.search(r"kld_tiny (\S+)", title).group(1)) for title in titles[1] if "kld_tiny" in title]
        assert len(shown) == 7
        assert shown == sorted(shown)
        assert shown[0] < shown[-1]

    def save_reference(self):
        self.run(save_reference=str(self.folder / "real.npz"))
        assert self.run(real=str(self.folder / "real.npz"))[0] == self.usual

    def on_error(self):
        folder = write_folder(self.folder / "one_bad", count=7)
        (folder / "s03.wav").write_text("no sound")
        with pytest.raises(UserError, match=r"s03\.wav"):
            self.run(generated=str(folder))
        assert self.run(generated=str(folder), on_error="skip")[0]["fad_tiny"].card.num_generated == 6

    def num_workers(self):
        with arguments_of(DecodingPool) as (arguments, _):
            self.run(num_workers=3)
        assert arguments[1] == 3

    def batch_size(self):
        batches = []
        for size in (16, 2):
            with batches_seen(TinyJudge) as sizes:
                self.run(batch_size=size, metrics="fad")
            batches.append({2, 7} & set(sizes))  # others are of the network's own check, and what is left at the end
        assert batches == [{7}, {2}]

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")

    def seed(self):
        figures = [self.run(seed=seed, inception_splits=3)[0]["inception_score_tiny"] for seed in (0, 1)]
        assert [figure.card.seed for figure in figures] == [0, 1]
        assert figures[0].value != figures[1].value

    def overwrite(self):
        out = self.folder / "there.json"
        out.write_text("mine")
        with pytest.raises(UserError, match="there already"):
            self.run(out=str(out))
        self.run(out=str(out), overwrite=True)
        assert json.loads(out.read_text())["figures"]


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory):
    return Evaluate(tmp_path_factory.mktemp("evaluate_flags"))


@each_flag(evaluate)
def test_evaluate(request, evaluating, flag):
    flip(request, evaluating, flag)


def test_a_card_counts_each_side_for_itself(evaluating):
    fewer = write_folder(evaluating.folder / "fewer", count=5)
    card = evaluating.run(generated=str(fewer), pair="none")[0]["fad_tiny"].card
    assert (card.num_real, card.num_generated, card.num_real_rows, card.num_generated_rows) == (7, 5, 7, 5)


def test_kad_takes_its_bandwidth_from_the_real_side(evaluating):
    judge, listening = load_judge("tiny"), Listening((16_000,), 4.0, "keep", False)
    settings = {"num_workers": 0, "batch_size": 16, "on_error": "stop", "title": ""}
    real, made = (
        judge_folder(find_folder(str(folder)), [judge], listening, **settings).outputs["tiny"].embedding
        for folder in (evaluating.originals, evaluating.made)
    )
    figure = evaluating.usual["kad_tiny"]
    assert figure.details["bandwidth"] == pytest.approx(float(median_bandwidth(real)), rel=1e-5)
    assert figure.details["bandwidth"] != pytest.approx(float(median_bandwidth(made)), rel=0.05)
    assert figure.value == pytest.approx(float(kernel_distance(real, made, median_bandwidth(real))), rel=1e-4)


def test_onsets_are_those_of_the_sound_without_its_padding(tmp_path):
    short = demo_sound(3)[:9000]
    (tmp_path / "a").mkdir()
    write_sound(tmp_path / "a" / "x.wav", short)
    settings = {"num_workers": 0, "batch_size": 4, "on_error": "stop", "title": ""}
    (heard,) = judge_folder(
        find_folder(str(tmp_path / "a")), [load_judge("tiny")], Listening((16_000,), 10.0, "pad", False), **settings
    ).onsets
    padded = find_onsets(torch.from_numpy(np.pad(short, (0, 160_000 - len(short)))), 16_000)
    assert torch.equal(heard, find_onsets(torch.from_numpy(short), 16_000))
    assert not torch.equal(heard, padded)


class Compare:
    """Puts two reports side by side that differ by 12."""

    def __init__(self, folder, evaluating, capsys):
        self.folder, self.capsys = folder, capsys
        figures, self.report = evaluating.run(metrics="kld,fad")
        self.figure = figures["kld_tiny"]
        self.paths = [self.written("one", 20.0, 3.0), self.written("other", 32.0, 4.0)]

    def written(self, name, value, error):
        """A report whose divergence is this."""
        entry = asdict(replace(self.figure, value=value, error=error))
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(self.report | {"figures": self.report["figures"] | {"kld_tiny": entry}}))
        return str(path)

    def reports(self):
        rows = compare(self.paths[::-1])
        assert [figure.value for figure in rows["kld_tiny"]] == [32.0, 20.0]

    def only(self):
        assert set(compare(self.paths)) == {"kld_tiny", "fad_tiny"}
        assert set(compare(self.paths, only=["kld_tiny"])) == {"kld_tiny"}
        assert "fad_tiny" not in self.capsys.readouterr().out.rpartition("figures whose")[2]


@pytest.fixture
def comparing(tmp_path, evaluating, capsys):
    return Compare(tmp_path, evaluating, capsys)


@each_flag(compare)
def test_compare(request, comparing, flag):
    flip(request, comparing, flag)


def test_errors_of_two_reports_add_by_their_squares(comparing, capsys):
    compare(comparing.paths, only=["kld_tiny"])
    assert re.search(r"\+12 \+- 5\b.*yes", capsys.readouterr().out)
    compare([comparing.paths[0], comparing.written("nearer", 29.0, 4.0)], only=["kld_tiny"])  # 9 < 1.96 * 5
    assert re.search(r"\+9 \+- 5\b.*no", capsys.readouterr().out)
