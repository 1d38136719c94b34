"""The batch of a whole optimizer step, over any number of devices and accumulated batches."""

import itertools
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything

from ranks import in_ranks
from small_runs import RankTask, SaveEverywhere, SmallTask, run
from tasks_help import quiet_trainer, small_backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.order import permutation
from vab.data.reading.step_size import batches_of_step
from vab.spec import UserError
from vab.tasks import AlignTask

NUM_TRAIN, STEP = 27, 8  # 3 steps in an epoch, 3 records are left over


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("data")
    return str(make_shards(folder / "train", NUM_TRAIN)), str(make_shards(folder / "val", 7, start=100))


def records_of_steps(seen, batches):
    """The records of each step of one rank, from what a task saw of each batch."""
    steps = [seen[start : start + batches] for start in range(0, len(seen), batches)]
    return [[number for *_, numbers in step for number in numbers] for step in steps]


@pytest.mark.parametrize(
    ("records", "devices", "most", "batches"),
    [
        (576, 8, 72, 1),
        (576, 1, 72, 8),
        (576, 16, 72, 1),
        (576, 4, 100, 2),
        (576, 3, 72, 3),
        (48, 8, 72, 1),
        (14, 1, 6, 7),
    ],
)
def test_a_step_is_the_fewest_equal_batches_that_fit(records, devices, most, batches):
    assert batches_of_step(records, devices, most) == batches


def test_a_step_that_does_not_divide_is_one_line_with_what_does():
    with pytest.raises(UserError) as raised:
        batches_of_step(36, 8, 72)
    assert str(raised.value) == (
        "data.global_batch_size 36 cannot be divided equally among 8 devices: type --data.global_batch_size 32 or 40,"
        " or train on one of 1, 2, 3, 4, 6, 9, 12, 18, 36 devices"
    )
    with pytest.raises(UserError, match=r"--data\.global_batch_size 8, or train"):
        batches_of_step(5, 8, 72)


@pytest.mark.parametrize(("most", "batches"), [(8, 1), (100, 1), (5, 2), (2, 4), (1, 8)])
def test_the_records_and_steps_are_the_same_however_small_a_batch_must_be(folders, most, batches):
    settings = {"max_steps": 7, "val_check_interval": 2}
    task = run(folders, batch_size=most, global_batch_size=STEP, trainer_settings=settings)
    assert {len(entry[3]) for entry in task.seen} == {STEP // batches}
    orders = [permutation(0, epoch, NUM_TRAIN)[:24].reshape(3, STEP).tolist() for epoch in range(3)]
    assert records_of_steps(task.seen, batches) == [*itertools.chain(*orders)][:7]
    assert sorted({step for step, _ in task.validated}) == [2, 4, 6]  # the interval counts steps


def test_two_ranks_and_one_process_have_the_same_records_in_each_step(folders, tmp_path):
    settings = {"max_steps": 7, "devices": 2, "strategy": "ddp"}
    in_ranks(2, partial(_train, folders, tmp_path, batch_size=2, global_batch_size=STEP, trainer_settings=settings))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text())["seen"] for rank in (0, 1)]
    ranks = [records_of_steps(seen, 2) for seen in ranks]  # 8 records: 2 batches of 2 on each
    alone = records_of_steps(
        run(folders, global_batch_size=STEP, batch_size=4, trainer_settings={"max_steps": 7}).seen, 2
    )
    assert [sorted(first + second) for first, second in zip(*ranks, strict=True)] == [sorted(step) for step in alone]


def _train(folders, tmp_path, **settings):
    run(folders, make_task=partial(RankTask, tmp_path), **settings)


