"""What user code is told about its job: one context object per kind of event, and the table of callbacks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from arkor_ray.client.job_request import unknown
from arkor_ray.schemas.event import CHECKPOINT, COMPLETED, FAILED, LOG, STARTED, Event
from arkor_ray.schemas.job import Job


class Infer(Protocol):
    """Asks exactly one checkpoint. A plain callback gets the response, an async one awaits it.

    Every call is a new generation. The raw response of a stream (the default) must be read to its end or closed;
    `iter_text` and `aiter_text` read its text, `text_of` that of an answer with `stream=False`. What is None is left
    to the service; `fields` are further fields of the wire, in snake_case.
    """

    def __call__(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int | None = None,
        stream: bool = True,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        **fields: Any,
    ) -> Any: ...


@dataclass(frozen=True)
class EventContext:
    """What every callback gets. `cancel()` ends the job, for early stopping; an async callback awaits it."""

    job: Job
    event: Event
    cancel: Callable[[], Any] = field(repr=False)


@dataclass(frozen=True)
class StartedContext(EventContext):
    metadata: dict[str, Any]


@dataclass(frozen=True)
class LogContext(EventContext):
    """Numbers of one step; None for what was not measured there, or not finite."""

    step: int
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    epoch: float | None
    samples_per_second: float | None


@dataclass(frozen=True)
class CheckpointContext(EventContext):
    """The adapter after `step` updates, which answers now. `ready` is False if its first answer may take a while."""

    step: int
    adapter: dict[str, Any]
    artifacts: list[dict[str, Any]]
    ready: bool
    infer: Infer = field(repr=False)


@dataclass(frozen=True)
class CompletedContext(EventContext):
    artifacts: list[dict[str, Any]]
    metrics: dict[str, Any] | None


@dataclass(frozen=True)
class FailedContext(EventContext):
    """`step` is the last step known, None if training never got there."""

    error: str
    step: int | None


@dataclass(frozen=True)
class TrainerCallbacks:
    """Plain or async functions of one argument, the context."""

    on_started: Callable[[StartedContext], Any] | None = None
    on_log: Callable[[LogContext], Any] | None = None
    on_checkpoint: Callable[[CheckpointContext], Any] | None = None
    on_completed: Callable[[CompletedContext], Any] | None = None
    on_failed: Callable[[FailedContext], Any] | None = None

    @classmethod
    def of(cls, callbacks: TrainerCallbacks | Mapping[str, Callable[[Any], Any]] | None) -> TrainerCallbacks:
        """From a mapping. Raises TypeError for a name that is no callback, or a value that cannot be called."""
        if isinstance(callbacks, TrainerCallbacks):
            return callbacks
        names = [each.name for each in fields(cls)]
        for name, callback in (callbacks or {}).items():
            if name not in names:
                raise TypeError(unknown(name, names, "callback"))
            if callback is not None and not callable(callback):
                raise TypeError(f"the callback {name} must be a function (got {callback!r})")
        return cls(**(callbacks or {}))

    def for_event(self, type: str) -> Callable[[Any], Any] | None:
        name = _NAMES.get(type)
        return getattr(self, name) if name else None


_NAMES = {
    STARTED: "on_started",
    LOG: "on_log",
    CHECKPOINT: "on_checkpoint",
    COMPLETED: "on_completed",
    FAILED: "on_failed",
}


class ChatClient(Protocol):
    """The part of `Client` or `AsyncClient` that a context needs: blocking, or giving awaitables."""

    def chat(self, messages: list[dict[str, Any]], **arguments: Any) -> Any: ...


def make_context(event: Event, job: Job, client: ChatClient, cancel: Callable[[], Any]) -> EventContext:
    """The context of an event that has a callback."""
    data = event.data
    artifacts = data.get("artifacts") or []
    if event.type == STARTED:
        return StartedContext(job, event, cancel, metadata=data.get("metadata") or {})
    if event.type == LOG:
        numbers = (data.get(key) for key in ("loss", "evalLoss", "learningRate", "epoch", "samplesPerSecond"))
        return LogContext(job, event, cancel, data["step"], *numbers)
    if event.type == CHECKPOINT:
        adapter = {"kind": "checkpoint", "jobId": job.id, "step": data["step"]}
        infer = functools.partial(_infer, client, adapter)
        return CheckpointContext(
            job, event, cancel, data["step"], dict(adapter), artifacts, data.get("ready", True), infer
        )
    if event.type == COMPLETED:
        return CompletedContext(job, event, cancel, artifacts, data.get("metrics"))
    assert event.type == FAILED
    return FailedContext(job, event, cancel, data.get("error") or "", data.get("step"))


def is_async(callback: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; also for partials and for objects with an async `__call__`."""
    return inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(getattr(callback, "__call__", None))  # noqa: B004


def _infer(
    client: ChatClient,
    adapter: dict[str, Any],
    messages: list[dict[str, Any]],
    max_tokens: int | None = None,
    stream: bool = True,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: str | list[str] | None = None,
    seed: int | None = None,
    **fields: Any,
) -> Any | Awaitable[Any]:
    return client.chat(
        messages,
        adapter=adapter,
        stream=stream,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        seed=seed,
        **fields,
    )
