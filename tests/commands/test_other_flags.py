"""Each flag of ``vab datasets``, ``export``, ``folds``, ``listen``, ``doctor`` and ``weights`` does what it says."""

import contextlib
import io
import itertools
import json
from functools import cached_property
from pathlib import Path

import pytest
import yaml

from flags import each_flag, flip
from listed import column, rows, touch
from small_media import save_model, tone, video
from sound_folders import write_folder
from tone_shards import short_spec, write_shards
from vab.callbacks.class_table import METRICS
from vab.cli import main
from vab.commands import datasets
from vab.commands import folds as folds_module
from vab.commands.doctor import doctor
from vab.commands.evaluate import evaluate
from vab.commands.export import export
from vab.commands.folds import cross_validate
from vab.commands.listen import listen
from vab.commands.weights import fetch_weights, verify_weights
from vab.data.media.write import write_wav
from vab.frozen.codec import load_codec
from vab.spec import UserError
from vab.tasks import load_task

# ---- datasets ----


class _List:
    """A published list and a folder of media."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()

    def place(self):
        """A new output."""
        return str(self.folder / f"{next(self.numbers)}{self.suffix}")

    def out(self):
        self.run(out=str(self.folder / f"mine{self.suffix}"))
        assert (self.folder / f"mine{self.suffix}").exists()

    def overwrite(self):
        place = self.place()
        self.run(out=place)
        with pytest.raises(UserError, match="there already"):
            self.run(out=place)
        self.run(out=place, overwrite=True)


class VGGSound(_List):
    """Three excerpts, of which one has its own file name."""

    suffix = ""
    command = staticmethod(datasets.vggsound)
    lines = ("---g-f_I2yQ,1,people marching,test", "--0PQM4-hqg,30,bird chirping,train", "--56QUhyDQM,185,x,train")

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "vggsound.csv").write_text("\n".join(self.lines) + "\n")
        touch(folder / "media", "---g-f_I2yQ.mp4", "--0PQM4-hqg.mp4", "--56QUhyDQM_000185.mp4")

    def run(self, **changes):
        """Run the command; gives the rows of the training set."""
        usual = {"list": str(self.folder / "vggsound.csv"), "media": str(self.folder / "media"), "out": self.place()}
        settings = usual | changes
        self.command(**settings)
        return sorted(rows(Path(settings["out"]) / "train.csv"), key=lambda row: row["file"])

    def list(self):
        (self.folder / "other").mkdir()
        (self.folder / "other" / "vggsound.csv").write_text(self.lines[1] + "\n")
        assert [len(self.run()), len(self.run(list=str(self.folder / "other" / "vggsound.csv")))] == [2, 1]

    def media(self):
        touch(self.folder / "fewer", "--0PQM4-hqg.mp4")
        assert [len(self.run()), len(self.run(media=str(self.folder / "fewer")))] == [2, 1]

    def whole_videos(self):
        starts = [[row["start"] for row in self.run(whole_videos=choice)] for choice in (False, True)]
        assert starts[0] == ["", ""]
        assert [float(start or 0) for start in starts[1]] == [30, 0]

    def val_share(self):
        ids = [f"{number:011d}" for number in range(20)]
        (self.folder / "many.csv").write_text("".join(f"{name},1,x,train\n" for name in ids))
        touch(self.folder / "media", *(f"{name}.mp4" for name in ids))
        self.run(list=str(self.folder / "many.csv"), out=str(self.folder / "split"), val_share=0.5)
        parts = [column(self.folder / "split" / f"{part}.csv", "file") for part in ("train", "val")]
        assert sorted(parts[0] + parts[1]) == [f"{name}.mp4" for name in ids]
        assert 3 < len(parts[1]) < 17


class AudioSet(_List):
    """Two segments, of files called by the id alone."""

    suffix = ".csv"
    command = staticmethod(datasets.audioset)
    lines = ('--4gqARaEJE, 10.000, 20.000, "/m/068hy"', '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"')

    def __init__(self, folder):
        super().__init__(folder)
        self.write("segments.csv", *self.lines)
        touch(folder / "media", "--4gqARaEJE.mp4", "-0RWZT-miFs.mp4")

    def write(self, name, *lines):
        (self.folder / name).write_text("# made\n# 2\n# YTID, start, end, labels\n" + "\n".join(lines) + "\n")
        return str(self.folder / name)

    def run(self, **changes):
        usual = {"list": str(self.folder / "segments.csv"), "media": str(self.folder / "media"), "out": self.place()}
        settings = usual | changes
        self.command(**settings)
        return rows(Path(settings["out"]))

    def list(self):
        assert [len(self.run()), len(self.run(list=self.write("one.csv", self.lines[0])))] == [2, 1]

    def media(self):
        touch(self.folder / "fewer", "--4gqARaEJE.mp4")
        assert [len(self.run()), len(self.run(media=str(self.folder / "fewer")))] == [2, 1]

    def whole_videos(self):
        starts = [sorted(row["start"] for row in self.run(whole_videos=choice)) for choice in (False, True)]
        assert starts[0] == ["", ""]
        assert sorted(map(float, starts[1])) == [10, 420]

    def val_share(self):
        ids = [f"{number:011d}" for number in range(20)]
        listed = self.write("many.csv", *(f'{name}, 10.000, 20.000, "/m/068hy"' for name in ids))
        touch(self.folder / "media", *(f"{name}.mp4" for name in ids))
        self.run(list=listed, out=str(self.folder / "train.csv"), val_share=0.5)
        parts = [column(self.folder / f"{part}.csv", "file") for part in ("train", "val")]
        assert sorted(parts[0] + parts[1]) == [f"{name}.mp4" for name in ids]
        assert 3 < len(parts[1]) < 17


class ESC50(_List):
    """Four recordings of two classes, one of them of ESC-10."""

    suffix = ""
    command = staticmethod(datasets.esc50)

    def __init__(self, folder):
        super().__init__(folder)
        for name, folds in (("five", range(1, 6)), ("two", range(1, 3))):
            lines = ["filename,fold,target,category,esc10,src_file,take"]
            for fold in folds:
                for target, kind, ten in ((0, "dog", True), (14, "chirping_birds", False)):
                    file = f"{fold}-1-A-{target}.wav"
                    lines.append(f"{file},{fold},{target},{kind},{ten},1,A")
                    touch(folder / name, f"audio/{file}")
            (folder / name / "meta").mkdir()
            (folder / name / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")

    def run(self, name="esc50", **changes):
        settings = {"root": str(self.folder / "five"), "out": self.place()} | changes
        self.command(**settings)
        return rows(Path(settings["out"]) / f"{name}.csv")

    def root(self):
        assert [len(self.run()), len(self.run(root=str(self.folder / "two")))] == [10, 4]

    def esc10(self):
        assert [row["labels"] for row in self.run("esc10", esc10=True)] == ["dog"] * 5


class MSRVTT(_List):
    """Two videos of the test set and one to train on."""

    suffix = ".csv"
    command = staticmethod(datasets.msrvtt)

    def __init__(self, folder):
        super().__init__(folder)
        self.write("all.json", ((0, "train"), (7010, "test"), (7011, "test")))
        touch(folder / "media", "video0.mp4", "video7010.mp4", "video7011.mp4")

    def write(self, name, videos):
        listed = [{"id": number, "video_id": f"video{number}", "category": 3, "split": part} for number, part in videos]
        (self.folder / name).write_text(json.dumps({"videos": listed, "sentences": []}))
        return str(self.folder / name)

    def run(self, **changes):
        usual = {
            "list": str(self.folder / "all.json"), "media": str(self.folder / "media"), "out": self.place(),
            "split": "test",
        }  # fmt: skip
        settings = usual | changes
        self.command(**settings)
        return rows(Path(settings["out"]))

    def list(self):
        assert [len(self.run()), len(self.run(list=self.write("one.json", [(7010, "test")])))] == [2, 1]

    def media(self):
        touch(self.folder / "fewer", "video7011.mp4")
        assert [len(self.run()), len(self.run(media=str(self.folder / "fewer")))] == [2, 1]

    def split(self):
        assert [row["id"] for row in self.run(split="train")] == ["video0"]


@each_flag(datasets.vggsound)
def test_datasets_vggsound(request, tmp_path, flag):
    flip(request, VGGSound(tmp_path), flag)


@each_flag(datasets.audioset)
def test_datasets_audioset(request, tmp_path, flag):
    flip(request, AudioSet(tmp_path), flag)


@each_flag(datasets.esc50)
def test_datasets_esc50(request, tmp_path, flag):
    flip(request, ESC50(tmp_path), flag)


@each_flag(datasets.msrvtt)
def test_datasets_msrvtt(request, tmp_path, flag):
    flip(request, MSRVTT(tmp_path), flag)


class SpeechCommands:
    """What the tests of the list itself show."""

    root = out = test_root = "tests/data/inputs/published/test_keywords.py::test_twelve_classes_of_speech_commands"
    overwrite = "tests/data/inputs/published/test_keywords.py::test_lists_that_are_there_are_replaced_if_asked"


@each_flag(datasets.speech_commands)
def test_datasets_speech_commands(request, flag):
    flip(request, SpeechCommands, flag)


# ---- export ----


class Export:
    """Exports an untrained model that also has live weights."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        self.model, self.second = (self.saved(f"{seed}.ckpt", seed) for seed in (0, 1))

    def saved(self, name, seed):
        return save_model(self.folder / name, short_spec(), load_codec("tiny").codebooks(), seed=seed)

    def run(self, **changes):
        return export(**{"checkpoint": self.model, "out": str(self.folder / f"m{next(self.numbers)}")} | changes)

    def weights_of(self, place):
        return next(iter(load_task(place).parameters())).flatten()[:20].tolist()

    def checkpoint(self):
        assert self.weights_of(self.run(checkpoint=self.second)) == self.weights_of(self.second)
        assert self.weights_of(self.second) != self.weights_of(self.run())

    def out(self):
        assert (self.run(out=str(self.folder / "mine")) / "model.safetensors").parent.name == "mine"

    weights = "tests/commands/test_export.py::test_the_folder_guesses_what_the_checkpoint_guesses"

    def report(self):
        sounds = write_folder(self.folder / "sounds", count=2)
        report = str(self.folder / "report.json")
        evaluate(str(sounds), str(sounds), report, metrics="kld", seconds=1.0, num_workers=0, device="cpu")
        cards = [(self.run(report=choice) / "README.md").read_text() for choice in (None, report)]
        assert ["kld_tiny" in card for card in cards] == [False, True]

    def overwrite(self):
        place = str(self.folder / "there")
        self.run(out=place)
        with pytest.raises(UserError, match="is there already"):
            self.run(out=place, checkpoint=self.second)
        assert self.weights_of(self.run(out=place, checkpoint=self.second, overwrite=True)) == self.weights_of(
            self.second
        )


