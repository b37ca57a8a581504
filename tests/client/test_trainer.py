"""What `create_trainer` promises: what is sent, `start`, `cancel`, the abort signal, and its asyncio twin."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from arkor_ray.client import (
    BlobDataset,
    HuggingfaceDataset,
    LoraConfig,
    TrainingAborted,
    create_async_trainer,
    text_of,
)
from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.job import JobConfig, JobStatus
from tests.client.runs import MESSAGES, short_run, trainer_of

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
