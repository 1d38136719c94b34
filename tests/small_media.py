"""Small media files for tests, and an untrained model saved as Lightning saves it."""

import hashlib

import av
import numpy as np
import torch
from lightning.pytorch import Trainer

from vab.backbone import Backbone
from vab.data.media.segments import MediaError, read_segments
from vab.data.media.write import write_video
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


def tone(seconds, hertz=440.0, rate=16_000):
    """(N,) float32: a tone that swells and fades twice a second."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * (0.6 + 0.4 * np.sin(4 * np.pi * time)) * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def video(path, seconds, sound=True, fps=16, seed=0):
    """A video of noise, with a tone."""
    frames = np.random.default_rng(seed).integers(0, 255, (round(seconds * fps), 48, 64, 3), dtype=np.uint8)
    write_video(path, frames, fps, tone(seconds) if sound else None, 16_000)
    return str(path)


def read_segment(path, sample_rate, video_fps, start=0.0, seconds=10.0):
    """One segment, read by itself."""
    (segment,) = read_segments(path, sample_rate, video_fps, [start], seconds)
    if isinstance(segment, MediaError):
        raise segment
    return segment


def picture_hash(path):
    """Of the video packets as they lie in the file."""
    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            digest.update(bytes(packet))
    return digest.hexdigest()


def save_model(path, spec, codebooks, seed=0, **options):
    """An untrained model's checkpoint."""
    torch.manual_seed(seed)
    backbone = Backbone(spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    backbone.set_codebooks(codebooks)
    task = PretrainTask(backbone, sampler=Sampler(decode_steps=2, guidance_scale=2.0), **options)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return str(path)
