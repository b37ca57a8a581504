"""A job's events: what the log stores, what a stream carries, what a callback receives."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from pydantic import Field

from arkor_ray.schemas.base import WireModel, iso, storable

STARTED = "training.started"
LOG = "training.log"
CHECKPOINT = "checkpoint.saved"
COMPLETED = "training.completed"
FAILED = "training.failed"
CANCELLED = "training.cancelled"
TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED})

# Events of our own that tell why nothing happens; `reason` says it in a sentence. Clients that do not know them skip them.
RESOURCES_WAITING = "resources.waiting"
SERVING_WAITING = "serving.waiting"
WAITING = frozenset({RESOURCES_WAITING, SERVING_WAITING})

# Frames of the stream that are no events: they have no number.
PING = "ping"
END = "end"


class Event(WireModel):
    """One event as a client sees it. `id` is its number in the job, from 1; `data` its JSON, `type` included."""

    id: int
    type: str
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def step(self) -> int | None:
        return self.data.get("step")


def event_data(type: str, job_id: str, at: datetime, fields: dict[str, Any]) -> dict[str, Any]:
    """The `data` object of an event. NaN and infinities, which are not JSON, become null; see `storable` for texts."""
    return {"type": type, "jobId": job_id, "timestamp": iso(at), **_json_safe(fields)}


def log_fields(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A log entry of the train loop (see `training.callbacks.EventSink.log`) as training.log's fields, and the key that
    tells it from every other of its job."""
    kind = "log" if entry.get("loss") is not None else "eval"
    return f"{kind}:{entry['step']}", {_LOG_NAMES.get(name, name): value for name, value in entry.items()}


_LOG_NAMES = {"eval_loss": "evalLoss", "learning_rate": "learningRate", "samples_per_second": "samplesPerSecond"}


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(str(k)): _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value
