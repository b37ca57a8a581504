"""What `wait` promises: every event once and in order, through dropped connections and callbacks that fail."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from arkor_ray.client import (
    TrainerCallbacks,
    aiter_text,
)
from arkor_ray.errors import AuthenticationError, GoneError, PermissionDeniedError
from arkor_ray.schemas.job import JobStatus
from tests.client.runs import MESSAGES, recorder, short_run, trainer_of

# wait


def test_wait_starts_if_needed_and_returns_job_status_artifacts_and_metrics(client, fake):
    short_run(fake)
    result = trainer_of(client).wait()
    assert result.status == result.job.status == JobStatus.COMPLETED
    assert result.artifacts == [{"pathname": "adapter_model.safetensors"}]
    assert result.metrics == {"finalLoss": 0.5, "totalSteps": 4, "totalTime": 1.5}
    assert result.error is None
    assert result.job.started_at is not None and result.job.completed_at is not None


def test_callbacks_get_every_event_once_and_in_order(client, fake):
    short_run(fake)
    calls = []
    trainer_of(client, callbacks=recorder(calls)).wait()
    assert calls == [
        ("on_started", 1), ("on_log", 2), ("on_log", 3), ("on_checkpoint", 4), ("on_log", 5), ("on_log", 6),
        ("on_checkpoint", 7), ("on_completed", 8),
    ]  # fmt: skip


def test_contexts_carry_what_their_events_say(client, fake):
    def happen(job):
        fake.emit_started(job)
        fake.emit_log(job, 1, evalLoss=1.5, learningRate=1e-3, epoch=0.5, samplesPerSecond=None)
        fake.emit_checkpoint(job, 1, ready=False)
        fake.complete(job)

    fake.on_create(happen)
    seen = []
    callbacks = TrainerCallbacks(
        on_started=seen.append, on_log=seen.append, on_checkpoint=seen.append, on_completed=seen.append
    )
    result = trainer_of(client, callbacks=callbacks).wait()
    started, log, checkpoint, completed = seen
    assert started.metadata == {"total_steps": 4} and started.job.status == JobStatus.RUNNING
    assert (log.step, log.loss, log.eval_loss, log.learning_rate, log.epoch, log.samples_per_second) == (
        1, 2.0, 1.5, 1e-3, 0.5, None,
    )  # fmt: skip
    assert checkpoint.adapter == {"kind": "checkpoint", "jobId": result.job.id, "step": 1}
    assert checkpoint.step == 1 and checkpoint.artifacts and checkpoint.ready is False
    assert checkpoint.job.id == result.job.id
    assert completed.metrics == result.metrics and completed.artifacts == result.artifacts


def test_callbacks_run_one_at_a_time_even_with_two_waiting(client, fake):
    short_run(fake)
    running, overlaps, calls = [], [], []

    def callback(ctx):
        running.append(ctx)
        overlaps.append(len(running))
        calls.append(ctx.event.id)
        threading.Event().wait(0.005)
        running.pop()

    trainer = trainer_of(client, callbacks={"on_log": callback, "on_checkpoint": callback})
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: trainer.wait(), range(2)))
    assert max(overlaps) == 1
    assert calls == [2, 3, 4, 5, 6, 7]
    assert results[0] == results[1]


def test_wait_after_the_end_gives_the_result_again_and_calls_nobody(client, fake):
    short_run(fake)
    calls = []
    trainer = trainer_of(client, callbacks=recorder(calls))
    assert trainer.wait() is trainer.wait()
    assert len(calls) == 8


def test_a_failed_job_is_a_result_not_an_error(client, fake):
    fake.on_create(fake.emit_started, fake.fail)
    seen = []
    result = trainer_of(client, callbacks={"on_failed": seen.append}).wait()
    assert (result.status, result.error) == (JobStatus.FAILED, "the loss is not finite")
    assert (seen[0].error, seen[0].step) == ("the loss is not finite", 3)


def test_wait_works_in_a_thread_that_runs_an_event_loop(client, fake):
    short_run(fake)
    calls = []

    async def notebook_cell():
        return trainer_of(client, callbacks=recorder(calls)).wait()

    assert asyncio.run(notebook_cell()).status == JobStatus.COMPLETED
    assert len(calls) == 8


def test_plain_callbacks_run_in_the_waiting_thread(client, fake):
    short_run(fake)
    threads = set()
    trainer_of(client, callbacks={"on_log": lambda ctx: threads.add(threading.current_thread())}).wait()
    assert threads == {threading.current_thread()}


def test_an_interrupt_in_a_callback_leaves_wait_at_once_and_the_job_alone(client, fake):
    short_run(fake)

    def interrupt(ctx):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(client, callbacks={"on_log": interrupt}).wait()
    assert not fake.asked("POST", "/cancel")


# Reconnecting


@pytest.mark.parametrize("drop", range(9))
def test_a_dropped_connection_is_resumed_without_loss_or_repetition(client, fake, drop):
    short_run(fake)
    fake.drop_connection(after_event=drop)
    calls = []
    assert trainer_of(client, callbacks=recorder(calls)).wait().status == JobStatus.COMPLETED
    assert [id for _, id in calls] == [1, 2, 3, 4, 5, 6, 7, 8]
    streams = fake.asked("GET", "/events/stream")
    # The terminal event ends the following, so a stream that breaks right after it is not opened again.
    expected = [None] if drop == 8 else [None, str(drop) if drop else None]
    assert [request.headers.get("Last-Event-ID") for request in streams] == expected


@pytest.mark.parametrize("status", [400, 404, 409, 429, 500, 503])
def test_an_error_that_may_pass_is_tried_again(client, fake, status):
    short_run(fake)
    fake.refuse("/events/stream", status, times=3)
    assert trainer_of(client).wait().status == JobStatus.COMPLETED
    assert len(fake.asked("GET", "/events/stream")) == 4


def test_an_unreachable_service_is_tried_again(client, fake):
    short_run(fake)
    fake.be_unreachable("/events/stream", times=3)
    assert trainer_of(client).wait().status == JobStatus.COMPLETED


@pytest.mark.parametrize(
    ("status", "error"), [(401, AuthenticationError), (403, PermissionDeniedError), (410, GoneError)]
)
def test_an_error_that_will_not_pass_is_raised(client, fake, status, error):
    short_run(fake)
    fake.refuse("/events/stream", status)
    with pytest.raises(error):
        trainer_of(client).wait()
    assert len(fake.asked("GET", "/events/stream")) == 1


def test_an_end_without_a_last_word_gives_the_status_of_then(client, fake):
    fake.on_create(fake.emit_started, fake.end_stream)
    assert trainer_of(client).wait().status == JobStatus.RUNNING


# Failing callbacks


def test_a_callback_that_raises_gets_the_same_event_again(client, fake, caplog):
    short_run(fake)
    calls = []

    def fails_twice(ctx):
        calls.append(ctx.event.id)
        if len(calls) < 3:
            raise RuntimeError("not yet")

    with caplog.at_level(logging.WARNING):
        assert trainer_of(client, callbacks={"on_checkpoint": fails_twice}).wait().status == JobStatus.COMPLETED
    assert calls == [4, 4, 4, 7]
    assert "not yet" in caplog.text


def test_after_its_last_attempt_wait_raises_the_callbacks_error(client, fake):
    short_run(fake)
    calls = []

    def fails(ctx):
        calls.append(ctx.event.id)
        raise LookupError("never")

    with pytest.raises(LookupError, match="never"):
        trainer_of(client, callbacks={"on_checkpoint": fails}).wait()
    assert calls == [4, 4, 4]
    assert not fake.asked("POST", "/cancel")


def test_an_event_is_seen_only_once_its_callback_returned(client, fake):
    """So the next `wait` begins with the event whose callback failed, not with the one after it."""
    short_run(fake)
    calls = []

    def fails_at_first(ctx):
        calls.append(ctx.event.id)
        if len(calls) <= 3:
            raise ValueError("broken")

    trainer = trainer_of(client, callbacks={"on_checkpoint": fails_at_first})
    with pytest.raises(ValueError):
        trainer.wait()
    assert trainer.wait().status == JobStatus.COMPLETED
    assert calls == [4, 4, 4, 4, 7]
    assert fake.asked("GET", "/events/stream")[-1].headers["Last-Event-ID"] == "3"
    assert len(fake.jobs) == 1


def test_an_event_whose_callback_was_cut_short_by_a_drop_is_not_repeated(client, fake):
    """A connection that breaks during a slow callback costs nothing: the callback returned, so the event was seen."""
    short_run(fake)
    calls = []
    fake.drop_connection(after_event=4)

    def slow(ctx):
        threading.Event().wait(0.02)
        calls.append(ctx.event.id)

    trainer_of(client, callbacks={"on_checkpoint": slow}).wait()
    assert calls == [4, 7]


# Async callbacks


def test_async_callbacks_of_a_plain_trainer_run_on_a_loop(client, fake):
    short_run(fake)
    fake.answer = lambda body: f"step {body['adapter']['step']}"
    answers = []

    async def on_checkpoint(ctx):
        answers.append("".join([piece async for piece in aiter_text(await ctx.infer(MESSAGES))]))

    assert trainer_of(client, callbacks={"on_checkpoint": on_checkpoint}).wait().status == JobStatus.COMPLETED
    assert answers == ["step 2", "step 4"]


@pytest.mark.parametrize("form", ["partial", "object", "lambda"])
def test_async_callbacks_are_known_in_every_form(client, fake, form):
    short_run(fake)
    seen = []

    async def function(ctx):
        await asyncio.sleep(0)
        seen.append(ctx.event.id)

    class Callable:
        async def __call__(self, ctx):
            await function(ctx)

    callback = {"partial": functools.partial(function), "object": Callable(), "lambda": lambda ctx: function(ctx)}[form]
    trainer_of(client, callbacks={"on_checkpoint": callback}).wait()
    assert seen == [4, 7]
