"""Which attempts have stopped giving signs of life: cut off with their node, or hanging in a way that Ray does not see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

LONGEST_GAP_S = 10.0
FIRST_SIGN_S = 300.0  # from the driver's start: it imports what it needs, and connects to Ray


@dataclass
class _Seen:
    sign: datetime | None
    since: float
    in_turn: int


class SilenceWatch:
    """Judges by its own clock how long a sign has been the newest one, so that clocks of nodes need not agree.

    Args:
        limit_s: an attempt is silent when its newest sign of life is older.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._turn = 0
        self._looked_at = clock()

    def begin_turn(self) -> None:
        """Before the attempts are looked at, each once."""
        now = self._clock()
        if now - self._looked_at > LONGEST_GAP_S:
            # We could not look for a while. Whatever kept us, such as a database that was away, has silenced others too.
            self._seen.clear()
        self._looked_at = now
        self._seen = {name: seen for name, seen in self._seen.items() if seen.in_turn == self._turn}
        self._turn += 1

    def is_silent(self, submission: str, sign: datetime | None) -> bool:
        """Of an attempt that should live, by its newest sign, None before the first."""
        seen = self._seen.get(submission)
        if seen is None or seen.sign != sign:
            seen = self._seen[submission] = _Seen(sign, self._clock(), self._turn)
        seen.in_turn = self._turn
        limit = self._limit_s if sign is not None else max(self._limit_s, FIRST_SIGN_S)
        return self._clock() - seen.since > limit
