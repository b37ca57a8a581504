from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from arkor_ray.cli.main import app
from arkor_ray.doctor import examination
from arkor_ray.doctor.findings import Examination, Finding, fail, ok, warning

WELL = [ok("python", "Python 3.11"), warning("access", "to [anybody]", "set ARKOR_RAY_ANONYMOUS=0")]


def doctor(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *options: str):
    monkeypatch.setattr(examination, "examine", lambda subject: Examination(findings))
    return CliRunner().invoke(app, ["doctor", *options])


def test_each_finding_is_a_line_with_its_remedy_below(monkeypatch):
    done = doctor(monkeypatch, WELL)
    assert done.exit_code == 0
    assert done.stdout == (
        "ok      python: Python 3.11\nwarning access: to [anybody]\n        → set ARKOR_RAY_ANONYMOUS=0\n"
    )


def test_one_failure_is_exit_code_1(monkeypatch):
    assert doctor(monkeypatch, [*WELL, fail("disk", "full", "make room")]).exit_code == 1


def test_json_has_every_finding(monkeypatch):
    done = doctor(monkeypatch, [fail("disk", "full", "make room")], "--json")
    said = {"name": "disk", "status": "fail", "found": "full", "remedy": "make room"}
    assert json.loads(done.stdout) == {"ok": False, "checks": [said]}
    assert done.exit_code == 1


def test_a_server_that_hangs_does_not_hang_the_end_of_the_program(tmp_path):
    """A connection that is taken and never answered, in a program that has real threads to end."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        code = f"""
import sys
from arkor_ray.doctor import examination
examination.HEAVY, examination.STORAGE_S, examination.DATABASE_S = (), 2.0, 2.0
from arkor_ray.cli.main import app
app(["doctor", "--json", "--data-dir", {str(tmp_path)!r}])
"""
        environment = {
            "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path),
            "ARKOR_RAY_STORAGE_URL": "s3://bucket/x", "AWS_ACCESS_KEY_ID": "abc", "AWS_SECRET_ACCESS_KEY": "the-secret",
            "ARKOR_RAY_S3_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    said = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, said["storage"]["found"]) == (1, "no answer within 2 s")
    assert said["database"]["status"] == "ok"
    assert "the-secret" not in done.stdout + done.stderr
