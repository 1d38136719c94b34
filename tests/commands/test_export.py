"""A trained model as a folder: equal logits, weights alone, a card that says what it is, nothing that can be run."""

import json
import shutil

import pytest
import torch

from tasks_help import quiet_trainer, small_backbone
from vab.callbacks import EMA, Checkpoints, Meters
from vab.cli import main
from vab.commands.evaluate import evaluate
from vab.commands.export import export
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, PretrainTask, load_task
from vab.tasks.checkpoints import find_checkpoint
from vab.tasks.exported import CARD, CONFIG, WEIGHTS


def train(shards, folder, task, *callbacks, steps=3):
    """Its checkpoint's folder."""
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=4, num_workers=0)
    keep = Checkpoints(dirpath=str(folder), save_top_k=0, save_last=True)
    settings = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "val_check_interval": 3}
    quiet_trainer(callbacks=[Meters(), *callbacks, keep], check_val_every_n_epoch=None, **settings).fit(task, data)
    return folder


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A pretraining's run, with an average."""
    backbone = small_backbone(ShardDataset(shards / "train").spec)
    task = PretrainTask(backbone, warmup_steps=1, schedule_steps=10)
    return train(shards, tmp_path_factory.mktemp("run") / "checkpoints", task, EMA(0.5))


def guesses(task, shards):
    data = ShardDataset(shards / "val")
    batch = data.read(range(6))
    with torch.no_grad():
        return task.logits(batch, torch.rand(batch.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5)


def outputs(task, batch):
    return task(batch) if isinstance(task, AlignTask) else (task.predict_step(batch, 0)["probabilities"],)


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_the_folder_guesses_what_the_checkpoint_guesses(weights, run, shards, tmp_path):
    folder = export(str(run), str(tmp_path / "model"), weights)
    assert sorted(file.name for file in folder.iterdir()) == sorted([CONFIG, WEIGHTS, CARD])
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    trained = json.loads((folder / CONFIG).read_text())["trained"]
    assert (trained["average_of_steps"] is None) == (weights == "live")
    again = load_task(folder, weights)
    assert type(again) is PretrainTask
    expected = guesses(load_task(run, weights), shards)
    assert torch.equal(guesses(again, shards), expected)
    other = load_task(run, "live" if weights == "ema" else "ema")
    assert not torch.equal(guesses(other, shards), expected)
    assert again.audio_statistics == load_task(run).audio_statistics
    assert find_checkpoint(folder) == find_checkpoint(folder / WEIGHTS) == folder / WEIGHTS


def test_the_size_is_that_of_the_weights(run, tmp_path):
    folder = export(str(run), str(tmp_path / "model"))
    size = sum(value.nbytes for value in load_task(run).state_dict().values())
    assert size < (folder / WEIGHTS).stat().st_size < size + 20_000
    assert 2 * sum(file.stat().st_size for file in folder.iterdir()) < (run / "last.ckpt").stat().st_size


def test_the_card_says_what_it_is(run, shards, tmp_path):
    folder = export(str(run), str(tmp_path / "model"))
    card, data = (folder / CARD).read_text(), ShardDataset(shards / "train")
    config = json.loads((folder / CONFIG).read_text())
    assert config["spec"] == data.spec.to_dict()
    assert config["weights"] == "ema"
    assert config["trained"]["steps"] == 3
    assert config["trained"]["data_sha256"] == data.manifest_hash
    for line in (
        "| steps | 3 |",
        "| records per step | 4 |",
        "| records of the training set | 48 |",
        f"| SHA-256 of the training set's manifest | {data.manifest_hash} |",
        f"| codec's weights, SHA-256 | {data.spec.codec_hash} |",
        "| steps in the average | 3 |",
        "| backbone dim | 32 |",
        "| feature_dropout | 0.1 |",
        "vab generate --checkpoint model --video",
    ):
        assert line in card
    logged = config["trained"]["figures"]["val/loss"]
    assert "## Validation in training, at step 3" in card
    assert f"| val/loss | {logged:.4g} |" in card or f"| val/loss | {logged:.3f}" in card
    assert "AdamW lr 0.0002" in card
    assert str(run) not in card


def test_figures_of_an_evaluation_are_on_the_card_with_what_they_depend_on(run, tmp_path):
    import soundfile

    for side in ("real", "made"):
        (tmp_path / side).mkdir()
        for number in range(12):
            noise = torch.randn(16_000, generator=torch.Generator().manual_seed(number)).numpy()
            soundfile.write(tmp_path / side / f"{number}.wav", 0.05 * noise * (1 + number * (side == "made")), 16_000)
    sides = [str(tmp_path / side) for side in ("real", "made")]
    report = tmp_path / "report.json"
    found = evaluate(*sides, str(report), metrics="fad", num_workers=0, device="cpu").figures["fad_tiny"]
    card = (export(str(run), str(tmp_path / "model"), report=str(report)) / CARD).read_text()
    assert "**fad_tiny**" in card
    assert f"  - weight_hash: {found.card.weight_hash}" in card
    assert "  - num_generated: 12" in card
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError):
        export(str(run), str(tmp_path / "second"), report=str(tmp_path / "other.json"))
    assert not (tmp_path / "second").exists()


