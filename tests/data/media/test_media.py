import errno
import hashlib
import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from small_media import read_segment
from vab.data.media import segments
from vab.data.media.segments import MediaError, read_audio, read_frames, scan_packets
from vab.data.media.write import replace_audio, write_video, write_wav
from vab.spec import UserError

RATE = 16000


def painted(number, height=96, width=96):
    """A frame that says its number: eight stripes, black or white, the lowest bit at the left."""
    bits = np.repeat([255 * (number >> bit & 1) for bit in range(8)], width // 8)
    return np.broadcast_to(bits[None, :, None], (height, width, 3)).astype(np.uint8)


def numbers(frames):
    """What `painted` wrote, read from the middle of each stripe."""
    height, width = frames.shape[1:3]
    stripes = frames[:, height // 2, width // 16 :: width // 8, 1] > 127
    return (stripes[:, :8] * 2 ** np.arange(8)).sum(axis=1).tolist()


def click(seconds, at, rate=RATE):
    waveform = np.zeros(round(seconds * rate), np.float32)
    waveform[round(at * rate)] = 0.9
    return waveform


def write(path, times=(), waveform=None, *, sound_starts=0.0, codec="libx264", options=None, clock=90000, rate=RATE):
    """A file whose frame k is `painted(k)` and is shown from times[k] on, s."""
    with av.open(str(path), "w") as container:
        if len(times):
            video = container.add_stream(codec, 30, width=96, height=96, pix_fmt="yuv420p", options=options or {})
            video.codec_context.time_base = Fraction(1, clock)
        if waveform is not None:
            audio = container.add_stream("pcm_s16le" if path.suffix in (".mov", ".mkv") else "aac", rate, layout="mono")
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            frame.pts, frame.time_base = round(time * clock), Fraction(1, clock)
            container.mux(video.encode(frame))
        if len(times):
            container.mux(video.encode())
        if waveform is not None:
            frame = av.AudioFrame.from_ndarray(np.float32(waveform)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(sound_starts * rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def shown(times, at):
    """The number of the frame shown at each time of `at`, by the plainest rule."""
    return [max([k for k, time in enumerate(times) if time <= t + 1e-4], default=0) for t in at]


def sampling(fps, start, count):
    return [start + (k + 0.5) / fps for k in range(count)]


# ---- pictures ----


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(30000, 1001), 12.5, 60, 7])
def test_frames_of_any_frame_rate(tmp_path, fps):
    times = [k / float(fps) for k in range(40)]
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(40)]), fps, None, RATE)
    span = read_frames(tmp_path / "x.mp4", fps=10.0, count=6)
    assert numbers(span.frames) == shown(times, sampling(10.0, 0.0, 6))


def test_frames_of_variable_rate_are_chosen_by_time(tmp_path):
    random = np.random.default_rng(0)
    times = np.concatenate([[0.0], np.cumsum(random.choice([0.01, 0.04, 0.2, 0.5], 40))])
    path = write(tmp_path / "vfr.mp4", times)
    count = int(times[-1] * 8) - 1
    span = read_frames(path, fps=8.0, count=count)
    assert numbers(span.frames) == shown(times, sampling(8.0, 0.0, count))
    assert span.valid_frames == count


def test_frames_with_b_frames(tmp_path):
    times = [k / 25 for k in range(60)]
    path = write(tmp_path / "b.mp4", times, options={"bf": "3", "b-adapt": "0", "preset": "medium"})
    with av.open(str(path)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert order != sorted(order), "the file should have packets out of presentation order"
    span = read_frames(path, fps=25.0, start=0.4, count=30)
    assert numbers(span.frames) == shown(times, sampling(25.0, 0.4, 30))


def test_past_the_end_the_last_frame_is_repeated_and_not_valid(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(8)]), 8, None, RATE)
    span = read_frames(tmp_path / "x.mp4", fps=8.0, start=0.5, count=8)
    assert span.valid_frames == 4
    assert numbers(span.frames) == [4, 5, 6, 7, 7, 7, 7, 7]


