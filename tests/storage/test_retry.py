from __future__ import annotations

import threading
import time

import pytest

from arkor_ray.storage.retry import RetryPolicy, call_with_retries

QUICK = RetryPolicy(budget_seconds=5, first_delay_seconds=0.001, longest_delay_seconds=0.01)


class Flaky:
    """Raises `error` the first `failures` times; remembers what it was called with."""

    def __init__(self, failures: int, error: type[Exception] = ConnectionError) -> None:
        self.failures, self.error, self.calls = failures, error, list[int]()

    def __call__(self, failures: int) -> str:
        self.calls.append(failures)
        if len(self.calls) <= self.failures:
            raise self.error(f"call {len(self.calls)}")
        return "done"


def run(call: Flaky, policy: RetryPolicy = QUICK, stop: threading.Event | None = None) -> str:
    return call_with_retries(
        call, policy, is_transient=lambda error: isinstance(error, ConnectionError), what="test", stop=stop
    )


def test_transient_errors_are_retried_and_counted() -> None:
    call = Flaky(3)
    assert run(call) == "done"
    assert call.calls == [0, 1, 2, 3]


def test_other_errors_are_raised_at_once() -> None:
    call = Flaky(1, KeyError)
    with pytest.raises(KeyError):
        run(call)
    assert call.calls == [0]


def test_last_error_is_raised_when_the_budget_is_spent() -> None:
    call = Flaky(1000)
    policy = RetryPolicy(budget_seconds=0.2, first_delay_seconds=0.02, longest_delay_seconds=0.02)
    with pytest.raises(ConnectionError) as raised:
        run(call, policy)
    assert str(raised.value) == f"call {len(call.calls)}"
    # 0.2 s of budget in steps of 0.01 to 0.02 s: fewer only if the machine is busy.
    assert 2 <= len(call.calls) <= 21


def test_budget_begins_with_the_first_failure() -> None:
    """So that a long transfer keeps the whole budget for its outage."""
    slow = Flaky(1)

    def call(failures: int) -> str:
        time.sleep(0.3)
        return slow(failures)

    policy = RetryPolicy(budget_seconds=0.2, first_delay_seconds=0.001)
    assert call_with_retries(call, policy, is_transient=lambda _: True, what="test") == "done"


def test_stop_ends_the_wait() -> None:
    stop = threading.Event()
    call = Flaky(1000)
    patient = RetryPolicy(budget_seconds=1e6, first_delay_seconds=1e5, longest_delay_seconds=1e5)
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    with pytest.raises(ConnectionError):
        run(call, patient, stop)
    assert call.calls == [0]


def test_delays_grow_up_to_the_longest_and_differ() -> None:
    policy = RetryPolicy(first_delay_seconds=1, longest_delay_seconds=8)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (10_000, 8)):
        delays = [policy.delay_seconds(failures) for _ in range(100)]
        assert longest / 2 <= min(delays) <= max(delays) <= longest
        assert len(set(delays)) > 1
