"""Real, odd and broken files: each gives what was asked for or one clear MediaError, and nothing else."""

import csv
from pathlib import Path

import av
import numpy as np
import pytest

from small_media import read_segment
from vab.data.media.segments import MediaError, read_audio, read_frames, scan_packets

RATE = 16000
REASONS = {"unreadable", "no_audio", "no_video", "too_short"}


@pytest.fixture(scope="module")
def odd(shared_data):
    """Name of a file without its long middle -> (path, what is known of it)."""
    folder = shared_data / "odd-media"
    rows = rows_of(folder / "manifest.csv")
    paths = {path.name: path for path in folder.rglob("*") if path.is_file()}
    return {row["file"]: (paths[row["file"]], row) for row in rows}


def find(odd, ending):
    (name,) = [name for name in odd if name.endswith(ending)]
    return odd[name][0]


def outcome(read):
    """ "ok", or the reason of the MediaError; any other exception fails the test."""
    try:
        read()
    except MediaError as error:
        return error.reason if error.reason in REASONS and "\n" not in str(error) else f"badly worded: {error}"
    return "ok"


UNREADABLE = [
    "emptyfile.mp3",
    "76UZQRJq028_181000_191000.mp4",
    "aa.mp4",
    "Twinkle.mid",
    "__64bit.mp4",
    "truncated-64bit.mp4",
    "too-short.mp3",
    "play-trimmed.mp3",
    "1024_incrementing_bytes.mp3",
    "sample_malformed_free_box.mp4",
    "sample_fragmented_sideloaded_track.mp4",
    "large_stbl_truncated_after_moov.m4b",
    "sample_ac4.mp4",
    "52-too-short-block-size.flac",
    "nero-chapters.m4b",
    "sample_missing_stsd.mp4",
]


@pytest.mark.parametrize("ending", UNREADABLE)
def test_sound_that_cannot_be_read(odd, ending):
    assert outcome(lambda: read_audio(find(odd, ending), RATE)) == "unreadable"


@pytest.mark.parametrize(
    "ending", ["invalid-bitstream.webm", "subsample_encrypted_noaltref.webm", "__corrupted.mp4", "invalid_nalu.mp4"]
)
def test_pictures_that_cannot_be_read(odd, ending):
    assert outcome(lambda: read_frames(find(odd, ending), 4.0, count=20)) == "unreadable"


def test_a_damaged_end_does_not_spoil_the_beginning(odd):
    assert read_frames(find(odd, "__corrupted.mp4"), 4.0, count=4).valid_frames == 4
    assert read_audio(find(odd, "no-seek-table-trailing-garbage.mp3"), RATE, seconds=2.5).valid_samples == 2.5 * RATE


@pytest.mark.parametrize("ending", ["bear-id3.mp3", "bear_with_picture.flac", "nero-chapters.m4b", "sample_8bit.wav"])
def test_sound_alone_or_with_a_cover_has_no_video(odd, ending):
    assert outcome(lambda: read_segment(find(odd, ending), RATE, 4.0, seconds=1.0)) == "no_video"


@pytest.mark.parametrize("ending", ["sample_video_only.mp4", "h265_bframes.mp4", "var_fps_video.mp4"])
def test_picture_alone_has_no_audio(odd, ending):
    path = find(odd, ending)
    assert outcome(lambda: read_segment(path, RATE, 4.0, seconds=1.0)) == "no_audio"
    assert read_frames(path, 4.0, count=3).valid_frames == 3


@pytest.mark.parametrize(
    ("ending", "video", "audio"),
    [
        ("sample_fragmented.mp4", 1.07, 1.07),  # 143165 s by its header
        ("vbri.mp3", None, 0.44),  # 222 s
        ("bear_no_num_samples.flac", None, 2.74),  # none at all
        ("firstpts_10_sec.mp4", 4.0, None),
        ("edit_list_positive_shift.mp4", 10.0, 10.0),
        ("sample_shorter_audio.mp4", 1.2, 0.77),
        ("nasa_13013.mp4", 13.01, 13.06),
        ("long_1080p_lowbitrate.mp4", 362.77, 360.0),
    ],
)
def test_ends_are_where_the_data_end(odd, ending, video, audio):
    scan = scan_packets(find(odd, ending))
    assert (scan.video_end, scan.audio_end) == (
        None if video is None else pytest.approx(video, abs=0.01),
        None if audio is None else pytest.approx(audio, abs=0.01),
    )