def test_seeking_far_into_a_file_gives_what_decoding_from_the_start_gives(tmp_path, monkeypatch):
    times = [k / 8 for k in range(80)]
    sound = np.sin(2 * np.pi * np.cumsum(np.linspace(200, 2000, 10 * RATE)) / RATE).astype(np.float32)
    path = write(tmp_path / "long.mp4", times, sound, options={"g": "24"})
    sought = read_segment(path, RATE, 8.0, start=7.3, seconds=2.0)
    monkeypatch.setattr(segments, "_SEEK_BEYOND", 1e9)
    decoded = read_segment(path, RATE, 8.0, start=7.3, seconds=2.0)
    assert numbers(sought.frames) == numbers(decoded.frames) == shown(times, sampling(8.0, 7.3, 16))
    assert np.abs(sought.waveform - decoded.waveform).max() < 1e-3


# Matrices as in the mp4's track header: (x, y) goes to (a x + c y, b x + d y), y pointing down.
TURNS = {
    "clockwise": ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, axes=(1, 2))),
    "half": ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, axes=(1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, axes=(1, 2))),
    "mirror": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "flip": ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
    "transpose": ((0, 1, 1, 0), lambda frames: frames.transpose(0, 2, 1, 3)),
}


def turn(path, matrix):
    a, b, c, d = matrix
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("name", TURNS)
def test_display_matrix_is_applied(tmp_path, name):
    matrix, expected = TURNS[name]
    path = tmp_path / "x.mp4"
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :20, :30] = (255, 0, 0)  # so that no turn and no mirror image looks like another
    frames[:, :10, 60:] = (0, 255, 0)
    write_video(path, frames, 4, None, RATE)
    upright = read_frames(path, fps=4.0, count=4).frames
    turn(path, matrix)
    turned = read_frames(path, fps=4.0, count=4).frames
    assert np.array_equal(turned, expected(upright))


def test_cover_art_is_not_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", RATE, layout="mono")
        cover = container.add_stream("png", 1, width=64, height=64, pix_fmt="rgb24")
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(painted(1, 64, 64), format="rgb24")
        picture.pts, picture.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(click(1.0, 0.5)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1, "the file should show its cover as a video stream"
    scan = scan_packets(path)
    assert scan.audio_end is not None
    assert scan.video_end is None
    with pytest.raises(MediaError, match="no video track") as caught:
        read_segment(path, RATE, 4.0, seconds=1.0)
    assert caught.value.reason == "no_video"


# ---- sound ----


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 48000])
def test_a_click_stays_at_its_time(tmp_path, rate):
    path = tmp_path / "x.mp4"
    write_video(path, np.stack([painted(k) for k in range(8)]), 4, click(2.0, 1.2345, rate), rate)
    for wanted in (16000, 24000):
        span = read_audio(path, wanted, seconds=2.0)
        assert span.valid_samples == len(span.waveform) == 2 * wanted
        assert abs(np.abs(span.waveform).argmax() / wanted - 1.2345) < 0.5e-3
        late = read_audio(path, wanted, start=0.7, seconds=1.0)
        assert abs(np.abs(late.waveform).argmax() / wanted - (1.2345 - 0.7)) < 0.5e-3


