"""The driver's heartbeat against a recorder that is told how to answer."""

from __future__ import annotations

import threading

import pytest
import ray

from arkor_ray.training import heartbeat
from arkor_ray.training.heartbeat import Heartbeat

LIMIT_S = 30


class FakeRecorder:
    """Counts beats; `die` makes the next ones fail, as calls to a restarting actor do."""

    def __init__(self) -> None:
        self.count = 0
        self.failing = 0
        self.came = threading.Condition()
        self.beat = self
        self.remote = lambda: self._take

    def die(self, times: int) -> None:
        self.failing = times

    def await_beats(self, count: int) -> bool:
        with self.came:
            return self.came.wait_for(lambda: self.count >= count, LIMIT_S)

    def _take(self) -> None:
        with self.came:
            self.count += 1
            self.came.notify_all()
            if self.failing:
                self.failing -= 1
                raise ray.exceptions.ActorUnavailableError("restarting", None)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda call, timeout=None: call())
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    return FakeRecorder()


def test_it_beats_at_once_and_for_as_long_as_it_is_entered(recorder):
    with Heartbeat(recorder):
        assert recorder.await_beats(3)


def test_it_goes_on_when_the_recorder_was_away(recorder):
    recorder.die(2)
    with Heartbeat(recorder):
        assert recorder.await_beats(4)
