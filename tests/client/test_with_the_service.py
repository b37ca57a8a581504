"""The SDK and the real application, on a real socket: what one sends, the other understands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from arkor_ray import errors
from arkor_ray.client import Client, create_trainer, iter_text, text_of
from arkor_ray.client.event_stream import EventFollower

pytest.importorskip("fastapi", reason="needs the extra 'server'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'server'")
openai = pytest.importorskip("openai", reason="needs the extra 'dev'")

from arkor_ray.api import sse  # noqa: E402
from tests.api.conftest import MODEL, app, db, gateway, settings, tail, training  # noqa: E402, F401

MESSAGES = [{"role": "user", "content": "hello"}]
JOB = {"name": "run", "model": MODEL, "dataset": "arkorlab/triage-demo", "max_steps": 4}


@pytest.fixture
def url(app) -> Iterator[str]:  # noqa: F811
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def service(url, home, project_dir, fake) -> Iterator[Client]:
    # `fake` is not used: it makes clients try again at once.
    with Client(url, home=home, project_dir=project_dir) as client:
        yield client


def test_what_the_service_frames_the_client_reads_cut_at_every_byte_and_resumed():
    events = [{"type": "training.log", "jobId": "j", "step": n, "text": "zwei\nZeilen 🎈"} for n in range(1, 4)]
    frames = [sse.frame(data, event=data["type"], id=n) for n, data in enumerate(events, start=1)]
    stream = b"".join([sse.PING_FRAME, *frames, sse.PING_FRAME, sse.END_FRAME])
    for cut in range(len(stream)):
        follower = EventFollower()
        follower.connect()
        seen = [event.data for event in follower.receive(stream[:cut])]
        last = int(follower.connect().get("Last-Event-ID", 0))
        seen += [event.data for event in follower.receive(b"".join([*frames[last:], sse.END_FRAME]))]
        assert seen == events, cut
        assert follower.done


def test_a_job_from_start_to_final_adapter(service, training, gateway):  # noqa: F811
    answers, steps, losses = [], [], []

    def on_checkpoint(ctx):
        steps.append(ctx.step)
        answers.append(text_of(ctx.infer(MESSAGES, max_tokens=5, stream=False)))
        answers.append("".join(iter_text(ctx.infer(MESSAGES))))
        if ctx.step == 2:
            training.save(ctx.job.id, 4)
            training.complete(ctx.job.id)

    callbacks = {"on_checkpoint": on_checkpoint, "on_log": lambda ctx: losses.append(ctx.loss)}
    trainer = create_trainer(**JOB, client=service, callbacks=callbacks)
    job = trainer.start()
    training.start(job.id)
    training.log(job.id, 1, loss=2.5)
    training.save(job.id, 2)
    result = trainer.wait()
    assert (result.status, steps, losses) == ("completed", [2, 4], [2.5])
    assert answers == ["Hello there"] * 4
    assert [request["adapter_id"] for request in gateway.requests] == [f"{job.id}-step-{n}" for n in (2, 2, 4, 4)]
    assert [(each.kind, each.step) for each in service.list_checkpoints(job.id)][-1][0] == "final"
    assert service.get_checkpoint(job.id, "final").manifest.final
    assert "".join(service.chat_text(MESSAGES, job_id=job.id)) == "Hello there"
    assert [event.id for event in service.events(job.id, last_event_id=3)] == [4, 5]
    assert service.job_logs(job.id) == ""


def test_a_file_that_is_not_what_its_manifest_says_is_refused(service, training, tmp_path):  # noqa: F811
    job = create_trainer(**JOB, client=service).start()
    training.start(job.id)
    training.save(job.id, 2)
    with pytest.raises(errors.AdapterError, match="damaged"):
        service.download_adapter(job.id, 2, tmp_path / "out")


def test_cancel_ends_wait(service, training):  # noqa: F811
    trainer = create_trainer(**JOB, client=service, callbacks={"on_started": lambda ctx: ctx.cancel()})
    training.start(trainer.start().id)
    assert trainer.wait().status == "cancelled"
    assert service.get_job(trainer.job.id).status == "cancelled"
    with pytest.raises(errors.ConflictError):
        service.cancel_job(trainer.job.id)


def test_errors_keep_their_class_and_field(service):
    with pytest.raises(errors.InvalidRequestError) as raised:
        create_trainer(**{**JOB, "max_steps": -1}, client=service).start()
    assert raised.value.param == "config.maxSteps"
    with pytest.raises(errors.NotFoundError):
        service.get_job("00000000-0000-0000-0000-000000000000")
    with pytest.raises(errors.NotFoundError):
        next(service.events("00000000-0000-0000-0000-000000000000"))
    with Client(service.base_url, token="wrong") as stranger, pytest.raises(errors.AuthenticationError):
        stranger.me()


def test_endpoint_from_its_publication_to_its_end(service, training, gateway):  # noqa: F811
    job = create_trainer(**JOB, client=service).start()
    training.start(job.id)
    training.save(job.id, 2)
    endpoint = service.create_endpoint("triage", job_id=job.id, step=2)
    assert endpoint.url.endswith("/e/triage/v1") and endpoint.run_retention_days == 7
    with pytest.raises(errors.ConflictError, match="final adapter does not exist yet") as raised:
        service.update_endpoint(endpoint.id, job_id=job.id)
    assert raised.value.param == "target.adapter"
    training.complete(job.id)
    assert service.update_endpoint(endpoint.id, job_id=job.id).target.model == job.id
    assert gateway.prepared == [f"{job.id}-step-2", f"{job.id}-final"]
    issued = service.create_endpoint_key(endpoint.id, "  ci ")
    assert issued.label == "ci" and issued.plaintext.startswith("ark_live_")
    service.revoke_endpoint_key(endpoint.id, issued.id)
    assert [key.enabled for key in service.list_endpoint_keys(endpoint.id)] == [False]
    service.delete_endpoint(endpoint.id)
    assert service.list_endpoints() == []


def test_what_an_endpoint_answered_comes_back_as_a_data_set(service, tmp_path):
    endpoint = service.create_endpoint("triage", base_model=MODEL, auth_mode="none")
    with openai.OpenAI(base_url=f"{service.base_url}/e/triage/v1", api_key="-") as client:
        for stream in (False, True):
            answer = client.chat.completions.create(model="", messages=MESSAGES, stream=stream)
            if stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "Hello there"
    while len(runs := service.list_runs(endpoint.id)) < 2:
        time.sleep(0.01)
    assert [run.id for run in service.list_runs(endpoint.id, before=runs[0].id)] == [runs[1].id]
    exported = service.export_runs(endpoint.id, tmp_path / "runs.jsonl").read_text().splitlines()
    conversation = [*MESSAGES, {"role": "assistant", "content": "Hello there"}]
    assert [json.loads(line) for line in exported] == [{"messages": conversation}] * 2


def test_identity_tokens_projects_and_models(service):
    assert service.list_jobs() == []
    org = service.me().orgs[0]
    issued = service.create_token("ci", email="a@b.test", expires_in_days=3)
    assert issued.org.slug == org.slug
    assert "ci" in [token.label for token in service.list_tokens()]
    with Client(service.base_url, token=issued.token, project="my-project") as second:
        assert second.list_jobs() == []
    service.revoke_token(issued.id)
    assert service.ensure_project("x", "my-project").slug == "my-project"
    assert MODEL in [model["name"] for model in service.list_models()]
    assert service.healthz()["status"] == "ok"
    assert service.cli_config()["clientId"] is None
