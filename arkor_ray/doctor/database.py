"""The database: whether it answers, how soon, in which state its tables are, and whether it can be written to."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
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
CHECK_URL = "check ARKOR_RAY_DATABASE_URL and that it runs"
SEVERAL = "postgresql://USER:PASSWORD@HOST1:5432,HOST2:5432/DATABASE"


def check_database(url: str) -> Iterator[Finding]:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from arkor_ray.db.session import Database
    from arkor_ray.db.url import for_sqlalchemy

    parsed = make_url(for_sqlalchemy(url))
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        yield _not_made_yet(Path(parsed.database or ""))
        return
    shown = shown_database_url(url)
    try:
        db = Database(url)
    except ModuleNotFoundError as error:
        yield fail(NAME, f"{shown} needs {error.name}, which is not installed", "pip install 'arkor-ray[postgres]'")
        return
    except ArgumentError as error:
        yield fail(NAME, f"{shown} cannot be read: {error}", f"as in {SEVERAL}")
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
        yield _read_only(db.url, shown) or fail(NAME, f"{shown} cannot be opened: {reason(error)}", CHECK_URL)
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


def _read_only(url: str, shown: str) -> Finding | None:
    """What is wrong with servers that answer and take no writes, which the service passes by; None if that is not it."""
    from sqlalchemy import make_url, text
    from sqlalchemy.exc import SQLAlchemyError

    from arkor_ray.db.session import Database
    from arkor_ray.db.url import for_sqlalchemy

    if not url.startswith("postgres"):
        return None
    state = text("SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool")
    anywhere = make_url(for_sqlalchemy(url)).update_query_dict({"target_session_attrs": "any", "connect_timeout": "2"})
    with closing(Database(anywhere.render_as_string(hide_password=False))) as db:
        try:
            with db.engine.connect() as connection:
                standby, read_only = connection.execute(state).one()
                server = connection.connection.driver_connection.info  # type: ignore[union-attr]  # of psycopg
                where = f"{server.host}:{server.port}"
        except SQLAlchemyError:
            return None
    if standby:
        return fail(
            NAME, f"{shown}: {where} is a standby, which takes no writes, and no primary is named there that answers",
            f"name the primary as well, as in {SEVERAL}; if it is lost, promote the standby: SELECT pg_promote()",
        )  # fmt: skip
    if read_only:
        return fail(
            NAME, f"{shown}: {where} is read-only, and no server is named there that takes writes",
            "if it was set aside for another, name that one too; else look why (a full disk, an upgrade) and set "
            "default_transaction_read_only to off where it is on: the server, the database or the user",
        )  # fmt: skip
    return None


def check_tables(db: Database) -> Iterator[Finding]:
    """Migrated to this version, and writable."""
    from sqlalchemy.exc import SQLAlchemyError

    from arkor_ray.db.revisions import schema_state
    from arkor_ray.db.session import reason

    try:
        with db.engine.connect() as connection:
            schema = schema_state(connection)
    except SQLAlchemyError as error:
        yield fail("migrations", reason(error), "the database's user needs to read its own tables")
        return
    if schema.state == "none":
        yield ok("migrations", "no tables yet; `arkor-ray up` makes them")
        return
    if schema.state == "foreign":
        yield fail(
            "migrations", f"at {schema.found}, which is no revision of arkor-ray",
            "this is another program's database: make one for arkor-ray, and name it in ARKOR_RAY_DATABASE_URL",
        )  # fmt: skip
        return
    if schema.state == "newer":
        yield warning(
            "migrations", f"at {schema.found}, newer than this version's {schema.newest}; it is left as it is",
            "install the newer arkor-ray here too",
        )  # fmt: skip
    elif schema.state == "behind":
        yield warning(
            "migrations", f"at {schema.found}, and this version needs {schema.newest}",
            "`arkor-ray up` migrates at its start",
        )  # fmt: skip
    else:
        yield ok("migrations", f"at {schema.found}, the newest")
    try:
        _try_to_write(db)
    except SQLAlchemyError as error:
        yield fail(
            "database writes", f"refused: {reason(error)}",
            "connect to the primary, as a user that may INSERT, UPDATE and DELETE; for SQLite, check the disk",
        )  # fmt: skip
    else:
        yield ok("database writes", "accepted")


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
