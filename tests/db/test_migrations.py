"""The schema that migrations make is the one that tables.py declares, however many processes make it at once."""

from __future__ import annotations

import ast
import inspect as source
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import inspect, text

from arkor_ray.db.revisions import SCRIPTS
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


def test_a_schema_of_a_newer_version_is_left_as_it_is_and_logged(db: Database, caplog) -> None:
    """Processes of the version before outlive the migration, and `helm rollback` starts them again."""
    with db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = db.migrate()
    assert (found.state, found.found) == ("newer", "9999")
    assert "The database is at revision 9999, newer than this version's" in caplog.text
    with db.read() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_a_database_of_another_program_is_refused(db: Database) -> None:
    with db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '27c6a30d7c24'"))
    with pytest.raises(CommandError, match="27c6a30d7c24"):
        db.migrate()


def test_revisions_are_numbered_and_only_add() -> None:
    """By the number an older version sees that a schema is newer; and what it reads must still be there."""
    revisions = list(ScriptDirectory(str(SCRIPTS)).walk_revisions())[::-1]
    assert [each.revision for each in revisions] == [f"{n:04}" for n in range(1, len(revisions) + 1)]
    for each in revisions:
        calls = [
            node for node in ast.walk(ast.parse(source.getsource(each.module.upgrade))) if isinstance(node, ast.Call)
        ]
        done = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        assert not {name for name in done if name.startswith(("drop_", "rename_"))}, each.revision


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
