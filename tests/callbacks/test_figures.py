import numpy as np
import torch

from vab.callbacks import spectrogram_picture
from vab.callbacks.class_table import _most_confused
from vab.callbacks.pictures import (
    Found,
    _band,
    confusion_figure,
    nearest,
    retrieval_figure,
    spectrograms_figure,
)

RATE = 16_000
TONE = 0.5 * torch.sin(2 * torch.pi * 200 * torch.arange(RATE) / RATE)
NOISE = 0.5 * torch.randn(RATE // 2, generator=torch.Generator().manual_seed(0))


def test_a_spectrogram_picture_shows_low_frequencies_at_the_bottom():
    picture = spectrogram_picture(TONE, RATE)
    assert picture.shape[0] == 3
    assert picture.min() >= 0
    assert picture.max() <= 1
    brightness = picture.sum(0).mean(1)
    assert brightness.argmax() > len(brightness) * 0.75


def test_spectrograms_stand_one_above_the_other_under_the_frames():
    two = spectrograms_figure([("tone", TONE), ("noise", NOISE)], RATE)
    one = spectrograms_figure([("tone", TONE)], RATE)
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[..., 1] = 255
    with_frames = spectrograms_figure([("tone", TONE)], RATE, "title", frames)
    assert two.dtype == np.uint8
    assert two.shape[2] == 3
    assert two.shape[0] > with_frames.shape[0] > one.shape[0]
    green = (with_frames == [0, 255, 0]).all(-1)
    assert green.any()
    assert np.nonzero(green)[0].max() < with_frames.shape[0] / 2
    # On one time axis: the noise ends half way, and nothing is drawn beyond.
    white = (two[two.shape[0] * 3 // 4] == 255).all(-1)
    assert white[int(two.shape[1] * 0.7) : int(two.shape[1] * 0.9)].all()


def test_frequencies_are_marked_where_tones_lie():
    for hertz in (500, 1000, 4000):
        tone = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(RATE) / RATE)
        bands = spectrogram_picture(tone, RATE).sum(0).mean(1)[::-1]  # lowest band first

        assert abs(bands.argmax() - _band(hertz, RATE)) <= 1


def test_a_confusion_matrix_has_a_row_for_each_true_class():
    small = confusion_figure(torch.eye(2, dtype=torch.int64), ("a", "b"), "title")
    confusion_figure(torch.eye(2, dtype=torch.int64), ("$_{$", "not utf-8 \udcff"), "$^$")
    large = confusion_figure(torch.zeros(20, 20, dtype=torch.int64), [str(n) for n in range(20)], "no record at all")
    assert large.shape > small.shape
    # All of the true class is dark blue on the diagonal, none white off it.
    assert (small[..., 2].astype(int) - small[..., 0] > 60).any()
    assert not np.array_equal(small, confusion_figure(torch.eye(2, dtype=torch.int64).flip(0), ("a", "b"), "title"))


def test_the_right_sound_is_framed():
    others = [Found("one", NOISE), Found("two", TONE)]
    plain = retrieval_figure(Found("query", TONE), others, RATE, "title")
    framed = retrieval_figure(Found("query", TONE), [others[0], Found("two", TONE, right=True)], RATE, "title")
    lime = (framed == [50, 205, 50]).all(-1)
    assert np.nonzero(lime)[1].min() > framed.shape[1] * 0.6
    assert not (plain == [50, 205, 50]).all(-1).any()


def test_nearest_is_by_the_angle_and_ties_go_to_the_lower_number():
    gallery = torch.tensor([[0.0, 9.0], [2.0, 0.1], [-1.0, 0.0], [1.0, 0.05], [1.0, 1.0]])
    assert nearest(torch.tensor([[5.0, 0.25], [0.0, 0.1]]), gallery, 3).tolist() == [[1, 3, 4], [0, 4, 1]]


def test_the_classes_that_are_shown_are_those_confused_most_not_those_that_are_many():
    counts = torch.tensor([[90, 0, 0, 1], [0, 1, 2, 0], [0, 3, 1, 0], [1, 0, 0, 50]])
    assert _most_confused(counts, 2).tolist() == [1, 2]
    assert _most_confused(counts, 9).tolist() == [0, 1, 2, 3]
