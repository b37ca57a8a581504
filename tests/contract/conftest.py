"""One running service for the whole folder, and one job on it whose stream was recorded from its creation to its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from arkor_ray.demo.testing import make_tiny_model
from tests.contract.wire import MODEL, Caller
from tests.servers.arkor import RunningService, running_service

DOMAIN = "models.test"
QUESTION = "what do we say?"
ANSWER = "the red fox runs over the hill"
STEPS, SAVE_EVERY = 20, 5
SECRET = "hf_a-token-that-nobody-may-see"
UNKNOWN = {"plan": {"budget": [1, None, "zwölf"]}, "owner": "team-7"}


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("contract")
    tiny = make_tiny_model(folder / "tiny", hidden=64, layers=2)
    environment = {"ARKOR_RAY_ENDPOINTS_DOMAIN": DOMAIN}
    with running_service(folder / "service", models={"tiny": tiny, MODEL: tiny}, environment=environment) as running:
        yield running


@pytest.fixture(scope="package")
def caller(service: RunningService) -> Iterator[Caller]:
    """The owner of `finished`."""
    made = Caller.login(service.url)
    yield made
    made.http.close()


@pytest.fixture(scope="package")
def stranger(service: RunningService) -> Iterator[Caller]:
    """Another identity, whose project has the same slug."""
    made = Caller.login(service.url)
    yield made
    made.http.close()


@dataclass
class Recorded:
    """A job, and the bytes of its event stream as they came, with the time of each."""

    job: dict[str, Any]
    sent: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    received: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.job["id"]

    @property
    def final(self) -> dict[str, Any]:
        return {"kind": "final", "jobId": self.id}

    def checkpoint(self, step: int) -> dict[str, Any]:
        return {"kind": "checkpoint", "jobId": self.id, "step": step}

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.received)


@pytest.fixture(scope="package")
def submitted(caller: Caller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recorded, threading.Thread]]:
    """A job and the thread that records it. Asked for early, it trains while other tests run."""
    config = {
        "model": MODEL,
        "datasetSource": {"type": "blob", "url": write_answers(tmp_path_factory.mktemp("rows"), ANSWER), "token": SECRET},
        "datasetFormat": {"type": "chatml"},
        "maxSteps": STEPS,
        "saveSteps": str(SAVE_EVERY),
        "loggingSteps": {"steps": 1},
        "warmupSteps": {"ratio": 0.05},
        "batchSize": 8,
        "learningRate": 1e-2,
        "loraR": 8,
        "loadIn4bit": False,
        "trainOnResponsesOnly": {"enabled": True},
        "gpuTypes": ["h100", "a100"],
        **UNKNOWN,
    }  # fmt: skip
    answer = caller.post("/v1/jobs", {"name": "contract-run", "config": config})
    assert answer.status_code == 201, answer.text
    recorded = Recorded(answer.json()["job"], config)
    thread = threading.Thread(target=_record, args=(caller, recorded), daemon=True)
    thread.start()
    yield recorded, thread
    thread.join(60)


@pytest.fixture(scope="package")
def finished(submitted: tuple[Recorded, threading.Thread]) -> Recorded:
    """A completed job whose checkpoints and final adapter answer `QUESTION` with `ANSWER`."""
    recorded, thread = submitted
    thread.join(300)
    assert not thread.is_alive(), "the job has not ended"
    assert b"event: training.completed\n" in recorded.body, recorded.body[-2000:]
    return recorded


@pytest.fixture(scope="package")
def log(finished: Recorded, caller: Caller) -> bytes:
    """The finished job's event stream, replayed from the start."""
    return caller.events(finished.id)


def write_answers(folder: Path, answer: str, rows: int = 64) -> str:
    """Rows that answer everything with `answer`; returns the file:// URL of their file."""
    path = folder / "rows.jsonl"
    turns = [
        [{"role": "user", "content": QUESTION if i % 2 else f"question {i}"}, {"role": "assistant", "content": answer}]
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path.as_uri()


def _record(caller: Caller, recorded: Recorded) -> None:
    with caller.stream("GET", f"/v1/jobs/{recorded.id}/events/stream") as answer:
        recorded.headers = dict(answer.headers)
        recorded.received.append((time.monotonic(), b""))
        for chunk in answer.iter_raw():
            recorded.received.append((time.monotonic(), chunk))
