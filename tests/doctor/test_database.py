"""The check of the database, on real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from arkor_ray.db.session import Database
from arkor_ray.doctor.database import check_database
from arkor_ray.doctor.findings import Finding, Status
from arkor_ray.embedded import free_ports
from tests.db.databases import both, empty_database_url, migrated_database


@pytest.fixture
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    yield from migrated_database(getattr(request, "param", "sqlite"), request, tmp_path)


@pytest.fixture
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    yield from migrated_database("postgresql", request, tmp_path)


def by_name(url: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_database(url)}


def execute(db: Database, statement: str) -> None:
    with db.engine.begin() as connection:
        connection.execute(text(statement))


@both
def test_a_migrated_database_is_well_and_nothing_is_left_in_it(db: Database):
    found = by_name(db.url)
    assert {name: f.status for name, f in found.items() if name != "database"} == {
        "migrations": Status.OK, "database writes": Status.OK
    }  # fmt: skip
    assert "ms a query" in found["database"].found
    with db.read() as session:
        assert session.scalar(text("SELECT count(*) FROM leases")) == 0


def test_one_whose_crash_would_take_back_what_it_acknowledged_is_told(postgres: Database):
    forgetful = make_url(postgres.url).update_query_dict({"options": "-c synchronous_commit=off"})
    told = [f for f in check_database(forgetful.render_as_string(hide_password=False)) if f.status is Status.FAIL]
    assert [("synchronous_commit is off" in f.found, "default" in f.remedy) for f in told] == [(True, True)]
    assert not [f for f in check_database(postgres.url) if f.status is Status.FAIL]


def test_one_that_is_not_there_yet_is_not_made(tmp_path: Path):
    (finding,) = check_database(f"sqlite:///{tmp_path / 'a' / 'arkor.db'}")
    assert (finding.status, "arkor-ray up" in finding.found) == (Status.OK, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["postgresql"])
def test_an_empty_one_has_its_tables_to_come(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    for url in empty_database_url(kind, request, tmp_path):
        found = by_name(url)
        assert found["migrations"].status is Status.OK
        assert "no tables yet" in found["migrations"].found


@both
@pytest.mark.parametrize(
    ("revision", "status", "word"),
    [
        ("0001", Status.WARNING, "arkor-ray up"),
        ("9999", Status.WARNING, "newer arkor-ray"),
        ("27c6a30d7c24", Status.FAIL, "another program's database"),
    ],
)
def test_another_revision_is_told_with_what_to_do(db: Database, revision: str, status: Status, word: str):
    execute(db, f"UPDATE alembic_version SET version_num = '{revision}'")
    found = by_name(db.url)["migrations"]
    assert (found.status, word in found.remedy) == (status, True)
    assert revision in found.found


def test_one_that_takes_no_writes_fails(postgres: Database):
    name = make_url(postgres.url).database
    execute(postgres, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    (finding,) = check_database(postgres.url)
    assert (finding.status, "read-only" in finding.found, "off" in finding.remedy) == (Status.FAIL, True, True)
    any_server = make_url(postgres.url).update_query_dict({"target_session_attrs": "any"})
    found = by_name(any_server.render_as_string(hide_password=False))
    assert found["database"].status is not Status.FAIL
    assert (found["database writes"].status, "read-only" in found["database writes"].found) == (Status.FAIL, True)


@pytest.mark.parametrize("form", ["arkor:secret@127.0.0.1:{}/arkor", "arkor@127.0.0.1:{}/arkor?password=secret"])
def test_one_that_is_away_is_named_without_its_password(form: str):
    (finding,) = check_database("postgresql://" + form.format(*free_ports(1)))
    assert (finding.status, "ARKOR_RAY_DATABASE_URL" in finding.remedy) == (Status.FAIL, True)
    assert "refused" in finding.found and "secret" not in finding.found


def test_a_url_whose_servers_and_ports_are_not_as_many_is_told():
    (finding,) = check_database("postgresql://arkor:secret@one,two/arkor?port=1,2,3")
    assert (finding.status, "HOST1:5432,HOST2:5432" in finding.remedy) == (Status.FAIL, True)
    assert "ports" in finding.found and "secret" not in finding.found


def test_a_file_that_is_no_database_fails(tmp_path: Path):
    (tmp_path / "arkor.db").write_text(
        "this is no database, whatever its name says, and long enough to be looked at" * 20
    )
    found = by_name(f"sqlite:///{tmp_path / 'arkor.db'}")
    assert found["database"].status is Status.FAIL
    assert "not a database" in found["database"].found