def test_other_tasks_begin_with_it_and_can_be_exported_too(run, shards, tmp_path):
    folder = export(str(run), str(tmp_path / "model"))
    labels = ShardDataset(shards / "train").labels
    shared = {"warmup_steps": 1, "schedule_steps": 10, "init_from": str(folder)}
    spec = ShardDataset(shards / "train").spec
    for kind, task in {
        "align": AlignTask(small_backbone(spec), embedding_dim=16, **shared),
        "classify": ClassifyTask(small_backbone(spec), labels, multi_label=True, **shared),
    }.items():
        assert "took " in task.begin_with(folder)
        begun, mine = load_task(folder).backbone.state_dict(), task.backbone.state_dict()
        assert all(torch.equal(begun[name], mine[name]) for name in mine)
        place = train(shards, tmp_path / kind, task)
        after = export(str(place), str(tmp_path / f"{kind}_model"), "ema")
        assert json.loads((after / CONFIG).read_text())["weights"] == "live"  # there is no average
        again, batch = load_task(after), ShardDataset(shards / "val").read(range(4))
        with torch.no_grad():
            one, other = (outputs(task, batch) for task in (load_task(place), again))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert f"| began with | {folder} |" in (after / CARD).read_text()
        assert load_task(after).init_from is None


def test_a_compiled_network_s_names_are_plain(run, shards, tmp_path):
    folder = export(str(run), str(tmp_path / "model"))
    task = load_task(run)
    expected = guesses(task, shards)
    task.backbone = torch.compile(task.backbone)  # wraps it: every name has a prefix
    trainer = quiet_trainer()
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    names = torch.load(tmp_path / "compiled.ckpt", weights_only=True)["state_dict"]
    assert any("_orig_mod." in name for name in names)
    assert torch.equal(guesses(load_task(tmp_path / "compiled.ckpt"), shards), expected)
    again = load_task(export(str(tmp_path / "compiled.ckpt"), str(tmp_path / "other")))
    assert torch.equal(guesses(again, shards), expected)
    compiled = load_task(folder)
    compiled.backbone.compile(backend="eager")
    assert torch.equal(guesses(compiled, shards), expected)


def test_commands_take_the_folder(run, shards, tmp_path, capsys):
    from vab.generation.generator import Generator

    folder = export(str(run), str(tmp_path / "model"))
    one, other = (Generator.load(str(place), device="cpu").task for place in (run, folder))
    features = torch.randn(2, one.spec.num_frames, one.spec.feature_dim)
    keys = torch.arange(2)
    assert torch.equal(one.generate(features, keys), other.generate(features, keys))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/demo/pretrain.yaml", f"--data.train={shards / 'train'}",
              f"--data.val={shards / 'val'}", f"--ckpt_path={folder}"])  # fmt: skip
    assert stop.value.code == 2
    assert "is an exported model, not the state of a run: give a run" in capsys.readouterr().err


def test_what_is_there_is_not_lost(run, tmp_path):
    folder = tmp_path / "model"
    export(str(run), str(folder), "live")
    with pytest.raises(UserError, match="--overwrite true"):
        export(str(run), str(folder))
    assert json.loads((folder / CONFIG).read_text())["weights"] == "live"
    export(str(run), str(folder), overwrite=True)
    assert json.loads((folder / CONFIG).read_text())["weights"] == "ema"
    with pytest.raises(UserError, match="averaged weights only"):
        load_task(folder, "live")
    with pytest.raises(UserError, match="exported model already"):
        export(str(folder), str(tmp_path / "twice"))
    (tmp_path / "letters").mkdir()
    with pytest.raises(UserError, match="is no exported model"):
        export(str(run), str(tmp_path / "letters"), overwrite=True)
    with pytest.raises(UserError, match="no checkpoint at"):
        export(str(tmp_path / "nothing"), str(tmp_path / "more"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "model"]


def test_a_full_disk_leaves_nothing(run, small_disk):
    with pytest.raises(UserError, match="no space left"):
        export(str(run), str(small_disk / "model"))
    assert list(small_disk.iterdir()) == []


def changed(folder, place, **entries):
    """A copy of an exported model with other entries in its config."""
    shutil.copytree(folder, place)
    config = json.loads((place / CONFIG).read_text()) | entries
    (place / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return place


def test_a_folder_that_names_other_things_is_refused(run, tmp_path):
    folder = export(str(run), str(tmp_path / "model"))
    sizes = json.loads((folder / CONFIG).read_text())["init_args"]
    wrong = {
        "a_class": ({"class_path": "subprocess.Popen"}, "subprocess.Popen is no BaseTask"),
        "none": ({"class_path": "vab.tasks.NoTask"}, "is no BaseTask"),
        "backbone": (
            {"init_args": sizes | {"backbone": {"class_path": "os.system", "init_args": {"command": "true"}}}},
            "os.system is no Backbone",
        ),
        "future": ({"format_version": 2}, "format version 2, this vab reads 1"),
        "format": ({"format": "other"}, "does not describe a model of vab"),
        "lacking": ({"init_args": None}, "lacks init_args"),
    }
    for name, (entries, words) in wrong.items():
        with pytest.raises(UserError, match=words):
            load_task(changed(folder, tmp_path / name, **entries))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(UserError, match="is no whole exported model"):
        load_task(folder)
