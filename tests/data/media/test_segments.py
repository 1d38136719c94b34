"""Many segments of a file in one pass: what they are one by one, also where the pass does not succeed."""

import math
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from test_media import RATE, numbers, painted, sampling, shown, write

from small_media import read_segment
from vab.data.media import segments as media
from vab.data.media.frames import PictureTrack
from vab.data.media.scan import Scan
from vab.data.media.segments import MediaError, read_segments, scan_packets
from vab.data.media.write import write_video

B_FRAMES = {"bf": "3", "b-adapt": "0", "preset": "medium", "g": "48"}


def chirp(seconds):
    times = np.arange(round(seconds * RATE)) / RATE
    return (0.4 * np.sin(2 * np.pi * (200 + 60 * times) * times)).astype(np.float32)


@pytest.fixture
def counts(monkeypatch):
    """How often a picture was decoded, and a span was read by itself."""
    counted = {"pictures": 0, "spans": 0}
    add, read_span = PictureTrack.add, media._read_span

    def counting_add(track, frame):
        counted["pictures"] += 1
        add(track, frame)

    def counting_read_span(*arguments):
        counted["spans"] += 1
        return read_span(*arguments)

    monkeypatch.setattr(PictureTrack, "add", counting_add)
    monkeypatch.setattr(media, "_read_span", counting_read_span)
    return counted


def same(path, starts, seconds, fps=4.0, scan=None):
    """The segments, each checked against what reading it by itself gives."""
    got = list(read_segments(path, RATE, fps, starts, seconds, scan=scan))
    assert len(got) == len(starts)
    for start, segment in zip(starts, got, strict=True):
        alone = read_segment(path, RATE, fps, start, seconds)
        assert np.array_equal(segment.frames, alone.frames)
        assert (segment.valid_samples, segment.valid_frames) == (alone.valid_samples, alone.valid_frames)
        np.testing.assert_allclose(segment.waveform, alone.waveform, atol=2e-3)  # a seek may land between samples
    return got


@pytest.mark.parametrize("hop", [2.0, 0.7, 3.1])
@pytest.mark.parametrize("rate", ["even", "varying", "ntsc"])
def test_one_pass_gives_what_reading_each_gives(tmp_path, counts, hop, rate):
    random = np.random.default_rng(1)
    steps = {"even": [1 / 25], "varying": [0.02, 0.04, 0.1, 0.4], "ntsc": [1001 / 24000]}[rate]
    times = np.concatenate([[0.0], np.cumsum(random.choice(steps, 250))])
    times = times[times < 9.5]
    write_video(tmp_path / "interleaved.mp4", np.stack([painted(k) for k in range(36)]), 4, chirp(9.0), RATE)
    path = write(tmp_path / "x.mp4", times, chirp(9.0), options=B_FRAMES)
    starts = [k * hop for k in range(math.floor(8.0 / hop) + 1)]
    for file, shown_at in ((path, times), (tmp_path / "interleaved.mp4", [k / 4 for k in range(36)])):
        counts["spans"] = 0
        list(read_segments(file, RATE, 4.0, starts, 2.0))
        in_one_pass = counts["spans"] == 0
        assert in_one_pass or file == path  # sound behind all pictures is had one by one where there are many segments
        for start, segment in zip(starts, same(file, starts, 2.0), strict=True):
            wanted = shown(shown_at, sampling(4.0, start, 8))
            valid = segment.valid_frames
            assert numbers(segment.frames)[:valid] == wanted[:valid]


def test_pictures_that_nobody_wants_are_not_decoded_and_the_others_are_the_same(tmp_path, counts):
    write(tmp_path / "x.mp4", [k / 25 for k in range(200)], chirp(8.0), options=B_FRAMES)
    scan = scan_packets(tmp_path / "x.mp4")
    assert len(scan.pictures) == 200
    starts = [0.0, 2.0, 4.0, 6.0]
    whole = list(read_segments(tmp_path / "x.mp4", RATE, 2.0, starts, 2.0))
    all_pictures, counts["pictures"] = counts["pictures"], 0
    skipping = list(read_segments(tmp_path / "x.mp4", RATE, 2.0, starts, 2.0, scan=scan))
    assert counts["pictures"] < all_pictures * 0.75
    for one, other in zip(whole, skipping, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.waveform, other.waveform)
        assert one.valid_frames == other.valid_frames


