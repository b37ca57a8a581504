"""The operator's way to a first token, against a real database."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from arkor_ray.cli import main
from arkor_ray.cli.tokens import app
from arkor_ray.db import identities
from arkor_ray.db.session import Database


def test_a_token_issued_on_the_machine_opens_the_service(tmp_path):
    done = CliRunner().invoke(app, ["issue", "laptop", "--org", "acme", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    db = Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    with db.read() as session:
        caller = identities.authenticate(session, done.stdout.strip().splitlines()[-1])
    assert caller.identity_id


def test_a_bad_organisation_is_refused_by_name(tmp_path):
    done = CliRunner().invoke(app, ["issue", "laptop", "--org", "Not A Slug", "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "orgSlug" in str(done.exception)


def test_the_database_is_named_and_whether_it_has_just_been_made(tmp_path):
    issue = ["issue", "laptop", "--org", "acme", "--data-dir", str(tmp_path / "data"), "--json"]
    first, second = (CliRunner().invoke(app, issue) for _ in range(2))
    for done in (first, second):
        assert f"Database: sqlite:///{tmp_path}/data/arkor.db\n" in done.stderr
        assert list(json.loads(done.stdout)) == ["token", "org", "label"]
    assert "warning: there was none" in first.stderr
    assert "warning" not in second.stderr
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_database_that_is_away_is_one_line_without_its_password(monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", "postgresql://arkor:hunter2hunter2@127.0.0.1:1/arkor")
    done = CliRunner().invoke(main.app, ["tokens", "issue", "laptop", "--org", "acme"])
    assert done.exit_code == 1
    assert done.output.startswith("error: ARKOR_RAY_DATABASE_URL: ") and done.output.count("\n") == 1
    assert "cannot be opened" in done.output and "hunter2" not in done.output


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize("command", [["up"], ["tokens", "issue", "laptop", "--org", "acme"]])
def test_a_data_directory_that_cannot_be_is_one_line_that_names_the_option(command, place, tmp_path):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main.app, [*command, "--data-dir", str(tmp_path / place)], env={"ARKOR_RAY_PORT": "0"})
    assert done.exit_code == 1
    assert f"error: --data-dir {tmp_path / place}: nothing can be kept there (" in done.stderr
    assert "ARKOR_RAY_DATA_DIR" in done.stderr and done.stderr.count("\n") == 1
