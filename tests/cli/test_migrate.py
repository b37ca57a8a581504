"""`arkor-ray migrate`: the schema and nothing else, with a database that may come up later."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect, text
from typer.testing import CliRunner

from arkor_ray.cli import migrate
from arkor_ray.cli.main import app
from arkor_ray.db.session import Database
from arkor_ray.errors import ServiceUnavailableError


@pytest.fixture
def database_url(tmp_path, monkeypatch) -> str:
    url = f"sqlite:///{tmp_path / 'service.db'}"
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", url)
    monkeypatch.chdir(tmp_path)
    return url


def test_the_schema_is_there_afterwards_and_a_second_time_changes_nothing(database_url, tmp_path):
    for _ in range(2):
        done = CliRunner().invoke(app, ["migrate"])
        assert done.exit_code == 0, done.output
    assert {"jobs", "events", "leases", "alembic_version"} <= set(
        inspect(Database(database_url).engine).get_table_names()
    )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("service.db")] == []


def test_a_schema_of_a_newer_version_stays_and_that_is_said(database_url):
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 0
    db = Database(database_url)
    with db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    done = CliRunner().invoke(app, ["migrate"])
    assert done.exit_code == 0
    assert "has revision 9999 of the schema, which a newer arkor-ray made: it stays as it is" in done.output


def test_it_waits_for_a_database_that_does_not_answer_yet(database_url, monkeypatch):
    answers = iter([ServiceUnavailableError("ARKOR_RAY_DATABASE_URL: refused"), None])

    def check(settings):
        if error := next(answers):
            raise error

    monkeypatch.setattr("arkor_ray.service.check_database", check)
    monkeypatch.setattr(migrate, "RETRY_S", 0.01)
    done = CliRunner().invoke(app, ["migrate", "--wait", "30"])
    assert done.exit_code == 0
    assert "waiting: ARKOR_RAY_DATABASE_URL: refused" in done.output


def test_without_waiting_a_database_that_is_away_is_one_line_without_its_password(monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", "postgresql://arkor:hunter2hunter2@127.0.0.1:1/arkor")
    done = CliRunner().invoke(app, ["migrate"])
    assert done.exit_code == 1
    assert done.output.startswith("error: ARKOR_RAY_DATABASE_URL: ")
    assert "cannot be opened" in done.output
    assert "hunter2" not in done.output
