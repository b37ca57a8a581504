"""When silence counts, and when it does not: signs and a clock, nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from arkor_ray.jobs.silence import FIRST_SIGN_S, LONGEST_GAP_S, SilenceWatch

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT_S = 60.0


class Looking:
    """Turns the watch by hand: `look` says whether the attempt is silent `after` so many more seconds of turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = SilenceWatch(LIMIT_S, clock=lambda: self.now)
        self.watch.begin_turn()

    def look(self, sign: datetime | None, *, after: float, every: float = 0.5, turn: float = 0.0) -> bool:
        """`every`: seconds between turns; `turn`: how long each takes."""
        silent, until = False, self.now + after
        while self.now < until:
            self.now += every
            self.watch.begin_turn()
            silent = self.watch.is_silent("job-1", sign)
            self.now += turn
            self.watch.end_turn()
        return silent


@pytest.fixture
def looking() -> Looking:
    return Looking()


def test_a_sign_that_stays_the_newest_for_the_limit_means_silence(looking):
    assert not looking.look(FIRST, after=LIMIT_S)
    assert looking.look(FIRST, after=2)


def test_every_new_sign_counts_from_now_whatever_the_clock_of_its_node_says(looking):
    looking.look(FIRST, after=LIMIT_S - 1)
    assert not looking.look(FIRST - timedelta(days=1), after=LIMIT_S - 1)
    assert looking.look(FIRST - timedelta(days=1), after=3)


def test_a_driver_has_longer_for_its_first_sign(looking):
    assert not looking.look(None, after=FIRST_SIGN_S - 1)
    assert looking.look(None, after=3)


def test_silence_does_not_count_while_nobody_could_look(looking):
    looking.look(FIRST, after=LIMIT_S - 1)
    assert not looking.look(FIRST, after=LONGEST_GAP_S + 1, every=LONGEST_GAP_S + 1)
    assert not looking.look(FIRST, after=LIMIT_S - 1)


def test_silence_is_found_though_every_turn_is_slow(looking):
    slow = 2 * LONGEST_GAP_S
    assert looking.look(FIRST, after=8 * slow, turn=slow)


def test_a_turn_that_hung_is_no_long_silence(looking):
    looking.look(FIRST, after=5)
    assert not looking.look(FIRST, after=1, every=0.5, turn=10 * LIMIT_S)
    assert not looking.look(FIRST, after=5)
    assert looking.look(FIRST, after=LIMIT_S)


def test_a_turn_that_failed_has_not_looked(looking):
    looking.look(FIRST, after=LIMIT_S - 1)
    looking.watch.begin_turn()
    looking.now += LONGEST_GAP_S + 1
    assert not looking.look(FIRST, after=LIMIT_S - 1)


def test_an_attempt_that_was_not_to_be_looked_at_begins_anew(looking):
    looking.look(FIRST, after=LIMIT_S - 1)
    for _ in range(2):  # a turn in which it is pending, say
        looking.watch.begin_turn()
    assert not looking.look(FIRST, after=LIMIT_S - 1)