@pytest.fixture(scope="module")
def exporting(tmp_path_factory):
    return Export(tmp_path_factory.mktemp("export_flags"))


@each_flag(export)
def test_export(request, exporting, flag):
    flip(request, exporting, flag)


# ---- folds ----


def vab_in_process(arguments, capture=False):
    """``vab`` in this process, which is quicker to start; what it prints, and the status that it ends with."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(list(arguments))
    return printed.getvalue()


class Folds:
    """Figures of three folds that were trained before, of data that have two."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setattr(folds_module, "_vab", vab_in_process)
        data = str(write_shards(folder / "data", short_spec(), 3))
        recipe = {
            "trainer": {
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(folder / "runs"), "name": "tones"},
                },
            },
            "data": {"train": data, "val": data, "fold_pattern": "tone([0-9])"},
            "model": {
                "class_path": "vab.tasks.ClassifyTask",
                "init_args": {"backbone": {"class_path": "vab.backbone.Backbone"}},
            },
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.recipe = ["--config", str(folder / "recipe.yaml")]
        for fold in (1, 2, 3):
            run = folder / "runs" / "tones" / f"fold_{fold}"
            run.mkdir(parents=True)
            (run / METRICS).write_text(json.dumps({"records": 2, "step": 4, "top_1": fold / 4}))
            command = {"arguments": self.recipe, "fold": fold, "vab": folds_module.__version__}
            (run / "folds_command.json").write_text(json.dumps(command))

    def arguments(self):
        assert cross_validate(self.recipe, 2)["arguments"] == self.recipe
        with pytest.raises(UserError, match="has the folds"):  # of others nothing was trained before
            cross_validate([*self.recipe, "--data.batch_size=3"], 3)

    def folds(self):
        means = [cross_validate(self.recipe, folds)["mean"]["top_1"] for folds in (2, 3)]
        assert means == pytest.approx([0.375, 0.5])

    def overwrite(self):
        cross_validate(self.recipe, 3)
        with pytest.raises(UserError, match="has the folds"):
            cross_validate(self.recipe, 3, overwrite=True)


