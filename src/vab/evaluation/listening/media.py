"""Media of a listening test: the sounds of a video, brought to the same length and loudness."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from vab.audio import rms_db
from vab.data.media.open import OpenMedia
from vab.data.media.segments import read_audio, scan_packets
from vab.evaluation.listening.plan import Material
from vab.metrics.health import SILENT_DB
from vab.spec import UserError

SAMPLE_RATE = 48_000
"""Hz, of every sound in the page, so that no file shows its system."""
LEVEL_DB = -23.0
"""dBFS, root mean square: the level of all sounds of a video, unless one of them would clip."""
PEAK_DB = -1.0
"""dBFS: highest peak of a level-matched sound, before it is encoded."""
SHORT_SECONDS = 0.5
"""s. A sound that ends this much before its video causes a warning."""
_FADE_SECONDS = 0.01
_CODECS = ("h264", "av1", "vp9")
"""Video codecs that browsers play in MP4, as parts of the names of FFmpeg's decoders."""


def require_playable(material: Mapping[str, Material]) -> None:
    """Check that browsers can show the videos.

    Raises:
        UserError: If one has no pictures, or of a kind that they do not show.
    """
    for files in material.values():
        with OpenMedia(files.video) as source:
            if source.video is None:
                raise UserError(f"{files.video}: has no video track")
            codec = source.video.codec_context.name
        if not any(name in codec for name in _CODECS):
            raise UserError(
                f"{files.video}: browsers do not show {codec} in MP4: convert it to H.264 first, for example with "
                f"ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"
            )


def read_sounds(files: Material) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Read the sounds of one video, all cut to the shortest of them and of the video.

    Returns:
        Sounds: system -> (N,) float32, 48 kHz, mono, with a fade-out of 10 ms; and by how many seconds each system's
        file ends before the video, 0 if it does not.
    """
    shown = scan_packets(files.video).video_end
    assert shown is not None  # require_playable has seen pictures
    whole = {system: read_audio(path, SAMPLE_RATE).waveform for system, path in files.sounds.items()}
    n = min(round(shown * SAMPLE_RATE), *(len(waveform) for waveform in whole.values()))
    fade = np.ones(n, np.float32)
    ramp = min(n, round(_FADE_SECONDS * SAMPLE_RATE))
    fade[n - ramp :] = np.linspace(1, 0, ramp, dtype=np.float32)
    missing = {system: max(0.0, shown - len(waveform) / SAMPLE_RATE) for system, waveform in whole.items()}
    return {system: waveform[:n] * fade for system, waveform in whole.items()}, missing


def match_levels(sounds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Gains that bring sounds of one video to the same root mean square, without clipping.

    The level is -23 dBFS; if a peak would then be above -1 dBFS, all of the video's sounds get a lower level. A silent
    sound (below -60 dBFS) stays as it is.

    Args:
        sounds: System -> (N,) float32.

    Returns:
        System -> gain, dB; of those that are not silent.
    """
    level = {system: float(rms_db(torch.from_numpy(waveform).double())) for system, waveform in sounds.items()}
    loud = [system for system in sounds if level[system] >= SILENT_DB]
    room = [PEAK_DB - 20 * math.log10(float(np.abs(sounds[system]).max())) + level[system] for system in loud]
    target = min([LEVEL_DB, *room])
    return {system: target - level[system] for system in loud}
