"""Which attempts have stopped giving signs of life: cut off with their node, or hanging in a way that Ray does not see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

LONGEST_GAP_S = 10.0  # of one turn or between two, that counts as looking
FIRST_SIGN_S = 300.0  # from the driver's start: it imports what it needs, and connects to Ray


@dataclass
class _Seen:
    sign: datetime | None
    since: float  # seconds of looking
    in_turn: int


class SilenceWatch:
    """Judges by its own clock how long a sign has been the newest one, so that clocks of nodes need not agree.

    What counts is the time in which signs were looked for. Turns may be slow for as long as Ray is slow to answer, and each
    counts; but no more of it than a gap, since a database that hangs may have kept the turn, and signs of life with it.

    Args:
        limit_s: an attempt is silent when its newest sign of life is older.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._turn = 0
        self._began_at = self._ended_at = clock()
        self._looked_s = 0.0

    def begin_turn(self) -> None:
        """Before the attempts are looked at, each once, with signs that have just been read."""
        now = self._clock()
        if now - self._ended_at > LONGEST_GAP_S:
            # Nobody looked for a while. Whatever kept us, such as a database that was away, has silenced others too.
            self._seen.clear()
        self._looked_s += min(now - self._began_at, LONGEST_GAP_S)
        self._began_at = now
        self._seen = {name: seen for name, seen in self._seen.items() if seen.in_turn == self._turn}
        self._turn += 1

    def end_turn(self) -> None:
        """After all that a turn does. One that failed has not looked."""
        self._ended_at = self._clock()

    def is_silent(self, submission: str, sign: datetime | None) -> bool:
        """Of an attempt that should live, by its newest sign, None before the first."""
        seen = self._seen.get(submission)
        if seen is None or seen.sign != sign:
            seen = self._seen[submission] = _Seen(sign, self._looked_s, self._turn)
        seen.in_turn = self._turn
        limit = self._limit_s if sign is not None else max(self._limit_s, FIRST_SIGN_S)
        return self._looked_s - seen.since > limit
