"""The scripts that the chart's hooks run in the image: the bucket of a try-out, and `helm test`."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest

from tests.deploy.chart import CHART, install

SCRIPTS = CHART / "scripts"


def run(script: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(SCRIPTS / script))


def check_install(monkeypatch: pytest.MonkeyPatch, api: str, head: str) -> None:
    """`helm test`, which does not wait here."""
    run("check_install.py", monkeypatch, API=f"http://{api}", HEAD=head, WAIT="0")


@contextmanager
def answering(status: int) -> Iterator[str]:
    """HOST:PORT of a server whose every answer has this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("kind", "component", "script"), [("Job", "bucket", "make_bucket.py"), ("Pod", "test", "check_install.py")]
)
def test_the_image_runs_them_as_they_are_here_with_every_variable_they_read(kind, component, script):
    found = install("everything").the(kind, component)
    [container] = (found["spec"].get("template", found)["spec"])["containers"]
    source = (SCRIPTS / script).read_text()
    assert container["command"] == ["python", "-c", source]
    variables = {each["name"] for each in container["env"]}
    assert {part.split('"')[1] for part in source.split("os.environ[")[1:]} <= variables


def test_the_bucket_is_made_once(moto_s3, monkeypatch):
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu-central-1"}
    for _ in range(2):
        run("make_bucket.py", monkeypatch, ENDPOINT=moto_s3.endpoint_url, BUCKET="try-out", **credentials)
    client = boto3.client("s3", endpoint_url=moto_s3.endpoint_url)
    assert "try-out" in [each["Name"] for each in client.list_buckets()["Buckets"]]


@pytest.mark.parametrize("status", [401, 403])
def test_an_install_whose_api_is_ready_and_whose_dashboard_asks_for_a_token_passes(status, monkeypatch):
    with answering(200) as api, answering(status) as head:
        check_install(monkeypatch, api, head)


def test_a_dashboard_that_cannot_be_reached_passes_too(monkeypatch):
    with answering(200) as api, answering(401) as gone:
        pass
    with answering(200) as api:
        check_install(monkeypatch, api, gone)


@pytest.mark.parametrize(
    ("ready", "dashboard", "words"),
    [
        (503, 401, "is not ready: 503"),
        (200, 200, "answers 200 without a token"),
        (200, 500, "answers 500 without a token"),
    ],
)
def test_an_open_dashboard_or_an_api_that_is_not_ready_fails(ready, dashboard, words, monkeypatch):
    with answering(ready) as api, answering(dashboard) as head, pytest.raises(SystemExit) as caught:
        check_install(monkeypatch, api, head)
    assert words in str(caught.value)


def test_a_head_whose_name_leads_nowhere_fails(monkeypatch):
    with answering(200) as api, pytest.raises(OSError):
        check_install(monkeypatch, api, "no-such-head.invalid:8265")
