"""What the tests of a cluster look at: a client that never stops asking, and what Ray still holds when all is done."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from arkor_ray.client.client import Client
from tests.integration.stories import ask
from tests.servers.ray_hosts import RayHosts

_HELD = """
import json, ray
from ray.util.state import list_actors, list_placement_groups
ray.init(address="auto", namespace="arkor", log_to_driver=False, logging_level="ERROR")
total, free = ray.cluster_resources(), ray.available_resources()
kept = {k: total[k] - free.get(k, 0) for k in total if k in ("CPU", "GPU")}
actors = [a.class_name for a in list_actors(filters=[("state", "!=", "DEAD")], limit=1000)]
groups = [g.placement_group_id for g in list_placement_groups(filters=[("state", "!=", "REMOVED")], limit=1000)]
print(json.dumps({"kept": kept, "actors": sorted(actors), "placement_groups": groups}))
"""


LONG = 900  # tokens: some seconds


def stream_long(client: Client, **target: Any) -> None:
    """One long answer, token by token. Fails where it ends early, whatever the reason."""
    form = {"regex": "(b |a ){3000}"}
    response = client.chat([{"role": "user", "content": "go"}], max_tokens=LONG, structured_outputs=form, **target)
    finish = [
        reason
        for line in response.iter_lines()
        if line.startswith("data: {")
        for choice in json.loads(line.removeprefix("data: ")).get("choices", [])
        if (reason := choice.get("finish_reason"))
    ]
    assert finish == ["length"], f"a stream ended with {finish}"


class Asking:
    """Asks for one greedy answer, or by `how`, again and again in a thread, from entering to leaving.

    `answers`: (moment, seconds it took); `failures`: (moment, what was raised).
    """

    def __init__(self, client: Client, pause_s: float = 0.2, how: Callable[..., Any] = ask, **target: Any) -> None:
        self.answers: list[tuple[float, float]] = []
        self.failures: list[tuple[float, str]] = []
        self._client, self._pause_s, self._how, self._target = client, pause_s, how, target
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(150)

    def answered_after(self, moment: float) -> float | None:
        """When the first request that began after `moment` was answered, None if none was yet."""
        return next((at for at, took in self.answers if at - took >= moment), None)

    def longest_gap(self, since: float, until: float) -> float:
        """The longest time without an answer, in seconds."""
        moments = [since, *(at for at, _ in self.answers if since < at < until), until]
        return max(b - a for a, b in itertools.pairwise(moments))

    def failed_between(self, since: float, until: float) -> list[str]:
        return [what for at, what in self.failures if since <= at <= until]

    def _ask(self) -> None:
        while not self._ended.wait(self._pause_s):
            began = time.monotonic()
            try:
                self._how(self._client, **self._target)
            except Exception as error:  # whatever it is, that is what a user would have seen
                self.failures.append((time.monotonic(), f"{type(error).__name__}: {error}"[:200]))
            else:
                self.answers.append((time.monotonic(), time.monotonic() - began))


def held(cluster: RayHosts) -> dict[str, Any]:
    """What Ray holds now: `kept` CPUs and GPUs, class names of living `actors`, and `placement_groups`."""
    return dict(json.loads(cluster.python(_HELD).strip().splitlines()[-1]))
