"""The database: whether it answers, how soon, in which state its tables are, and whether it can be written to."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from arkor_ray.doctor.findings import Finding, fail, ok, warning
from arkor_ray.doctor.machine import nearest_existing
from arkor_ray.placeholders import shown_database_url

if TYPE_CHECKING:
    from arkor_ray.db.session import Database

SLOW_S = 0.05
NAME = "database"


def check_database(url: str) -> Iterator[Finding]:
    from sqlalchemy import make_url

    from arkor_ray.db.session import Database

    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        yield _not_made_yet(Path(parsed.database or ""))
        return
    shown = shown_database_url(url)
    try:
        db = Database(url)
    except ModuleNotFoundError as error:
        yield fail(NAME, f"{shown} needs {error.name}, which is not installed", "pip install 'arkor-ray[postgres]'")
        return
    try:
        yield from _check_open(db, shown)
    finally:
        db.close()


def _not_made_yet(path: Path) -> Finding:
    folder = nearest_existing(path.parent)
    if os.access(folder, os.W_OK):
        return ok(NAME, f"{path} is not there yet; `arkor-ray up` makes it")
    return fail(NAME, f"{path} cannot be made: {folder} is not writable", f"chown or chmod {folder}, or set --data-dir")


def _check_open(db: Database, shown: str) -> Iterator[Finding]:
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    from arkor_ray.db.session import reason

    try:
        with db.engine.connect() as connection:
            sqlite = connection.dialect.name == "sqlite"
            version = connection.scalar(text("SELECT sqlite_version()" if sqlite else "SHOW server_version"))
            forgets = not sqlite and connection.scalar(text("SHOW synchronous_commit")) == "off"
            times = []
            for _ in range(5):
                begun = time.perf_counter()
                connection.scalar(text("SELECT 1"))
                times.append(time.perf_counter() - begun)
    except SQLAlchemyError as error:
        yield fail(NAME, f"{shown} cannot be opened: {reason(error)}", "check ARKOR_RAY_DATABASE_URL and that it runs")
        return
    latency = median(times)
    said = f"{shown}, {'SQLite' if sqlite else 'PostgreSQL'} {version}, {1000 * latency:.1f} ms a query"
    if latency > SLOW_S:
        yield warning(NAME, said, "put the database nearer: every event of a job waits for it")
    else:
        yield ok(NAME, said)
    if forgets:
        yield fail(
            NAME, "synchronous_commit is off: its crash would take back events and jobs that were acknowledged",
            "set synchronous_commit to on, its default, for this server or for the service's user",
        )  # fmt: skip
    yield from check_tables(db)


def check_tables(db: Database) -> Iterator[Finding]:
    """Migrated to this version, and writable."""
    from sqlalchemy.exc import SQLAlchemyError

    from arkor_ray.db.session import reason

    try:
        state, revision, head = migration_state(db)
    except SQLAlchemyError as error:
        yield fail("migrations", reason(error), "the database's user needs to read its own tables")
        return
    if state == "none":
        yield ok("migrations", "no tables yet; `arkor-ray up` makes them")
        return
    if state == "unknown":
        yield fail(
            "migrations", f"at {revision}, which this version does not know", "install the newer arkor-ray here too"
        )
        return
    if state == "behind":
        yield warning(
            "migrations", f"at {revision}, and this version needs {head}", "`arkor-ray up` migrates at its start"
        )
    else:
        yield ok("migrations", f"at {revision}, the newest")
    try:
        _try_to_write(db)
    except SQLAlchemyError as error:
        yield fail(
            "database writes", f"refused: {reason(error)}",
            "connect to the primary, as a user that may INSERT, UPDATE and DELETE; for SQLite, check the disk",
        )  # fmt: skip
    else:
        yield ok("database writes", "accepted")


def migration_state(db: Database) -> tuple[str, str | None, str | None]:
    """("none" | "behind" | "head" | "unknown", the database's revision, this version's)."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from arkor_ray.db import migrations

    scripts = ScriptDirectory(str(Path(str(migrations.__file__)).parent))
    with db.engine.connect() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    head = scripts.get_current_head()
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is None:
        return "none", None, head
    if revision not in known:
        return "unknown", revision, head
    return ("head" if revision == head else "behind"), revision, head


def _try_to_write(db: Database) -> None:
    """A row that is never committed."""
    from arkor_ray.db.tables import LeaseRow
    from arkor_ray.schemas.base import utcnow

    class Undo(Exception):
        pass

    try:
        with db.write() as session:
            session.add(LeaseRow(name=f"doctor-{uuid.uuid4()}", holder="doctor", expires_at=utcnow()))
            session.flush()
            raise Undo
    except Undo:
        pass
