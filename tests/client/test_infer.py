"""What the `infer` of a checkpoint promises."""

from __future__ import annotations

from arkor_ray.client import (
    iter_text,
    text_of,
)
from arkor_ray.errors import NotFoundError
from tests.client.runs import MESSAGES, short_run, trainer_of


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
