"""What integration tests submit, and what must be true of every job that ended."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from arkor_ray.client.client import Client
from arkor_ray.schemas import event
from arkor_ray.schemas.event import Event

STEPS, SAVE_EVERY = 40, 10
WORDS = [
    "please",
    "help",
    "my",
    "order",
    "invoice",
    "printer",
    "login",
    "refund",
    "account",
    "late",
    "broken",
    "update",
    "password",
    "thanks",
    "again",
]


def write_rows(path: Path, rows: int = 160, seed: int = 0) -> str:
    """Chat rows of varied length; returns the file:// URL of the file."""
    chance = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))

    with path.open("w") as file:
        for _ in range(rows):
            turns = [{"role": "user", "content": words(20, 50)}, {"role": "assistant", "content": words(5, 20)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path.as_uri()


def config(url: str, **fields: Any) -> dict[str, Any]:
    """A job that takes some seconds and saves four times."""
    return {
        "model": "tiny",
        "datasetSource": {"type": "blob", "url": url},
        "maxSteps": STEPS,
        "saveSteps": SAVE_EVERY,
        "loggingSteps": 1,
        "batchSize": 8,
        "learningRate": 1e-3,
        "loraR": 8,
        "trainOnResponsesOnly": True,
        **fields,
    }


def losses(events: list[Event]) -> dict[int, float]:
    return {e.data["step"]: e.data["loss"] for e in events if e.type == event.LOG and e.data.get("loss") is not None}


def saved_steps(events: list[Event]) -> list[int]:
    return [e.data["step"] for e in events if e.type == event.CHECKPOINT]


def assert_whole(events: list[Event], *, terminal: str = event.COMPLETED, steps: int = STEPS) -> None:
    """Numbers 1..n without hole or repeat, every step logged once and in order, one terminal event, last."""
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    assert [e.type for e in events].count(event.STARTED) == 1
    assert [e.type for e in events if e.type in event.TERMINAL] == [terminal], events[-1].data
    assert events[-1].type == terminal
    if terminal == event.COMPLETED:
        logged = [e.data["step"] for e in events if e.type == event.LOG and e.data.get("loss") is not None]
        assert logged == list(range(1, steps + 1))
        assert saved_steps(events) == list(range(SAVE_EVERY, steps + 1, SAVE_EVERY))


def assert_checkpoints_answer(client: Client, job_id: str, events: list[Event]) -> None:
    """Every announced checkpoint, and the final adapter of a completed job, answers as itself."""
    targets: list[dict[str, Any]] = [
        {"kind": "checkpoint", "jobId": job_id, "step": step} for step in saved_steps(events)
    ]
    if events[-1].type == event.COMPLETED:
        targets.append({"kind": "final", "jobId": job_id})
    for target in targets:
        answer = ask(client, adapter=target)
        name = f"{job_id}-final" if target["kind"] == "final" else f"{job_id}-step-{target['step']}"
        assert answer["system_fingerprint"].startswith(f"{name}@"), answer


def ask(client: Client, text: str = "my printer is broken please help", **target: Any) -> dict[str, Any]:
    """One greedy answer of an adapter or a base model, as the wire's JSON."""
    messages = [{"role": "user", "content": text}]
    response = client.chat(messages, max_tokens=8, temperature=0, stream=False, **target)
    answer = response.json()
    assert answer["content"] == answer["choices"][0]["message"]["content"]
    return answer
