"""Whether a call that failed is sent again, and when. No I/O: both clients ask here, and sleep as they do.

The event stream decides for itself, without an end (`event_stream.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import httpx

from arkor_ray.client.calls import Call, Repeat
from arkor_ray.errors import ArkorError, RateLimitError, ServiceUnavailableError

MAX_RETRIES = 2
FIRST_DELAY = 0.5  # seconds before the first retry; doubled after each further failure
LONGEST_WAIT = 30.0  # a service that asks for more patience than that is for the caller to ask again
JITTER = 0.25  # the share of a delay that is left to chance

#: The request cannot have arrived.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout)


class Retries:
    """Of one call, `limit` at the most.

    Worth it are connections that fail, 429 with Retry-After, and 502, 503, 504 and whatever else says that somebody is away.
    An answer that does not come in time is not: the service may be at it still, and the caller has waited long enough.
    """

    def __init__(self, call: Call[Any], limit: int, chance: Callable[[], float] = random.random) -> None:
        self._call = call
        self._limit = limit
        self._chance = chance
        self._failures = 0

    def after(self, error: ArkorError) -> float:
        """Seconds to wait before the call is sent again; raises `error` where it is not to be."""
        asked = error.retry_after or 0.0
        if self._failures >= self._limit or asked > LONGEST_WAIT or not self._is_worth_it(error):
            raise error
        delay = FIRST_DELAY * 2**self._failures
        self._failures += 1
        # Not before the time that was asked for, and not all who were told the same at once.
        return max(asked * (1 + JITTER * self._chance()), delay * (1 - JITTER * self._chance()))

    def _is_worth_it(self, error: ArkorError) -> bool:
        reason = error.__cause__
        if self._call.repeat is Repeat.NEVER:
            return False
        if isinstance(reason, _NEVER_SENT):
            return True
        if self._call.repeat is not Repeat.ALWAYS or isinstance(reason, httpx.TimeoutException):
            return False
        if isinstance(error, RateLimitError):
            return error.retry_after is not None
        return isinstance(error, ServiceUnavailableError) or error.http_status in (502, 503, 504)
