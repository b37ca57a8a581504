"""A service as `arkor-ray up` starts it, looked at as an attacker would: who is let in where, and where its secrets lie.

Everything that it is trusted with is a string that can be recognised. There is work, and there are faults: a driver that is
killed, data that is refused, bad requests, revoked tokens. Then all that the run has written, shown and is called is searched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
import grpc
import httpx
import pytest
from sqlalchemy import inspect, make_url, text

from arkor_ray.db.session import Database
from arkor_ray.demo.testing import make_tiny_model
from arkor_ray.schemas.address import is_loopback
from tests.contract.wire import Caller
from tests.db.databases import empty_database_url
from tests.integration.attack import DataServer, Listeners, call
from tests.integration.stories import config, write_rows
from tests.servers.arkor import PARTS, RunningService, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def secret(what: str) -> str:
    return f"{what}-{secrets.token_hex(8)}"


@dataclass
class World:
    service: RunningService
    listeners: Listeners
    secrets: dict[str, str]
    ray_token: str
    database: Database
    bucket: Any
    data: DataServer
    said: dict[str, str] = field(default_factory=dict)  # answers and outputs, by what was asked
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def ray_dir(self) -> Path:
        return Path((self.service.data_dir / "ray-temp-dir").read_text())

    def titles(self) -> list[str]:
        return list(self.service.processes().values())

    def dashboard(self, path: str, **headers: str) -> httpx.Response:
        [title] = [title for title in self.titles() if "/dashboard.py " in title]
        port = next(word for word in title.split() if word.startswith("--port=")).removeprefix("--port=")
        return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory, postgres_url, moto_s3, request) -> Iterator[World]:
    """After all has happened, while the service still runs."""
    folder = tmp_path_factory.mktemp("safe")
    known = {name: secret(name) for name in ("data-token", "hub-token", "database-password", "s3-secret", "signature")}
    rows = Path(write_rows(folder / "rows.jsonl", rows=16).removeprefix("file://")).read_bytes()
    data = DataServer(rows, known["data-token"])
    s3 = replace(moto_s3, secret_key=known["s3-secret"])
    bucket = s3.make_bucket()
    tiny = make_tiny_model(folder / "tiny", hidden=64, layers=2)
    with contextlib.contextmanager(empty_database_url)("postgresql", request, folder) as url:
        url = make_url(url).set(password=known["database-password"]).render_as_string(hide_password=False)
        environment = {
            **s3.environment,
            "ARKOR_RAY_STORAGE_URL": f"s3://{bucket}/arkor",
            "ARKOR_RAY_DATABASE_URL": url,
            "HF_TOKEN": known["hub-token"],
        }
        service = RunningService(folder / "service", models={"tiny": tiny}, environment=environment)
        database = Database(url)
        try:
            service.start()
            listeners = Listeners(service)
            here = boto3.resource("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **_keys(s3))
            made = World(service, listeners, known, _ray_token(service), database, here.Bucket(bucket), data)
            known["ray-token"] = made.ray_token
            _live(made)
            listeners.end()
            yield made
        finally:
            data.close()
            service.crash()
            database.close()


def _keys(s3: Any) -> dict[str, str]:
    return {"aws_access_key_id": s3.access_key, "aws_secret_access_key": s3.secret_key}


def _ray_token(service: RunningService) -> str:
    for pid in service.processes():
        with contextlib.suppress(OSError):
            for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if each.startswith(b"RAY_AUTH_TOKEN="):
                    return each.partition(b"=")[2].decode()
    raise AssertionError("Ray runs without a token")


def _live(world: World) -> None:
    """A job that is published, and meanwhile one whose driver is killed, and whose data is then refused to the next."""
    caller = Caller.login(world.service.url)
    known, said = world.secrets, world.said
    known["user-token"] = caller.token

    def ask(what: str, answer: httpx.Response, *statuses: int) -> Any:
        assert answer.status_code in (statuses or (200, 201)), answer.text
        said[what] = answer.text
        return answer.json() if answer.headers.get("content-type") == "application/json" else answer.text

    source = {"type": "blob", "url": f"{world.data.url}/rows.jsonl", "token": known["data-token"]}
    small = {"maxSteps": 2, "saveSteps": 1, "batchSize": 2}
    sent = {"name": "x", "config": config("", **small, datasetSource=source)}
    world.job = job = ask("submitted", caller.post("/v1/jobs", sent))["job"]
    refused = {**source, "url": f"{world.data.url}/rows.jsonl?signature={known['signature']}"}
    body = {"name": "y", "config": config("", **small, datasetSource=refused)}
    other = caller.post("/v1/jobs", body).json()["job"]
    assert world.data.asked.wait(120), world.service.log()
    for pid, title in world.service.processes().items():
        if PARTS["driver"](title) and other["id"] in title:
            os.kill(pid, signal.SIGKILL)
    world.data.let_go.set()
    for wrong in (
        {"token": known["data-token"]},
        {**source, "type": "ftp"},
        {**source, "token": [known["data-token"]]},
    ):
        body = {"name": "x", "config": config("", datasetSource=wrong)}
        ask(f"refused {sorted(wrong)} {wrong.get('type')}", caller.post("/v1/jobs", body), 400)
    with_user = f"https://someone:{known['data-token']}@127.0.0.1/x"
    ask("refused URL", caller.post("/v1/jobs", {"name": "x", "config": config(with_user)}), 400)
    issued = caller.post("/v1/tokens", {"label": "mine"}).json()
    known["revoked-token"] = issued["token"]
    assert caller.delete(f"/v1/tokens/{issued['id']}").status_code == 204
    ask("revoked", caller.get("/v1/me", headers={"Authorization": f"Bearer {issued['token']}"}), 401)
    for each in (job, other):
        said[f"events of {each['name']}"] = caller.events(each["id"]).decode()
        ask(f"logs of {each['id']}", caller.get(f"/v1/jobs/{each['id']}/logs"))
    endpoint = caller.create_endpoint(
        {"kind": "adapter", "adapter": {"kind": "final", "jobId": job["id"]}}, authMode="fixed_api_key"
    )
    key = caller.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "mine"}).json()["key"]
    known["endpoint-key"] = key["plaintext"]
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for what, opened, status in (("chat", key["plaintext"], 200), ("wrong key", known["user-token"], 401)):
        url = f"{world.service.url}/e/{endpoint['slug']}/v1/chat/completions"
        ask(what, httpx.post(url, json=chat, headers={"x-api-key": opened}, timeout=60), status)
    for path in (f"/v1/jobs/{job['id']}", "/v1/jobs", "/v1/tokens", f"/v1/endpoints/{endpoint['id']}/keys", "/readyz"):
        ask(path, caller.get(path))
    # The signature is a part of the configuration that the job's owner gets back as he sent it, and of nothing else.
    said["/v1/jobs"] = said["/v1/jobs"].replace(known["signature"], "")
    said["command line"] = _command_line(world, caller, "jobs", "get", job["id"], "--json")
    said["command line, refused"] = _command_line(world, caller, "jobs", "get", "nonesuch")


def _command_line(world: World, caller: Caller, *arguments: str) -> str:
    home = world.service.home
    (home / ".arkor").mkdir(exist_ok=True)
    stored = {"mode": "anon", "token": caller.token, "anonymousId": "x", "orgSlug": caller.org_slug}
    (home / ".arkor" / "credentials.json").write_text(json.dumps({**stored, "arkorCloudApiUrl": world.service.url}))
    (home / ".arkor" / "state.json").write_text(
        json.dumps({"orgSlug": caller.org_slug, "projectSlug": caller.project_slug, "projectId": caller.project_id})
    )
    command = [sys.executable, "-m", "arkor_ray.cli.main", *arguments]
    environment = {**world.service.environment, "ARKOR_CLOUD_API_URL": world.service.url}
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


# What each part of Ray would do for whoever asks, tried at every port.
CALLS = [
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/Init",
    "/ray.serve.ASGIService/HandleRequest",
]
PAGES = ["/api/jobs/", "/api/job_agent/jobs/", "/api/serve/applications/", "/api/v0/actors", "/nodes?view=summary"]


def test_only_loopback_is_listened_on_but_for_serves_replicas(world):
    """Those listen everywhere in Ray 2.60, and want Ray's token like the rest of it (see below)."""
    assert len(world.listeners.seen) > 10
    elsewhere = {title for (address, _), title in world.listeners.seen.items() if not is_loopback(address)}
    assert {title.split(":")[2] for title in elsewhere} <= {"ServeReplica", "SERVE_REPLICA"}, elsewhere


