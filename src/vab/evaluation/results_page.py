"""A page that shows what a query found, with players: one file that opens in any browser."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import soundfile
import torch

from vab.data.inputs.listing import VIDEO_SUFFIXES
from vab.frozen.protocols import Codec
from vab.spec import Batch

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
ol{list-style:none;padding:0;display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}
li,.query{border:1px solid #8886;border-radius:.5rem;padding:.75rem;overflow-wrap:anywhere}
video,audio{width:100%}
small{opacity:.75}
"""


@dataclass(frozen=True)
class Hit:
    """One thing that was found."""

    rank: int
    """1 = nearest."""
    name: str
    """Its name in the gallery."""
    cosine: float
    """With the query."""
    file: str = ""
    """Where it is from, if known."""
    start_seconds: float | None = None
    """Where in that file it starts, if it is a part of it."""
    labels: tuple[str, ...] = ()
    """Its classes, if known."""


def results_page(
    query: Path, by: str, hits: Sequence[Hit], among: int, folder: Path, sounds: Mapping[int, bytes]
) -> str:
    """The page's text.

    Args:
        query: The file that was asked with.
        by: ``audio`` or ``video``: what of it was looked at.
        hits: What was found, nearest first.
        among: How many were searched.
        folder: Where the page will be; files are linked relative to it.
        sounds: By rank a .wav file that is put into the page; what is found without one is linked.
    """
    items = []
    for hit in hits:
        at = "" if hit.start_seconds is None else f", from {hit.start_seconds:g} s on"
        if hit.rank in sounds:
            data = base64.b64encode(sounds[hit.rank]).decode()
            player = f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'
        else:
            player = _player(Path(hit.file), folder) if hit.file else ""
        lines = [
            f"<b>{hit.rank}. {html.escape(hit.name)}</b>",
            player,
            f"<small>cosine {hit.cosine:.3f}</small>",
            f"<small>{html.escape(hit.file + at)}</small>" if hit.file else "",
            f"<small>{html.escape(', '.join(hit.labels))}</small>" if hit.labels else "",
        ]
        items.append("<li>" + "<br>".join(line for line in lines if line) + "</li>")
    looked = "Sounds nearest to its picture" if by == "video" else "Videos nearest to its sound"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(query.name)}: what was found</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(query.name)}</h1>
<div class="query">{_player(query, folder)}</div>
<h2>{looked}, among {among}</h2>
<ol>
{chr(10).join(items)}
</ol></body></html>
"""


@torch.inference_mode()
def sound_of_codes(codec: Codec, record: Batch, device: torch.device) -> bytes:
    """A record's sound, as the codec gives it back: a .wav file."""
    waveform = codec.decode(record.codes[:, :, : int(record.steps[0])].to(device))[0, 0].cpu().numpy()
    content = io.BytesIO()
    soundfile.write(content, waveform, codec.sample_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def _player(path: Path, folder: Path) -> str:
    kind = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "audio"
    link = html.escape(quote(os.fsencode(os.path.relpath(path.resolve(), folder.resolve()))), quote=True)
    return f'<{kind} controls preload="metadata" src="{link}"></{kind}>'
