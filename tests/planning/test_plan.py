"""``vab plan``: what its flags change, its numbers against those of real objects, and its errors."""

import json

import pytest
import torch

from flags import ROOT, each_flag
from tone_shards import short_spec, write_shards
from vab.cli import main
from vab.commands.plan import plan
from vab.data.shards.format import read_manifest
from vab.planning.cards import GIB, usable_bytes
from vab.planning.fake_cuda import TORCH
from vab.planning.segments import record_bytes, spec_of_extraction
from vab.spec import UserError
from vab.training.cli import settings_of_fit

pytestmark = pytest.mark.skipif(torch.__version__ < TORCH, reason=f"fake CUDA needs torch {TORCH}")

SMALL = "--config configs/demo/pretrain.yaml --data.train {0} --data.val {0}"
ONE_BLOCK = [f"--model.backbone.init_args.num_{kind}_layers=1" for kind in ("modality", "joint")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("plan") / "shards", short_spec(), 40)


@pytest.fixture(scope="module")
def recipe(folder):
    return [*SMALL.format(folder).split(), *ONE_BLOCK]


@pytest.fixture(scope="module")
def first(recipe):
    return plan(recipe)


@pytest.fixture(scope="module")
def second(recipe, tmp_path_factory):
    """A plan with other values of all flags."""
    home = tmp_path_factory.mktemp("flags")
    (home / "extract.yaml").write_text("codec: dac_16khz\nsegment_seconds: 2.0\n")
    values = {"gpus": 2, "memory": 16.0, "gpu": "T4", "mfu": 0.2, "extract": str(home / "extract.yaml")}
    content = plan([*recipe, "--data.batch_size", "10"], **values, records=1000, out=str(home / "plan.json"))
    return content, json.loads((home / "plan.json").read_text())


def row(content, name):
    return next(row for row in content["rows"] if name in row["name"])


class Flags:
    def __init__(self, first, second):
        self.first, (self.second, self.written) = first, second

    def arguments(self):
        assert "x 1 GPUs" in row(self.first, "records in a step")["value"]
        assert row(self.second, "records in a step")["value"] == "10 a GPU x 2 GPUs = 20"

    def gpus(self):
        assert "DDP" not in str(self.first["rows"])
        assert {"DDP, without activation checkpointing", "FSDP, with activation checkpointing"} <= set(
            self.second["numbers"]["largest batch"]
        )

    def memory(self):
        assert "of 79.1 GiB" in row(self.first, "needed of a card of 80 GB")["value"]
        assert "of 14.6 GiB" in row(self.second, "needed of a card of 16 GB")["value"]

    def gpu(self):
        assert {"A100", "H100", "T4"} <= set(self.first["numbers"]["time"])
        assert "A100" not in self.second["numbers"]["time"]

    def mfu(self):
        flops = self.second["numbers"]["time"]["operations of a step, each GPU"]
        assert self.second["numbers"]["time"]["T4"] == pytest.approx(
            2 * flops / (65e12 * 0.2), abs=1e-4
        )  # 32-true: half the rate

    def extract(self):
        assert "the manifest of" in row(self.first, "segment")["source"]
        assert row(self.second, "segment")["value"] == "12 x 100 codes, 2 frames"

    def records(self):
        assert "/ 40 records" in row(self.first, "epochs")["source"]
        assert "/ 1,000 records" in row(self.second, "epochs")["source"]

    def out(self):
        assert self.written == self.second


@each_flag(plan)
def test_plan(flag, first, second):
    getattr(Flags(first, second), flag)()


def test_numbers_are_those_of_the_network_and_the_shards(first, folder):
    numbers = first["numbers"]
    manifest = read_manifest(folder)[0]
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert numbers["data"]["training shards"] == pytest.approx(size, rel=0.15)
    assert numbers["data"]["epochs"] == pytest.approx(
        numbers["data"]["records seen"] / manifest["counts"]["records"], abs=0.01
    )
    assert numbers["memory"]["between steps, with gradients"] > 4 * 5 * numbers["network"]["parameters"]
    assert first["fits"]
    assert all(row["source"] for row in first["rows"])


def test_a_recipe_that_does_not_fit_says_so_and_what_fits(recipe, capsys):
    main(["plan", *recipe, "--gpus", "1", "--memory", "1.7", "--data.batch_size", "20000"])
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "1 x 1.7 GB" in printed


def test_fit_prints_the_plan_and_does_not_train(recipe, capsys, tmp_path, monkeypatch):
    root = [argument if not argument.endswith(".yaml") else str(ROOT / argument) for argument in recipe]
    monkeypatch.chdir(tmp_path)
    main(["fit", *root, "--print_plan"])
    assert "how it was got" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_settings_are_those_that_fit_trains_with():
    settings = settings_of_fit(["--config", "configs/pretrain.yaml", "--data.batch_size", "7"])
    assert settings["data"]["batch_size"] == 7
    assert settings["model"]["class_path"] == "vab.tasks.PretrainTask"
    assert settings["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "gpus must be 1 or more"),
        (["--mfu", "2"], "mfu in"),
        (["--gpu", "B17"], "gpu"),
        (["--extract", "absent.yaml"], "there is no such file"),
        (["--out", "absent/plan.json"], "absent is not a folder to write in"),
        (["--trainer.precision", "64"], "precision 64"),
        (["--data.no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_a_wrong_value_is_one_line(recipe, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *recipe, *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert "Traceback" not in error


def test_a_codec_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="knows no codec 'opus'"):
        spec_of_extraction({"codec": "opus"})


def test_specs_without_shards_are_those_that_extraction_writes():
    spec = spec_of_extraction({"codec": "encodec_24khz:3", "segment_seconds": 5.0, "video_fps": 2.0}, levels=2)
    assert (spec.num_codebooks, spec.num_steps, spec.num_frames, spec.codebook_size) == (2, 375, 10, 1024)
    assert spec_of_extraction({}).num_steps == 500
    assert record_bytes(spec_of_extraction({})) == 3 * 512 + 4608 + 15872 + 512


@pytest.mark.parametrize(("memory_gb", "gib"), [(80, 79.1), (24, 23.5), (32, 31.04)])
def test_usable_memory_is_less_than_a_cards_name_says(memory_gb, gib):
    assert usable_bytes(memory_gb) == pytest.approx(gib * GIB)
