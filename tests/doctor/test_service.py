from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arkor_ray.doctor.findings import Finding, Status
from arkor_ray.doctor.service import check_api, check_exposure
from arkor_ray.embedded import free_ports
from arkor_ray.settings import Settings


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """The port of an API that says this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def look(tmp_path: Path, port: int, instance: dict[str, Any] | None = None) -> Finding:
    (finding,) = check_api(Settings.load(data_dir=tmp_path, port=port), instance)
    return finding


def readyz(**checks: str) -> bytes:
    return json.dumps({"status": "x", "checks": checks}).encode()


def test_a_service_that_is_ready_is_well(tmp_path: Path):
    with answering(200, readyz(database="ok")) as port:
        assert look(tmp_path, port).status is Status.OK


def test_one_that_is_not_ready_says_which_part(tmp_path: Path):
    with answering(503, readyz(database="ok", storage="does not answer")) as port:
        finding = look(tmp_path, port)
    assert (finding.status, finding.found.endswith("not ready: storage does not answer")) == (Status.FAIL, True)


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[1]", b'{"checks": 1}'])
def test_a_stranger_on_our_port_is_told(tmp_path: Path, body: bytes):
    with answering(200, body) as port:
        finding = look(tmp_path, port)
    assert (finding.status, "ARKOR_RAY_PORT" in finding.remedy) == (Status.WARNING, True)


def test_none_runs_is_no_fault_unless_one_should(tmp_path: Path):
    (port,) = free_ports(1)
    assert look(tmp_path, port).status is Status.OK
    dead = look(tmp_path, port, {"pid": 7, "url": f"http://127.0.0.1:{port}"})
    assert (dead.status, "pid 7" in dead.found) == (Status.FAIL, True)


def test_the_instance_that_runs_here_is_asked_wherever_it_listens(tmp_path: Path):
    with answering(200, readyz()) as port:
        finding = look(tmp_path, free_ports(1)[0], {"pid": 7, "url": f"http://127.0.0.1:{port}"})
    assert finding.status is Status.OK
    assert look(tmp_path, 1, {"pid": 7, "url": None}).status is Status.WARNING


@pytest.mark.parametrize(
    ("host", "anonymous", "status"),
    [
        ("127.0.0.1", True, Status.OK), ("localhost", True, Status.OK), ("::1", True, Status.OK),
        ("0.0.0.0", True, Status.WARNING), ("10.1.2.3", True, Status.WARNING), ("0.0.0.0", False, Status.OK),
    ],
)  # fmt: skip
def test_tokens_for_anybody_are_for_this_machine_alone(host: str, anonymous: bool, status: Status):
    assert check_exposure(host, anonymous).status is status
