from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from arkor_ray import errors
from arkor_ray.client import AsyncClient, Client
from arkor_ray.client.inference import TextReader, iter_text, text_of
from tests.client.fake_service import URL

MESSAGES = [{"role": "user", "content": "hello"}]
CONFIG = {"model": "tiny", "datasetSource": {"type": "huggingface", "name": "a/b"}}


@pytest.fixture
def job(client, fake):
    """A finished job with checkpoints 2 and 4 and a final adapter; 8 events."""

    def happen(job):
        fake.emit_started(job)
        for step in range(1, 5):
            fake.emit_log(job, step)
            if step % 2 == 0:
                fake.emit_checkpoint(job, step)
        fake.complete(job)

    fake.on_create(happen)
    return client.create_job("run", CONFIG)


def test_identity_and_tokens(client, fake):
    assert client.me().orgs[0].slug == "anon-1"
    issued = client.create_token("ci")
    assert issued.token in fake.tokens and issued.label == "ci"
    assert [token.label for token in client.list_tokens()] == ["ci"]
    client.revoke_token(issued.id)
    assert client.list_tokens() == []
    assert client.anonymous_token().token not in (client.session.token, None)


def test_projects(client):
    assert client.create_project("One", "one").slug == "one"
    assert client.ensure_project("One", "one").slug == "one"
    assert client.ensure_project("Two", "two").slug == "two"
    assert [project.slug for project in client.list_projects()] == ["one", "two"]
    with pytest.raises(errors.ConflictError):
        client.create_project("One", "one")


def test_jobs(client, job, fake):
    second = client.create_job("second", CONFIG)
    assert [each.id for each in client.list_jobs()] == [second.id, job.id]
    assert client.get_job(job.id).status == "completed"
    detail = client.get_job_detail(job.id)
    assert [(event.id, event.type) for event in detail.events][-1] == (8, "training.completed")
    assert client.job_logs(job.id) == "one line\n"
    assert "".join(client.follow_logs(job.id, attempt=2)) == "one line\n"
    assert dict(fake.asked("GET", "/logs")[-1].url.params).items() >= {"attempt": "2", "follow": "true"}.items()
    with pytest.raises(errors.ConflictError, match="Job is already completed"):
        client.cancel_job(job.id)


def test_events_replay_follow_and_reconnect(client, job, fake):
    fake.drop_connection(after_event=3)
    assert [event.id for event in client.events(job.id)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.id for event in client.events(job.id, last_event_id=6)] == [7, 8]


def test_events_of_a_job_that_is_not_there_are_an_error_at_once(client, job):
    with pytest.raises(errors.NotFoundError):
        next(client.events("00000000-0000-0000-0000-000000000000"))


def test_checkpoints_and_download(client, job, fake, tmp_path):
    assert [(each.kind, each.step) for each in client.list_checkpoints(job.id)] == [
        ("checkpoint", 2), ("checkpoint", 4), ("final", 4),
    ]  # fmt: skip
    assert client.get_checkpoint(job.id, 2).manifest.step == 2
    folder = client.download_adapter(job.id, 2, tmp_path / "out")
    assert folder == tmp_path / "out" / f"{job.id}-step-2"
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights 2"
    assert json.loads((folder / "manifest.json").read_text())["step"] == 2
    fake.requests.clear()
    assert client.download_adapter(job.id, 2, tmp_path / "out") == folder
    assert len(fake.requests) == 1, "nothing is fetched twice"
    assert client.download_adapter(job.id, "final", tmp_path / "out").name == f"{job.id}-final"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{job.id}-final", f"{job.id}-step-2"]


def test_a_download_that_arrives_damaged_leaves_nothing(client, job, fake, tmp_path):
    fake_job = fake.jobs[job.id]
    detail = client.get_checkpoint(job.id, 2)
    fake_job.adapters["2"]["tokenizer.json"] = b"damaged"
    client.get_checkpoint = lambda *_: detail
    with pytest.raises(errors.AdapterError, match="damaged"):
        client.download_adapter(job.id, 2, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_download_never_overwrites_another_folder(client, job, tmp_path):
    (tmp_path / f"{job.id}-step-2").mkdir()
    with pytest.raises(errors.ConflictError, match="exists"):
        client.download_adapter(job.id, 2, tmp_path)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "..\\evil"])
def test_a_manifest_cannot_write_elsewhere(client, job, fake, tmp_path, path):
    fake.jobs[job.id].adapters["2"] = {path: b"x"}
    with pytest.raises(errors.AdapterError, match="outside"):
        client.download_adapter(job.id, 2, tmp_path)


def test_chat(client, job, fake):
    fake.answer = lambda body: json.dumps(body.get("adapter") or body["baseModel"])
    assert text_of(client.chat(MESSAGES, base_model="tiny", stream=False)) == '"tiny"'
    assert json.loads("".join(iter_text(client.chat(MESSAGES, job_id=job.id)))) == {"kind": "final", "jobId": job.id}
    text = "".join(client.chat_text(MESSAGES, job_id=job.id, step=2))
    assert json.loads(text) == {"kind": "checkpoint", "jobId": job.id, "step": 2}
    with pytest.raises(errors.InvalidRequestError, match="'final'"):
        client.chat(MESSAGES, job_id=job.id, step="last")


