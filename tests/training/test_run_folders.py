"""What commands write into the folder of a run: ``vab fit`` alone writes there."""

import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fit_runs import RECIPE, flags
from vab.cli import main
from vab.tasks.checkpoints import find_checkpoint


@pytest.fixture(scope="module")
def begun(shards, tmp_path_factory):
    """A run that was resumed in place: 4 steps, then 6; its folder is ``runs/run/version_0``."""
    home = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(shards, 4)
        train(shards, 6, "--ckpt_path=runs/run")
    return home


@pytest.fixture
def run(begun, tmp_path, monkeypatch):
    """A copy of it, in whose home the test works."""
    shutil.copytree(begun, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return Path("runs/run/version_0")


def train(shards, steps, *more):
    main([*flags(shards, "run", batch_size=8, steps=steps, every=2), "--trainer.log_every_n_steps=1", *more])


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def curves(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [point.step for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def of_run(run, command, *more):
    main([command, f"--config={run / 'config.yaml'}", f"--ckpt_path={run}", *more])


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_resumed_run_does_not_save_where_it_continued(run):
    logger = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert (logger.get("version"), logger.get("purge_step")) == (None, None)


def test_only_fit_writes_into_a_run(run, shards, capsys):
    before = contents(Path())
    of_run(run, "validate")
    assert "val/loss" in capsys.readouterr().out
    of_run(run, "test", f"--data.test={shards / 'val'}")
    assert "test/loss" in capsys.readouterr().out
    assert contents(Path()) == before
    of_run(run, "predict", f"--data.test={shards / 'val'}", "--out=made")
    new = contents(Path())
    assert new.keys() - before.keys() == {"made/codes_rank_0.npz"}
    assert {name: new[name] for name in before} == before
    # The run goes on with its config, and its curves are whole.
    train(shards, 7, f"--config={run / 'config.yaml'}", "--trainer.max_steps=7", f"--ckpt_path={run}")
    assert [path.name for path in Path("runs/run").iterdir()] == ["version_0"]
    assert curves(run)["train/loss"] == list(range(7))


def test_a_classifier_is_validated_without_a_trace(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [flag for flag in flags(shards, "run", steps=2, every=2) if "sampler" not in flag and "joint" not in flag]
    recipe = RECIPE.with_name("classify.yaml")
    own = [f"--config={recipe}", "--model.init_from=null", *(flag for flag in small[1:] if "--config" not in flag)]
    main(["fit", *own])
    before = contents(Path())
    capsys.readouterr()
    main(["validate", *own, "--ckpt_path=runs/run"])
    assert "val/top_1" in capsys.readouterr().out
    assert contents(Path()) == before
    main(["validate", *own, "--ckpt_path=runs/run", "--log_to=scores"])
    assert curves("scores")["val/loss"] == [2]
    assert Path("scores/classes.csv").is_file()


@pytest.mark.parametrize(("command", "metric"), [("validate", "val/loss"), ("test", "test/loss")])
def test_metrics_are_logged_on_request_at_the_checkpoints_step(command, metric, run, shards):
    before = contents(run)
    of_run(run, command, f"--data.test={shards / 'val'}", "--log_to=scores", "--trainer.callbacks=null")
    assert contents(run) == before
    assert [path.name for path in Path("runs/run").iterdir()] == ["version_0"]
    assert curves("scores")[metric] == [6]


def test_the_folder_of_a_run_is_no_place_to_write_to(run, shards, capsys):
    before = contents(run)
    words = "is the folder of a run, where only vab fit writes: give another folder"
    given = f"--config={run / 'config.yaml'}", f"--ckpt_path={run}", f"--data.test={shards / 'val'}"
    assert complaint(capsys, "validate", *given, f"--log_to={run}") == f"error: --log_to {run} {words}"
    assert complaint(capsys, "predict", *given, f"--out={run}") == f"error: --out {run} {words}"
    assert complaint(capsys, "predict", *given) == "error: the following arguments are required: --out"
    Path("made").mkdir()
    Path("made/codes_rank_1.npz").touch()
    words = "is there already: give another --out, or remove the old predictions"
    assert complaint(capsys, "predict", *given, "--out=made") == f"error: made/codes_rank_1.npz {words}"
    assert contents(run) == before


def test_a_word_that_is_known_elsewhere_is_not_what_was_meant(run, capsys):
    text = (run / "config.yaml").read_text()
    Path("other.yaml").write_text(f"{text}verbose: true\n")
    words = complaint(capsys, "fit", "--config=other.yaml")
    assert "verbose" in words
    assert "did you mean" not in words


def test_a_run_without_a_last_checkpoint_continues_from_the_file_that_is_given(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = "[{class_path: vab.callbacks.Checkpoints, init_args: {save_top_k: -1, every_n_train_steps: 2}}]"
    train(shards, 4, f"--trainer.callbacks={callback}")
    kept = sorted(Path("runs/run/version_0/checkpoints").iterdir())
    assert len(kept) == 2
    train(shards, 6, f"--trainer.callbacks={callback}", f"--ckpt_path={kept[-1]}")
    assert [path.name for path in Path("runs/run").iterdir()] == ["version_0"]  # the newest: in place
    train(shards, 6, f"--trainer.callbacks={callback}", f"--ckpt_path={kept[0]}")
    assert sorted(path.name for path in Path("runs/run").iterdir()) == ["version_0", "version_1"]


def test_a_folder_means_its_only_checkpoint(tmp_path):
    one = tmp_path / "run" / "epoch=1.ckpt"
    one.parent.mkdir()
    one.touch()
    assert find_checkpoint(tmp_path) == one
    one.with_name("epoch=2.ckpt").touch()
    with pytest.raises(ValueError, match=r"but 2 others: give one, such as .*epoch=2\.ckpt"):
        find_checkpoint(tmp_path)
    one.with_name("last.ckpt").touch()
    assert find_checkpoint(tmp_path) == one.with_name("last.ckpt")
