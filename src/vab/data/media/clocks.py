"""Put the packets of files whose clock starts again (joined transport streams, chained Ogg) on one clock.

Packets whose time goes back get an offset that puts them after the packets before, as ``ffmpeg`` does.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from av import Packet

_BACKWARDS = 0.1
"""s. A decoding time this far before the last one of its stream begins a new clock. Source: FFmpeg's ffmpeg_demux.c."""
_REORDERED = 1.0
"""s. The same if decoding times are presentation times or guessed from them, which are in another order."""
_FORWARDS = 10.0
"""s. If a container can change its clock, a jump ahead of all streams by this begins a new one. Source: the same."""
_APART = 2.0
"""s. In MPEG streams, packets shown at the same time are no further apart in the file (by their decoding times)."""


def is_one_segment(path: Path) -> bool:
    """Whether a Matroska file is one segment of known size up to the end of the file (EBML, RFC 8794)."""
    with path.open("rb") as file:
        head, size = file.read(4096), file.seek(0, 2)
    place, lengths = 0, []
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[place : place + 4] != name or place + 5 > len(head) or not head[place + 4]:
            return False
        width = 9 - head[place + 4].bit_length()
        unknown = (1 << 7 * width) - 1
        length = int.from_bytes(head[place + 4 : place + 4 + width], "big") & unknown
        if length == unknown:
            return False
        lengths.append(place + 4 + width + length)
        place = lengths[-1]
    return lengths[-1] >= size


class Clock:
    """Puts the packets of a file whose clock starts again on one clock.

    Each start of the clock has an offset. A stream changes to the next one at its own packet, since packets of the old
    clock can still come after the first of the new one.

    Args:
        can_change: Whether the container's own clock can change, in both directions.
        is_mpeg: Whether no stream can be far behind the others.
    """

    def __init__(self, can_change: bool, is_mpeg: bool) -> None:
        self.can_change, self.is_mpeg = can_change, is_mpeg
        self.is_split = False  # whether a stream continues on the old clock after another one has started again
        self.offsets = [0.0]  # s, by start of the clock
        self._units: dict[int, float] = {}  # by stream, s
        self._current: dict[int, int] = {}  # by stream, which start of the clock it is at
        self._last: dict[int, float] = {}  # by stream, s, decoding time of the last packet, corrected
        self._left: dict[int, float] = {}  # by stream, s, what ``_last`` was when the newest clock began
        self._end: dict[int, float] = {}  # by stream, s, where its packets so far end, corrected

    def correct(self, packet: Packet[Any]) -> None:
        """Change the packet's times where the clock has started again."""
        stream, time = packet.stream.index, packet.dts if packet.dts is not None else packet.pts
        if not packet.size:
            return
        if stream not in self._units:  # PyAV makes a Fraction each time it is asked
            base = packet.time_base or Fraction(1)
            self._units[stream] = base.numerator / base.denominator
        unit = self._units[stream]
        length = (packet.duration or 0) * unit
        if time is None:
            self._end[stream] = self._end.get(stream, 0.0) + length
            return
        back = _BACKWARDS if self.can_change and packet.dts is not None else _REORDERED
        newest = len(self.offsets) - 1
        current = self._current.get(stream, newest)  # a stream that appears later is on the newest clock
        last, now = self._last.get(stream), time * unit + self.offsets[current]
        if last is None:
            current += self._is_behind(now)
        # The first condition is quick: it is checked for every packet.
        elif not last - back <= now <= last + _FORWARDS and self._is_jump(stream, now, back):
            current = max(current + 1, newest)
            if current == newest:  # another stream began it, perhaps several clocks later
                now = time * unit + self.offsets[current]
                current += self._is_jump(stream, now, _REORDERED) or self._is_behind(now)
        self._current[stream] = current
        shown = (packet.pts if packet.pts is not None else time) * unit
        if current > newest:
            self.offsets.append(max(self._end.values()) - shown)
            self._left = dict(self._last)
        if shift := round(self.offsets[current] / unit):
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
        self._last[stream] = time * unit + self.offsets[current]
        self.is_split |= current < newest and self._last[stream] > self._left[stream] + _APART
        self._end[stream] = max(self._end.get(stream, -math.inf), shown + self.offsets[current] + length)

    def _is_behind(self, time: float) -> bool:
        return self.is_mpeg and time < max(self._last.values(), default=-math.inf) - _APART

    def _is_jump(self, stream: int, time: float, back: float) -> bool:
        ahead = self.can_change and time > max(self._end.values()) + _FORWARDS  # one stream alone has a gap
        return ahead or time < self._last[stream] - back