def test_endpoints_and_their_keys(client, job, fake):
    endpoint = client.create_endpoint("triage", job_id=job.id, step=2, run_retention_mode="days", run_retention_days=3)
    assert endpoint.target.model == f"{job.id}:2" and endpoint.auth_mode == "fixed_api_key"
    assert (endpoint.run_retention_days, endpoint.url) == (3, f"{URL}/e/triage/v1")
    changed = client.update_endpoint(endpoint.id, base_model="tiny", auth_mode="none", run_retention_mode="unlimited")
    assert (changed.target.model, changed.run_retention_days) == ("tiny", None)
    assert client.get_endpoint(endpoint.id) == changed
    with pytest.raises(errors.ConflictError, match="slug is already taken"):
        client.create_endpoint("triage", base_model="tiny")
    issued = client.create_endpoint_key(endpoint.id, "ci")
    assert issued.plaintext.startswith(issued.prefix)
    client.revoke_endpoint_key(endpoint.id, issued.id)
    assert [(key.label, key.enabled) for key in client.list_endpoint_keys(endpoint.id)] == [("ci", False)]
    client.delete_endpoint(endpoint.id)
    assert client.list_endpoints() == []


@pytest.mark.parametrize("target", [{}, {"job_id": "j", "base_model": "b"}, {"job_id": "j", "step": "last"}])
def test_endpoint_without_one_clear_target_is_refused_before_anything_is_sent(client, fake, target):
    with pytest.raises(errors.InvalidRequestError):
        client.create_endpoint("triage", **target)
    assert fake.requests == []


def test_models_and_health(client):
    assert client.list_models() == [{"name": "tiny"}]
    assert client.healthz() == client.readyz() == {"status": "ok"}


def test_not_ready_says_which_part_is_not(client, fake):
    fake.refuse("/readyz", 503, error=None, status="unavailable", checks={"db": "ok", "controller": "no answer"})
    with pytest.raises(errors.ServiceUnavailableError, match="db: ok, controller: no answer"):
        client.readyz()


def test_every_request_says_who_asks(client, fake):
    client.list_jobs()
    assert all(request.headers["X-Arkor-Client"].startswith("arkor-ray/") for request in fake.requests)


@pytest.mark.parametrize(
    ("status", "body", "cls", "message"),
    [
        (400, {"error": "invalid_request: no", "code": "invalid_request", "param": "a"}, errors.InvalidRequestError, "no"),
        (400, {"error": "dataset_error: empty", "code": "dataset_error"}, errors.DatasetError, "empty"),
        (401, {"error": "no"}, errors.AuthenticationError, "no"),
        (403, {"error": "no"}, errors.PermissionDeniedError, "no"),
        (404, {"error": "no"}, errors.NotFoundError, "no"),
        (409, {"error": "no"}, errors.ConflictError, "no"),
        (410, {"error": "no"}, errors.GoneError, "no"),
        (413, {"error": "no"}, errors.PayloadTooLargeError, "no"),
        (429, {"error": "no"}, errors.RateLimitError, "no"),
        (500, {"error": "no"}, errors.InternalError, "no"),
        (503, {"error": "no"}, errors.ServiceUnavailableError, "no"),
        (418, {"error": "no", "code": "from_the_future"}, errors.ArkorError, "no"),
    ],
)  # fmt: skip
def test_errors_are_raised_as_the_class_that_the_service_raised(client, fake, status, body, cls, message):
    client.list_jobs()
    fake.refuse("/jobs", status, **body)
    with pytest.raises(errors.ArkorError) as raised:
        client.list_jobs()
    assert type(raised.value) is cls
    assert raised.value.message.startswith(message)
    assert raised.value.http_status == status
    assert raised.value.param == body.get("param")


def transport_of(response):
    return httpx.MockTransport(lambda request: response)


@pytest.mark.parametrize(
    ("response", "cls", "message"),
    [
        (
            httpx.Response(502, text="<html>bad gateway</html>"),
            errors.ServiceUnavailableError,
            "502 without saying why",
        ),
        (httpx.Response(500, text="Internal Server Error"), errors.ServiceUnavailableError, "GET /v1/me .*a proxy"),
        (httpx.Response(500, json=["no"]), errors.ServiceUnavailableError, "500 without saying why"),
        (httpx.Response(404, text=""), errors.NotFoundError, "HTTP 404"),
        (httpx.Response(200, text="<html>"), errors.InternalError, "not what this client expects"),
        (httpx.Response(200, json={"other": 1}), errors.InternalError, "user: Field required"),
        (httpx.Response(302, headers={"Location": "/x"}), errors.ArkorError, "HTTP 302"),
    ],
)
def test_answers_that_no_arkor_service_gives(response, cls, message, home):
    with (
        Client(URL, token="t", home=home, transport=transport_of(response), max_retries=0) as client,
        pytest.raises(cls, match=message),
    ):
        client.me()