def test_wanted_pictures_are_those_on_show(tmp_path):
    times = np.array([0.0, 0.5, 0.6, 2.0, 2.1])
    scan = Scan(3.0, 3.0, (times * 1000).astype(np.int64), Fraction(1, 1000), 0.0)
    assert scan.unwanted(np.array([0.55, 1.9])) == {2000}  # those at 0.5 and 0.6 s are on show, the ends are kept
    assert scan.unwanted(np.array([0.1, 0.2])) == {500, 600, 2000}
    assert Scan(3.0, 3.0).unwanted(np.array([0.1])) == frozenset()


def test_segments_around_damage_are_had(tmp_path, counts):
    path = tmp_path / "x.mp4"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8 * RATE).astype(np.float32)
    write_video(path, np.stack([painted(k) for k in range(64)]), 8, noise, RATE)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        damaged = packets[len(packets) * 9 // 16]  # at 4.5 s
        place, size = damaged.pos, damaged.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    got = list(read_segments(path, RATE, 4.0, [0.0, 2.0, 4.0, 6.0], 2.0))
    assert [isinstance(segment, MediaError) for segment in got] == [False, False, True, False]
    assert got[2].reason == "unreadable"
    assert counts["spans"] > 0


def test_pictures_of_spans_whose_sound_fails_do_not_stay_in_memory(tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        video = container.add_stream("libx264", 8, width=96, height=96, pix_fmt="yuv420p")
        audio = container.add_stream("pcm_f32le", RATE, layout="mono")
        for number in range(80):
            picture = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 8)
            container.mux(video.encode(picture))
            sound = av.AudioFrame.from_ndarray(np.full((1, RATE // 8), np.nan, np.float32), "flt", "mono")
            sound.sample_rate, sound.pts, sound.time_base = RATE, number * RATE // 8, Fraction(1, RATE)
            container.mux(audio.encode(sound))
        container.mux(video.encode())
    made, most = [], 0

    def convert(picture):
        kept = picture.copy()
        made.append(weakref.ref(kept))
        return kept

    for problem in read_segments(tmp_path / "x.mkv", RATE, 8.0, np.arange(20) / 2, 0.5, convert):
        assert "values that are not numbers" in str(problem)
        most = max(most, sum(reference() is not None for reference in made))
    assert most <= 24
    assert len(made) == 80


def test_a_start_behind_the_end_is_too_short(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(16)]), 8, chirp(2.0), RATE)
    *had, late = read_segments(tmp_path / "x.mp4", RATE, 4.0, [0.0, 1.0, 3.0], 1.0)
    assert all(not isinstance(segment, MediaError) for segment in had)
    assert late.reason == "too_short"


def test_what_is_kept_of_a_picture_is_what_convert_makes(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(24)]), 8, chirp(3.0), RATE)
    seen = []

    def convert(picture):
        seen.append(picture.shape)
        return picture[::8, ::8].mean(axis=2).astype(np.float32)

    segments = list(read_segments(tmp_path / "x.mp4", RATE, 4.0, [0.0, 1.5], 1.5, convert))
    assert [segment.frames.shape for segment in segments] == [(6, 12, 12)] * 2
    assert len(seen) == 12
    assert set(seen) == {(96, 96, 3)}


def test_every_real_video_is_the_same_in_one_pass(shared_data):
    files = sorted(path for path in (shared_data / "av").rglob("*") if path.suffix in (".mp4", ".mkv", ".avi", ".mpg"))
    for path in files[::6]:
        scan = scan_packets(path)
        starts = [k * 1.5 for k in range(int(min(scan.video_end, scan.audio_end, 9.0) / 1.5))]
        same(path, starts, 1.5, scan=scan)
