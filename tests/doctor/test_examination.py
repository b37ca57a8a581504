"""The whole of it: before anything was started, with the base install alone, with settings that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arkor_ray.doctor import examination, gpu, packages
from arkor_ray.doctor.examination import Subject, checks_of, examine
from arkor_ray.doctor.findings import Status
from arkor_ray.settings import Settings

# An interpreter in which only the base install can be imported.
BASE_INSTALL = """
import json, sys
for name in ("ray", "torch", "sqlalchemy", "alembic", "fastapi", "pydantic_settings", "boto3", "psycopg", "deepspeed"):
    sys.modules[name] = None
from arkor_ray.doctor import packages
real = packages.installed_version
base = ("httpx", "pydantic", "pyyaml", "rich", "typer")
packages.installed_version = lambda name: real(name) if name in base else None
from arkor_ray.cli.main import app
app(["doctor", "--json", "--data-dir", sys.argv[1]])
"""


@pytest.fixture
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that importing the heavy packages takes."""
    monkeypatch.setattr(examination, "HEAVY", ())
    monkeypatch.setattr(gpu, "read_driver", lambda: None)


@pytest.mark.usefixtures("no_imports")
def test_before_the_first_start_all_is_well_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARKOR_RAY_CACHE_DIR", str(tmp_path / "cache"))
    found = examine(Subject(tmp_path / "data")).findings
    assert {finding.name for finding in found} >= {
        "settings", "python", "packages", "gpu", "disk", "open files", "database", "storage", "access", "api"
    }  # fmt: skip
    assert [finding for finding in found if finding.status is Status.FAIL] == []
    assert list(tmp_path.iterdir()) == []


def test_the_base_install_is_examined_and_told_what_a_service_lacks(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, str(tmp_path / "data")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    said = {check["name"]: check for check in json.loads(run.stdout)["checks"]}
    assert said["settings"]["status"] == said["packages"]["status"] == "warning"
    assert "train (lacks" in said["packages"]["found"]
    assert said["packages"]["remedy"] == said["settings"]["remedy"] == "pip install 'arkor-ray[all]'"
    assert said["gpu"]["found"].endswith("torch is not installed")
    assert not {"database", "storage", "api"} & set(said)


@pytest.mark.usefixtures("no_imports")
def test_a_wrong_setting_is_named_and_the_machine_is_looked_at_all_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARKOR_RAY_STORAGE_URL", "gs://bucket")
    found = {finding.name: finding for finding in examine(Subject(tmp_path)).findings}
    assert found["settings"].status is Status.FAIL
    assert "ARKOR_RAY_STORAGE_URL" in found["settings"].found
    assert "disk" in found and "database" not in found


@pytest.mark.usefixtures("no_imports")
def test_no_secret_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", "postgresql://arkor:hunter-two@127.0.0.1:1/arkor")
    monkeypatch.setattr(packages, "check_installation", lambda: 1 / len("hunter-two"[:0]))
    found = examine(Subject(tmp_path)).findings
    assert "hunter-two" not in repr(found)
    database = next(finding for finding in found if finding.name == "database")
    assert database.status is Status.FAIL
    assert next(f for f in found if f.name == "packages").found.startswith("ZeroDivisionError")


def test_nodes_are_asked_only_where_a_ray_is_named(tmp_path: Path):
    settings = Settings.load(data_dir=tmp_path)
    names = [[check.name for check in checks_of(Subject(tmp_path, address), settings)] for address in (None, "h:6379")]
    assert names[1] == [*names[0], "ray"]


def test_every_check_says_what_to_do_when_it_hangs(tmp_path: Path):
    for check in checks_of(Subject(tmp_path, "h:6379"), Settings.load(data_dir=tmp_path)):
        assert check.hanging and check.limit_s <= 200
