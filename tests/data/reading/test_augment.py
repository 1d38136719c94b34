"""Splicing and rolling: what moves where, by which chance, and the same in any batch and any run."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from same_batches import same
from small_runs import SaveEverywhere, SmallTask, run
from vab.data.reading.augment import Augmentation, augment, cut_seconds
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.loader import Loader
from vab.data.reading.mixed import MixedDataset
from vab.data.reading.order import Changes, Share, permutation
from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.spec import UserError

SECONDS, RATE, FPS, COUNT = 4, 25, 4, 14
DAC = 44100 / 512
"""Steps per second of DAC at 44.1 kHz: no whole second begins with a step."""


@pytest.fixture(scope="module")
def long_spec(small_spec):
    return replace(
        small_spec,
        segment_seconds=4.0,
        code_rate=25.0,
        num_steps=SECONDS * RATE,
        video_fps=4.0,
        num_frames=SECONDS * FPS,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, long_spec, codebooks):
    """Records of which each code and feature says whose it is and when: record n has labels after n % 4 and is short
    where n % 5 is 4."""
    folder = tmp_path_factory.mktemp("augment")
    for name, count, first in (("train", COUNT, 0), ("val", 7, 100)):
        with ShardWriter(folder / name, long_spec, ["bell", "dog", "drum"], 4) as writer:
            for number in range(first, first + count):
                second = np.repeat(np.arange(SECONDS), RATE)
                codes = np.stack([np.full(SECONDS * RATE, number), np.arange(SECONDS * RATE) % 100 + second])
                features = np.zeros((SECONDS * FPS, 6))
                features[:, 0], features[:, 1] = number, np.arange(SECONDS * FPS)
                short = number % 5 == 4
                meta = {"id": f"v{number}", "source": f"v{number}.mp4", "start_seconds": 0.0, "frames": SECONDS * FPS}
                meta |= {
                    "steps": 60 if short else SECONDS * RATE,
                    "labels": [["bell"], ["dog"], [], ["drum"]][number % 4],
                }
                writer.add(f"v{number}.mp4", [(make_key(f"v{number}", 0.0), codes, features, meta)])
            writer.finish(codebooks)
    return str(folder / "train"), str(folder / "val")


@pytest.fixture(scope="module")
def data(folders):
    return ShardDataset(folders[0])


def changed(data, numbers, **changes):
    """These records after changes; what is not given does nothing."""
    count = len(numbers)
    nothing = {"spliced": np.zeros(count, bool), "partners": np.zeros(count, int), "cuts": np.ones(count, int)}
    given = nothing | {"shifts": np.zeros(count, int)} | {name: np.array(value) for name, value in changes.items()}
    packed = data.gather(numbers)
    augment(packed, data, Changes(**given))
    return packed.unpack().widened()


def test_a_spliced_record_goes_on_as_another_in_sound_and_picture(data):
    got = changed(data, [0, 1, 2], spliced=[True, False, True], partners=[3, 5, 7], cuts=[1, 2, 3])
    one, other = data.read([0, 1, 2]), data.read([3, 5, 7])
    for row, (step, frame) in {0: (25, 4), 2: (75, 12)}.items():
        assert torch.equal(got.codes[row], torch.cat([one.codes[row, :, :step], other.codes[row, :, step:]], 1))
        assert torch.equal(got.features[row], torch.cat([one.features[row, :frame], other.features[row, frame:]]))
    assert torch.equal(got.codes[1], one.codes[1])
    assert torch.equal(got.features[1], one.features[1])
    assert got.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]  # bell and drum, dog, nothing and drum
    for name in ("index", "source", "steps", "frames", "valid", "draw"):
        assert torch.equal(getattr(got, name), getattr(one, name)), name


def test_a_rolled_record_is_moved_on_and_comes_round(data):
    got, one = changed(data, [0, 1, 2], shifts=[1, 0, 3]), data.read([0, 1, 2])
    for row, (step, frame) in enumerate([(25, 4), (0, 0), (75, 12)]):
        assert torch.equal(got.codes[row], torch.roll(one.codes[row], step, 1))
        assert torch.equal(got.features[row], torch.roll(one.features[row], frame, 0))
    same(replace(got, codes=one.codes, features=one.features), one)


def test_spliced_first_and_then_rolled(data):
    both = changed(data, [0], spliced=[True], partners=[1], cuts=[2], shifts=[1])
    spliced = changed(data, [0], spliced=[True], partners=[1], cuts=[2])
    assert torch.equal(both.codes, torch.roll(spliced.codes, 25, 2))
    assert torch.equal(both.features, torch.roll(spliced.features, 4, 1))
    assert both.features[0, ::FPS, 0].tolist() == [1, 0, 0, 1]


def test_records_that_do_not_fill_the_segment_stay_as_they_are(data):
    got = changed(data, [4, 0, 4], spliced=[True, True, False], partners=[0, 4, 0], cuts=[1, 1, 1], shifts=[2, 0, 2])
    same(got, data.read([4, 0, 4]))
    assert got.ragged


def test_levels_and_several_data_sets(folders, data):
    coarse = ShardDataset(folders[0], levels=1)
    settings = {"spliced": [True, True], "partners": [3, 0], "cuts": [1, 2], "shifts": [0, 3]}
    assert torch.equal(changed(coarse, [0, 1], **settings).codes, changed(data, [0, 1], **settings).codes[:, :1])
    mixed = MixedDataset([data, ShardDataset(folders[1])])
    got = changed(mixed, [0, 15], spliced=[True, True], partners=[14, 2], cuts=[1, 1])
    assert got.features[:, ::FPS, 0].tolist() == [[0, 100, 100, 100], [101, 2, 2, 2]]


@pytest.mark.parametrize(
    ("code_rate", "fps", "segment", "expected"),
    [(50.0, 1.0, 10.0, range(1, 10)), (50.0, 12.5, 10.0, [2, 4, 6, 8]), (50.0, 1 / 3, 10.0, [3, 6]),
     (75.0, 4.0, 2.0, [1]), (50.0, 4.0, 1.0, []), (DAC, 4.0, 10.0, range(1, 10)), (50.0, 4.0, 2.5, [1, 2]),
     (DAC, 0.5, 10.0, [2, 4, 6, 8])],
)  # fmt: skip
def test_cuts_are_where_a_frame_begins(small_spec, code_rate, fps, segment, expected):
    lengths = {"num_steps": max(1, int(code_rate * segment)), "num_frames": max(1, int(fps * segment + 1e-9))}
    spec = replace(small_spec, code_rate=code_rate, video_fps=fps, segment_seconds=segment, **lengths)
    assert cut_seconds(spec).tolist() == list(expected)


def test_what_cannot_be_done_is_refused(folders, small_spec, long_spec, make_shards, tmp_path):
    for name in ("splice", "roll"):
        for wrong in (-0.1, 1.5):
            with pytest.raises(UserError, match=rf"data.{name} must be a probability from 0 to 1, got {wrong}"):
                ShardDataModule(*folders, **{name: wrong})
    short = str(make_shards(tmp_path / "short", 2))
    with pytest.raises(UserError, match=r"data.splice and data.roll must be 0 here: no second of a segment of 0.5 s"):
        ShardDataModule(short, short, splice=0.5, roll=0.1)
    with pytest.raises(UserError, match=r"^data.roll must be 0 here: no second"):
        ShardDataModule(short, short, roll=0.1)
    uneven = replace(long_spec, num_frames=15)
    Augmentation(uneven, 0, splice=1.0, roll=0.0)
    with pytest.raises(UserError, match=r"data.roll must be 0 here: .* the steps last 4 s and the frames 3.75 s"):
        Augmentation(uneven, 0, splice=0.0, roll=0.1)


@pytest.fixture(scope="module")
def fractional(tmp_path_factory, small_spec, codebooks):
    """Records of which codes and features are the time at which they begin, in steps and in frames."""
    spec = replace(small_spec, segment_seconds=4.0, code_rate=DAC, num_steps=345, video_fps=4.0, num_frames=16)
    folder = tmp_path_factory.mktemp("fractional")
    with ShardWriter(folder, spec, [], 4) as writer:
        for number in range(2):
            codes = np.stack([np.arange(345) // 2, np.full(345, number)])
            features = np.stack([np.arange(16.0), *np.full((5, 16), number)], axis=1)
            meta = {"id": f"v{number}", "source": f"v{number}.mp4", "start_seconds": 0.0, "steps": 345, "frames": 16}
            writer.add(f"v{number}.mp4", [(make_key(f"v{number}", 0.0), codes, features, {**meta, "labels": []})])
        writer.finish(codebooks)
    return ShardDataset(folder)


@pytest.mark.parametrize("second", [1, 2, 3])
def test_without_whole_seconds_in_steps_sound_and_picture_go_to_the_nearest_step(fractional, second):
    step, half = round(second * DAC), 0.5 / DAC
    assert abs(step / DAC - second) <= half
    spliced = changed(fractional, [0], spliced=[True], partners=[1], cuts=[second])
    assert spliced.codes[0, 1].tolist() == [0] * step + [1] * (345 - step)
    assert spliced.features[0, :, 1].tolist() == [0] * 4 * second + [1] * (16 - 4 * second)
    rolled, plain = changed(fractional, [0], shifts=[second]), fractional.read([0])
    frames = rolled.features[0, :, 0].to(torch.int64)
    assert frames.tolist() == torch.roll(plain.features[0, :, 0], 4 * second).tolist()
    # What is heard at each step is what is heard when its picture is shown, to half a step.
    where = torch.cat([torch.arange(345)[_came_round(second) :][:step], torch.arange(345 - step)])
    assert torch.equal(rolled.codes[0], plain.codes[0][:, where])
    for at in range(345):
        moved = -second if at >= step else 4 - second
        assert abs((where[at] - at) / DAC - moved) <= half + 1e-9


def _came_round(second):
    """The step nearest to so many seconds before the end of the picture."""
    return round((4 - second) * DAC)


def test_augmentation_is_drawn_where_no_second_is_whole_in_steps(fractional):
    order = np.arange(2)
    changes = Augmentation(fractional.spec, 0, splice=1.0, roll=1.0).changes(0, order, order)
    assert changes.spliced.all()
    assert set(changes.cuts) | set(changes.shifts) <= {1, 2, 3}


def draws(data, epoch=0, seed=0, count=20_000, splice=0.5, roll=0.1):
    order = permutation(seed, epoch, count)
    return order, Augmentation(data.spec, seed, splice, roll).changes(epoch, np.arange(count), order)


def test_chances_are_those_that_were_asked_for(data):
    order, changes = draws(data)
    count = len(order)
    rolled = changes.shifts > 0
    for got, chance in ((changes.spliced, 0.5), (rolled, 0.1), (changes.spliced & rolled, 0.05)):
        assert abs(got.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / count)
    for seconds in (changes.cuts[changes.spliced], changes.shifts[rolled]):
        times = np.bincount(seconds, minlength=4)
        assert times[0] == 0
        expected = times.sum() / 3
        assert ((times[1:] - expected) ** 2 / expected).sum() < 18.4  # 2 degrees of freedom: once in 10,000
    assert (changes.partners != order).all()
    # Partners are spread over all records (Poisson of mean 1), and do not follow the record.
    assert abs((np.bincount(changes.partners, minlength=count) == 0).mean() - np.exp(-1)) < 0.02
    assert abs(np.corrcoef(order, changes.partners)[0, 1]) < 0.03


def test_epochs_and_seeds_have_chances_of_their_own(data):
    base = draws(data)[1]
    for epoch, seed in ((1, 0), (0, 1)):
        other = draws(data, epoch, seed)[1]
        for name in Changes._fields:
            assert abs(np.corrcoef(getattr(base, name), getattr(other, name))[0, 1]) < 0.03
    assert not draws(data, splice=0.0, roll=1.0)[1].spliced.any()
    assert draws(data, splice=1.0, roll=0.0)[1].spliced.all()
    assert (draws(data, splice=0.0, roll=1.0)[1].shifts > 0).all()


def test_chances_are_fixed_for_ever(data):
    changes = draws(data, 2, 7, 8, 0.5, 0.5)[1]
    assert [column.astype(int).tolist() for column in changes] == [
        [0, 0, 1, 1, 0, 0, 0, 1],
        [3, 7, 6, 7, 1, 5, 2, 0],
        [3, 3, 3, 3, 1, 1, 2, 2],
        [0, 0, 0, 1, 0, 2, 0, 0],
    ]


@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(2, 60), st.data())
def test_a_records_chances_are_those_of_its_place(data, seed, epoch, count, chosen):
    augmentation = Augmentation(data.spec, seed, 0.5, 0.3)
    order = permutation(seed, epoch, count)
    whole = augmentation.changes(epoch, np.arange(count), order)
    start = chosen.draw(st.integers(0, count - 1))
    places = np.arange(start, chosen.draw(st.integers(start + 1, count)))
    for mine, all_of_them in zip(augmentation.changes(epoch, places, order), whole, strict=True):
        assert np.array_equal(mine, all_of_them[places])


def test_a_partner_that_is_the_record_itself_changes_nothing(data):
    order = np.array([3, 3, 3])
    changes = Augmentation(data.spec, 0, 1.0, 0.0).changes(0, np.arange(3), order)
    assert not changes.spliced.any()
    alone = Augmentation(data.spec, 0, 1.0, 0.0).changes(0, np.arange(1), np.array([3]))
    assert not alone.spliced.any()


class Kept(SmallTask):
    """Keeps what it is given, by record and epoch."""

    def __init__(self, places):
        super().__init__()
        self.places, self.validated_batches = places, []

    def training_step(self, batch, batch_idx):
        for row, number in enumerate(batch.index.tolist()):
            values = (batch.codes, batch.features, batch.labels, batch.source)
            self.places[self.current_epoch, number] = [value[row].clone() for value in values]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated_batches.append(batch)
        super().validation_step(batch, batch_idx)


AUGMENTED = {"splice": 0.7, "roll": 0.4}


def kept(folders, **settings):
    places = {}
    run(folders, make_task=partial(Kept, places), **(AUGMENTED | settings))
    return places


def equal(one, other):
    return all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 7}, {"num_workers": 2}, {"num_workers": 1}])
def test_an_augmented_record_is_the_same_alone_and_in_any_batch(folders, settings):
    usual, other, plain = kept(folders), kept(folders, **settings), kept(folders, splice=0.0, roll=0.0)
    both = usual.keys() & other.keys()
    assert len(both) >= 8
    assert all(equal(usual[place], other[place]) for place in both)
    moved = [not equal(usual[place], plain[place]) for place in usual]
    assert 0.3 < np.mean(moved) < 0.95


def test_a_run_that_stops_and_goes_on_draws_the_same(folders, tmp_path):
    saver = SaveEverywhere(tmp_path)
    whole = run(folders, callbacks=[saver], num_workers=1, **AUGMENTED)
    plain = run(folders)
    assert any(not torch.equal(value, plain.state_dict()[name]) for name, value in whole.state_dict().items())
    assert len(saver.paths) > 10
    for moment, path in saver.paths.items():
        resumed = run(folders, path, **AUGMENTED)
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], moment
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), moment


def test_validation_is_as_stored(folders):
    task = run(folders, make_task=partial(Kept, {}), num_workers=1, splice=1.0, roll=1.0)
    stored = ShardDataset(folders[1])
    assert len(task.validated_batches) >= 4
    for batch in task.validated_batches:
        same(batch, stored.read(batch.index.tolist()))


def test_workers_change_what_they_hand_on(data):
    loader = Loader(data, 1, pin_memory=False)
    changes = Changes(np.array([True]), np.array([3]), np.array([1]), np.array([2]))
    loader.shares = lambda: iter([Share(np.array([0]), np.array([True]), np.array([5]), changes)])
    (batch,) = loader.batches()
    assert batch.codes.is_shared()
    assert batch.draw.tolist() == [5]
    expected = changed(data, [0], spliced=[True], partners=[3], cuts=[1], shifts=[2])
    same(batch.widened(), replace(expected, draw=torch.tensor([5])))
