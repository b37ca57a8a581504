"""The schema that migrations make is the one that tables.py declares, however many processes make it at once."""

from __future__ import annotations

import subprocess
import sys

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base

MIGRATE = "import sys; from arkor_ray.db.session import Database; d = Database(sys.argv[1]); d.migrate(); d.close()"


def test_migrations_make_exactly_the_declared_tables(db: Database) -> None:
    with db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_names_of_constraints_are_those_of_the_declaration(db: Database) -> None:
    """Later revisions change constraints by name, on both databases; comparing metadata overlooks most names."""
    with db.engine.connect() as connection:
        made = inspect(connection)
        for table in Base.metadata.sorted_tables:
            foreign_keys = {key["name"] for key in made.get_foreign_keys(table.name)}
            assert foreign_keys == {str(key.name) for key in table.foreign_key_constraints}
            assert made.get_pk_constraint(table.name)["name"] == table.primary_key.name


def test_migrating_again_changes_nothing(db: Database) -> None:
    with db.write() as session:
        session.execute(text("INSERT INTO leases (name, holder, expires_at) VALUES ('x', 'y', '2026-01-01 00:00:00')"))
    db.migrate()
    with db.read() as session:
        assert session.scalar(text("SELECT holder FROM leases")) == "y"


def test_many_processes_may_migrate_at_once(database_url: str) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", MIGRATE, database_url]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    database = Database(database_url)
    with database.engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) >= set(Base.metadata.tables)
    database.close()


def test_failed_migration_leaves_nothing_behind(database_url: str) -> None:
    """A half-made schema would fail every later start; here a table of another program is in the way."""
    database = Database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE checkpoints (x INTEGER)"))
    try:
        database.migrate()
    except Exception as error:
        assert "checkpoints" in str(error)
    else:
        raise AssertionError("migrate() overlooked a table in its way")
    with database.engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"checkpoints"}
    database.close()
