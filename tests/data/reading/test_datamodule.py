import json
import multiprocessing
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from small_runs import BATCH_SIZE, MAX_STEPS, RankTask, SaveEverywhere, SmallTask, run
from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.order import permutation
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask

NUM_TRAIN, NUM_VAL = 14, 7  # 3 steps in an epoch, 2 records sit out


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("data")
    return str(make_shards(folder / "train", NUM_TRAIN)), str(make_shards(folder / "val", NUM_VAL, start=100))


def assert_goes_on_as(whole, resumed, step, message):
    """What ``resumed`` did from ``step`` on is what ``whole`` did, to the last bit."""
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], message
    assert len(resumed.seen) == len([entry for entry in whole.seen if entry[2] >= step]), message
    assert resumed.validated == [entry for entry in whole.validated if entry[0] > step], message
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), message


BY_EPOCHS = {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize(
    "trainer_settings",
    [
        pytest.param({}, id="validated every 2 steps"),
        pytest.param({"limit_train_batches": 2}, id="limited", marks=pytest.mark.slow),
        pytest.param({"accumulate_grad_batches": 2, "val_check_interval": 4}, id="accumulated", marks=pytest.mark.slow),
        pytest.param(
            {"val_check_interval": 1.0, "check_val_every_n_epoch": 1},
            id="validated every epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"val_check_interval": 0.7, "check_val_every_n_epoch": 1}, id="validated in epochs", marks=pytest.mark.slow
        ),
        pytest.param(BY_EPOCHS, id="ended by epochs", marks=pytest.mark.slow),
    ],
)
def test_run_resumed_at_any_moment_ends_as_the_uninterrupted_one(folders, tmp_path, trainer_settings):
    saver = SaveEverywhere(tmp_path)
    whole = run(folders, callbacks=[saver], trainer_settings=trainer_settings)
    assert len(saver.paths) > 10
    for moment, path in saver.paths.items():
        resumed = run(folders, path, trainer_settings=trainer_settings)
        assert_goes_on_as(whole, resumed, int(moment[:2]), moment)


def test_order_is_the_permutation(folders):
    seen = run(folders, seed=5).seen
    orders = [permutation(5, epoch, NUM_TRAIN)[:12].tolist() for epoch in range(3)]
    assert [number for *_, numbers in seen for number in numbers] == [*chain(*orders)][: MAX_STEPS * BATCH_SIZE]
    assert [entry[:3] for entry in seen] == [(step // 3, step % 3, step) for step in range(MAX_STEPS)]


@pytest.mark.parametrize("moment", ["04-batch_end", "06-epoch_end"])
def test_number_of_workers_changes_nothing(folders, tmp_path, moment):
    saver = SaveEverywhere(tmp_path)
    whole = run(folders, callbacks=[saver], num_workers=2)
    assert whole.seen == run(folders).seen
    for num_workers in (0, 1):
        resumed = run(folders, saver.paths[moment], num_workers=num_workers)
        assert_goes_on_as(whole, resumed, int(moment[:2]), f"{num_workers} workers")
    resumed = run(folders, saver.paths[moment], num_workers=2)
    assert_goes_on_as(whole, resumed, int(moment[:2]), "2 workers")
    assert multiprocessing.active_children() == []


def test_run_interrupted_again_and_again_ends_as_the_uninterrupted_one(folders, tmp_path):
    whole, path = run(folders), None
    for moment in (
        "01-batch_end",
        "03-epoch_start",
        "03-train_start",
        "04-validation_end",
        "05-batch_end",
        "06-epoch_end",
    ):
        saver = SaveEverywhere(tmp_path)
        task = run(folders, path, [saver])
        assert task.seen == whole.seen[len(whole.seen) - len(task.seen) :], moment
        path = saver.paths[moment]
    assert_goes_on_as(whole, run(folders, path), 6, "after six interruptions")


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_step_that_failed_is_done_again(folders, tmp_path, step):
    """The record count in a checkpoint taken in the middle of a step does not include that step."""

    class Broken(SmallTask):
        def before_step(self, number):
            if number == step:
                raise RuntimeError("out of memory")

    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    whole = run(folders)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(folders, callbacks=[SaveOnException()], make_task=Broken, num_workers=2)
    assert multiprocessing.active_children() == []
    assert_goes_on_as(whole, run(folders, tmp_path / "broken.ckpt"), step - 1, f"step {step}")


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_other_global_batch_size_neither_loses_nor_repeats(folders, tmp_path, batch_size):
    """More or fewer ranks change the number of records in a step; so does the batch size, which one process can try."""
    saver = SaveEverywhere(tmp_path)
    run(folders, callbacks=[saver])
    orders = [permutation(0, epoch, NUM_TRAIN).tolist() for epoch in range(4)]
    for moment in ("01-batch_end", "02-validation_end", "03-batch_end", "03-epoch_end", "04-batch_end"):
        step = int(moment[:2])
        epoch, done = (1, 0) if step == 3 else (step // 3, step % 3 * BATCH_SIZE)
        resumed = run(
            folders,
            saver.paths[moment],
            batch_size=batch_size,
            trainer_settings={"max_steps": -1, "max_epochs": 3, "val_check_interval": 1000},
        )
        expected = []
        for number in range(epoch, 3):
            rest = orders[number][done:]
            expected.append([number, rest[: len(rest) // batch_size * batch_size]])
            done = 0
        got = [
            [number, [*chain(*(numbers for seen, *_, numbers in resumed.seen if seen == number))]]
            for number in range(epoch, 3)
        ]
        assert got == expected, moment
        assert {len(numbers) for *_, numbers in resumed.seen} == {batch_size}


def test_other_training_data_are_refused_or_begun_anew(folders, tmp_path, make_shards):
    saver = SaveEverywhere(tmp_path)
    run(folders, callbacks=[saver])
    other = str(make_shards(tmp_path / "other", 9, start=50)), folders[1]
    hashes = [ShardDataset(folder).manifest_hash for folder in (folders[0], other[0])]
    for moment, epoch in (("04-batch_end", 2), ("06-epoch_end", 2), ("03-batch_end", 1)):
        path = saver.paths[moment]
        with pytest.raises(UserError, match=f"{hashes[0]} != {hashes[1]}.*--data.data_resume restart"):
            run(other, path)
        with pytest.warns(UserWarning, match="a new epoch begins"):
            resumed = run(other, path, data_resume="restart")
        order = permutation(0, epoch, 9).tolist()
        assert resumed.seen[0][1] == 0
        assert [numbers for *_, numbers in resumed.seen[:2]] == [order[:4], order[4:8]]
        assert len(resumed.seen) == MAX_STEPS - int(moment[:2])
    with pytest.raises(UserError, match="seed: 0 != 1"):
        run(folders, path, seed=1)


def test_overfitting_sees_the_same_records_in_each_epoch(folders):
    seen = run(folders, trainer_settings={"overfit_batches": 1, "max_steps": 3}).seen
    assert [numbers for *_, numbers in seen] == [permutation(0, 0, NUM_TRAIN)[:4].tolist()] * 3


def test_second_fit_of_a_trainer_goes_on_and_another_trainer_starts_again(folders):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "limit_val_batches": 0}
    task, data = SmallTask(), ShardDataModule(*folders, batch_size=BATCH_SIZE, num_workers=0)
    trainer = Trainer(max_epochs=1, **settings)
    trainer.fit(task, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(task, data)
    Trainer(max_steps=1, **settings).fit(task, data)
    order = [*permutation(0, 0, NUM_TRAIN)[:12], *permutation(0, 1, NUM_TRAIN)[:12], *permutation(0, 0, NUM_TRAIN)[:4]]
    assert [number for *_, numbers in task.seen for number in numbers] == order


@pytest.mark.parametrize("val_records", [None, 5, 100])
def test_validation_scores_each_record_once(folders, val_records):
    task = run(folders, val_records=val_records, val_batch_size=3, num_workers=2)
    count = min(val_records or NUM_VAL, NUM_VAL)
    for step in (2, 4, 6, 8):
        scored = [number for at, numbers in task.validated if at == step for number in numbers]
        assert scored == list(range(count))


def test_validation_that_is_cut_begins_anew_each_time(folders):
    limited = {"num_sanity_val_steps": 1, "limit_val_batches": 2, "max_steps": 4}
    task = run(folders, val_batch_size=2, num_workers=2, trainer_settings=limited)
    assert task.validated == [(0, [0, 1]), (2, [0, 1]), (2, [2, 3]), (4, [0, 1]), (4, [2, 3])]


def test_validating_a_checkpoint_takes_other_data(folders, tmp_path, make_shards):
    saver = SaveEverywhere(tmp_path)
    run(folders, callbacks=[saver])
    other = str(make_shards(tmp_path / "other", 9, start=50))
    task = SmallTask()
    data = ShardDataModule(other, other, other, num_workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(task, data, ckpt_path=saver.paths["04-batch_end"], weights_only=True, verbose=False)
    assert task.validated == [(0, list(range(9)))]


def test_loaders_of_the_stages(folders, tmp_path, make_shards):
    test = str(make_shards(tmp_path / "test", 3, start=200))
    counts = []
    for stage, data in [
        ("test", ShardDataModule(*folders, test, num_workers=0)),
        ("predict", ShardDataModule(*folders, test, num_workers=0)),
        ("predict", ShardDataModule(*folders, num_workers=0)),
    ]:
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        counts.append([len(batch) for batch in getattr(data, f"{stage}_dataloader")()])
    assert counts == [[3], [3], [NUM_VAL]]
    data = ShardDataModule(*folders)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"no test data: give --data.test DIR"):
        data.test_dataloader()


@pytest.mark.ddp
def test_two_processes_share_the_records_and_a_single_one_goes_on(folders, tmp_path):
    # Also with the trainer's own sampler switched on: it must not touch our order.
    settings = {"strategy": "ddp_fork", "devices": 2, "max_steps": 5, "use_distributed_sampler": True}
    saver = SaveEverywhere(tmp_path)
    run(
        folders,
        callbacks=[saver],
        make_task=partial(RankTask, tmp_path),
        batch_size=2,
        num_workers=1,
        trainer_settings=settings,
    )
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    together = [first[-1] + second[-1] for first, second in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    order = permutation(0, 0, NUM_TRAIN)[:12].tolist() + permutation(0, 1, NUM_TRAIN)[:8].tolist()
    assert [*chain(*together)] == order
    # 7 records in 2 steps of 2 x 2: the last place of the second rank is to spare.
    assert [numbers for _, numbers in ranks[0]["validated"][:2]] == [[0, 1], [4, 5]]
    assert [numbers for _, numbers in ranks[1]["validated"][:2]] == [[2, 3], [6]]
    single = run(folders, tmp_path / "04-batch_end.ckpt", batch_size=2, trainer_settings={"max_steps": 9})
    rest = [number for *_, numbers in single.seen for number in numbers]
    assert rest == permutation(0, 1, NUM_TRAIN)[4:14].tolist()


@pytest.mark.ddp
def test_ranks_that_see_other_data_are_refused_before_the_first_step(folders):
    class Uneven(ShardDataModule):
        def setup(self, stage):
            self.num_val_records = 3 + self.trainer.global_rank
            super().setup(stage)

    trainer = Trainer(accelerator="cpu", strategy="ddp_fork", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(Exception, match=r"UserError: ranks \[1\] see other data than rank 0"):
        trainer.fit(SmallTask(), Uneven(*folders, num_workers=0))


def test_batch_moves_to_the_device_whole(folders):
    data = ShardDataModule(*folders, num_workers=0)
    batch = data.transfer_batch_to_device(data.val_dataset.read([0, 1]), torch.device("meta"), 0)
    assert isinstance(batch, Batch)
    assert {value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {"meta"}


def test_spec_labels_and_codebooks_are_there_at_once(folders, small_spec, codebooks):
    data = ShardDataModule(*folders)
    assert data.spec == small_spec
    assert data.labels == ("bell", "dog", "drum")
    assert torch.equal(data.codebooks, codebooks)


def test_levels_are_read_of_all_data_sets_in_the_same_order(folders, codebooks):
    class CodesTask(SmallTask):
        def training_step(self, batch, batch_idx):
            self.seen.append((batch.index.tolist(), tuple(batch.codes.shape[1:])))
            return self.layer(batch.features.mean(1)).mean()

    data = ShardDataModule(*folders, folders[1], levels=1)
    assert {d.spec.num_codebooks for d in (data, data.train_dataset, data.val_dataset, data.test_dataset)} == {1}
    assert torch.equal(data.codebooks, codebooks[:1])
    whole, coarse = (run(folders, make_task=CodesTask, num_workers=1, levels=levels) for levels in (None, 1))
    assert {shape for _, shape in whole.seen} == {(2, 25)}
    assert coarse.seen == [(numbers, (1, 25)) for numbers, _ in whole.seen]


def test_checkpoint_of_other_levels_is_refused(folders, tmp_path):
    def fit(levels, resume=None, model_levels=None):
        data = ShardDataModule(*folders, batch_size=BATCH_SIZE, num_workers=0, levels=levels)
        spec = replace(data.spec, num_codebooks=model_levels or data.spec.num_codebooks)
        backbone = Backbone(spec, dim=8, num_heads=1, num_modality_layers=1, num_joint_layers=1)
        trainer = Trainer(
            max_steps=2 if resume else 1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(PretrainTask(backbone, warmup_steps=0), data, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(path := tmp_path / f"{levels}.ckpt")
        return path, data.state_dict()

    (coarse, coarse_state), (whole, whole_state) = fit(1), fit(None)
    assert coarse_state == whole_state  # the place in the order is the same, and so are the data
    with pytest.raises(UserError, match=r"checkpoint and shards do not fit .*num_codebooks: 1 != 2"):
        fit(None, coarse)
    with pytest.raises(UserError, match=r"checkpoint and shards do not fit .*num_codebooks: 2 != 1"):
        fit(1, whole)
    with pytest.raises(UserError, match=r"model and shards do not fit .*num_codebooks: 2 != 1"):
        fit(1, whole, model_levels=2)
    fit(1, coarse)


def test_data_that_do_not_go_together_are_refused(folders, tmp_path, make_shards, small_spec):
    slower = make_shards(tmp_path / "slower", 2, spec=replace(small_spec, code_rate=40.0, codec_hash="0ther"))
    with pytest.raises(UserError, match=r"code_rate: 50.0 != 40.0; .*codec_hash|codec_hash: c0dec != 0ther"):
        ShardDataModule(folders[0], str(slower))
    more = make_shards(tmp_path / "more", 2, labels=("bell", "dog", "drum", "flute"))
    with pytest.raises(UserError, match=r"labels: 3 != 4, missing \[\], extra \['flute'\]"):
        _ = ShardDataModule(folders[0], folders[1], str(more)).test_dataset


def test_test_data_are_opened_when_they_are_needed(folders, tmp_path, make_shards):
    class Tested(SmallTask):
        def test_step(self, batch, batch_idx):
            return None

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = ShardDataModule(*folders, str(tmp_path / "test"), batch_size=BATCH_SIZE, num_workers=0)
    task = Tested()
    trainer = Trainer(max_steps=1, enable_model_summary=False, **settings)
    trainer.fit(task, data)
    trainer.validate(task, data, verbose=False)
    with pytest.raises(UserError, match=r"test.*type: vab extract --media DIR --out"):
        trainer.test(task, data, verbose=False)
    make_shards(tmp_path / "test", 3, start=200)
    assert len(data.test_dataset) == 3


def test_mistakes_get_one_line(folders):
    with pytest.raises(UserError, match=r"type: vab extract --media DIR --out nowhere"):
        ShardDataModule("nowhere", folders[1])
    for settings, words in [
        ({"batch_size": 0}, r"data.batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, r"data.num_workers must be 0 or more, got -1"),
        ({"seed": -1}, r"data.seed must be 0 or more"),
        ({"val_records": 0}, r"data.val_records must be 1 or more"),
        ({"levels": 0}, r"data.levels must be 1 or more, got 0"),
        ({"levels": 3}, r"levels must be 1 to 2, the codebooks of .*train; got 3"),
        ({"data_resume": "maybe"}, r'data.data_resume must be "error" or "restart", got \'maybe\''),
    ]:
        with pytest.raises(UserError, match=words):
            ShardDataModule(*folders, **settings)
    with pytest.raises(
        UserError, match=r"has 14 records, fewer than one step takes \(15 x 1 ranks\): lower --data.batch"
    ):
        run(folders, batch_size=15)


@pytest.mark.parametrize(("limit", "steps"), [(0.75, 2), (0.34, 1), (1.0, 3), (2, 2)])
def test_part_of_an_epoch_is_taken_once(folders, limit, steps):
    """An epoch has 3 steps; the trainer takes a share of the loader's length, which must not be cut before."""
    settings = {"limit_train_batches": limit, "max_steps": -1, "max_epochs": 3, "val_check_interval": 1000}
    seen = run(folders, trainer_settings=settings).seen
    orders = [permutation(0, epoch, NUM_TRAIN)[: steps * BATCH_SIZE].tolist() for epoch in range(3)]
    assert [number for *_, numbers in seen for number in numbers] == [*chain(*orders)]
    assert [entry[:2] for entry in seen] == [(epoch, step) for epoch in range(3) for step in range(steps)]


def test_overfitting_on_a_share_sees_the_same_records_in_each_epoch(folders):
    settings = {"overfit_batches": 0.7, "max_steps": -1, "max_epochs": 3, "val_check_interval": 1000}
    seen = run(folders, trainer_settings=settings).seen
    order = permutation(0, 0, NUM_TRAIN).tolist()
    assert [numbers for *_, numbers in seen] == [order[:4], order[4:8]] * 3


def test_a_limit_below_an_optimizer_step_names_the_flag_that_was_given(folders):
    for flag, settings in {
        "fast_dev_run": {"fast_dev_run": 1},
        "overfit_batches": {"overfit_batches": 1},
        "limit_train_batches": {"limit_train_batches": 1},
    }.items():
        with pytest.raises(UserError, match=rf"--trainer\.{flag} 1 leaves no optimizer step of 2 batches"):
            run(folders, trainer_settings={"accumulate_grad_batches": 2, **settings})


def test_a_trainer_that_is_given_other_data_asks_them_for_the_place(folders, tmp_path, make_shards):
    saver = SaveEverywhere(tmp_path)
    whole = run(folders, callbacks=[saver])
    other = str(make_shards(tmp_path / "other", 9, start=50))
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "limit_val_batches": 0, "max_epochs": -1}
    trainer = Trainer(max_steps=1, **settings)
    trainer.fit(SmallTask(), ShardDataModule(other, folders[1], batch_size=BATCH_SIZE, num_workers=0))
    trainer.fit_loop.epoch_loop.max_steps = MAX_STEPS
    task = SmallTask()
    data = ShardDataModule(*folders, batch_size=BATCH_SIZE, num_workers=0)
    trainer.fit(task, data, ckpt_path=saver.paths["04-batch_end"], weights_only=True)
    assert [entry[3] for entry in task.seen] == [entry[3] for entry in whole.seen[4:]]


def test_a_batch_that_failed_is_done_again_by_the_same_trainer(folders):
    class Broken(SmallTask):
        def before_step(self, number):
            if number == 2:
                raise RuntimeError("out of memory")

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, enable_model_summary=False, limit_val_batches=0, **settings)
    task, data = Broken(), ShardDataModule(*folders, batch_size=BATCH_SIZE, num_workers=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(task, data)
    trainer.fit(task, data)
    assert task.seen[1][3] == task.seen[2][3] == permutation(0, 0, NUM_TRAIN)[4:8].tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_finds_wrong_is_said_in_one_line(folders, tmp_path, make_shards, num_workers):
    damaged = make_shards(tmp_path / "damaged", NUM_TRAIN)
    row = ShardDataset(damaged).index_row(3)
    tar = sorted(damaged.glob("*.tar"))[row["shard"]]
    content = bytearray(tar.read_bytes())
    content[row["codes_offset"]] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match="is not what was written") as raised:
        run((str(damaged), folders[1]), check_crc=True, num_workers=num_workers)
    assert len(str(raised.value).splitlines()) == 1
