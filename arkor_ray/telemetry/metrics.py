"""Every metric of the service, once: its name, what it counts and in which unit, its tags.

Code that measures writes `TRAINING_STEPS.add(base_model=…)` and knows no more. Where it goes is the process's to say
(`telemetry.export`); nowhere, until it has said so. On Ray the names appear with Ray's prefix, `ray_arkor_…`.

Tags have few values: route templates, models of the catalogue (and few others, `export.FewModels`), words of our own. A
job's id is on gauges only, and those vanish with the process that sets them. The buckets of histograms are exact; their sums
are Ray's estimate from the buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Tags = dict[str, str]


class Exporter(Protocol):
    """Where measurements go. Called from any thread; must neither block nor raise."""

    def count(self, metric: Counter, amount: float, tags: Tags) -> None: ...
    def set(self, metric: Gauge, value: float, tags: Tags) -> None: ...
    def forget(self, metric: Gauge) -> None: ...
    def observe(self, metric: Histogram, value: float, tags: Tags) -> None: ...


_exporter: Exporter | None = None
REGISTRY: dict[str, Metric] = {}


def export_to(exporter: Exporter | None) -> None:
    """Where this process's measurements go from now on; None: nowhere."""
    global _exporter
    _exporter = exporter


@dataclass(frozen=True, eq=False)
class Metric:
    name: str
    description: str
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.name not in REGISTRY, f"{self.name} is there twice"
        REGISTRY[self.name] = self


class Counter(Metric):
    """Only grows; its name ends with _total."""

    def add(self, amount: float = 1, **tags: str) -> None:
        if _exporter is not None and amount:
            _exporter.count(self, amount, tags)


class Gauge(Metric):
    """What is so now; it holds until it is set anew, forgotten, or this process ends."""

    def set(self, value: float, **tags: str) -> None:
        if _exporter is not None:
            _exporter.set(self, value, tags)

    def forget(self) -> None:
        """With all tags: this process no longer knows."""
        if _exporter is not None:
            _exporter.forget(self)


@dataclass(frozen=True, eq=False)
class Histogram(Metric):
    """`buckets`: their upper bounds, in the unit of the name."""

    buckets: tuple[float, ...] = ()

    def observe(self, value: float, **tags: str) -> None:
        if _exporter is not None:
            _exporter.observe(self, value, tags)


_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 1.0)
_LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STAGE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_QUEUE_S = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_TURN_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)

# The api: each replica. Rejected tokens are requests with status 401.
API_REQUESTS = Counter(
    "arkor_api_requests_total", "Requests answered, by route template.", ("method", "route", "status")
)
API_REQUEST_SECONDS = Histogram(
    "arkor_api_request_seconds",
    "Seconds from a request's arrival to the start of its answer.",
    ("method", "route"),
    buckets=_REQUEST_S,
)
API_EVENT_STREAMS = Gauge("arkor_api_event_streams", "Event streams of jobs that are open now.")

# Jobs: the controller.
JOBS = Gauge("arkor_jobs", "Jobs in the database, by status.", ("status",))
JOBS_OLDEST_QUEUED = Gauge(
    "arkor_jobs_oldest_queued_seconds", "Age of the job that has been queued longest; 0 if none."
)
JOBS_QUEUE_SECONDS = Histogram(
    "arkor_jobs_queue_seconds", "Seconds from a job's creation to training.started.", buckets=_QUEUE_S
)
JOB_ATTEMPTS = Counter("arkor_job_attempts_total", "Drivers launched, first ones and relaunches.")
JOB_RETRIES = Counter(
    "arkor_job_retries_total",
    "Attempts that were lost and are launched again, by the state that Ray told: failed, stopped, succeeded, missing, "
    "unplaced, silent.",
    ("state",),
)
JOB_FAILURES = Counter(
    "arkor_job_failures_total",
    "Jobs that ended as failed, by the error's code; `infrastructure`: lost too often.",
    ("reason",),
)
CONTROLLER_TURN_SECONDS = Histogram(
    "arkor_controller_turn_seconds", "Seconds of one turn of the controller over all open jobs.", buckets=_TURN_S
)
CONTROLLER_LEADER = Gauge("arkor_controller_leader", "1 while this controller holds the lease, else 0.")