@pytest.mark.parametrize("ending", ["video_0.mov", "video_90.mov", "video_180.mov", "video_270.mov"])
def test_rotated_files_are_turned_by_what_ffmpeg_reads_of_their_matrix(odd, ending):
    with av.open(str(find(odd, ending))) as container:
        stored = next(container.decode(video=0))
    expected = np.rot90(stored.to_ndarray(format="rgb24"), stored.rotation // 90)
    assert np.array_equal(read_frames(find(odd, ending), 30.0).frames[0], expected)


@pytest.mark.slow
def test_a_false_keyframe_is_not_trusted(odd):
    # Seeking in this file lands on pictures without their reference: grey and green.
    path = find(odd, "cockatoo.mp4")
    late = read_frames(path, 2.0, start=5.5, count=1).frames
    from_start = read_frames(path, 2.0, count=12).frames
    assert np.array_equal(late[0], from_start[11])


def test_a_late_segment_of_a_long_file(odd):
    segment = read_segment(find(odd, "long_1080p_lowbitrate.mp4"), RATE, 1.0, start=300.0, seconds=2.0)
    assert (segment.valid_samples, segment.valid_frames) == (2 * RATE, 2)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def seconds_of(path):
    """Lengths of picture and sound as the table writes them; the reason where nothing is known."""
    try:
        scan = scan_packets(path)
        if scan.video_end is not None:
            read_frames(path, fps=1000.0)
    except MediaError as error:
        return error.reason, error.reason
    return tuple("" if length is None else f"{length:.3f}" for length in (scan.video_end, scan.audio_end))


@pytest.mark.parametrize("row", rows_of(Path(__file__).with_name("odd_media.csv")), ids=lambda row: row["file"])
@pytest.mark.timeout(60)
def test_every_odd_file_does_what_the_table_says(odd, row):
    """``odd_media.csv``: what comes of each file, and why, where what is known of it would let one expect otherwise."""
    path, known = odd[row["file"]]
    assert outcome(lambda: read_segment(path, RATE, 8.0, seconds=0.25)) == row["segment"]
    for got, listed in zip(seconds_of(path), (row["video_seconds"], row["audio_seconds"]), strict=True):
        assert got == listed or float(got) == pytest.approx(float(listed), abs=0.01)
    assert bool(row["difference"]) == is_unexpected(row, known)


def is_unexpected(row, known):
    """Whether an outcome is not what the manifest of the files lets one expect."""
    streams, is_bad = known["streams"], known["note"].startswith("FAIL")
    has_both = "v:" in streams and "attached" not in streams and "a:" in streams and "a:  ch" not in streams
    lengths = [float(text) for text in (row["video_seconds"], row["audio_seconds"]) if text[:1].isdigit()]
    claimed = float(known["duration"] or "nan")
    another_length = bool(lengths) and abs(max(lengths) - claimed) > 0.1
    another_end = row["segment"] == "ok" if is_bad else has_both and row["segment"] != "ok"
    found_first = is_bad and row["segment"] != "unreadable" and "unreadable" in (row["video_seconds"], row["segment"])
    return another_length or another_end or found_first


def test_the_table_has_every_odd_file(odd):
    assert [row["file"] for row in rows_of(Path(__file__).with_name("odd_media.csv"))] == list(odd)
    assert len(odd) == 112


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("emptyfile.mp3", "is empty (0 bytes)"),
        ("76UZQRJq028_181000_191000.mp4", "is a pointer of Git LFS, not the file itself: type git lfs pull"),
        ("aa.mp4", "is text, not media: "),
    ],
)
def test_what_is_no_media_is_named(odd, ending, words):
    with pytest.raises(MediaError) as problem:
        read_segment(find(odd, ending), RATE, 8.0, seconds=0.25)
    assert words in problem.value.detail


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_real_video_gives_its_whole_length(shared_data):
    rows = rows_of(shared_data / "av" / "manifest.csv")
    paths = {path.name: path for path in (shared_data / "av").rglob("*") if path.is_file()}
    assert len(rows) == 79
    for row in rows:
        path = paths[row["file"].rsplit("/", 1)[-1]]
        scan = scan_packets(path)
        with av.open(str(path)) as container:
            length = container.duration / av.time_base
        assert max(scan.video_end, scan.audio_end) == pytest.approx(length, abs=0.35), path.name
        segment = read_segment(path, RATE, 4.0, seconds=1.5)
        assert (segment.valid_samples, segment.valid_frames) == (1.5 * RATE, 6), path.name
        assert np.abs(segment.waveform).max() > 1e-3, path.name
