"""Several data sets read as one, and trained on in one order that stops and goes on anywhere."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch

from same_batches import same
from small_runs import BATCH_SIZE, RankTask, SaveEverywhere, SmallTask, run
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.mixed import MixedDataset
from vab.data.reading.order import mixed_order, permutation
from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.spec import UserError

LARGE, SMALL, NUM_VAL = 14, 5, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("mixed")
    return [
        str(make_shards(folder / name, count, start=start))
        for name, count, start in (("large", LARGE, 0), ("small", SMALL, 300), ("val", NUM_VAL, 100))
    ]


@pytest.fixture(scope="module")
def mixed(folders):
    return MixedDataset([ShardDataset(folder) for folder in folders[:2]])


def weights(folders, large=1.0, small=1.0):
    return {folders[0]: large, folders[1]: small}


def test_records_are_numbered_through(folders, mixed):
    large, small = mixed.datasets
    assert len(mixed) == LARGE + SMALL
    numbers = [15, 3, 18, 14, 0, 13, 3]
    batch = mixed.read(numbers)
    assert batch.index.tolist() == numbers
    for row, number in enumerate(numbers):
        dataset, own = (large, number) if number < LARGE else (small, number - LARGE)
        one, alone = dataset.read([own]), mixed[number]
        same(replace(alone, index=one.index), one)
        for name in ("codes", "features", "labels", "steps", "frames", "source", "draw", "valid"):
            assert torch.equal(getattr(batch, name)[row : row + 1], getattr(one, name)), name
        assert mixed.key(number) == dataset.key(own)
        assert mixed.record(number) == dataset.record(own)
        assert mixed.label_names(number) == dataset.label_names(own)
    assert batch.ragged
    assert not mixed.read([14]).ragged
    assert mixed.labels_per_record().tolist() == [*large.labels_per_record(), *small.labels_per_record()]
    assert mixed.label_counts().tolist() == (large.label_counts() + small.label_counts()).tolist()
    assert mixed.without_video() == 0
    assert str(mixed.folder) == f"{folders[0]} + {folders[1]}"
    for wrong in ([19], [-1], []):
        with pytest.raises(IndexError, match=r"record numbers must be in 0..18"):
            mixed.read(wrong)


def write(folder, small_spec, codebooks, names, **types):
    """A data set whose records have the names as ids, each its own label but the last."""
    with ShardWriter(folder, small_spec, [*names[:-1], "common"], 4) as writer:
        for number, name in enumerate(names):
            meta = {"id": name, "source": f"{name}.mp4", "start_seconds": 1.0 * number, "steps": 25, "frames": 4}
            labels = [name if name != names[-1] else "common"]
            codes, features = np.full((2, 25), number), np.full((4, 6), 0.1 * number)
            record = make_key(name, 1.0 * number), codes, features, meta | {"labels": labels}
            writer.add(f"{name}.mp4", [record])
        writer.finish(codebooks)
    return str(folder)


def test_labels_are_brought_together_and_a_recording_has_one_number(tmp_path, small_spec, codebooks):
    one = write(tmp_path / "one", small_spec, codebooks, ["zebra", "ant", "x"])
    two = write(tmp_path / "two", small_spec, codebooks, ["mole", "ant", "zebra", "y"])
    data = ShardDataModule({one: 1, two: 1}, two, one)
    assert data.labels == ("ant", "common", "mole", "zebra")
    assert data.val_dataset.labels == data.test_dataset.labels == data.labels
    batch = data.train_dataset.read(range(7))
    assert batch.labels.argmax(1).tolist() == [3, 0, 1, 2, 0, 3, 1]
    assert batch.labels.sum(1).tolist() == [1] * 7
    assert data.val_dataset.read(range(4)).labels.argmax(1).tolist() == [2, 0, 3, 1]
    sources = batch.source.tolist()
    assert (sources[0], sources[1]) == (sources[5], sources[4])
    assert len(set(sources)) == 5
    listed = tmp_path / "names.txt"
    listed.write_text("zebra\nmole\ncommon\nant\nbee\n")
    assert ShardDataModule({one: 1, two: 1}, two, vocabulary=str(listed)).labels == (
        "zebra", "mole", "common", "ant", "bee")  # fmt: skip
    other = write(tmp_path / "other", small_spec, codebooks, ["bee", "y"])
    with pytest.raises(
        UserError, match=r"other: no class 'bee' among the 4 of .*one \+ .*two: give the list .* --data.vocab"
    ):
        ShardDataModule({one: 1, two: 1}, other)
    listed.write_text("zebra\nmole\ncommon\n")
    with pytest.raises(UserError, match="one: no class 'ant'"):
        ShardDataModule({one: 1, two: 1}, two, vocabulary=str(listed))


def test_the_wider_type_is_read_where_two_differ(folders, mixed, make_shards, tmp_path):
    """Data sets that others wrote may hold other types; here one is told so of an equal pair."""
    large, small = (ShardDataset(folder) for folder in folders[:2])
    wide = MixedDataset([large, small])
    wide._types = (np.dtype("<i8"), np.dtype("<f4"))
    packed = wide.gather([3, 16, 2])
    assert packed.unpack().codes.dtype == torch.int64
    same(packed.unpack().widened(), mixed.read([3, 16, 2]))
    large.check_crc = small.check_crc = True
    same(wide.read([3, 16, 2]), mixed.read([3, 16, 2]))


def test_data_sets_that_do_not_go_together_are_refused(folders, tmp_path, make_shards, small_spec, codebooks):
    slower = str(make_shards(tmp_path / "slower", 2, spec=replace(small_spec, code_rate=40.0)))
    with pytest.raises(UserError, match=r"large and .*slower cannot be mixed \(code_rate: 50.0 != 40.0\)"):
        ShardDataModule({folders[0]: 1, slower: 1}, folders[2])
    other = write(tmp_path / "other", small_spec, codebooks + 1, ["a", "b"])
    with pytest.raises(UserError, match=r"large and .*other cannot be mixed: their codebooks differ"):
        ShardDataModule({folders[0]: 1, other: 1}, folders[2])
    # Of which a coarse model reads levels that are alike.
    changed = codebooks.clone()
    changed[1] += 1
    coarse = write(tmp_path / "coarse", small_spec, changed, ["a", "b"])
    assert len(ShardDataModule({folders[0]: 1, coarse: 1}, coarse, levels=1).train_dataset) == LARGE + 2


@pytest.mark.parametrize(
    ("train", "settings", "words"),
    [
        ({}, {}, "data.train names no folder"),
        ((1, 0), {}, r"the weight of .*small must be a number above 0, got 0"),
        ((1, float("nan")), {}, r"must be a number above 0, got nan"),
        ((1, 1e-6), {}, r"small would give no record to an epoch of 19: raise its weight"),
        ((1, 1), {"records_per_epoch": 1}, r"small would give no record to an epoch of 1:"),
        ((1, 1), {"records_per_epoch": 0}, r"data.records_per_epoch must be 1 or more, got 0"),
        ((1, 1), {"order": "class_balanced"}, r"data.order class_balanced is for one training data set; .* has 2"),
        ((1, 1), {"fold": 1}, r"data.fold is for one training data set"),
        ("{a: x}", {}, r"data.train must be a folder, or folders and numbers as in \{A: 3, B: 1\}; got \{a: x\}"),
        ({"${oc.env:VAB_NO_SUCH}/a": 1}, {}, r"data.train: .*VAB_NO_SUCH"),
    ],
)
def test_mistakes_get_one_line(folders, train, settings, words):
    if isinstance(train, tuple):
        train = weights(folders, *train)
    with pytest.raises(UserError, match=words) as error:
        ShardDataModule(train, folders[2], **settings)
    assert "\n" not in str(error.value)


def test_a_folder_named_twice_is_refused(folders):
    with pytest.raises(UserError, match=r"data.train names .*large more than once"):
        ShardDataModule({folders[0]: 1, f"{folders[0]}/": 2}, folders[2])


def test_an_epoch_has_its_shares_and_a_mixture_of_one_is_as_before(folders):
    data = ShardDataModule(weights(folders, 3, 1), folders[2], records_per_epoch=24, seed=3)
    assert data.records_per_part == (18, 6)
    for epoch in range(4):
        order = data.epoch_order(epoch)
        assert (order < LARGE).sum() == 18
        assert np.array_equal(order, mixed_order(3, epoch, [LARGE, SMALL], [18, 6]))
    plain, alone = ShardDataModule(*folders[::2], seed=3), ShardDataModule({folders[0]: 0.3}, folders[2], seed=3)
    assert np.array_equal(alone.epoch_order(2), permutation(3, 2, LARGE))
    assert np.array_equal(alone.epoch_order(2), plain.epoch_order(2))
    assert alone._identity == plain._identity
    longer = ShardDataModule(*folders[::2], seed=3, records_per_epoch=20)
    whole = np.concatenate([permutation(3, number, LARGE) for number in range(3)])
    assert np.array_equal(np.concatenate([longer.epoch_order(0), longer.epoch_order(1)]), whole[:40])
    balanced = ShardDataModule(*folders[::2], order="class_balanced", records_per_epoch=100)
    assert balanced.epoch_order(0).shape == (100,)


def test_a_run_sees_the_order_and_says_so(folders, caplog):
    with caplog.at_level("INFO"):
        seen = run((weights(folders), folders[2]), records_per_epoch=13).seen
    assert f"records of an epoch: 7 of 14 from {folders[0]}, 6 of 5 from {folders[1]}" in caplog.text
    orders = [mixed_order(0, epoch, [LARGE, SMALL], [7, 6])[:12].tolist() for epoch in range(3)]
    assert [number for *_, numbers in seen for number in numbers] == [*chain(*orders)][: 8 * BATCH_SIZE]


class DrawTask(SmallTask):
    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, list(zip(batch.index.tolist(), batch.draw.tolist(), strict=True))))
        return self.layer(batch.features.mean(1)).mean()


@pytest.mark.parametrize("settings", [{"records_per_epoch": 40}, {"order": "class_balanced"}])
def test_each_draw_of_a_record_in_an_epoch_has_a_number(folders, settings):
    train = folders[1] if "order" in settings else weights(folders)
    seen = run((train, folders[2]), make_task=DrawTask, num_workers=1, **settings).seen
    count = Counter()
    for epoch, batch in seen:
        for number, draw in batch:
            assert draw == count[epoch, number]
            count[epoch, number] += 1
    assert max(count.values()) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_another_global_batch_size_in_the_middle_neither_loses_nor_repeats(folders, tmp_path, batch_size):
    """As more or fewer ranks would make it."""
    train = weights(folders, 1, 2)
    settings = {"records_per_epoch": 15}
    saver = SaveEverywhere(tmp_path)
    run((train, folders[2]), callbacks=[saver], **settings)
    orders = [mixed_order(0, epoch, [LARGE, SMALL], [5, 10]).tolist() for epoch in range(3)]
    trainer = {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1000}
    for moment, epoch, done in (("01-batch_end", 0, 4), ("02-batch_end", 0, 8), ("04-batch_end", 1, 4)):
        resumed = run(
            (train, folders[2]), saver.paths[moment], batch_size=batch_size, trainer_settings=trainer, **settings
        )
        for number in range(epoch, 3):
            rest = orders[number][done if number == epoch else 0 :]
            got = [*chain(*(numbers for seen, *_, numbers in resumed.seen if seen == number))]
            assert got == rest[: len(rest) // batch_size * batch_size], moment


def test_a_changed_mixture_is_refused_or_begun_anew(folders, tmp_path):
    saver = SaveEverywhere(tmp_path)
    run((weights(folders), folders[2]), callbacks=[saver])
    path = saver.paths["02-batch_end"]
    hashes = [
        ShardDataModule(train, folders[2]).train_dataset.manifest_hash for train in (weights(folders), folders[0])
    ]
    assert len(set(hashes)) == 2
    same_ratio = run((weights(folders, 2, 2), folders[2]), path)
    assert len(same_ratio.seen) == 6
    for train, settings, words in (
        (weights(folders, 2, 1), {}, r"records_per_epoch: \[10, 9\] != \[13, 6\]"),
        (weights(folders), {"records_per_epoch": 18}, r"records_per_epoch: \[10, 9\] != \[9, 9\]"),
        (folders[0], {}, rf"manifest_hash: {hashes[0]} != {hashes[1]}"),
        (dict(reversed(weights(folders).items())), {}, r"manifest_hash: "),
    ):
        with pytest.raises(UserError, match=words):
            run((train, folders[2]), path, **settings)
        with pytest.warns(UserWarning, match="a new epoch begins"):
            resumed = run((train, folders[2]), path, data_resume="restart", **settings)
        data = ShardDataModule(train, folders[2], **settings)
        assert resumed.seen[0][3] == data.epoch_order(1)[:BATCH_SIZE].tolist()
    # A checkpoint from before there were mixtures is one of a single whole data set.
    run((folders[0], folders[2]), callbacks=[saver])
    content = torch.load(path, weights_only=True)
    del content["ShardDataModule"]["records_per_epoch"]
    torch.save(content, tmp_path / "old.ckpt")
    assert len(run((folders[0], folders[2]), tmp_path / "old.ckpt").seen) == 6


@pytest.mark.ddp
def test_two_processes_share_the_mixture_and_a_single_one_goes_on(folders, tmp_path):
    settings = {"strategy": "ddp_fork", "devices": 2, "max_steps": 5}
    saver = SaveEverywhere(tmp_path)
    train, count = (weights(folders, 1, 2), folders[2]), {"records_per_epoch": 15, "batch_size": 2}
    task = partial(RankTask, tmp_path)
    run(train, callbacks=[saver], make_task=task, num_workers=1, trainer_settings=settings, **count)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    together = [first[-1] + second[-1] for first, second in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    orders = [mixed_order(0, epoch, [LARGE, SMALL], [5, 10]).tolist() for epoch in range(2)]
    assert [*chain(*together)] == orders[0][:12] + orders[1][:8]
    single = run(train, tmp_path / "04-batch_end.ckpt", trainer_settings={"max_steps": 9}, **count)
    assert [number for *_, numbers in single.seen for number in numbers] == orders[1][4:14]