def test_no_part_of_ray_does_anything_without_its_token(world):
    answers = {}
    for (address, port), title in world.listeners.look().items():
        for method in CALLS:
            code = call(port, method)
            assert code != grpc.StatusCode.OK, f"{title} at {address}:{port} lets anybody {method}"
            if code == grpc.StatusCode.UNAUTHENTICATED:
                answers.setdefault(method, []).append(port)
        for page in PAGES:
            with contextlib.suppress(httpx.HTTPError):  # this port speaks something else
                answer = httpx.get(f"http://127.0.0.1:{port}{page}", timeout=5)
                # Ray's metrics ask nobody who he is and answer to any path; no other machine reaches them.
                metrics = is_loopback(address) and answer.text.startswith(("# HELP", "# TYPE"))
                assert answer.status_code != 200 or metrics, f"{title} at {address}:{port} shows {page} to anybody"
                assert not _find(world, title, answer.content)
    # These questions were the right ones: each kind of part refused its own, and answers who has the token.
    for method in ("GetAllJobInfo", "GetNodeStats", "GetCoreWorkerStats", "HandleRequest"):
        assert any(asked.endswith(f"/{method}") for asked in answers), (method, answers)
    jobs = "/ray.rpc.JobInfoGcsService/GetAllJobInfo"
    assert any(call(port, jobs, world.ray_token) == grpc.StatusCode.OK for port in answers[jobs])
    assert world.dashboard("/api/jobs/").status_code == 401
    assert world.dashboard("/api/jobs/", Authorization=f"Bearer {world.ray_token}").status_code == 200