@each_flag(cross_validate)
def test_folds(request, tmp_path, monkeypatch, flag):
    flip(request, Folds(tmp_path, monkeypatch), flag)


# ---- listen ----


class Listen:
    """Two systems' sounds for two videos."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count()
        for number, name in enumerate(("one", "two")):
            video(folder / "videos" / f"{name}.mp4", 0.4, seed=number)
            for system, hertz in (("zebra", 300), ("quagga", 500), ("okapi", 700)):
                (folder / system).mkdir(exist_ok=True)
                write_wav(folder / system / f"{name}.wav", tone(0.4, hertz), 16_000)

    def run(self, **changes):
        """Write a test; gives its key."""
        out = self.folder / f"test{next(self.numbers)}"
        settings = {
            "systems": [str(self.folder / name) for name in ("zebra", "quagga")],
            "videos": str(self.folder / "videos"), "out": str(out), "num_pairs": 2,
        } | changes  # fmt: skip
        listen(**settings)
        return json.loads((out / "key.json").read_text()) if out.exists() else None

    @cached_property
    def usual(self):
        return self.run()

    def systems(self):
        key = self.run(systems=[str(self.folder / name) for name in ("zebra", "okapi")])
        assert "okapi" in json.dumps(key)
        assert "quagga" in json.dumps(self.usual)

    videos = "tests/evaluation/test_listen.py::test_each_side_is_the_video_with_the_sound_that_the_key_names"

    def out(self):
        self.run(out=str(self.folder / "mine"))
        assert (self.folder / "mine" / "page" / "index.html").is_file()

    def names(self):
        keys = self.usual, self.run(names=["first", "second"])
        sides = [{trial[side] for trial in key["trials"] for side in "AB"} for key in keys]
        assert sides == [{"zebra", "quagga"}, {"first", "second"}]

    def num_pairs(self):
        assert [len(self.run(num_pairs=count)["trials"]) for count in (1, 2)] == [1, 2]

    questions = "tests/evaluation/test_listen.py::test_names_and_questions_are_taken"
    level_match = "tests/evaluation/test_listen.py::test_sounds_of_a_trial_are_equally_loud_unless_told_not_to"
    on_error = "tests/evaluation/test_listen.py::test_a_video_without_sound_of_a_system_is_refused_or_skipped"

    def seed(self):
        drawn = [json.dumps(self.run(seed=seed)["trials"]) for seed in range(5)]
        assert len(set(drawn)) > 1
        assert json.dumps(self.run()["trials"]) == drawn[0]

    score = key = "tests/evaluation/test_listen.py::test_answers_are_turned_to_the_systems_and_summed"


@pytest.fixture(scope="module")
def listening(tmp_path_factory):
    return Listen(tmp_path_factory.mktemp("listen_flags"))


@each_flag(listen)
def test_listen(request, listening, flag):
    flip(request, listening, flag)


# ---- doctor, weights ----


class Doctor:
    """What is examined in other processes takes long: see the tests that do it."""

    out = "tests/commands/test_doctor.py::test_it_runs_where_torch_does_not"
    overwrite = "tests/commands/test_doctor.py::test_an_installation_that_works"


@each_flag(doctor)
def test_doctor(request, flag):
    flip(request, Doctor, flag)


class FetchWeights:
    """From a server of the tests."""

    names = out = "tests/commands/test_weights_command.py::test_from_an_address"


@each_flag(fetch_weights)
def test_weights_fetch(request, flag):
    flip(request, FetchWeights, flag)


class VerifyWeights:
    """Of files that a server of the tests gave."""

    folder = "tests/commands/test_weights_command.py::test_verify_names_what_was_changed_with_both_hashes"


@each_flag(verify_weights)
def test_weights_verify(request, flag):
    flip(request, VerifyWeights, flag)
