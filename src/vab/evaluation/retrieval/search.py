"""Search a gallery with a media file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from vab.data.media.open import MediaError
from vab.data.media.scan import scan_packets
from vab.evaluation.retrieval.gallery import Gallery
from vab.evaluation.retrieval.results import Hit
from vab.frozen.codec import load_codec
from vab.spec import UserError

OTHER_SIDE = {"audio": "video", "video": "audio"}


def query_side(path: Path, by: str) -> str:
    """Which side of a query to embed: ``audio`` or ``video``; for ``by`` ``auto`` the video if there is one.

    Raises:
        MediaError: If the file is unreadable, or has not the side that is asked for.
    """
    scan = scan_packets(path)
    if by == "auto":
        return "audio" if scan.video_end is None else "video"
    if (scan.video_end if by == "video" else scan.audio_end) is None:
        raise MediaError(f"no_{by}", path, f"has no {'picture' if by == 'video' else 'sound'} to search by")
    return by


def search(query: Tensor, gallery: Gallery, side: str, top: int) -> list[Hit]:
    """The ``top`` items whose embedding of a side is nearest to a query (E,), by cosine; of equal ones the first.

    Raises:
        UserError: If the gallery was embedded in another width.
    """
    rows = gallery.embeddings[side].double()
    if rows.shape[1] != len(query):
        raise UserError(
            f"the gallery's embeddings have width {rows.shape[1]}, the checkpoint's {len(query)}: they are of another "
            "model, give its checkpoint"
        )
    cosines = (rows / rows.norm(dim=1, keepdim=True)) @ (query.double() / query.double().norm())
    order = torch.sort(cosines, descending=True, stable=True).indices[:top].tolist()
    return [_hit(gallery, rank, place, float(cosines[place])) for rank, place in enumerate(order, start=1)]


def _hit(gallery: Gallery, rank: int, place: int, cosine: float) -> Hit:
    assert gallery.keys is not None
    name = gallery.keys[place]
    if gallery.dataset is None:
        return Hit(rank, name, cosine, str(gallery.files[place]) if gallery.files else "")
    number = gallery.numbers[place]
    meta = gallery.dataset.record(number)
    labels = tuple(gallery.dataset.label_names(number))
    return Hit(rank, name, cosine, str(meta.get("source", "")), meta.get("start_seconds"), labels)


@torch.inference_mode()
def decode_hits(gallery: Gallery, hits: Sequence[Hit], device: torch.device) -> dict[int, bytes]:
    """By rank, the sound of a record decoded from its codes, as a .wav file; empty if the items are no records."""
    if gallery.dataset is None:
        return {}
    codec = load_codec(gallery.dataset.spec.codec, device)
    numbers = dict(zip(gallery.keys or (), gallery.numbers, strict=True))
    sounds = {}
    for hit in hits:
        record = gallery.dataset.read([numbers[hit.name]])
        waveform = codec.decode(record.codes[:, :, : int(record.steps[0])].to(device))[0, 0].cpu().numpy()
        content = io.BytesIO()
        soundfile.write(content, waveform, codec.sample_rate, format="WAV", subtype="PCM_16")
        sounds[hit.rank] = content.getvalue()
    return sounds