@pytest.mark.parametrize(
    "moment", ["01-batch_end", "03-batch_end", "03-epoch_end", "04-batch_end", "04-validation_end"]
)
@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8), (4, 4)])
def test_a_run_goes_on_with_other_batches_at_the_same_records_and_validates_at_the_same_steps(
    folders, tmp_path, moment, before, after
):
    same = {"global_batch_size": STEP, "val_batch_size": 4}
    same["trainer_settings"] = {"max_steps": 8, "val_check_interval": 4}
    saver = SaveEverywhere(tmp_path)
    whole = run(folders, callbacks=[saver], batch_size=before, **same)
    resumed = run(folders, saver.paths[moment], batch_size=after, **same)
    step = int(moment[:2])
    expected = records_of_steps(whole.seen, STEP // before)[step:]
    assert records_of_steps(resumed.seen, STEP // after) == expected
    assert [entry[2] for entry in resumed.seen[:: STEP // after]] == [*range(step, 8)]
    assert resumed.validated == [entry for entry in whole.validated if entry[0] > step]


@pytest.mark.parametrize(
    "limit", [{"fast_dev_run": 1}, {"overfit_batches": 1, "max_steps": 2}, {"limit_train_batches": 1}]
)
def test_a_limit_of_training_batches_counts_steps(folders, limit):
    task = run(folders, batch_size=2, global_batch_size=STEP, trainer_settings={"max_steps": 2, **limit})
    steps = 1 if "fast_dev_run" in limit else 2
    assert len(task.seen) == 4 * steps
    assert records_of_steps(task.seen, 4)[0] == permutation(0, 0, NUM_TRAIN)[:STEP].tolist()


def test_a_trainer_that_was_told_to_accumulate_is_refused(folders):
    words = "--trainer.accumulate_grad_batches 2: data.global_batch_size fills it in.*--data.global_batch_size null"
    with pytest.raises(UserError, match=words):
        run(folders, global_batch_size=STEP, trainer_settings={"accumulate_grad_batches": 2})


def test_only_training_divides_the_step(folders):
    data = ShardDataModule(*folders, batch_size=5, global_batch_size=7, num_workers=0)
    trainer = quiet_trainer()
    trainer.validate(SmallTask(), data, verbose=False)
    assert trainer.accumulate_grad_batches == 1
    assert data.val_batch_size == 5


def test_a_second_fit_and_a_second_trainer_divide_the_step_once(folders):
    data = ShardDataModule(*folders, batch_size=2, global_batch_size=STEP, num_workers=0)
    for _ in range(2):
        trainer, task = quiet_trainer(max_epochs=1, limit_val_batches=0), SmallTask()
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(task, data)
        assert (trainer.accumulate_grad_batches, data.batch_size, data.global_batch_size) == (4, 2, STEP)
        assert trainer.global_step == 6


def test_a_second_datamodule_and_a_trainer_that_comes_back_begin_with_the_trainers_own_settings(folders):
    def data(most):
        return ShardDataModule(*folders, batch_size=most, global_batch_size=STEP, num_workers=0)

    first, trainers = data(2), [quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0) for _ in "ab"]
    for number, module in ((0, first), (1, first), (0, first), (0, data(4))):
        trainer, task = trainers[number], SmallTask()
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1
        trainer.fit(task, module)
        batches = STEP // module.max_batch_size
        assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (batches, 2 * batches)
        assert len(task.seen) == 2 * batches


@pytest.mark.parametrize(("limit", "steps"), [(0.34, 1), (0.5, 1), (0.67, 2)])
@pytest.mark.parametrize("most", [8, 4, 2, 1])
def test_a_fraction_of_the_training_batches_is_one_of_the_steps(folders, limit, steps, most):
    settings = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": limit}
    task = run(folders, batch_size=most, global_batch_size=STEP, trainer_settings=settings)
    assert len(task.seen) * most == steps * STEP


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_checkpoint_that_does_not_say_the_batches_of_a_step_goes_on_validating_at_the_same_steps(
    folders, tmp_path, step
):
    saver = SaveEverywhere(tmp_path)
    before = {"max_steps": 8, "accumulate_grad_batches": 2, "val_check_interval": 4}
    whole = run(folders, callbacks=[saver], batch_size=4, trainer_settings=before)
    checkpoint = torch.load(saver.paths[f"0{step}-batch_end"], weights_only=False)
    del checkpoint["ShardDataModule"]["accumulate_grad_batches"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    now = {"global_batch_size": STEP, "trainer_settings": {"max_steps": 8, "val_check_interval": 2}}
    resumed = run(folders, tmp_path / "old.ckpt", batch_size=2, val_batch_size=4, **now)
    steps = {step for step, _ in whole.validated}
    assert {step for step, _ in resumed.validated} == {late for late in steps if late > step}


def test_too_few_records_name_the_flag_that_helps(folders):
    for most in (4, 64):
        with pytest.raises(UserError, match=r"27 records, fewer than one step .*: lower --data\.global_batch_size$"):
            run(folders, batch_size=most, global_batch_size=64)
    with pytest.raises(UserError, match=r"raise it, or lower --data\.global_batch_size$"):
        run(folders, batch_size=2, global_batch_size=STEP, trainer_settings={"limit_train_batches": 0.1})


def test_an_alignment_takes_its_part_as_one_batch_and_embeds_so_many_records_at_once(shards, monkeypatch):
    """The loss is that of the whole batch."""
    losses, sizes = {}, []
    embed = AlignTask.embed_audio
    monkeypatch.setattr(
        AlignTask, "embed_audio", lambda task, codes, steps: (sizes.append(len(codes)), embed(task, codes, steps))[1]
    )
    for most in (12, 5):
        seed_everything(0, verbose=False)
        data = ShardDataModule(
            str(shards / "train"), str(shards / "val"), batch_size=most, global_batch_size=12, num_workers=0
        )
        task = AlignTask(small_backbone(data.spec), warmup_steps=1, schedule_steps=9, embedding_dim=16)
        trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
        trainer.fit(task, data)
        losses[most] = float(trainer.callback_metrics["train/loss"])
        assert trainer.accumulate_grad_batches == 1
        assert max(sizes) == most
        sizes.clear()
    assert losses[5] == pytest.approx(losses[12], rel=1e-5)