def test_the_story_went_as_it_should(world):
    """Else there would be nothing to find below."""
    assert "training.completed" in world.said["events of x"]
    token = f"Bearer {world.secrets['data-token']}"
    assert world.data.tokens.count(token) >= 3, "the killed driver, the next one, and the job that was refused"
    failures = world.said["events of y"]
    assert "training.failed" in failures
    assert world.said["command line"].lstrip().startswith("{") and "error" in world.said["command line, refused"]


def _find(world: World, what: str, content: str | bytes) -> list[str]:
    content = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    return [f"{name} in {what}" for name, value in world.secrets.items() if value.encode() in content]


def test_no_secret_is_in_an_answer_an_event_or_what_a_command_printed(world):
    assert not [found for what, said in world.said.items() for found in _find(world, what, said)]


def test_no_secret_is_in_a_file_that_the_service_or_ray_wrote(world):
    time.sleep(1)  # what is written at the end of a job
    files = [path for root in (world.service.data_dir, world.ray_dir) for path in root.rglob("*")]
    files += [world.service.data_dir.parent / "up.log"]
    found, read = [], 0
    for path in files:
        with contextlib.suppress(OSError):  # a socket, or gone
            if path.is_file() and not path.is_symlink():
                read += 1
                found += _find(world, str(path), path.read_bytes())
    assert not found
    assert read > 50 and any("job-driver" in path.name for path in files)


def test_no_secret_is_in_a_command_line(world):
    titles = world.titles()
    assert len(titles) > 10
    assert not [found for title in titles for found in _find(world, title[:80], title)]


def test_ray_shows_no_secret_even_to_who_has_its_token(world):
    for path in ("/api/jobs/", "/api/serve/applications/", "/api/v0/actors?detail=1", "/api/v0/runtime_envs?detail=1"):
        answer = world.dashboard(path, Authorization=f"Bearer {world.ray_token}")
        assert answer.status_code == 200 and not _find(world, path, answer.content)
    assert world.job["id"] in world.dashboard("/api/jobs/", Authorization=f"Bearer {world.ray_token}").text


def test_no_secret_is_in_the_storage(world):
    objects = list(world.bucket.objects.all())
    assert any("adapter_model" in each.key for each in objects)
    assert not [found for each in objects for found in _find(world, each.key, each.key + str(each.get()["Metadata"]))]
    assert not [found for each in objects for found in _find(world, each.key, each.get()["Body"].read())]


def test_no_secret_is_in_the_database(world):
    """Tokens and keys are there as hashes; the data set's token is gone once the rows are stored, or the job has ended."""

    def clean() -> list[str]:
        found = []
        with world.database.read() as session:
            for table in inspect(session.connection()).get_table_names():
                rows = session.execute(text(f'SELECT * FROM "{table}"')).all()
                content = str(rows).replace(world.secrets["signature"], "")  # of the URL that the job's owner gave
                found += _find(world, table, content)
        return found

    wait_for(lambda: not clean(), 10, "secrets stay in the database", lambda: str(clean()))
    with world.database.read() as session:
        assert session.execute(text("SELECT count(*) FROM tokens")).scalar_one() >= 2


def test_only_the_owner_reads_the_data_directory(world):
    assert world.service.data_dir.stat().st_mode & 0o077 == 0 and world.ray_dir.stat().st_mode & 0o077 == 0
