"""Write media files: WAV, MP4, and videos with a new sound track."""

from __future__ import annotations

import heapq
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import soundfile
from av import AudioStream, Packet, VideoStream
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from vab import UserError
from vab.audio import resample
from vab.data.media.open import MediaError, OpenMedia
from vab.files import explain_full_disk, replacing, write_atomically

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
"""Hz. Source: ISO/IEC 14496-3, table 1.18."""


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float | Fraction,
    waveform: np.ndarray | None,
    sample_rate: int,
    crf: int = 20,
) -> None:
    """Write an MP4 file (H.264 4:2:0 and mono AAC) that any player shows. Equal input gives equal bytes.

    Args:
        path: Ends in .mp4. The file appears whole or not at all.
        frames: (F, H, W, 3) uint8 RGB, F >= 1; H and W even.
        fps: Frames per second.
        waveform: (N,) float in [-1, 1], or None for a file without a sound track.
        sample_rate: Of the waveform, Hz; a rate that AAC supports.
        crf: x264's quality, 0 (lossless) to 51.

    Raises:
        UserError: If the disk is full or the folder not writable.
        ValueError: If shapes, types or rates do not fit.
    """
    path, rate = Path(path), Fraction(fps).limit_denominator(1_001_000)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 of shape (F, H, W, 3), F >= 1; got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"H.264 4:2:0 needs even height and width, got {frames.shape[1]} x {frames.shape[2]}")
    if sample_rate not in _AAC_RATES:
        raise ValueError(f"AAC has the sample rates {_AAC_RATES} Hz, got {sample_rate}")
    sound = None if waveform is None else _mono_float(waveform)
    with _container(path, "mp4") as container:
        # One thread: for small pictures more are slower, and callers run one process per core.
        # Without mbtree: on small pictures x264's AVX-512 code for it gives other bytes from run to run.
        options = {"preset": "veryfast", "crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
        video = container.add_stream(
            "libx264", rate, width=frames.shape[2], height=frames.shape[1], pix_fmt="yuv420p", options=options
        )
        audio = None if sound is None else container.add_stream("aac", sample_rate, layout="mono")
        reformatter = VideoReformatter()
        for number, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = reformatter.reformat(rgb, format="yuv420p", threads=1)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            container.mux(list(_encoded(audio, sound, sample_rate)))


def replace_audio(video_path: str | Path, waveform: np.ndarray, sample_rate: int, out: str | Path) -> None:
    """Write a video with another sound track. Its video packets are copied, not encoded again.

    The sound begins at the zero of the file's timeline, as in ``read_frames``; rotation is kept; other tracks
    (old sound, subtitles, cover art) are dropped.

    Args:
        video_path: Any file with video, with or without sound.
        waveform: (N,) float in [-1, 1]; the new track has its length, whatever the video's.
        sample_rate: Of the waveform, Hz. Rates that AAC does not support are resampled to 48 kHz.
        out: Ends in .mp4 or .mkv; appears whole or not at all. May be ``video_path`` itself.

    Raises:
        MediaError: If the video is missing, unreadable, or has no video track.
        UserError: If the container cannot hold the video's codec, or the disk is full.
    """
    out = Path(out)
    container_format = {".mp4": "mp4", ".mkv": "matroska"}.get(out.suffix.lower())
    if container_format is None:
        raise UserError(f"{out}: a video with a new sound track is written as .mp4 or .mkv, not {out.suffix!r}")
    sound = _mono_float(waveform)
    if sample_rate not in _AAC_RATES:
        sound, sample_rate = resample(sound, sample_rate, 48000), 48000
    with OpenMedia(video_path, generate_pts=True) as source:
        if source.video is None:
            raise MediaError("no_video", source.path, "has no video track")
        with _container(out, container_format) as container:
            way_out = "give an output that ends in .mkv" if container_format == "mp4" else "convert it to H.264 first"
            refusal = UserError(
                f"{source.path}: {container_format} cannot hold {source.video.codec_context.name} video: {way_out}"
            )
            try:
                video = container.add_stream_from_template(source.video, opaque=True)
                audio = container.add_stream("aac", sample_rate, layout="mono")
                container.start_encoding()
            except OSError:
                raise
            except (ValueError, FFmpegError) as error:
                raise refusal from error
            # By decoding time: a player that streams the file needs the sound of each picture before it.
            sounds = _encoded(audio, sound, sample_rate)
            try:
                for packet in heapq.merge(sounds, _video_packets(source, video), key=_time):
                    container.mux(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError) as error:
                raise source.unreadable(f"its video packets cannot be put into {container_format}") from error


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int, subtype: str = "PCM_16") -> None:
    """Write a mono WAV file, whole or not at all. Integer subtypes clip at full scale.

    Args:
        path: Ends in .wav.
        waveform: (N,) float in [-1, 1].
        sample_rate: Hz.
        subtype: libsndfile's name: ``PCM_16``, ``PCM_24``, ``FLOAT``, ...

    Raises:
        UserError: If the disk is full or the folder not writable.
        ValueError: If the waveform is not one-dimensional and finite.
    """
    stream = io.BytesIO()
    soundfile.write(stream, _mono_float(waveform), sample_rate, subtype, format="WAV")
    content = stream.getvalue()
    if (peak := content.find(b"PEAK", 0, 200)) >= 0:  # libsndfile notes the time there: equal sounds, equal files
        content = content[: peak + 12] + bytes(4) + content[peak + 16 :]
    with _writing_to(Path(path)):
        write_atomically(Path(path), content)


def _mono_float(waveform: np.ndarray) -> np.ndarray:
    samples = np.ascontiguousarray(waveform, np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"a waveform to write is (N,) and finite, got shape {samples.shape}")
    return samples


def _encoded(stream: AudioStream, samples: np.ndarray, sample_rate: int) -> Iterator[Packet[Any]]:
    """Packets of a mono waveform."""
    if len(samples):
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _video_packets(source: OpenMedia, copy: VideoStream) -> Iterator[Packet[Any]]:
    """The video packets of a file, on its timeline, for a stream of another file."""
    for packet in source.packets():
        if packet.size == 0 or packet.time_base is None or packet.stream != source.video:
            continue  # the end marker, which only decoders need; old sound
        shift = round(source.zero / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = copy
        yield packet


def _time(packet: Packet[Any]) -> float:
    """When the packet is decoded, s."""
    time = packet.dts if packet.dts is not None else packet.pts
    return -math.inf if time is None or packet.time_base is None else float(time * packet.time_base)


@contextmanager
def _container(path: Path, container_format: str) -> Iterator[OutputContainer]:
    """An open media file to write to; it appears at its path whole or not at all."""
    with _writing_to(path):
        try:
            # By its name: the errors of a Python file are hidden by PyAV.
            with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format=container_format) as container:
                yield container
        except OSError as error:
            raise explain_full_disk(error, path.parent, 0) from error


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """Make the folder of a file; turn errors of the system into a ``UserError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
