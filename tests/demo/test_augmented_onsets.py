"""Spliced and rolled segments of the demo world: what is heard is still at the time at which it is seen to happen."""

import json

import numpy as np
import pytest
import torch

from vab.commands.extract import extract
from vab.data.media.segments import read_frames
from vab.data.reading.augment import augment
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.order import Changes
from vab.demo.scene import KINDS
from vab.demo.world import write_world
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.metrics.synchrony import find_onsets, match_onsets

SECONDS, FPS = 4, 8
EDGE = 0.08
"""Onsets this near to a cut or to the ends are left out, s: one may be cut through, and a cut is an onset itself."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of some segments, and of each lone object that strikes: number -> (file, event times, s)."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", num_train=40, num_val=1, num_workers=0)
    extract(
        str(folder / "videos" / "train.csv"), str(folder / "shards"), segment_seconds=4.0, video_fps=8.0, num_workers=0
    )
    events = json.loads((folder / "videos" / "events.json").read_text())
    dataset = ShardDataset(folder / "shards")
    known = {}
    for number in range(len(dataset)):
        file = f"train/{str(dataset.record(number)['source']).rpartition('/')[2]}"
        objects = events[file]["objects"]
        if len(objects) == 1 and KINDS[objects[0]["kind"]].motion == "strikes":
            known[number] = (folder / "videos" / file, np.array(objects[0]["events"]))
    return dataset, known


def heard(dataset, codec, codes):
    waveform = codec.decode(codes[None], int(SECONDS * codec.sample_rate))[0, 0]
    return find_onsets(waveform, codec.sample_rate)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sound_and_picture_are_at_the_transformed_times(world):
    dataset, known = world
    numbers = list(known)
    assert len(numbers) >= 8
    codec, vision = load_codec("tiny"), load_vision("tiny")
    partners = np.roll(numbers, -1)
    random = np.random.default_rng(0)
    cuts, shifts = random.integers(1, SECONDS, len(numbers)), random.integers(0, SECONDS, len(numbers))
    packed = dataset.gather(numbers)
    augment(packed, dataset, Changes(np.ones(len(numbers), bool), partners, cuts, shifts))
    batch, plain = packed.unpack().widened(), dataset.read(numbers)

    met = true = false = 0
    for row, (number, partner, cut, shift) in enumerate(zip(numbers, partners, cuts, shifts, strict=True)):
        own, other = known[number][1], known[int(partner)][1]
        events = np.concatenate([own[own < cut - EDGE], other[other > cut + EDGE]])
        events = np.sort((events + shift) % SECONDS)
        joins = (np.array([0, cut]) + shift) % SECONDS  # where something else begins
        clear = (np.abs(events[:, None] - np.append(joins, SECONDS)) > EDGE).all(1)
        onsets = heard(dataset, codec, batch.codes[row])
        wanted = torch.from_numpy(events[clear])
        paired, _ = match_onsets(wanted, onsets, 0.03)
        met, true = met + len(paired), true + len(wanted)
        # The same sound against times that were not moved along: they do not lie there.
        if shift:
            still = np.concatenate([own[own < cut - EDGE], other[other > cut + EDGE]])
            false += len(match_onsets(torch.from_numpy(still), onsets, 0.03)[0]) / len(still)

        # The picture: features of the frames that were moved, encoded anew from the videos.
        frames = np.concatenate(
            [read_frames(known[int(which)][0], FPS, 0.0, SECONDS * FPS).frames for which in (number, partner)]
        )
        mine, theirs = np.arange(cut * FPS), SECONDS * FPS + np.arange(cut * FPS, SECONDS * FPS)
        shown = frames[np.roll(np.concatenate([mine, theirs]), shift * FPS)]
        torch.testing.assert_close(batch.features[row], vision.encode(vision.preprocess(shown)), atol=2e-2, rtol=2e-2)
        assert not torch.equal(batch.features[row], plain.features[row])
    moved = int((shifts > 0).sum())
    assert true > 20
    assert met / true > 0.95
    assert false / moved < 0.3