# Training: rank 0, recorder and driver, by way of the controller (but for the gauges).
TRAINING_STEPS = Counter("arkor_training_steps_total", "Optimizer steps.", ("base_model",))
TRAINING_SAMPLES = Counter("arkor_training_samples_total", "Samples trained on.", ("base_model",))
TRAINING_TOKENS = Counter("arkor_training_supervised_tokens_total", "Tokens that the loss looked at.", ("base_model",))
TRAINING_STEP_SECONDS = Histogram(
    "arkor_training_step_seconds", "Seconds of one optimizer step.", ("base_model",), buckets=_STEP_S
)
TRAINING_LOSS = Gauge("arkor_training_loss", "The loss last logged, of jobs that run.", ("job_id", "base_model"))
TRAINING_PROGRESS = Gauge(
    "arkor_training_progress_ratio", "Steps done of all steps, of jobs that run.", ("job_id", "base_model")
)
TRAINING_CHECKPOINT_SECONDS = Histogram(
    "arkor_training_checkpoint_seconds",
    "Seconds of each stage of a checkpoint: gather (training stands still), upload (until committed), announce (until "
    "serving has loaded it and the event is written).",
    ("base_model", "stage"),
    buckets=_STAGE_S,
)
TRAINING_CHECKPOINTS = Counter(
    "arkor_training_checkpoints_total", "Checkpoints, by outcome: committed or failed.", ("base_model", "outcome")
)
TRAINING_STORAGE_FAILURES = Counter(
    "arkor_training_storage_failures_total", "Tries to store a checkpoint that storage did not take.", ("base_model",)
)
TRAINING_WORKER_RESTARTS = Counter(
    "arkor_training_worker_restarts_total", "Worker groups started again within an attempt.", ("base_model",)
)

# Serving: each replica; add them up over replicas.
SERVING_REQUESTS = Counter(
    "arkor_serving_requests_total",
    "Generations, by outcome: ok, cancelled, refused (4xx), unavailable (503), failed.",
    ("base_model", "outcome"),
)
SERVING_QUEUE_SECONDS = Histogram(
    "arkor_serving_queue_seconds",
    "Seconds that a request waited for a row and its adapter's slot.",
    ("base_model",),
    buckets=_LOAD_S,
)
SERVING_FIRST_TOKEN_SECONDS = Histogram(
    "arkor_serving_first_token_seconds",
    "Seconds from a request's arrival at the replica to its first token.",
    ("base_model",),
    buckets=_REQUEST_S,
)
SERVING_INTER_TOKEN_SECONDS = Histogram(
    "arkor_serving_inter_token_seconds",
    "Mean seconds between the tokens of one request.",
    ("base_model",),
    buckets=_TOKEN_S,
)
SERVING_PROMPT_TOKENS = Counter("arkor_serving_prompt_tokens_total", "Prompt tokens read.", ("base_model",))
SERVING_GENERATED_TOKENS = Counter("arkor_serving_generated_tokens_total", "Tokens generated.", ("base_model",))
SERVING_DECODE_STEPS = Counter(
    "arkor_serving_decode_steps_total", "Forward passes that decode; tokens per pass is the batch.", ("base_model",)
)
SERVING_ROWS = Gauge("arkor_serving_rows", "Rows of the batch, by state: busy or free.", ("base_model", "state"))
SERVING_WAITING = Gauge("arkor_serving_waiting_requests", "Requests that wait for a row or a slot.", ("base_model",))
SERVING_SLOTS = Gauge(
    "arkor_serving_slots", "Adapter slots on the device, by state: used or free.", ("base_model", "state")
)
SERVING_ADAPTER_LOOKUPS = Counter(
    "arkor_serving_adapter_lookups_total",
    "Requests for an adapter, by where it was found: device, host, disk, store.",
    ("base_model", "tier"),
)
SERVING_ADAPTER_LOAD_SECONDS = Histogram(
    "arkor_serving_adapter_load_seconds",
    "Seconds to read an adapter and make it ready for a slot, by where it was found: host, disk, store.",
    ("base_model", "tier"),
    buckets=_LOAD_S,
)
SERVING_EVICTIONS = Counter(
    "arkor_serving_evictions_total", "Adapters that gave their slot to another.", ("base_model",)
)
SERVING_KV_BYTES = Gauge(
    "arkor_serving_kv_bytes", "Memory reserved for keys and values, by state: used or free.", ("base_model", "state")
)
SERVING_MASKS = Counter("arkor_serving_masks_total", "Token masks of grammars computed.", ("base_model",))
SERVING_MASK_SECONDS = Counter(
    "arkor_serving_mask_seconds_total", "Seconds of computing token masks, beside the model.", ("base_model",)
)
