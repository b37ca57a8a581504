"""Sending a failing request again: how long, how often, and how not to do it in step with everybody else."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    `budget_seconds` counts from a request's first failure, not from its start, and separately for each part of a long
    transfer: it is the longest outage that is survived, whatever the size of the object. `log_level` is that of the lines
    which say so; the error is raised in any case.
    """

    budget_seconds: float = 60.0
    first_delay_seconds: float = 0.1
    longest_delay_seconds: float = 5.0
    log_level: int = logging.WARNING

    def delay_seconds(self, failures: int) -> float:
        """How long to wait after that many failures in a row (1 or more); random, up to twice as long each time."""
        # The exponent is bounded only to keep the power a sane number.
        longest = min(self.longest_delay_seconds, self.first_delay_seconds * 2 ** min(failures - 1, 30))
        # Not from 0: a server that has just said "slow down" is not asked again at once.
        return random.uniform(longest / 2, longest)


def call_with_retries(
    call: Callable[[int], T],
    policy: RetryPolicy,
    *,
    is_transient: Callable[[Exception], bool],
    what: str,
    stop: Event | None = None,
) -> T:
    """Returns `call(failures)`, called again while it raises transient errors; raises the last one when that ends.

    `failures` is the number of earlier sends that failed: 0 at first. `what` names the request in the log. `stop` ends
    the retries and their waiting at once: another part of the same transfer has failed for good.
    """
    stop = stop or Event()
    deadline = None
    failures = 0
    while True:
        try:
            return call(failures)
        except Exception as error:
            now = time.monotonic()
            deadline = deadline or now + policy.budget_seconds
            failures += 1
            delay = policy.delay_seconds(failures)
            if not is_transient(error) or now + delay > deadline or stop.is_set():
                raise
            # The first failure is nothing special; a second one may be the start of an outage.
            logger.log(
                logging.DEBUG if failures == 1 else policy.log_level,
                "%s failed %d times, next try in %.1f s: %s",
                what,
                failures,
                delay,
                error,
            )
            if stop.wait(delay):
                raise
