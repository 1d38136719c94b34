"""What files are called, and which entry of a list each of them is."""

import pytest

from vab.data.inputs.published.names import AMBIGUOUS, UNLISTED, UNNAMED, Excerpts, find_files, parse_name
from vab.data.inputs.published.rows import by_stem
from vab.spec import UserError

ID = "-0RW_T-miFs"


@pytest.mark.parametrize("y", ["", "Y"])
@pytest.mark.parametrize("video", [ID, "Y1234567890", "Yabcdefghi_", "abcdefg_300", "_0000000_00", "-----------"])
@pytest.mark.parametrize(
    ("rest", "starts"),
    [
        ("", ()),
        ("_000030", (30_000, 30)),
        ("_30", (30_000, 30)),
        ("_30000", (30_000_000, 30_000)),
        ("_30.0", (30_000,)),
        ("_30.500", (30_500,)),
        ("_30_40", (30_000,)),
        ("_30-40", (30_000,)),
        ("_000030_000040", (30_000,)),
        ("_30.000_40.000", (30_000,)),
        ("_30000_40000", (30_000,)),
        ("_0_10000", (0,)),
        ("_0_10", (0,)),
    ],
)
def test_names_that_downloaders_give(y, video, rest, starts):
    assert parse_name(y + video + rest) == (video, starts)


@pytest.mark.parametrize(
    "stem",
    ["", "video7010", "holiday", ID[:-1], f"X{ID}", f"{ID}.f137", "\u00e4" * 11]
    + [ID + rest for rest in ("x2", "_", "_30_", "_30.", "_a", "_30_40_50", "_30_40_gt")],
)
def test_other_names_are_none(stem):
    assert parse_name(stem) is None


def entries(*listed):
    found = Excerpts()
    for video, start, part in listed:
        found.add(video, start, ("label",), part)
    return found


def test_a_start_is_read_as_the_list_has_it():
    both = entries((ID, 30_000, "a"), (ID, 30, "a"), (ID, 30_000, "b"))
    found = find_files(both, [f"x/{ID}_000030.mp4"])
    assert found.files == [f"x/{ID}_000030.mp4", None, f"x/{ID}_000030.mp4"]
    assert find_files(entries((ID, 30, "a")), [f"{ID}_30.mp4"]).files == [f"{ID}_30.mp4"]
    assert find_files(entries((ID, 30_000, "a")), [f"{ID}_30000.mp4"]).files == [f"{ID}_30000.mp4"]
    other = find_files(entries((ID, 30_000, "a")), [f"{ID}_60_70.mp4"])
    assert other.files == [None]
    assert other.unused == {UNLISTED: (1, f"{ID}_60_70.mp4")}


def test_an_id_alone_is_the_only_excerpt_or_the_whole_video():
    once, twice = entries((ID, 30_000, "a")), entries((ID, 30_000, "a"), (ID, 90_000, "a"))
    assert find_files(once, [f"Y{ID}.wav"]).files == [f"Y{ID}.wav"]
    assert find_files(once, [f"Y{ID}.wav"]).starts_in_file == [False]
    assert find_files(once, [f"{ID}.wav"], whole_videos=True).starts_in_file == [True]
    assert find_files(once, [f"{ID}_30.wav"], whole_videos=True).starts_in_file == [False]
    ambiguous = find_files(twice, [f"{ID}.mkv", "holiday.mp4"])
    assert ambiguous.files == [None, None]
    assert ambiguous.unused == {AMBIGUOUS: (1, f"{ID}.mkv"), UNNAMED: (1, "holiday.mp4")}
    whole = find_files(twice, [f"{ID}.mkv"], whole_videos=True)
    assert whole.files == [f"{ID}.mkv"] * 2
    assert whole.starts_in_file == [True, True]


def test_several_files_of_one_entry_are_counted_and_refused():
    two = entries((ID, 30_000, "a"), ("abcdefghijk", 0, "a"), ("ABCDEFGHIJK", 0, "a"))
    files = [
        "ABCDEFGHIJK.mp4",
        f"a/{ID}_30.mp4",
        "abcdefghijk.mp4",
        "abcdefghijk.wav",
        "abcdefghijk_0.wav",
        f"Y{ID}.wav",
    ]
    with pytest.raises(
        UserError,
        match=r"^2 listed segments have more than one file, such as abcdefghijk.mp4 and abcdefghijk.wav: keep",
    ):
        find_files(two, files)


def test_an_entry_that_comes_again_counts_once():
    found = entries((ID, 0, "a"), (ID, 0, "a"), (ID, 0, "b"), (ID, 10_000, "a"))
    assert (len(found), found.repeats, found.of(ID), found.of("x")) == (3, 1, (0, 1, 2), ())
    with pytest.raises(ValueError, match="-0RW_T-miFs at 0 s is there before, with"):
        found.add(ID, 0, ("other",), "a")


def test_files_are_found_by_stem():
    files = ["a/video1.mp4", "b/video2.mkv", "video10.mp4", "video3.mp4", "video3.wav"]
    assert by_stem(files, {"video1", "video2", "video4"}) == {"video1": "a/video1.mp4", "video2": "b/video2.mkv"}
    with pytest.raises(UserError, match=r"^1 listed names have more than one file, such as video3.mp4 and video3.wav"):
        by_stem(files, {"video3"})
