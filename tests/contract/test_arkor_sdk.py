"""The main story as the arkor SDK lives it: submit, follow, ask every checkpoint while training goes on, finish."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contract.arkor_sdk import CloudApiClient, CloudApiError, Trainer, studio_pieces
from tests.contract.conftest import QUESTION, Recorded, write_answers
from tests.contract.wire import MODEL, UNKNOWN_ID
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": QUESTION}]
STEPS, EVAL_EVERY = 240, 60
TICKET = ["category", "urgency", "summary", "nextAction"]
TRIAGE = {
    "type": "json_schema",
    "json_schema": {
        "name": "triage",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {name: {"type": "string", "maxLength": 12} for name in TICKET},
            "required": TICKET,
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def sdk(service: RunningService) -> CloudApiClient:
    client = CloudApiClient(service.url + "/")
    client.request_anonymous_token()
    client.ensure_project("My App (v2)")
    return client


@pytest.fixture(scope="module")
def story(sdk: CloudApiClient, submitted: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run from its submission to `wait`'s result, on a connection that breaks all the time; what its callbacks saw."""
    told = SimpleNamespace(logs=[], answers=[], started=[], completed=[])

    def on_checkpoint(checkpoint: Any) -> None:
        [status] = [job["status"] for job in sdk.list_jobs() if job["id"] == checkpoint.job["id"]]
        whole = checkpoint.infer(MESSAGES, stream=False, temperature=0, maxTokens=16)
        whole.read()
        streamed = checkpoint.infer(MESSAGES, temperature=0, maxTokens=16)
        shown = "".join(studio_pieces(streamed.iter_lines()))
        formed = checkpoint.infer(MESSAGES, stream=False, maxTokens=900, temperature=0, responseFormat=TRIAGE)
        formed.read()
        told.answers.append((checkpoint.step, status, whole.json(), shown, formed.json()))

    config = {
        "model": MODEL,
        "datasetSource": {"type": "blob", "url": write_answers(tmp_path_factory.mktemp("story"), "a blue bird sings")},
        "datasetFormat": {"type": "chatml"},
        "maxSteps": STEPS,
        "saveSteps": EVAL_EVERY,
        "batchSize": 16,
        "learningRate": 5e-3,
        "loraR": 16,
        "loraAlpha": 16,
        "loadIn4bit": False,
    }
    callbacks = {
        "training.started": told.started.append,
        "training.log": told.logs.append,
        "checkpoint.saved": on_checkpoint,
        "training.completed": told.completed.append,
    }
    trainer = Trainer(sdk, "triage-run", config, callbacks, cut_after=25)
    told.created = dict(trainer.start())
    told.result = trainer.wait()
    told.trainer = trainer
    return told


def test_run_is_created_followed_and_completed(story: SimpleNamespace) -> None:
    assert story.created["status"] == "queued" and story.created["config"]["model"] == MODEL
    assert story.result["status"] == "completed"
    assert story.result["startedAt"] <= story.result["completedAt"]
    assert story.trainer.artifacts and len(story.started) == len(story.completed) == 1


def test_every_checkpoint_answers_in_its_callback_while_training_goes_on(story: SimpleNamespace) -> None:
    assert [step for step, *_ in story.answers] == list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
    assert story.answers[0][1] == "running"
    for step, _, whole, shown, _ in story.answers:
        assert whole["content"] == whole["choices"][0]["message"]["content"] == shown
        assert whole["system_fingerprint"].startswith(f"{story.result['id']}-step-{step}@")
    assert story.answers[-1][3] == "a blue bird sings"


def test_checkpoint_answers_in_the_form_that_the_default_template_asks_for(story: SimpleNamespace) -> None:
    for *_, formed in story.answers:
        assert set(json.loads(formed["choices"][0]["message"]["content"])) == set(TICKET)


def test_no_event_is_lost_or_repeated_over_broken_connections(story: SimpleNamespace) -> None:
    assert story.trainer.connections > STEPS // 25
    assert [entry["step"] for entry in story.logs] == list(range(1, STEPS + 1))
    assert story.trainer.seen[0]["type"] == "training.started"
    assert story.trainer.seen[-1]["type"] == "training.completed"


def test_project_is_found_again_by_its_slug(sdk: CloudApiClient) -> None:
    first = sdk.ensure_project("My App (v2)")
    assert first["slug"] == "my-app--v2"
    assert first == sdk.ensure_project("My App (v2)")


def test_cancelled_job_lets_wait_return(sdk: CloudApiClient) -> None:
    config = {"model": MODEL, "datasetSource": {"type": "huggingface", "name": "arkorlab/triage-demo"}}
    trainer = Trainer(sdk, "cancelled", config)
    trainer.start()
    sdk.cancel_job(trainer.job["id"])
    assert trainer.wait()["status"] == "queued", "the SDK keeps the status it saw last"
    assert [data["type"] for data in trainer.seen] == ["training.cancelled"]
    with pytest.raises(CloudApiError, match="already cancelled") as raised:
        sdk.cancel_job(trainer.job["id"])
    assert raised.value.status == 409


def test_refusal_reaches_the_user_as_a_sentence_with_its_code(sdk: CloudApiClient) -> None:
    with pytest.raises(CloudApiError, match=r"^invalid_request: config.learningRate: ") as raised:
        sdk.create_job(
            "bad", {"model": MODEL, "datasetSource": {"type": "huggingface", "name": "a/b"}, "learningRate": 0}
        )
    assert raised.value.status == 400


def test_stream_that_will_never_open_is_given_up(sdk: CloudApiClient, finished: Recorded) -> None:
    stranger = CloudApiClient(sdk.base_url, "arkt_wrong", sdk.org_slug, sdk.project_slug)
    for client, status in ((stranger, 401), (CloudApiClient(sdk.base_url, sdk.token, "other", "p"), 403)):
        trainer = Trainer(client, "", {})
        trainer.job = {"id": finished.id, "status": "queued"}
        with pytest.raises(CloudApiError) as raised:
            trainer.wait()
        assert raised.value.status == status
    with pytest.raises(CloudApiError) as raised:
        sdk.open_events(UNKNOWN_ID, "7")
    assert raised.value.status == 410


@pytest.mark.parametrize("mode", ["base", "final"])
def test_playground_shows_a_chat_with_its_failed_turns_and_numbered_messages(
    sdk: CloudApiClient, story: SimpleNamespace, mode: str
) -> None:
    target: dict[str, Any] = {"baseModel": MODEL}
    if mode == "final":
        target = {"adapter": {"kind": "final", "jobId": story.result["id"]}}
    messages = [
        {"id": 1, "role": "user", "content": "hello"},
        {"id": 2, "role": "assistant", "content": ""},
        {"id": 3, "role": "user", "content": QUESTION},
    ]
    body = {"messages": messages, "stream": True, "temperature": 0, "maxTokens": 16, **target}
    shown = "".join(studio_pieces(sdk.chat(body).iter_lines()))
    whole = sdk.chat({**body, "stream": False})
    assert shown == json.loads(whole.read())["content"] and shown
