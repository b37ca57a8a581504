"""The operator's collection of garbage, on a real database and a real folder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from arkor_ray.cli.main import app
from arkor_ray.db.session import Database
from arkor_ray.storage import layout
from arkor_ray.storage.local import LocalStore
from tests.db.databases import migrated_database
from tests.jobs.stored_jobs import PassingStore, StoredJobs


@pytest.fixture
def db(request, tmp_path):
    yield from migrated_database("sqlite", request, tmp_path)


@pytest.fixture
def ended(db: Database, tmp_path: Path, monkeypatch) -> StoredJobs:
    """A job that ended just now, with what it left grown old, under a retention of nothing."""
    monkeypatch.setenv("ARKOR_RAY_RESUME_STATE_DAYS", "0")
    jobs = StoredJobs(db, PassingStore(LocalStore(tmp_path / "storage")))
    job_id = jobs.create()
    jobs.commit_checkpoint(job_id, 10)
    jobs.commit_checkpoint(job_id, None)
    jobs.end(job_id)
    (tmp_path / "storage" / "notes.txt").write_bytes(b"mine")
    for path in (tmp_path / "storage").rglob("*"):
        os.utime(path, (time.time() - 5 * 86_400,) * 2)
    return jobs


def gc(tmp_path: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["storage", "gc", "--data-dir", str(tmp_path), *options])


def test_a_dry_run_says_what_the_real_run_does(ended, tmp_path):
    before = ended.stored()
    would = gc(tmp_path, "--dry-run")
    assert would.exit_code == 0, would.output
    assert ended.stored() == before
    did = gc(tmp_path)
    assert did.exit_code == 0, did.output
    assert would.stdout.replace("WOULD GO", "REMOVED ") == did.stdout
    lines = [line.split("  ") for line in did.stdout.splitlines()]
    assert ["resume states of ended jobs", "2", "6 bytes", "5 d ago"] in [[c.strip() for c in x if c] for x in lines]
    assert "'notes.txt'" in did.stdout
    assert not [key for key in ended.stored() if key.startswith(("resume/", "datasets/"))]
    assert "nothing to remove" in gc(tmp_path).stdout


def test_json_has_the_same_figures(ended, tmp_path):
    report = json.loads(gc(tmp_path, "--json").stdout)
    assert report["removed"]["resume_state"] == {**report["removed"]["resume_state"], "objects": 2, "bytes": 6}
    assert report["total"]["objects"] == 4
    assert (report["dryRun"], report["problems"], report["unknownKeys"]["examples"]) == (False, [], ["notes.txt"])


def test_a_database_that_is_not_there_is_not_made(ended, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    refused = CliRunner().invoke(
        app,
        ["storage", "gc", "--unknown-jobs", "--data-dir", str(elsewhere)],
        env={"ARKOR_RAY_STORAGE_URL": (tmp_path / "storage").as_uri()},
    )
    assert refused.exit_code == 1
    assert "There is no arkor-ray database" in refused.stderr
    assert "--data-dir" in refused.stderr
    assert not elsewhere.exists()


def test_an_empty_database_is_no_database_of_the_service(ended, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "arkor.db").touch()
    refused = gc(tmp_path / "elsewhere")
    assert (refused.exit_code, "There is no arkor-ray database" in refused.stderr) == (1, True)


def test_a_fault_in_the_middle_is_told_and_ends_with_code_1(ended, tmp_path, monkeypatch):
    from arkor_ray.errors import StorageError

    def refuse(self, key):
        raise StorageError("the disk is read-only")

    monkeypatch.setattr(LocalStore, "delete", refuse)
    failed = gc(tmp_path)
    assert failed.exit_code == 1
    assert "it ended early: the disk is read-only" in failed.stderr


def test_adapters_go_only_under_a_limit(ended, tmp_path, monkeypatch):
    adapters = {key for key in ended.stored() if key.startswith("adapters/")}
    gc(tmp_path)
    assert ended.stored() == {*adapters, "notes.txt"}
    monkeypatch.setenv("ARKOR_RAY_ADAPTER_DAYS", "0.00001")
    time.sleep(1)
    gc(tmp_path)
    assert ended.stored() == {key for key in adapters if layout.folder_of(key).step is None} | {"notes.txt"}
