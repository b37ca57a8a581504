"""What goes into a train loop and what comes out. Importable by the driver without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.training.callbacks import EventSink, NullEventSink
from arkor_ray.training.job_spec import JobSpec


@dataclass(frozen=True)
class StoragePatience:
    """How long one checkpoint is tried again, and how many may fail in a row before the job does."""

    per_checkpoint: RetryPolicy = field(default_factory=lambda: RetryPolicy(600.0, 0.5, 15.0))
    consecutive_failures: int = 3


@dataclass
class LoopConfig:
    """What a worker needs. `train` and `evaluation` are TokenizedDatasets, or under Ray Train references to them.

    `make_sink` makes the sink on rank 0; the others report nothing. `store` is for tests: absent, the spec says it.
    """

    spec: JobSpec
    train: Any
    evaluation: Any = None
    make_sink: Callable[[], EventSink] = NullEventSink
    patience: StoragePatience = field(default_factory=StoragePatience)
    store: ObjectStore | None = None


@dataclass(frozen=True)
class LoopResult:
    """Rank 0's answer. `stopped`: cancelled at `step`, with a resumable checkpoint and without a final adapter."""

    step: int
    total_steps: int
    stopped: bool
    metrics: dict[str, float | None]
    final_manifest: dict[str, Any] | None
