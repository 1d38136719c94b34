"""Timestamps and headers that are wrong: joined files, clocks that end, no presentation times, sizes of pipes."""

import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from test_media import RATE, numbers, painted

from small_media import read_segment
from vab.data.media.open import OpenMedia
from vab.data.media.segments import MediaError, read_audio, read_frames, read_segments, scan_packets
from vab.data.media.write import replace_audio, write_video, write_wav

FPS = 25


def tones(first, seconds, rate):
    """From second ``first`` on: second k sounds at 300 + 100 k Hz."""
    times = first + np.arange(seconds * rate) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 100 * np.floor(times)) * times)).astype(np.float32)


def heard(waveform):
    """Hz of each whole second, from its middle half."""
    found = []
    for second in range(len(waveform) // RATE):
        middle = waveform[round((second + 0.25) * RATE) : round((second + 0.75) * RATE)]
        found.append(round(np.abs(np.fft.rfft(middle)).argmax() * RATE / len(middle), -1))
    return found


def numbers_of_cases(frames):
    """In ../shared/data/cases: 3 x 4 blocks, bit b in row b // 4 and column b % 4."""
    height, width = frames.shape[1:3]
    blocks = frames[:, height // 6 :: height // 3, width // 8 :: width // 4, 1] > 127
    return (blocks[:, :3, :4].reshape(len(frames), 12) * 2 ** np.arange(12)).sum(axis=1).tolist()


def follow(found):
    """Whether each picture follows the one before; the first and last of a part may be shown for longer."""
    steps = np.diff(found)
    return set(steps.tolist()) <= {0, 1} and (steps == 0).sum() <= 8


def record(path, first, seconds, codecs, at=0.0, rate=RATE, gop=12):
    """Pictures and tones from second ``first`` of the story on, on a clock that begins at ``at`` s."""
    with av.open(str(path), "w") as container:
        video = audio = None
        if codecs[0]:
            options = {"bf": "2"} if codecs[0] == "libx264" else {}
            video = container.add_stream(codecs[0], FPS, width=96, height=96, pix_fmt="yuv420p", options=options)
            video.bit_rate, video.gop_size = 2_000_000, gop
        if codecs[1]:
            audio = container.add_stream(codecs[1], rate, layout="mono")
        sound = tones(first, seconds, rate)
        for number in range(seconds * FPS):
            if video is not None:
                frame = av.VideoFrame.from_ndarray(painted(first * FPS + number), format="rgb24")
                frame.pts, frame.time_base = number + round(at * FPS), Fraction(1, FPS)
                container.mux(video.encode(frame))
            if audio is not None:
                piece = sound[number * rate // FPS : (number + 1) * rate // FPS]
                frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = number * rate // FPS + round(at * rate)
                container.mux(audio.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode() if stream is not None else [])
    return path


def joined(folder, suffix, codecs, at=(0.0, 0.0), rate=RATE):
    """Two files of 4 s in one."""
    parts = [
        record(folder / f"part{k}{suffix}", 4 * k, 4, codecs, start, rate).read_bytes() for k, start in enumerate(at)
    ]
    (folder / f"joined{suffix}").write_bytes(b"".join(parts))
    return folder / f"joined{suffix}"


def sees_one_time(path, read_numbers, seconds):
    """One pass, reading each and seeking agree, and pictures and tones are those of one story of so many seconds."""
    scan = scan_packets(path)
    assert (scan.video_end, scan.audio_end) == (pytest.approx(seconds, abs=0.25), pytest.approx(seconds, abs=0.25))
    count = seconds * FPS - 5
    found = read_numbers(read_frames(path, FPS, count=count).frames)
    assert follow(found)
    assert found[-1] >= count - 10
    assert heard(read_audio(path, RATE).waveform)[:seconds] == [300 + 100 * k for k in range(seconds)]
    starts = [0.0, seconds / 2 - 1, seconds - 3]
    for start, one in zip(starts, read_segments(path, RATE, FPS, starts, 2.0, scan=scan), strict=True):
        alone = read_segment(path, RATE, FPS, start, 2.0)
        assert np.array_equal(one.frames, alone.frames)
        np.testing.assert_allclose(one.waveform, alone.waveform, atol=2e-3)
        np.testing.assert_allclose(one.waveform, read_audio(path, RATE, start, 2.0).waveform, atol=2e-3)
        assert read_numbers(one.frames) == found[round(start * FPS) :][: len(one.frames)]


@pytest.mark.parametrize(
    ("suffix", "codecs", "at"),
    [
        (".ts", ("libx264", "aac"), (0.0, 0.0)),
        (".ts", ("libx264", "aac"), (100.0, 0.0)),  # FFmpeg takes this for the end of a 33-bit clock
        (".ts", ("libx264", "aac"), (0.0, 100.0)),
        (".mpg", ("mpeg2video", "mp2"), (0.0, 0.0)),
        (".mkv", ("libx264", "aac"), (0.0, 0.0)),
        (".webm", ("libvpx", "libopus"), (0.0, 0.0)),
    ],
)
def test_joined_files_are_one_timeline(tmp_path, suffix, codecs, at):
    rate = 48_000 if codecs[1] == "libopus" else RATE
    sees_one_time(joined(tmp_path, suffix, codecs, at, rate), numbers, 8)


def in_a_row(path, *parts):
    """Joined transport streams of so many seconds of pictures and of sound."""
    content, first = b"", 0
    for pictures, sound in parts:
        part = path.with_name(f"part_from_{first}.ts")
        whole = record(part.with_suffix(".mkv"), first, 4, ("libx264", "aac"))
        with av.open(str(whole)) as source, av.open(str(part), "w") as target:
            copies = {stream: target.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                limit = pictures if packet.stream.type == "video" else sound
                if packet.size and packet.pts * packet.time_base < limit:
                    packet.stream = copies[packet.stream]
                    target.mux(packet)
        content += part.read_bytes()
        first += 4
    path.write_bytes(content)
    return path


def begin_of(path, second):
    """When the pictures and the sound of that second of the story begin."""
    pictures = numbers(read_frames(path, FPS, count=400).frames)
    waveform = read_audio(path, RATE).waveform
    windows = np.lib.stride_tricks.sliding_window_view(waveform, RATE // 10)[:: RATE // 50]
    hertz = np.abs(np.fft.rfft(windows)).argmax(axis=1) * 10
    found = next(k for k, tone in enumerate(hertz) if abs(tone - 300 - 100 * second) <= 20)
    return pictures.index(second * FPS) / FPS, found / 50 + 0.05


@pytest.mark.parametrize("parts", [[(4, 3.4), (4, 4)], [(3.4, 4), (4, 4)], [(4, 0), (4, 4)], [(4, 4), (4, 0), (4, 4)]])
def test_pictures_and_sound_of_joined_parts_stay_together(tmp_path, parts):
    path = in_a_row(tmp_path / "x.ts", *parts)
    last = 4 * (len(parts) - 1)
    assert begin_of(path, last) == (pytest.approx(last, abs=0.15), pytest.approx(last, abs=0.15))
    assert heard(read_audio(path, RATE, last + 0.05, 3.8).waveform) == [300 + 100 * (last + k) for k in range(3)]


def test_parts_that_cannot_be_put_on_one_clock_are_left_out_by_name(tmp_path):
    path = in_a_row(tmp_path / "x.ts", (1, 0), (4, 4))  # the sound begins where the pictures still could
    with pytest.raises(MediaError, match="do not share one clock") as problem:
        read_audio(path, RATE)
    assert problem.value.reason == "unreadable"


@pytest.mark.parametrize("error", [500, -500])
def test_a_wrong_time_of_one_packet_does_not_move_the_sound_after_it(tmp_path, error):
    path = record(tmp_path / "x.mkv", 0, 10, ("libx264", "aac"))
    whole = read_audio(path, RATE)
    with av.open(str(path)) as container:
        payload = bytes([packet for packet in container.demux(audio=0) if packet.size][30])  # at 1.9 s
    content = bytearray(path.read_bytes())
    place = content.index(payload) - 3  # of a SimpleBlock's time since its cluster began, ms
    struct.pack_into(">h", content, place, struct.unpack_from(">h", content, place)[0] + error)
    path.write_bytes(content)
    starts = [3.5, 6.0]
    for start, segment in zip(starts, read_segments(path, RATE, 5.0, starts, 2.0), strict=True):
        expected = whole.waveform[round(start * RATE) :][: 2 * RATE]
        np.testing.assert_allclose(segment.waveform, expected, atol=1e-3)
    assert read_audio(path, RATE).valid_samples == whole.valid_samples


def test_joined_recordings_of_unknown_length_are_one_timeline(tmp_path):
    path = joined(tmp_path, ".webm", ("libvpx", "libopus"), rate=48_000)
    unknown = re.sub(
        rb"(\x18\x53\x80\x67\x01).{7}", lambda found: found[1] + b"\xff" * 7, path.read_bytes(), flags=re.DOTALL
    )
    path.write_bytes(unknown)
    sees_one_time(path, numbers, 8)


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".oga", "flac"), (".opus", "libopus"), (".flac", "flac"), (".mp3", "mp3")]
)
def test_joined_sounds_are_one_timeline(tmp_path, suffix, codec):
    path = joined(tmp_path, suffix, ("", codec), rate=48_000)
    whole = read_audio(path, RATE)
    assert whole.valid_samples == pytest.approx(8 * RATE, abs=0.2 * RATE)
    assert heard(whole.waveform)[:8] == [300 + 100 * k for k in range(8)]
    np.testing.assert_allclose(read_audio(path, RATE, 6.2, 1.0).waveform, whole.waveform[99_200:115_200], atol=2e-3)


@pytest.mark.parametrize("second_rate", [None, 22_050, 32_000, 48_000])
def test_spans_after_a_change_of_rate_are_those_of_the_whole(tmp_path, shared_data, second_rate):
    path = shared_data / "cases" / "rate_change.mp3"
    if second_rate:
        parts = [
            record(tmp_path / f"{k}.mp3", 4 * k, 4, ("", "mp3"), rate=r) for k, r in enumerate((44_100, second_rate))
        ]
        path = tmp_path / "joined.mp3"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    whole = read_audio(path, 44_100).waveform
    for start in np.arange(3.5, 5.0, 0.02):
        part = read_audio(path, 44_100, start, 0.5).waveform
        np.testing.assert_array_equal(part, whole[round(start * 44_100) :][: len(part)])


def test_joined_fragments_of_mp4_are_left_out_by_name(tmp_path):
    for number in range(2):
        options = {"movflags": "frag_keyframe+empty_moov"}
        with av.open(str(tmp_path / f"{number}.mp4"), "w", options=options) as container:
            audio = container.add_stream("aac", RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(tones(4 * number, 4, RATE)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    (tmp_path / "x.mp4").write_bytes((tmp_path / "0.mp4").read_bytes() + (tmp_path / "1.mp4").read_bytes())
    with pytest.raises(MediaError, match="several MP4 files in one") as problem:
        read_audio(tmp_path / "x.mp4", RATE)
    assert problem.value.reason == "unreadable"


def boxes(content):
    """(kind, payload) of each MP4 box."""
    while content:
        size, kind = struct.unpack(">I4s", content[:8])
        yield kind, content[8:size]
        content = content[size:]


def with_edits(content, edits):
    """An MP4 file whose tracks show these spans (s) of what they hold."""
    changed = b""
    for kind, payload in boxes(content):
        if kind == b"moov":
            payload = with_edits(payload, edits)
        if kind == b"trak":
            inside = dict(boxes(payload))
            scale = struct.unpack(">I", dict(boxes(inside[b"mdia"]))[b"mdhd"][12:16])[0]
            zero = struct.unpack(">i", dict(boxes(inside[b"edts"]))[b"elst"][12:16])[0]
            rows = [(round((end - begin) * 1000), zero + round(begin * scale), 1 << 16) for begin, end in edits]
            body = struct.pack(">II", 0, len(rows)) + b"".join(struct.pack(">IiI", *row) for row in rows)
            inside[b"edts"] = struct.pack(">I4s", len(body) + 8, b"elst") + body
            payload = b"".join(struct.pack(">I4s", len(part) + 8, name) + part for name, part in inside.items())
        changed += struct.pack(">I4s", len(payload) + 8, kind) + payload
    return changed


@pytest.mark.parametrize("gop", [100, 8])
@pytest.mark.parametrize("edits", [[(0, 3), (7.2, 10)], [(0, 4), (6, 10)], [(2, 5), (2, 5)], [(2, 3), (5.2, 9)]])
def test_mp4_with_edits_shows_and_sounds_what_they_say(tmp_path, gop, edits):
    content = record(tmp_path / "whole.mp4", 0, 10, ("libx264", "aac"), gop=gop).read_bytes()
    path = tmp_path / "x.mp4"
    path.write_bytes(with_edits(content, edits))
    seconds = sum(end - begin for begin, end in edits)
    scan = scan_packets(path)
    assert (scan.video_end, scan.audio_end) == (pytest.approx(seconds, abs=0.1), pytest.approx(seconds, abs=0.1))
    starts = [0.0, 1.0, 2.0, 3.0]
    wanted = [number for begin, end in edits for number in range(round(begin * FPS), round(end * FPS))]
    for fps in (FPS, 5):
        for start, one in zip(starts, read_segments(path, RATE, fps, starts, 1.0, scan=scan), strict=True):
            found = np.array(numbers(one.frames))
            assert found == pytest.approx(wanted[round(start * FPS) :][FPS // fps // 2 :: FPS // fps][:fps], abs=1)
            assert np.array_equal(one.frames, read_segment(path, RATE, fps, start, 1.0).frames)


@pytest.mark.parametrize(("name", "seconds"), [("concat_6_3.ts", 9), ("concat_reset.ts", 8), ("wrap.ts", 12)])
def test_clocks_of_reported_files(shared_data, name, seconds):
    sees_one_time(shared_data / "cases" / name, numbers_of_cases, seconds)


def test_a_new_sound_keeps_the_pictures_before_the_end_of_a_clock(shared_data, tmp_path):
    replace_audio(shared_data / "cases" / "wrap.ts", np.zeros(12 * RATE, np.float32), RATE, tmp_path / "x.mp4")
    found = numbers_of_cases(read_frames(tmp_path / "x.mp4", FPS, count=301).frames)
    assert follow(found)
    assert (found[0], found[-1]) == (0, pytest.approx(299, abs=3))


@pytest.mark.parametrize("name", ["h264_b.avi", "xvid_b.avi"])
def test_pictures_without_presentation_times_come_in_the_decoders_order(shared_data, name):
    path = shared_data / "cases" / name
    found = numbers_of_cases(read_frames(path, FPS, count=103).frames)
    assert follow(found)
    assert (found[0], found[-1]) == (0, pytest.approx(99, abs=1))
    scan = scan_packets(path)
    for start, segment in zip([0.0, 2.0], read_segments(path, RATE, FPS, [0.0, 2.0], 2.0, scan=scan), strict=True):
        assert numbers_of_cases(segment.frames) == found[round(start * FPS) :][:50]


def test_h264_in_avi(tmp_path):
    path = record(tmp_path / "x.avi", 0, 8, ("libx264", "mp3"))
    assert follow(numbers(read_frames(path, FPS, count=195).frames))
    late = read_frames(path, FPS, 6.0, 20).frames
    assert np.array_equal(late, read_frames(path, FPS, count=170).frames[150:])


@pytest.mark.parametrize("name", ["cut_copy.mp4", "mid_gop.ts", "base.mp4"])
def test_reported_files_that_were_read_right_still_are(shared_data, name):
    path = shared_data / "cases" / name
    found = numbers_of_cases(read_frames(path, FPS, count=140).frames)
    first = {"cut_copy.mp4": 82, "mid_gop.ts": 73, "base.mp4": 0}[name]
    assert (found[0], found[-1]) == (first, pytest.approx(first + 139, abs=40))
    assert all(step in (0, 1) for step in np.diff(found))


@pytest.mark.parametrize(("name", "seconds"), [("flash_aac.mp4", 2.0), ("flash_no_elst.mp4", 2.08)])
def test_flash_and_beep_lie_where_they_were(shared_data, name, seconds):
    got = read_segment(shared_data / "cases" / name, RATE, FPS, 0.0, 4.0)
    flash = got.frames.mean(axis=(1, 2, 3)).argmax() / FPS
    beep = (np.abs(got.waveform) > 0.1).argmax() / RATE
    assert (flash, beep) == (pytest.approx(seconds, abs=0.041), pytest.approx(seconds, abs=0.03))


def test_sound_that_is_announced_and_does_not_come_is_not_there(shared_data):
    path = shared_data / "cases" / "test-no-audio-segment.ts"
    assert scan_packets(path).audio_end is None
    for read in (lambda: read_audio(path, RATE), lambda: read_segment(path, RATE, 4.0, 1.0, 1.0)):
        with pytest.raises(MediaError) as problem:
            read()
        assert problem.value.reason == "no_audio"


PIPED = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000), (0x7FFFFFFF, 0x7FFFFFFF)]


@pytest.mark.parametrize("sizes", [*PIPED, (32044, 32000), (32036, 32010)])
def test_sizes_in_the_header_that_no_file_can_have_are_not_believed(tmp_path, sizes):
    waveform = tones(0, 1, RATE)
    write_wav(tmp_path / "x.wav", waveform, RATE)
    expected = read_audio(tmp_path / "x.wav", RATE).waveform
    content = bytearray((tmp_path / "x.wav").read_bytes())
    content[4:8], content[40:44] = (struct.pack("<I", size) for size in sizes)
    (tmp_path / "x.wav").write_bytes(content)
    assert np.array_equal(read_audio(tmp_path / "x.wav", RATE).waveform, expected)


def test_a_sound_that_is_cut_off_is_so_for_every_reader(tmp_path):
    write_wav(tmp_path / "x.wav", tones(0, 2, RATE), RATE)
    content = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.wav").write_bytes(content[: len(content) // 2])
    for read in (lambda: read_audio(tmp_path / "x.wav", RATE), lambda: scan_packets(tmp_path / "x.wav")):
        with pytest.raises(MediaError, match="is cut off: 32022 bytes fewer than its header says"):
            read()


def test_reported_headers_read_like_their_originals(shared_data):
    files = sorted((shared_data / "cases" / "wav_gen").iterdir())
    assert len(files) == 7
    for path in files:
        real = read_audio(path.parents[1] / "wav_real" / path.name, RATE).waveform
        assert np.array_equal(read_audio(path, RATE).waveform, real), path.name


def test_a_video_of_one_clock_is_not_read_twice(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([painted(k) for k in range(64)]), 8, tones(0, 8, RATE), RATE)
    late = read_segment(tmp_path / "x.mp4", RATE, 8.0, 6.0, 1.0)
    assert numbers(late.frames) == list(range(48, 56))


def test_a_file_is_read_whole_once_however_often_it_is_sought_in(tmp_path, monkeypatch):
    path = record(tmp_path / "x.ts", 0, 10, ("libx264", "mp2"))
    readings = []
    packets = OpenMedia.packets

    def counting(source):
        readings.append(1)
        for packet in packets(source):
            if not packet.size:
                readings.append("whole")
            yield packet

    monkeypatch.setattr(OpenMedia, "packets", counting)
    starts = [5.5, 6.0, 7.0, 8.0]
    alone = [read_frames(path, 5.0, start, 5).frames for start in starts]
    assert readings.count("whole") <= 3  # one for the clock; up to two streams end
    readings.clear()
    scan = scan_packets(path)
    segments = list(read_segments(path, None, 5.0, [0.0, *starts], 1.0, scan=scan))
    assert readings.count(1) == 2
    assert [len(segment.waveform) for segment in segments] == [0] * 5
    for segment, frames in zip(segments[1:], alone, strict=True):
        assert np.array_equal(segment.frames, frames)
    readings.clear()
    assert next(read_segments(path, RATE, 5.0, [7.0], 1.0, scan=scan)).valid_frames == 5
    assert readings.count(1) == 1
