"""`create_trainer`: submit a job and react to it from your own code, while it trains.

```python
def on_checkpoint(checkpoint):
    answer = checkpoint.infer([{"role": "user", "content": "My parcel is late."}], max_tokens=80, stream=False)
    print(checkpoint.step, text_of(answer))

trainer = create_trainer(
    name="triage-run",
    model="arkor-ray/demo-base",
    dataset="https://example.com/tickets.jsonl",
    lora=LoraConfig(r=16, alpha=16),
    max_steps=100,
    callbacks={"on_checkpoint": on_checkpoint},
)
print(trainer.wait().status)
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from arkor_ray.client import loop_thread
from arkor_ray.client.async_client import AsyncClient
from arkor_ray.client.callbacks import TrainerCallbacks
from arkor_ray.client.client import Client
from arkor_ray.client.job_request import Dataset, JobRequest, LoraConfig, TrainingOptions, job_request
from arkor_ray.client.session import Session
from arkor_ray.client.training_run import AbortSignal, TrainingResult, TrainingRun, cancel_unless_ended_blocking
from arkor_ray.schemas.job import Job

Callbacks = TrainerCallbacks | Mapping[str, Callable[[Any], Any]]


def create_trainer(
    *,
    name: str,
    model: str,
    dataset: Dataset,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    callbacks: Callbacks | None = None,
    abort_signal: AbortSignal | None = None,
    client: Client | None = None,
    **options: Unpack[TrainingOptions],
) -> Trainer:
    """A trainer for one job; nothing is sent before `start` or `wait`.

    `dataset` is a `HuggingfaceDataset`, a `BlobDataset`, the wire's object, or a string: a URL, or a name on the Hub.
    `options` are those of `TrainingOptions`; what is not given is left to the service. `client` says which service and
    project; without one they are looked up as `Client()` does. Raises TypeError for an unknown option or callback.
    """
    request = job_request(name=name, model=model, dataset=dataset, lora=lora, **options)
    return Trainer(request, callbacks=callbacks, abort_signal=abort_signal, session=_session(client))


def create_async_trainer(
    *,
    name: str,
    model: str,
    dataset: Dataset,
    lora: LoraConfig | Mapping[str, Any] | None = None,
    callbacks: Callbacks | None = None,
    abort_signal: AbortSignal | None = None,
    client: AsyncClient | Client | None = None,
    **options: Unpack[TrainingOptions],
) -> AsyncTrainer:
    """As `create_trainer`, for asyncio."""
    request = job_request(name=name, model=model, dataset=dataset, lora=lora, **options)
    return AsyncTrainer(request, callbacks=callbacks, abort_signal=abort_signal, session=_session(client))


class Trainer:
    """One job, from plain code. May be used from several threads, and from a thread that runs an event loop."""

    def __init__(
        self,
        request: JobRequest,
        *,
        callbacks: Callbacks | None = None,
        abort_signal: AbortSignal | None = None,
        session: Session | None = None,
    ) -> None:
        self._run = TrainingRun(session or Session(), request, TrainerCallbacks.of(callbacks), abort_signal)

    @property
    def request(self) -> JobRequest:
        return self._run.request

    @property
    def job(self) -> Job | None:
        """The job as last heard of; None before it was created."""
        return self._run.job

    def start(self) -> Job:
        """Create the job, once: further calls, also concurrent ones, return the same job."""
        return loop_thread.run(self._run.start())

    def wait(self) -> TrainingResult:
        """Follow the job to its end, starting it if needed, and return how it ended, whichever way that was.

        Callbacks run one at a time, in the order of the events; plain ones in this thread, async ones on the client's
        own event loop. A lost connection is made again, for as long as it takes, without losing or repeating an event.
        A callback that raises is called again with the same event, up to 3 times in all; then its error is raised
        here. Raises TrainingAborted when the abort signal is set, and AuthenticationError, PermissionDeniedError or
        GoneError when the stream will never open again. The job goes on in all these cases, and `wait` may be called
        again: it continues with the first event whose callback has not returned.
        """
        return loop_thread.run_with_errands(self._run.wait)

    def cancel(self) -> None:
        """End the job, if it was created and has not ended. `wait` then returns with status cancelled."""
        if self._run.job is not None:
            # Not on the loop's thread: a callback that runs there may call this.
            with Client(session=self._run.session) as client:
                cancel_unless_ended_blocking(client, self._run.job.id)


class AsyncTrainer:
    """One job, from asyncio code; see `Trainer` for what the methods promise.

    Plain callbacks run in a worker thread, async ones on this loop. A plain callback that is running when the abort
    signal is set, or when `wait` is cancelled, goes on to its end in its thread.
    """

    def __init__(
        self,
        request: JobRequest,
        *,
        callbacks: Callbacks | None = None,
        abort_signal: AbortSignal | None = None,
        session: Session | None = None,
    ) -> None:
        self._run = TrainingRun(session or Session(), request, TrainerCallbacks.of(callbacks), abort_signal)

    @property
    def request(self) -> JobRequest:
        return self._run.request

    @property
    def job(self) -> Job | None:
        return self._run.job

    async def start(self) -> Job:
        return await self._run.start()

    async def wait(self) -> TrainingResult:
        return await self._run.wait(asyncio.to_thread)

    async def cancel(self) -> None:
        await self._run.cancel()


def _session(client: Client | AsyncClient | None) -> Session:
    return client.session if client is not None else Session()
