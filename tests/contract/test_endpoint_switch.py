"""An endpoint moved from one adapter to another and back, again and again, while clients stream from it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.contract.conftest import QUESTION, Recorded
from tests.contract.wire import Caller, chunks, text_of
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

SWITCHES, CLIENTS = 50, 16
BODY = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}


@dataclass(frozen=True)
class Weights:
    """An endpoint's target, and the one answer that these weights give."""

    target: dict[str, Any]
    fingerprint: str
    text: str


@pytest.fixture
def pair(caller: Caller, finished: Recorded) -> tuple[Weights, Weights]:
    """An early checkpoint of the job, and its final adapter, which has learnt a whole sentence by then."""
    made = []
    for adapter in (finished.checkpoint(5), finished.final):
        answer = caller.chat(QUESTION, adapter=adapter, maxTokens=BODY["max_tokens"]).json()
        made.append(Weights({"kind": "adapter", "adapter": adapter}, answer["system_fingerprint"], answer["content"]))
    early, late = made
    assert early.text != late.text and early.fingerprint != late.fingerprint
    return early, late


class Streaming:
    """A client that opens one stream after the other until it is told to stop, and keeps every byte."""

    def __init__(self, url: str, slug: str) -> None:
        self._url = f"{url}/e/{slug}/v1/chat/completions"
        self.bodies: list[bytes] = []

    def run(self, stop: threading.Event) -> None:
        with httpx.Client(timeout=120) as http:
            while not stop.is_set():
                with http.stream("POST", self._url, json={**BODY, "stream": True}) as answer:
                    body = answer.read()
                assert answer.status_code == 200, body
                self.bodies.append(body)


@pytest.fixture
def streaming(service: RunningService) -> Iterator[Any]:
    """Starts the clients on a slug; ended with the test."""
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as threads:

        def start(slug: str) -> tuple[list[Streaming], Any]:
            clients = [Streaming(service.url, slug) for _ in range(CLIENTS)]
            running = [threads.submit(client.run, stop) for client in clients]

            def end() -> None:
                stop.set()
                for each in running:
                    each.result(120)

            return clients, end

        try:
            yield start
        finally:
            stop.set()


def test_every_stream_is_of_one_adapter_from_its_first_token_to_its_last(
    caller: Caller, pair: tuple[Weights, Weights], streaming: Any
) -> None:
    endpoint = caller.create_endpoint(pair[0].target)
    clients, end = streaming(endpoint["slug"])
    for number in range(1, SWITCHES + 1):
        target = pair[number % 2].target
        answer = caller.patch(f"/v1/endpoints/{endpoint['id']}", {"target": target})
        assert answer.status_code == 200 and answer.json()["deployment"]["target"] == target
    end()

    known = {weights.fingerprint: weights.text for weights in pair}
    served: Counter[str] = Counter()
    for client in clients:
        assert client.bodies, "every client was served"
        for body in client.bodies:
            [fingerprint] = {chunk["system_fingerprint"] for chunk in chunks(body)}
            assert text_of(body) == known[fingerprint]
            served[fingerprint] += 1
    assert set(served) == set(known), "both were served while it moved"
    assert served.total() >= SWITCHES


def test_request_after_a_switch_is_served_by_the_new_target(
    service: RunningService, caller: Caller, pair: tuple[Weights, Weights]
) -> None:
    endpoint = caller.create_endpoint(pair[0].target)
    for number in range(1, 11):
        weights = pair[number % 2]
        assert caller.patch(f"/v1/endpoints/{endpoint['id']}", {"target": weights.target}).status_code == 200
        answer = httpx.post(f"{service.url}/e/{endpoint['slug']}/v1/chat/completions", json=BODY, timeout=60).json()
        assert answer["system_fingerprint"] == weights.fingerprint
        assert answer["choices"][0]["message"]["content"] == weights.text