def test_at_its_own_rate_a_click_stays_at_its_sample(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([painted(0)] * 8), 4, click(2.0, 1.0), RATE)
    waveform = read_audio(tmp_path / "x.mp4", RATE).waveform
    assert len(waveform) == 2 * RATE
    assert np.abs(waveform).argmax() == RATE


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_sound_that_starts_later_than_the_picture(tmp_path, suffix):
    times = [k / 8 for k in range(16)]
    path = write(tmp_path / f"late{suffix}", times, click(1.0, 0.25), sound_starts=0.5)
    got = read_segment(path, RATE, 8.0, seconds=2.0)
    assert abs(np.abs(got.waveform).argmax() / RATE - 0.75) < 1.5e-3  # MKV keeps time in ms
    assert np.abs(got.waveform[: RATE // 2 - 200]).max() < 0.02
    assert abs(got.valid_samples - 1.5 * RATE) <= 0.07 * RATE  # AAC fills its last packet
    assert numbers(got.frames) == list(range(16))


def test_picture_that_starts_later_than_the_sound(tmp_path):
    times = [1.0 + k / 8 for k in range(8)]
    path = write(tmp_path / "x.mkv", times, click(2.0, 1.5))
    got = read_segment(path, RATE, 8.0, seconds=2.0)
    assert numbers(got.frames) == [0] * 8 + list(range(8))
    assert abs(int(np.abs(got.waveform).argmax()) - 1.5 * RATE) <= 16


def test_a_clock_that_starts_late_is_moved_to_zero(tmp_path):
    times = [10.0 + k / 8 for k in range(16)]
    path = write(tmp_path / "x.mkv", times, click(2.0, 1.0), sound_starts=10.0)
    got = read_segment(path, RATE, 8.0, seconds=2.0)
    assert numbers(got.frames) == list(range(16))
    assert abs(int(np.abs(got.waveform).argmax()) - RATE) <= 16
    assert scan_packets(path).audio_end == pytest.approx(2.0, abs=2e-3)


def test_sound_shorter_than_the_picture_is_padded_and_counted(tmp_path):
    tone = 0.5 * np.sin(np.arange(RATE)).astype(np.float32)
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(16)]), 8, tone, RATE)
    got = read_segment(tmp_path / "x.mp4", RATE, 8.0, seconds=2.0)
    assert (got.valid_samples, got.valid_frames) == (RATE, 16)
    assert not got.waveform[RATE:].any()
    assert np.abs(got.waveform[RATE // 2 : RATE]).max() > 0.4
    with pytest.raises(MediaError, match=r"its sound ends at 1.00 s") as caught:
        read_audio(tmp_path / "x.mp4", RATE, start=1.5, seconds=0.5)
    assert caught.value.reason == "too_short"


def test_a_gap_between_packets_is_silence(tmp_path):
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", RATE, layout="mono")
        for start, number in ((0.0, 1), (0.6, 2)):
            half = np.full(RATE // 4, 0.1 * number, np.float32)
            frame = av.AudioFrame.from_ndarray((half * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, round(start * RATE), Fraction(1, RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    waveform = read_audio(path, RATE).waveform
    expected = np.zeros(round(0.85 * RATE), np.float32)
    expected[: RATE // 4] = 0.1
    expected[round(0.6 * RATE) :] = 0.2
    assert len(waveform) == len(expected)
    assert np.abs(waveform - expected).max() < 1e-4


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_reads_alike(tmp_path, subtype):
    waveform = (0.5 * np.sin(np.arange(RATE) / 7)).astype(np.float32)
    write_wav(tmp_path / "x.wav", waveform, RATE, subtype)
    assert b"PEAK" not in (tmp_path / "x.wav").read_bytes() or (tmp_path / "x.wav").read_bytes()[60:64] == bytes(4)
    got = read_audio(tmp_path / "x.wav", RATE).waveform
    assert np.abs(got - waveform).max() < (1e-2 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize(
    ("layout", "values", "expected"),
    [
        ("stereo", [6000, 3000], 4500),  # the mean
        # As ffmpeg -ac 1: FL and FR 0.7071, FC 1, LFE 0, BL and BR 0.5, divided by their sum so that nothing clips.
        ("5.1", [6000, 3000, 0, 0, -1200, 600], (0.70711 * 9000 + 0.5 * -600) / 3.41421),
        ("5.1", [0, 0, 10000, 0, 0, 0], 10000 / 3.41421),
        ("5.1", [0, 0, 0, 10000, 0, 0], 0),
        ("7.1", [0, 0, 10000, 10000, 0, 0, 1000, 1000], (10000 + 1000) / 4.41421),
        ("3.0", [1000, 1000, 4000], (1414.21 + 4000) / 2.41421),
    ],
)
def test_channels_are_mixed_as_ffmpeg_does(tmp_path, layout, values, expected):
    path = tmp_path / "x.wav"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", RATE, layout=layout)
        samples = np.zeros((RATE, len(values)), np.int16)
        samples[:] = values
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    waveform = read_audio(path, RATE).waveform
    assert len(waveform) == RATE
    assert np.allclose(waveform, expected / 32768, atol=2e-6)


def test_any_number_of_channels_gives_sound(tmp_path):
    sound = click(1.0, 0.5)
    for channels in (1, 2, 3, 5, 7, 9, 10, 16, 24):
        soundfile.write(tmp_path / "x.wav", np.repeat(sound[:, None], channels, axis=1), RATE)
        got = read_audio(tmp_path / "x.wav", RATE).waveform
        assert (len(got), np.abs(got).argmax()) == (RATE, RATE // 2)
        assert np.abs(got).max() == pytest.approx(0.9, abs=1e-3)


def test_channels_that_no_layout_has_are_mixed_to_their_mean(tmp_path):
    soundfile.write(tmp_path / "x.wav", click(1.0, 0.5)[:, None] * np.linspace(0.2, 1.0, 9), RATE)
    assert read_audio(tmp_path / "x.wav", RATE).waveform.max() == pytest.approx(0.9 * 0.6, abs=1e-3)


def test_a_rate_that_changes_is_resampled(shared_data):
    path = shared_data / "cases" / "rate_change.mp3"
    whole = read_audio(path, RATE).waveform
    assert len(whole) / RATE == pytest.approx(6.07, abs=0.03)  # 6.0725 s by ffmpeg
    for start in (1.0, 4.0, 5.2):
        part = read_audio(path, RATE, start, 0.8).waveform
        spectra = [np.abs(np.fft.rfft(x)) for x in (part, whole[round(start * RATE) :][: len(part)])]
        assert spectra[0].argmax() == spectra[1].argmax()
        assert np.abs(part - whole[round(start * RATE) :][: len(part)]).max() < 0.02


def test_the_last_sample_of_a_span_is_read_where_it_begins_between_samples(tmp_path):
    whole = np.random.default_rng(0).uniform(0.1, 0.5, RATE).astype(np.float32)
    write_wav(tmp_path / "x.wav", whole, RATE)
    for start in (0.1 + 0.6 / RATE, 0.2 + 0.4 / RATE):
        segment = read_segment(tmp_path / "x.wav", RATE, None, start, 0.25 + 0.8 / RATE)
        first = round(start * RATE)
        assert segment.valid_samples == len(segment.waveform) == RATE // 4 + 1
        np.testing.assert_allclose(segment.waveform, whole[first : first + RATE // 4 + 1], atol=1e-4)


# ---- what cannot be read ----


def test_each_fault_has_its_reason(tmp_path):
    write_video(tmp_path / "mute.mp4", np.stack([painted(0)] * 8), 8, None, RATE)
    write_wav(tmp_path / "sound.wav", click(1.0, 0.5), RATE)
    (tmp_path / "text.mp4").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.mp4").touch()
    reasons = {}
    for name in ("mute.mp4", "sound.wav", "text.mp4", "empty.mp4", "absent.mp4", ""):
        with pytest.raises(MediaError) as caught:
            read_segment(tmp_path / name, RATE, 8.0, seconds=1.0)
        reasons[name] = caught.value.reason
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert reasons == {
        "mute.mp4": "no_audio",
        "sound.wav": "no_video",
        "text.mp4": "unreadable",
        "empty.mp4": "unreadable",
        "absent.mp4": "missing",
        "": "unreadable",
    }


def test_an_error_survives_the_way_from_a_worker():
    error = MediaError("unreadable", Path("x.mp4"), "cannot be read")
    back = pickle.loads(pickle.dumps(error))
    assert (back.reason, str(back)) == ("unreadable", "x.mp4: cannot be read")


def test_damage_inside_the_span_is_an_error_and_behind_it_is_not(tmp_path):
    path = tmp_path / "x.mp4"
    random = np.random.default_rng(0)
    noise = random.uniform(-0.5, 0.5, 4 * RATE).astype(np.float32)
    write_video(path, np.stack([painted(k) for k in range(32)]), 8, noise, RATE)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(audio=0) if p.size]
        damaged = packets[len(packets) * 3 // 4]
        place, size = damaged.pos, damaged.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    assert read_audio(path, RATE, seconds=2.0).valid_samples == 2 * RATE
    with pytest.raises(MediaError) as caught:
        read_audio(path, RATE, seconds=4.0)
    assert caught.value.reason == "unreadable"


def test_a_header_that_lies_about_the_length_is_not_believed(tmp_path):
    path = tmp_path / "x.wav"
    write_wav(path, click(1.0, 0.5), RATE)
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", 2 * 3600 * RATE)  # an hour
    path.write_bytes(content)
    assert read_audio(path, RATE).valid_samples == RATE
    assert scan_packets(path).audio_end == pytest.approx(1.0)


@pytest.mark.parametrize(("start", "seconds"), [(-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_spans_that_make_no_sense(tmp_path, start, seconds):
    with pytest.raises(ValueError, match="a span starts at 0 s or later"):
        read_audio(tmp_path / "x.wav", RATE, start, seconds)


# ---- writing ----


def packet_hashes(path):
    with av.open(str(path)) as container:
        return [hashlib.sha256(bytes(p)).hexdigest() for p in container.demux(container.streams.video[0]) if p.size]


@pytest.mark.parametrize("with_sound", [True, False])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_replace_audio_copies_the_picture_and_sets_the_sound(tmp_path, with_sound, suffix):
    source, out = tmp_path / "in.mp4", tmp_path / f"out{suffix}"
    old = 0.1 * np.ones(2 * RATE, np.float32) if with_sound else None
    write_video(source, np.stack([painted(k) for k in range(16)]), 8, old, RATE)
    replace_audio(source, click(1.5, 1.0), RATE, out)
    assert packet_hashes(out) == packet_hashes(source)
    got = read_audio(out, RATE)
    assert np.abs(got.waveform).argmax() == pytest.approx(RATE, abs=16)
    # MKV has no field for the padding of the last AAC packet.
    assert got.valid_samples == pytest.approx(1.5 * RATE, abs=0 if suffix == ".mp4" else 1024)
    assert numbers(read_frames(out, 8.0, count=16).frames) == list(range(16))


def test_replace_audio_keeps_the_rotation(tmp_path):
    source = tmp_path / "in.mp4"
    frames = np.zeros((8, 64, 96, 3), np.uint8)
    frames[:, :20, :30] = 255
    write_video(source, frames, 8, None, RATE)
    turn(source, TURNS["clockwise"][0])
    replace_audio(source, click(1.0, 0.5), RATE, tmp_path / "out.mp4")
    assert np.array_equal(read_frames(tmp_path / "out.mp4", 8.0).frames, read_frames(source, 8.0).frames)
    assert read_frames(tmp_path / "out.mp4", 8.0).frames.shape[1:3] == (96, 64)


def test_replace_audio_keeps_sound_and_picture_on_one_timeline(tmp_path):
    times = [10.0 + k / 8 for k in range(16)]
    source = write(tmp_path / "in.mkv", times)
    replace_audio(source, click(2.0, 1.0), RATE, tmp_path / "out.mp4")
    got = read_segment(tmp_path / "out.mp4", RATE, 8.0, seconds=2.0)
    assert numbers(got.frames) == list(range(16))
    assert np.abs(got.waveform).argmax() == RATE


def test_replace_audio_over_its_own_input(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, np.stack([painted(k) for k in range(8)]), 8, None, RATE)
    before = packet_hashes(path)
    replace_audio(path, click(1.0, 0.5, 11000), 11000, path)  # a rate that AAC lacks
    assert packet_hashes(path) == before
    assert abs(np.abs(read_audio(path, RATE).waveform).argmax() / RATE - 0.5) < 1e-3


def test_a_codec_that_mp4_cannot_hold_is_sent_to_mkv(tmp_path):
    source = write(tmp_path / "in.mkv", [k / 8 for k in range(8)], codec="libvpx")
    with pytest.raises(UserError, match=r"mp4 cannot hold vp8 video.*\.mkv"):
        replace_audio(source, click(1.0, 0.5), RATE, tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mkv"]
    replace_audio(source, click(1.0, 0.5), RATE, tmp_path / "out.mkv")
    assert packet_hashes(tmp_path / "out.mkv") == packet_hashes(source)
    with pytest.raises(UserError, match=r"written as \.mp4 or \.mkv"):
        replace_audio(source, click(1.0, 0.5), RATE, tmp_path / "out.avi")


def test_replace_audio_needs_a_picture(tmp_path):
    write_wav(tmp_path / "x.wav", click(1.0, 0.5), RATE)
    with pytest.raises(MediaError, match="no video track"):
        replace_audio(tmp_path / "x.wav", click(1.0, 0.5), RATE, tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]


def test_equal_input_gives_equal_files(tmp_path):
    frames = np.stack([painted(k) for k in range(8)])
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 8, click(1.0, 0.5), RATE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_full_disk_leaves_nothing_behind_and_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    frames = np.stack([painted(k) for k in range(8)])
    write_video(path, frames, 8, None, RATE)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for attempt in (
        lambda: write_video(path, frames[:4], 8, click(0.5, 0.2), RATE),
        lambda: replace_audio(path, click(1.0, 0.5), RATE, path),
        lambda: write_wav(tmp_path / "x.wav", click(1.0, 0.5), RATE),
    ):
        with pytest.raises(UserError, match="no space left"):
            attempt()
    assert [item.name for item in tmp_path.iterdir()] == ["x.mp4"]
    assert path.read_bytes() == before


def test_folders_are_made_and_unwritable_places_are_named(tmp_path):
    frames = np.stack([painted(k) for k in range(8)])
    write_video(tmp_path / "new" / "x.mp4", frames, 8, None, RATE)
    write_wav(tmp_path / "other" / "x.wav", click(1.0, 0.5), RATE)
    assert scan_packets(tmp_path / "new" / "x.mp4").video_end == 1.0
    (tmp_path / "file").touch()
    for attempt in (
        lambda: write_video(tmp_path / "file" / "x.mp4", frames, 8, None, RATE),
        lambda: write_wav(tmp_path / "file" / "x.wav", click(1.0, 0.5), RATE),
    ):
        with pytest.raises(UserError, match="cannot be written"):
            attempt()


def test_a_wav_clips_instead_of_wrapping(tmp_path):
    write_wav(tmp_path / "x.wav", np.array([0.0, 1.5, -1.5, 0.5], np.float32), RATE)
    got = read_audio(tmp_path / "x.wav", RATE).waveform
    assert np.allclose(got, [0.0, 32767 / 32768, -1.0, 0.5], atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "rate", "words"),
    [
        (np.zeros((2, 5, 6, 3), np.uint8), RATE, "even height"),
        (np.zeros((2, 6, 6, 3), np.float32), RATE, "uint8"),
        (np.zeros((0, 6, 6, 3), np.uint8), RATE, "F >= 1"),
        (np.zeros((2, 6, 6, 3), np.uint8), 12345, "AAC has the sample rates"),
    ],
)
def test_what_write_video_refuses(tmp_path, frames, rate, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "x.mp4", frames, 8, None, rate)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><title>404</title>", "is a web page, not media: '<!DOCTYPE html> <html>"),
        (b"../other/clip.mp4", "is text, not media: '../other/clip.mp4'"),
        (bytes(range(256)), "cannot be read: Invalid data found when processing input"),
    ],
)
def test_what_downloads_leave_is_named(tmp_path, content, words):
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(MediaError) as problem:
        read_segment(tmp_path / "x.mp4", 16_000, 8.0, seconds=0.25)
    assert (problem.value.reason, problem.value.detail[: len(words)]) == ("unreadable", words)
