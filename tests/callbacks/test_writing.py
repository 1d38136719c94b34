"""Checkpoints beside the training: what is saved, in which order, and what is left after a kill or a full disk."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from vab.callbacks import AtomicCheckpoints, BackgroundCheckpoints, Checkpoints
from vab.cli import main
from vab.spec import UserError
from vab.tasks.checkpoints import find_checkpoint

RECIPE = Path(__file__).parents[2] / "configs" / "demo" / "align.yaml"


def read(path):
    return torch.load(path, weights_only=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(one, other):
    """Whether two checkpoints hold the same, but for the folder that they name."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    saver = BackgroundCheckpoints()
    weights = torch.zeros(2_000_000)
    for step in range(6):
        weights.fill_(step)
        saver.save_checkpoint({"step": step, "weights": weights}, tmp_path / f"{step}.ckpt")
        weights.fill_(-1)  # the training goes on, long before 8 MB are on the disk
    saver.wait()
    for step in range(6):
        content = read(tmp_path / f"{step}.ckpt")
        assert content["step"] == step
        assert bool((content["weights"] == step).all())


@pytest.mark.parametrize("saver", [AtomicCheckpoints, BackgroundCheckpoints])
def test_a_run_saves_each_of_its_steps_either_way(run, saver, tmp_path):
    keep = Checkpoints(tmp_path / "all", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run(keep, plugins=[saver()], steps=5, name="other")
    found = {read(path)["global_step"]: read(path) for path in (tmp_path / "all").iterdir()}
    assert found.keys() == {1, 2, 3, 4, 5}
    for steps, content in found.items():
        # A run that ended there, and nothing could go on after its checkpoint was asked for.
        _, task, _ = run(steps=steps, name=f"to_{steps}", plugins=[AtomicCheckpoints()])
        assert same(content["state_dict"], dict(task.state_dict()))


def test_removals_wait_for_what_takes_the_place_of_the_removed(tmp_path):
    saver = BackgroundCheckpoints()
    saver.save_checkpoint({"step": 1}, tmp_path / "old.ckpt")
    saver.save_checkpoint({"step": 2, "weights": torch.zeros(5_000_000)}, tmp_path / "new.ckpt")
    saver.remove_checkpoint(tmp_path / "old.ckpt")
    while (tmp_path / "old.ckpt").exists():
        time.sleep(0.001)
    assert read(tmp_path / "new.ckpt")["step"] == 2
    saver.teardown()
    content = {"state_dict": {}, "hyper_parameters": {"_class_path": "Task"}, "pytorch-lightning_version": "2.6.0"}
    saver.save_checkpoint(content, tmp_path / "new.ckpt")  # a second run with the same trainer
    assert saver.load_checkpoint(tmp_path / "new.ckpt", weights_only=True) == content


def test_a_full_disk_is_told_at_the_next_checkpoint_and_nothing_is_lost(small_disk, capsys):
    saver = BackgroundCheckpoints()
    large = {"step": 2, "weights": torch.zeros(100_000)}
    saver.save_checkpoint({"step": 1}, small_disk / "best-1.ckpt")
    saver.save_checkpoint(large, small_disk / "best-2.ckpt")
    saver.remove_checkpoint(small_disk / "best-1.ckpt")
    saver.link(small_disk / "best-2.ckpt", small_disk / "last.ckpt")
    saver.keep_newest(small_disk, "best-*.ckpt", 1)
    with pytest.raises(UserError, match="no space left"):
        saver.wait()
    assert names(small_disk) == ["best-1.ckpt"]
    saver.save_checkpoint({"step": 3}, small_disk / "best-3.ckpt")  # somebody made space
    saver.remove_checkpoint(small_disk / "best-1.ckpt")
    saver.teardown()
    assert names(small_disk) == ["best-3.ckpt"]
    saver.save_checkpoint(large, small_disk / "best-4.ckpt")
    try:
        raise KeyError("of the training")
    except KeyError:
        saver.teardown()  # which must not hide it
    assert "was not written: no space left" in capsys.readouterr().err


def test_vab_fit_on_a_full_disk_is_one_line(shards, small_disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"data.train": shards / "train", "data.val": shards / "val", "data.batch_size": 4, "data.num_workers": 0}
    sizes = {"dim": 32, "num_heads": 2, "num_modality_layers": 1}
    flags |= {f"model.backbone.{name}": size for name, size in sizes.items()}
    flags |= {"model.init_from": "null", "model.warmup_steps": 1, "trainer.max_steps": 4}
    flags |= {"trainer.val_check_interval": 2, "trainer.accelerator": "cpu"}
    saver = {"class_path": "vab.callbacks.Checkpoints", "init_args": {"dirpath": str(small_disk), "save_last": True}}
    flags["trainer.callbacks"] = json.dumps([saver])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(RECIPE), *(f"--{name}={value}" for name, value in flags.items())])
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert error[0].startswith(f"error: no space left in {small_disk}")
    assert names(small_disk) == []