def test_no_answer_is_an_error_that_says_where_and_what_next(client, fake):
    fake.be_unreachable("/healthz")
    with pytest.raises(errors.ServiceUnavailableError, match=r"http://fake\.test: connection refused.*`arkor-ray up`"):
        client.healthz()


def test_ids_cannot_leave_their_route(client, fake):
    with pytest.raises(errors.NotFoundError):
        client.get_job("../me")
    assert fake.requests[-1].url.raw_path.startswith(b"/v1/jobs/..%2Fme?")
    for id in ("", ".."):
        with pytest.raises(errors.InvalidRequestError):
            client.get_job(id)


def test_advice_about_the_client_is_logged_once(home, caplog):
    headers = {"Deprecation": "true", "Warning": '299 - "please upgrade"', "Sunset": "soon"}
    transport = transport_of(httpx.Response(200, json={}, headers=headers))
    with caplog.at_level(logging.WARNING), Client(URL, home=home, transport=transport) as client:
        client.healthz()
        client.healthz()
    assert [record.getMessage() for record in caplog.records] == [f"{URL}: please upgrade (until soon)"]


def test_threads_that_begin_together_mint_one_token(client, fake):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: client.list_jobs(), range(8)))
    assert len(fake.tokens) == 1


def test_the_async_client_does_the_same(fake, home, project_dir, tmp_path):
    fake.on_create(fake.emit_started, lambda job: fake.emit_checkpoint(job, 1), fake.complete)
    fake.answer = lambda body: "fine thanks"

    async def main():
        async with AsyncClient(URL, home=home, project_dir=project_dir, transport=fake) as client:
            await asyncio.gather(*(client.list_jobs() for _ in range(8)))
            job = await client.create_job("run", CONFIG)
            fake.drop_connection(after_event=1)
            assert [event.id async for event in client.events(job.id)] == [1, 2, 3]
            assert "".join([piece async for piece in client.chat_text(MESSAGES, job_id=job.id)]) == "fine thanks"
            assert text_of(await client.chat(MESSAGES, base_model="tiny", stream=False)) == "fine thanks"
            assert [piece async for piece in client.follow_logs(job.id)] == ["one line\n"]
            folder = await client.download_adapter(job.id, "final", tmp_path)
            assert (folder / "adapter_model.safetensors").read_bytes() == b"final weights"
            assert (await client.get_job(job.id)).status == "completed"
            with pytest.raises(errors.ConflictError):
                await client.cancel_job(job.id)
            endpoint = await client.create_endpoint("triage", job_id=job.id)
            key = await client.create_endpoint_key(endpoint.id, "ci")
            await client.revoke_endpoint_key(endpoint.id, key.id)
            first, second = fake.answer_at_endpoint("one"), fake.answer_at_endpoint("two")
            assert [run.id for run in await client.list_runs(endpoint.id, limit=1)] == [second["id"]]
            assert [run.id for run in await client.list_runs(endpoint.id, before=second["id"])] == [first["id"]]
            exported = await client.export_runs(endpoint.id, project_dir / "runs.jsonl")
            assert len(exported.read_text().splitlines()) == 2
            assert [each.enabled for each in await client.list_endpoint_keys(endpoint.id)] == [False]
            assert (await client.update_endpoint(endpoint.id, enabled=False)).enabled is False
            assert await client.list_endpoints() == [await client.get_endpoint(endpoint.id)]
            await client.delete_endpoint(endpoint.id)
            assert (await client.me()).orgs and await client.list_models() and await client.readyz()

    asyncio.run(main())
    assert len(fake.tokens) == 1


def test_both_clients_have_the_same_methods():
    public = [{name for name in dir(cls) if not name.startswith("_")} for cls in (Client, AsyncClient)]
    assert public[0] == public[1]


# Text in streams


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\ndata: "after"\n\n', "a"),
        (b'data: "a"\n\ndata: {"content": "b"}\n\ndata: {"text": "c"}\n\n', "abc"),
        (b'event: ping\ndata: "no"\n\ndata: "a"\n\nevent: end\ndata: {}\n\ndata: "no"\n\n', "a"),
        (b'data: {"choices": []}\n\ndata: {"usage": {}}\n\ndata: {"choices": [{"delta": {}}]}\n\n', ""),
        (b"data: plain text\n\n", "plain text"),
    ],
)
def test_text_is_read_by_the_contracts_rules(frames, text):
    for cut in range(len(frames) + 1):
        reader = TextReader()
        assert "".join([*reader.feed(frames[:cut]), *reader.feed(frames[cut:])]) == text


def test_an_error_in_a_stream_is_raised_after_the_text_before_it():
    pieces = TextReader().feed(b'data: "half"\n\ndata: {"error": {"message": "the replica died"}}\n\n')
    assert next(pieces) == "half"
    with pytest.raises(errors.InternalError, match="the replica died"):
        next(pieces)
