"""Opening the database: transactions that are all or nothing, writers that wait for each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from arkor_ray.db.session import Database
from arkor_ray.db.tables import OrgRow


def test_write_commits(db: Database) -> None:
    with db.write() as session:
        session.add(OrgRow(slug="a", name="A"))
    assert slugs(db) == ["a"]


def test_write_rolls_back_on_any_exception(db: Database) -> None:
    with pytest.raises(KeyboardInterrupt), db.write() as session:
        session.add(OrgRow(slug="a", name="A"))
        session.flush()
        raise KeyboardInterrupt
    assert slugs(db) == []


def test_reader_does_not_wait_for_a_writer_and_sees_nothing_unfinished(db: Database) -> None:
    with db.write() as session:
        session.add(OrgRow(slug="a", name="A"))
        session.flush()
        assert slugs(db) == []
    assert slugs(db) == ["a"]


def test_writers_that_read_before_they_write_do_not_fail_each_other(db: Database) -> None:
    """A deferred transaction on SQLite would fail with "database is locked" as soon as two upgrade at once."""
    workers, each = 8, 10
    together = threading.Barrier(workers)

    def add(worker: int) -> None:
        together.wait()
        for number in range(each):
            with db.write() as session:
                session.scalar(select(func.count()).select_from(OrgRow))
                session.add(OrgRow(slug=f"{worker}-{number}", name="A"))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(add, range(workers)))
    assert len(slugs(db)) == workers * each


def test_times_come_back_aware_and_in_utc(db: Database) -> None:
    with db.write() as session:
        session.add(OrgRow(slug="a", name="A"))
    with db.read() as session:
        created = session.scalars(select(OrgRow)).one().created_at
    assert created.utcoffset() is not None and not created.utcoffset()


def slugs(db: Database) -> list[str]:
    with db.read() as session:
        return list(session.scalars(select(OrgRow.slug).order_by(OrgRow.slug)))


def test_errors_of_the_database_do_not_show_what_was_to_be_stored(db: Database) -> None:
    """They are logged where a database is away, and a job's row holds its data set's token."""
    with pytest.raises(SQLAlchemyError) as raised, db.write() as session:
        session.execute(text("INSERT INTO nosuch (token) VALUES (:token)"), {"token": "hf_secret"})
    assert "nosuch" in str(raised.value) and "hf_secret" not in str(raised.value)


def test_a_file_with_its_journal_folded_in_can_be_copied_alone(tmp_path) -> None:
    url = f"sqlite:///{tmp_path / 'service.db'}"
    killed = Database(url)  # its connections stay open, as those of a process that was killed
    killed.migrate()
    with killed.write() as session:
        session.add(OrgRow(slug="a", name="A"))
    journal = tmp_path / "service.db-wal"
    assert journal.stat().st_size
    Database(url).fold_journal()
    assert journal.stat().st_size == 0
    (tmp_path / "copy.db").write_bytes((tmp_path / "service.db").read_bytes())
    assert slugs(Database(f"sqlite:///{tmp_path / 'copy.db'}")) == ["a"]


def test_a_journal_that_somebody_reads_is_left_to_them(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("arkor_ray.db.session.FOLD_MS", 10)
    db = Database(f"sqlite:///{tmp_path / 'service.db'}")
    db.migrate()
    with db.read() as session:
        session.execute(select(OrgRow)).all()
        with db.write() as other:
            other.add(OrgRow(slug="a", name="A"))
        db.fold_journal()
    assert slugs(db) == ["a"]