def test_the_last_k_are_kept_beside_the_best(run, tmp_path):
    folder = tmp_path / "kept"
    best = Checkpoints(folder, monitor="val/loss", save_top_k=1, filename="best-{step}")
    last = Checkpoints(folder, every_n_train_steps=2, save_top_k=0, save_last=True, keep_last=2)
    run(best, last, steps=9, plugins=[BackgroundCheckpoints()], name="other")
    kept = [name for name in names(folder) if not name.startswith("best")]
    assert kept == ["last-step=8.ckpt", "last-step=9.ckpt", "last.ckpt"]
    assert len(names(folder)) == 4
    assert (folder / "last.ckpt").samefile(folder / "last-step=9.ckpt")
    assert read(find_checkpoint(folder))["global_step"] == 9
    assert read(folder / "last-step=8.ckpt")["global_step"] == 8


def test_a_run_taken_up_from_an_earlier_step_keeps_its_own(run, tmp_path):
    folder = tmp_path / "kept"

    def go_on(steps, resume=None):
        last = Checkpoints(folder, every_n_train_steps=1, save_top_k=0, save_last=True, keep_last=3)
        run(last, steps=steps, plugins=[BackgroundCheckpoints()], name="other", resume=resume)
        return names(folder)

    assert go_on(6) == ["last-step=4.ckpt", "last-step=5.ckpt", "last-step=6.ckpt", "last.ckpt"]
    # Back to step 4: 5 is made anew, and 4 stays as long as the run that began with it.
    beginning = folder / "last-step=4.ckpt"
    assert go_on(5, beginning) == ["last-step=4.ckpt", "last-step=5.ckpt", "last-step=6.ckpt", "last.ckpt"]
    assert read(folder / "last.ckpt")["global_step"] == 5
    assert go_on(7, beginning) == ["last-step=4.ckpt", "last-step=5.ckpt", "last-step=6.ckpt", "last-step=7.ckpt",
                                   "last.ckpt"]  # fmt: skip
    assert read(folder / "last.ckpt")["global_step"] == 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"keep_last": 0}, "keep_last must be 1"), ({"keep_last": 2}, "needs save_last")],
)
def test_wrong_numbers_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Checkpoints(**settings)


def test_several_need_a_writer_that_can_keep_them(run, tmp_path):
    with pytest.raises(UserError, match="AtomicCheckpoints"):
        run(Checkpoints(tmp_path / "kept", every_n_train_steps=1, save_last=True, keep_last=2), name="other")


def write_on_and_on(folder, begun):
    """Until it is killed; says so once three checkpoints are there."""
    saver = BackgroundCheckpoints()
    for step in range(1, 10_000):
        numbered = folder / f"last-step={step}.ckpt"
        saver.save_checkpoint({"step": step, "weights": torch.full((500_000,), float(step))}, numbered)
        saver.link(numbered, folder / "last.ckpt")
        saver.keep_newest(folder, "last-step=*.ckpt", 2)
        if step == 3:
            saver.wait()
            begun.set()


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    moments, fork = random.Random(0), multiprocessing.get_context("fork")
    for attempt in range(8):
        folder, begun = tmp_path / str(attempt), fork.Event()
        folder.mkdir()
        process = fork.Process(target=write_on_and_on, args=(folder, begun))
        process.start()
        assert begun.wait(60)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        files = list(folder.glob("last*.ckpt"))
        assert folder / "last.ckpt" in files
        assert len(files) >= 3
        for file in files:
            content = read(file)
            assert bool((content["weights"] == content["step"]).all())
            assert file.name in ("last.ckpt", f"last-step={content['step']}.ckpt")
        assert read(folder / "last.ckpt")["step"] >= 3
