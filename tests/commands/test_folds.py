import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tone_shards import short_spec, write_shards
from vab.commands.folds import cross_validate, require_folds, summary
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError

PATTERN = r"^tone\d*(\d)$"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty records, two of each of ten recordings, whose fold is the last figure of their id."""
    return str(write_shards(tmp_path_factory.mktemp("folds") / "s", short_spec(), 20, sound_only=True, per_source=2))


def test_each_record_is_validated_in_one_fold_and_trained_on_in_the_others(data):
    everything = {ShardDataset(data).key(number) for number in range(20)}
    seen = []
    for fold in range(10):
        module = ShardDataModule(data, data, batch_size=2, num_workers=0, fold=fold, fold_pattern=PATTERN)
        sides = [[d.key(n) for n in range(len(d))] for d in (module.train_dataset, module.val_dataset)]
        assert len(sides[1]) == 2
        assert set(sides[0]) | set(sides[1]) == everything
        assert not set(sides[0]) & set(sides[1])
        batch = module.val_dataset.read([0, 1])
        assert batch.index.tolist() == [0, 1]
        assert [module.val_dataset.record(n)["id"][-1] for n in (0, 1)] == [str(fold)] * 2
        seen += sides[1]
    assert sorted(seen) == sorted(everything)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"fold": 11, "fold_pattern": PATTERN},
            r"has the folds \[0, 1, .*with data.fold 11 there is nothing to validate",
        ),
        ({"fold": 1}, r"finds no fold in the id 'tone0'"),
        ({"fold": 1, "fold_pattern": "("}, r"is not a regular expression"),
        ({"order": "other"}, r'must be "shuffled" or "class_balanced"'),
    ],
)
def test_folds_that_are_none_are_refused(data, settings, words):
    with pytest.raises(UserError, match=words):
        ShardDataModule(data, data, num_workers=0, **settings)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (1, r"has the folds \[1, 2, 3, 4\]: with --folds 5 there is nothing to validate fold 5 on; type --folds 4$"),
        (2, r"has the folds \[2, 3, 4, 5\]: .* nothing to validate fold 1 on; folds are numbered from 1"),
    ],
)
def test_a_fold_that_the_data_lack_is_told_before_the_first_training(data, tmp_path, monkeypatch, first, words):
    monkeypatch.setattr(ShardDataset, "record_id", lambda self, number: f"tone{first + number % 4}")
    config = {
        "data": {"train": data, "val": data, "fold": 1, "fold_pattern": PATTERN},
        "trainer": {"logger": {"init_args": {"save_dir": str(tmp_path), "name": "tones"}}},
    }
    started = []

    def vab(arguments, capture=False):
        started.append(arguments[-1])
        return yaml.safe_dump(config)

    monkeypatch.setattr("vab.commands.folds._vab", vab)
    with pytest.raises(UserError, match=words):
        cross_validate(["--config", "x"], folds=5)
    assert started == ["--print_config"]
    if first == 1:
        require_folds(config["data"], 4)


def test_mean_and_sample_deviation():
    both = summary([{"top_1": 0.5, "map": 0.2, "step": 3}, {"top_1": 0.7, "map": 0.4, "step": 3}])
    assert both["mean"] == pytest.approx({"top_1": 0.6, "map": 0.3})
    assert both["deviation"] == pytest.approx({"top_1": 0.02**0.5, "map": 0.02**0.5})
    with pytest.raises(UserError, match="--folds must be 2 or more"):
        cross_validate(["--config", "x"], folds=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_trains_all_folds_and_goes_on_where_it_stopped(data, tmp_path):
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "num_sanity_val_steps": 0, "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(tmp_path / "runs"), "name": "tones"},
            },
            "callbacks": [{"class_path": "vab.callbacks.ClassTable"}],
        },
        "data": {"train": data, "val": data, "batch_size": 8, "num_workers": 0, "fold_pattern": PATTERN},
        "model": {
            "class_path": "vab.tasks.ClassifyTask",
            "init_args": {
                "backbone": {
                    "class_path": "vab.backbone.Backbone",
                    "init_args": {"dim": 32, "num_heads": 2, "num_modality_layers": 1, "num_joint_layers": 0},
                },
                "inputs": "audio", "warmup_steps": 1, "schedule_steps": 9,
            },
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(*more):
        command = [sys.executable, "-m", "vab.cli", "folds", "--config", str(tmp_path / "recipe.yaml"), "--folds", "2"]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=250, env=environment, cwd=tmp_path, check=False
        )

    first = run()
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "runs" / "tones" / "folds.json").read_text())
    assert set(report["folds"]) == {"1", "2"}
    assert all(fold["records"] == 2 and fold["step"] == 4 for fold in report["folds"].values())
    table = Path(tmp_path / "runs" / "tones" / "fold_1" / "classes.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table] == [["class", "records"], ["high", "1"], ["low", "1"]]
    assert "fold 1 of 2" in first.stdout
    again = run()
    assert "fold 1 of 2" not in again.stdout
    assert "last validation of each run" in again.stdout
    other = run("--trainer.max_steps", "2")
    assert "fold 1 of 2" in other.stdout
    assert run("--trainer.callbacks+=fit_runs.EndAfterValidation").returncode == 3
    assert "fold 1 of 2" in run("--trainer.max_steps", "2").stdout  # its figures are of the run that was cut off
    wrong = run("--model.init_args.dimm", "2")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
