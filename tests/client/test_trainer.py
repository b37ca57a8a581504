"""What `create_trainer` promises, sentence by sentence."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from arkor_ray.client import (
    BlobDataset,
    HuggingfaceDataset,
    LoraConfig,
    TrainerCallbacks,
    TrainingAborted,
    aiter_text,
    create_async_trainer,
    create_trainer,
    iter_text,
    text_of,
)
from arkor_ray.errors import AuthenticationError, GoneError, InvalidRequestError, NotFoundError, PermissionDeniedError
from arkor_ray.schemas.job import JobConfig, JobStatus

MESSAGES = [{"role": "user", "content": "hello"}]


def trainer_of(client, create=create_trainer, **arguments):
    return create(**{"name": "run", "model": "tiny", "dataset": "owner/data", "client": client, **arguments})


def short_run(fake, *, checkpoints=(2, 4)):
    """Every job: started, four steps, checkpoints, completed. Events are numbered 1 to 8."""

    def happen(job):
        fake.emit_started(job)
        for step in range(1, 5):
            fake.emit_log(job, step)
            if step in checkpoints:
                fake.emit_checkpoint(job, step)
        fake.complete(job)

    fake.on_create(happen)


def recorder(calls):
    names = ("on_started", "on_log", "on_checkpoint", "on_completed", "on_failed")
    return {name: functools.partial(lambda name, ctx: calls.append((name, ctx.event.id)), name) for name in names}


# What is sent


def test_every_option_reaches_the_wire_and_what_is_not_set_stays_absent(client, fake):
    short_run(fake)
    trainer_of(
        client,
        name="everything",
        dataset=HuggingfaceDataset("owner/data", split="train[:10]", subset="en"),
        lora=LoraConfig(r=8, alpha=32, max_length=512, load_in_4bit=True),
        max_steps=4, num_train_epochs=2.5, learning_rate=1e-3, batch_size=2, optim="adamw_8bit", lr_scheduler_type="cosine",
        weight_decay=0.1, warmup_steps=0.1, logging_steps=1, save_steps={"steps": 2}, eval_steps="2",
        train_on_responses_only=True, dataset_format="chatml", dataset_split={"enabled": True, "test_size": 0.2, "seed": 1},
        dry_run=True, num_workers=2, zero_stage=2, gradient_accumulation_steps=3, precision="bf16", seed=7,
    ).start()  # fmt: skip
    trainer_of(client, name="nothing").start()
    everything, nothing = (job.wire["config"] for job in fake.jobs.values())
    assert everything == {
        "model": "tiny",
        "datasetSource": {"type": "huggingface", "name": "owner/data", "split": "train[:10]", "subset": "en"},
        "loraR": 8, "loraAlpha": 32, "maxLength": 512, "loadIn4bit": True,
        "maxSteps": 4, "numTrainEpochs": 2.5, "learningRate": 1e-3, "batchSize": 2, "gradientAccumulationSteps": 3,
        "optim": "adamw_8bit", "lrSchedulerType": "cosine", "weightDecay": 0.1, "warmupSteps": {"ratio": 0.1},
        "loggingSteps": 1, "saveSteps": {"steps": 2}, "evalSteps": "2", "trainOnResponsesOnly": True,
        "datasetFormat": "chatml", "datasetSplit": {"enabled": True, "testSize": 0.2, "seed": 1}, "dryRun": True,
        "numWorkers": 2, "zeroStage": 2, "precision": "bf16", "seed": 7,
    }  # fmt: skip
    assert nothing == {"model": "tiny", "datasetSource": {"type": "huggingface", "name": "owner/data"}}


def test_every_option_is_one_that_the_service_knows():
    from arkor_ray.client.job_request import OPTION_NAMES, _wire_name

    known = {field.alias for field in JobConfig.model_fields.values()}
    assert {_wire_name(name) for name in (*OPTION_NAMES, "r", "alpha", "max_length", "load_in_4bit")} <= known


@pytest.mark.parametrize(
    ("dataset", "source"),
    [
        ("owner/data", {"type": "huggingface", "name": "owner/data"}),
        ("https://x.test/a.jsonl", {"type": "blob", "url": "https://x.test/a.jsonl"}),
        ("file:///a.jsonl", {"type": "blob", "url": "file:///a.jsonl"}),
        (BlobDataset("http://x.test", token="s"), {"type": "blob", "url": "http://x.test", "token": "s"}),
        ({"url": "http://x.test"}, {"type": "blob", "url": "http://x.test"}),
        ({"type": "huggingface", "name": "a", "split": "test"}, {"type": "huggingface", "name": "a", "split": "test"}),
    ],
)
def test_a_dataset_may_be_given_in_many_forms(client, dataset, source):
    assert trainer_of(client, dataset=dataset).request.config["datasetSource"] == source


def test_a_path_on_this_machine_is_refused_with_the_way_out(client):
    with pytest.raises(InvalidRequestError, match=r"ALLOW_LOCAL_PATHS=1.*'file:///.*/tickets.jsonl'"):
        trainer_of(client, dataset="./tickets.jsonl")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_stepz": 3}, "did you mean 'max_steps'"),
        ({"lora": {"rank": 3, "alhpa": 3}}, "unknown LoRA option 'rank'"),
        ({"callbacks": {"on_checkpiont": print}}, "did you mean 'on_checkpoint'"),
        ({"callbacks": {"on_log": 3}}, "must be a function"),
    ],
)
def test_a_name_that_nobody_knows_is_an_error_at_once(client, arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        trainer_of(client, **arguments)


# start


def test_nothing_is_sent_before_start(client, fake):
    trainer_of(client)
    assert fake.requests == []


def test_start_is_idempotent(client, fake):
    trainer = trainer_of(client)
    assert trainer.job is None
    assert trainer.start().id == trainer.start().id == trainer.job.id
    assert len(fake.jobs) == 1


def test_start_is_idempotent_under_concurrent_calls(client, fake):
    trainer = trainer_of(client)
    with ThreadPoolExecutor(8) as threads:
        jobs = list(threads.map(lambda _: trainer.start(), range(8)))
    assert len({job.id for job in jobs}) == len(fake.jobs) == 1


def test_start_that_failed_may_be_tried_again(client, fake):
    trainer = trainer_of(client)
    fake.refuse("/jobs", 400)
    with pytest.raises(InvalidRequestError):
        trainer.start()
    assert trainer.start().status == JobStatus.QUEUED


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


# infer


def test_infer_returns_the_raw_response_bound_to_exactly_its_checkpoint(client, fake):
    short_run(fake)
    fake.answer = lambda body: f"step {body['adapter']['step']}"
    answers = []

    def on_checkpoint(ctx):
        response = ctx.infer(messages=MESSAGES, max_tokens=80, stream=False)
        answers.append((response.status_code, response.json()["content"], text_of(response)))

    trainer_of(client, callbacks={"on_checkpoint": on_checkpoint}).wait()
    assert answers == [(200, "step 2", "step 2"), (200, "step 4", "step 4")]


def test_infer_stays_bound_to_its_checkpoint_after_the_run_went_on(client, fake):
    short_run(fake)
    kept, answers = [], []
    fake.answer = lambda body: f"step {body['adapter']['step']}"
    callbacks = {
        "on_checkpoint": kept.append,
        "on_completed": lambda _: answers.extend(text_of(ctx.infer(MESSAGES, stream=False)) for ctx in kept),
    }
    trainer_of(client, callbacks=callbacks).wait()
    assert answers == ["step 2", "step 4"]


def test_infer_streams_by_default(client, fake):
    short_run(fake, checkpoints=(2,))
    fake.answer = lambda body: "Hello there"
    pieces = []
    trainer_of(client, callbacks={"on_checkpoint": lambda ctx: pieces.extend(iter_text(ctx.infer(MESSAGES)))}).wait()
    assert len(pieces) > 1 and "".join(pieces) == "Hello there"


def test_infer_sends_what_it_is_given_and_leaves_the_rest_to_the_service(client, fake):
    short_run(fake, checkpoints=(2,))
    bodies = []
    fake.answer = lambda body: bodies.append(body) or "x"

    def on_checkpoint(ctx):
        ctx.infer(MESSAGES, stream=False)
        ctx.infer(
            MESSAGES,
            max_tokens=5,
            stream=False,
            temperature=0.0,
            top_p=0.5,
            stop=["."],
            seed=3,
            top_logprobs=2,
            logprobs=True,
        )

    result = trainer_of(client, callbacks={"on_checkpoint": on_checkpoint}).wait()
    plain = {
        "messages": MESSAGES,
        "adapter": {"kind": "checkpoint", "jobId": result.job.id, "step": 2},
        "stream": False,
    }
    assert bodies[0] == plain
    asked = {
        "maxTokens": 5,
        "temperature": 0.0,
        "topP": 0.5,
        "stop": ["."],
        "seed": 3,
        "topLogprobs": 2,
        "logprobs": True,
    }
    assert bodies[1] == {**plain, **asked}


def test_infer_is_never_memoised(client, fake):
    short_run(fake, checkpoints=(2,))
    counter = iter(range(10))
    fake.answer = lambda body: f"answer {next(counter)}"
    answers = []
    ask = lambda ctx: answers.extend(text_of(ctx.infer(MESSAGES, stream=False)) for _ in range(3))  # noqa: E731
    trainer_of(client, callbacks={"on_checkpoint": ask}).wait()
    assert answers == ["answer 0", "answer 1", "answer 2"]


def test_infer_raises_the_services_error(client, fake):
    short_run(fake, checkpoints=(2,))
    fake.refuse("/inference/chat", 404, code="not_found")
    errors = []

    def on_checkpoint(ctx):
        try:
            ctx.infer(MESSAGES)
        except NotFoundError as error:
            errors.append(error.message)

    trainer_of(client, callbacks={"on_checkpoint": on_checkpoint}).wait()
    assert errors == ["refused with 404"]


# cancel and abort


def test_cancel_from_a_callback_ends_the_job_as_cancelled(client, fake):
    fake.on_create(fake.emit_started, lambda job: fake.emit_log(job, 1))
    trainer = trainer_of(client, callbacks={"on_log": lambda ctx: trainer.cancel()})
    assert trainer.wait().status == JobStatus.CANCELLED
    assert next(iter(fake.jobs.values())).wire["status"] == "cancelled"


@pytest.mark.parametrize("style", ["plain", "async"])
def test_a_context_can_cancel_for_early_stopping(client, fake, style):
    fake.on_create(fake.emit_started, lambda job: fake.emit_log(job, 1))

    def plain(ctx):
        ctx.cancel()

    async def coroutine(ctx):
        await ctx.cancel()

    callback = {"plain": plain, "async": coroutine}[style]
    assert trainer_of(client, callbacks={"on_log": callback}).wait().status == JobStatus.CANCELLED


def test_a_plain_trainer_can_be_cancelled_from_an_async_callback(client, fake):
    fake.on_create(fake.emit_started, lambda job: fake.emit_log(job, 1))

    async def on_log(ctx):
        trainer.cancel()

    trainer = trainer_of(client, callbacks={"on_log": on_log})
    assert trainer.wait().status == JobStatus.CANCELLED


def test_cancel_of_a_job_that_has_ended_or_never_began_is_no_error(client, fake):
    short_run(fake)
    trainer = trainer_of(client)
    trainer.cancel()
    assert not fake.asked("POST", "/cancel")
    assert trainer.wait().status == JobStatus.COMPLETED
    trainer.cancel()
    assert trainer.job.status == JobStatus.COMPLETED


def test_the_abort_signal_stops_wait_without_cancelling_and_wait_can_go_on(client, fake):
    fake.on_create(fake.emit_started, lambda job: fake.emit_log(job, 1))
    signal, calls = threading.Event(), []

    def on_log(ctx):
        calls.append(ctx.event.id)
        if ctx.step == 1:
            threading.Timer(0.02, signal.set).start()  # while the stream is silent

    trainer = trainer_of(client, abort_signal=signal, callbacks={"on_log": on_log})
    with pytest.raises(TrainingAborted):
        trainer.wait()
    assert not fake.asked("POST", "/cancel")
    job = next(iter(fake.jobs.values()))
    assert job.wire["status"] == "running"
    fake.emit_log(job, 2)
    fake.complete(job)
    signal.clear()
    assert trainer.wait().status == JobStatus.COMPLETED
    assert calls == [2, 3]


def test_an_abort_signal_that_is_set_already_begins_nothing(client, fake):
    signal = threading.Event()
    signal.set()
    with pytest.raises(TrainingAborted):
        trainer_of(client, abort_signal=signal).wait()
    assert fake.jobs == {}


# asyncio


def test_an_async_trainer_does_the_same_with_coroutines(client, fake):
    short_run(fake)
    calls, loops, threads = [], set(), set()
    fake.answer = lambda body: f"step {body['adapter']['step']}"
    fake.drop_connection(after_event=3)

    async def on_checkpoint(ctx):
        loops.add(asyncio.get_running_loop())
        calls.append(text_of(await ctx.infer(MESSAGES, stream=False)))

    def on_log(ctx):
        threads.add(threading.current_thread())
        calls.append(ctx.step)

    async def main():
        trainer = trainer_of(client, create_async_trainer, callbacks={"on_checkpoint": on_checkpoint, "on_log": on_log})
        jobs = await asyncio.gather(*(trainer.start() for _ in range(5)))
        assert len({job.id for job in jobs}) == 1
        result = await trainer.wait()
        assert loops == {asyncio.get_running_loop()}
        return result

    assert asyncio.run(main()).status == JobStatus.COMPLETED
    assert calls == [1, 2, "step 2", 3, 4, "step 4"]
    assert threading.current_thread() not in threads


def test_a_blocking_callback_of_an_async_trainer_does_not_block_the_loop(client, fake):
    short_run(fake, checkpoints=(2,))
    release = threading.Event()

    async def main():
        answers = []

        def on_checkpoint(ctx):
            assert release.wait(30), "the loop was blocked"
            answers.append(text_of(ctx.infer(MESSAGES, stream=False)))

        trainer = trainer_of(client, create_async_trainer, callbacks={"on_checkpoint": on_checkpoint})
        waiting = asyncio.ensure_future(trainer.wait())
        while not fake.asked("GET", "/events/stream"):
            await asyncio.sleep(0)
        release.set()
        await waiting
        return answers

    assert asyncio.run(main()) == ["fine"]


@pytest.mark.parametrize("make_signal", [threading.Event, asyncio.Event])
def test_an_async_wait_is_aborted_and_the_trainer_cancelled(client, fake, make_signal):
    fake.on_create(fake.emit_started)

    async def main():
        signal = make_signal()
        trainer = trainer_of(client, create_async_trainer, abort_signal=signal)
        waiting = asyncio.ensure_future(trainer.wait())
        while not fake.asked("GET", "/events/stream"):
            await asyncio.sleep(0)
        signal.set()
        with pytest.raises(TrainingAborted):
            await waiting
        signal.clear()
        await trainer.cancel()
        return await trainer.wait()

    assert asyncio.run(main()).status == JobStatus.CANCELLED
