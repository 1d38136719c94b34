"""Passes over a media file: one span by seeking to it, or many spans in one go.

The machinery behind ``vab.data.media.segments``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
from av import Packet
from av.error import FFmpegError

from vab.data.media.open import MediaError, OpenMedia
from vab.data.media.takers import SoundTrack, Taker, Track

_SEEK_BEYOND = 5.0
"""s. A span that starts later than this is reached by seeking; before it, decoding from the start costs less."""
_PREROLL = 1.0
"""s. How far before the wanted time a seek aims: decoders need some packets to settle (AAC overlap, MP3 reservoir)."""
LEAD = 1.5
"""s. Spans are made ready this much before they start: more than any context that a taker gathers before its span."""
_MOST_WAITING = 4
"""Spans that may wait for one of their two streams, beyond those that overlap, before a file counts as interleaved so
badly that its pictures would fill the memory."""

OpenTracks = Callable[[OpenMedia], Sequence[Track]]
MakeTakers = Callable[[Sequence[Track], float], Sequence[Taker]]
"""Tracks and the start of a span, s, to what gathers it."""


class NotInOnePassError(Exception):
    """The spans cannot be had in one pass, or not in bounded memory; they may be had one by one."""


def take_span(path: str | Path, start: float, open_tracks: OpenTracks, make_takers: MakeTakers) -> Sequence[Taker]:
    """Gather one span: a pass over the file, from near the start on, until the takers have enough.

    Raises:
        MediaError: If the file, or a stream before its taker was complete, cannot be decoded.
    """
    if start > _SEEK_BEYOND:
        try:
            takers = _pass(path, start, open_tracks, make_takers, seek=start - _PREROLL)
        except MediaError as error:
            if error.reason in ("missing", "no_audio", "no_video"):
                raise
        else:
            if not any(taker.landed_late for taker in takers):
                return takers
        # Seeking went wrong (no index, a false keyframe, timestamps guessed): what is read from the start is right.
    return _pass(path, start, open_tracks, make_takers, seek=None)


def _pass(
    path: str | Path, start: float, open_tracks: OpenTracks, make_takers: MakeTakers, seek: float | None
) -> Sequence[Taker]:
    with OpenMedia(path) as source:
        tracks = _ready(source, open_tracks)
        takers = make_takers(tracks, start)
        if seek is not None and not source.has_one_clock and _restarts(path):
            seek = None  # the same time is there more than once
        if seek is not None:
            try:
                source.container.seek(int((source.zero + seek) * av.time_base))
            except (FFmpegError, OverflowError) as error:
                raise source.unreadable(error) from error
        waiting = {track.stream.index: (track, taker) for track, taker in zip(tracks, takers, strict=True)}
        try:
            for packet in source.packets():
                if packet.stream.index not in waiting:
                    continue
                track, taker = waiting[packet.stream.index]
                try:
                    for frame in _decoded(packet, track):
                        track.add(frame)
                except FFmpegError as error:
                    if _is_before(packet, start - LEAD, track):
                        continue  # sound does not depend on what went before; pictures do
                    if not taker.complete:
                        raise source.unreadable(error) from error
                    del waiting[packet.stream.index]
                if taker.done:
                    waiting.pop(packet.stream.index, None)
                if not waiting:
                    break
        except MediaError:
            if not all(taker.complete for taker in takers):
                raise
        return takers


def _restarts(path: str | Path) -> bool:
    """Whether a file's clock starts again, found by reading all packets."""
    with OpenMedia(path) as source:
        deque(source.packets(), maxlen=0)
        return source.restarts


def take_spans(
    path: str | Path, starts: Sequence[float], overlap: int, open_tracks: OpenTracks, make_takers: MakeTakers
) -> Iterator[Sequence[Taker]]:
    """Gather many spans in one pass over the file from its beginning.

    Args:
        path: The file.
        starts: s, rising.
        overlap: How many spans share a moment, those counted that start less than `LEAD` later.
        open_tracks: The streams wanted.
        make_takers: As in ``take_span``.

    Yields:
        The takers of each span, in order, as soon as they have enough or the file ends.

    Raises:
        NotInOnePassError: If something cannot be opened or decoded, or the streams are so far apart in the file that
            too many spans wait for one of them. Those that were given before are right.
    """
    try:
        with OpenMedia(path) as source:
            tracks = {track.stream.index: track for track in _ready(source, open_tracks)}
            to_come, live = deque(starts), deque[Sequence[Taker]]()
            for packet in source.packets():
                track = tracks.get(packet.stream.index)
                if track is None:
                    continue  # only its times matter: all readings of a file have one clock
                for frame in _decoded(packet, track):
                    time = track.time_of(frame)
                    while to_come and (time is None or to_come[0] <= time + LEAD):
                        live.append(make_takers(list(tracks.values()), to_come.popleft()))
                        if len(live) > overlap + _MOST_WAITING:
                            raise NotInOnePassError
                    track.add(frame)
                while live and all(taker.done for taker in live[0]):
                    yield _let_go(live.popleft())
                if not live and not to_come:
                    return
            while live or to_come:
                yield _let_go(live.popleft() if live else make_takers(list(tracks.values()), to_come.popleft()))
    except (FFmpegError, MediaError) as error:
        raise NotInOnePassError from error


def _let_go(takers: Sequence[Taker]) -> Sequence[Taker]:
    """These need no more frames."""
    for taker in takers:
        taker.let_go()
    return takers


def _is_before(packet: Packet[Any], time: float, track: Track) -> bool:
    """Whether a packet of sound lies before a time, s."""
    if not isinstance(track, SoundTrack) or packet.pts is None or packet.time_base is None:
        return False
    return float(packet.pts * packet.time_base) - track.source.zero < time


def _ready(source: OpenMedia, open_tracks: OpenTracks) -> Sequence[Track]:
    tracks = open_tracks(source)
    for track in tracks:
        if track.stream.codec_context is None:
            raise source.unreadable(f"there is no decoder for its {track.stream.type} track")
        # One thread: extraction runs one process per core, and frame threads decode more than is wanted.
        track.stream.codec_context.thread_count = 1
    return tracks


def _decoded(packet: Packet[Any], track: Track) -> Sequence[Any]:
    track.see_packet(packet)
    return packet.decode()
