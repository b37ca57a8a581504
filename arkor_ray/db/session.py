"""Opening the database: one engine per process, short transactions, the same behaviour on SQLite and PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from arkor_ray.db.postgres import postgres_engine
from arkor_ray.db.url import for_sqlalchemy

if TYPE_CHECKING:
    from arkor_ray.db.revisions import SchemaState

logger = logging.getLogger(__name__)

# What says that the database cannot be reached now, rather than that a statement is wrong: worth trying again. It has a
# PostgreSQL that shuts down, starts, is full or takes no writes (db/postgres.py), and transactions that gave way to others.
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)

FOLD_MS = 2000


class Database:
    """An engine and its sessions. `write()` is serialised by the database, `read()` never waits for a writer.

    Args:
        url: `sqlite:///PATH` or `postgresql://…` (psycopg 3 is used for the latter), also with several servers.

    Raises ValueError or ArgumentError for a URL that cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = make_url(for_sqlalchemy(url))
        if parsed.get_backend_name() in ("postgres", "postgresql"):
            self.engine = postgres_engine(parsed)
        else:
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            local: dict[str, Any] = {"timeout": 30, "check_same_thread": False}
            self.engine = create_engine(parsed, connect_args=local, hide_parameters=True)
            _tune_sqlite(self.engine)
        self._session = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits on success and rolls back on any exception."""
        with self._session() as session:
            if session.get_bind().dialect.name == "sqlite":
                # Taking the write lock first: a deferred transaction that upgrades later can fail instead of waiting.
                session.connection(execution_options={"sqlite_begin": "IMMEDIATE"})
            with session.begin() if not session.in_transaction() else _commit(session):
                yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._session() as session:
            yield session

    def migrate(self) -> SchemaState:
        """Brings the schema to the newest revision; safe to run from several processes at once. Returns what it found.

        A schema that a newer version made is left as it is, and that is logged: revisions only add, so that this version
        still finds what it needs. It comes to that when the processes of one version outlive the migration to the next.
        """
        from alembic import command
        from alembic.config import Config

        from arkor_ray.db.revisions import SCRIPTS, schema_state

        config = Config()
        # Configuration files interpolate "%", and so does this one that is not a file.
        config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
        with self.engine.connect() as connection:
            # All revisions are one transaction, which a second process waits for: SQLite locks the file when it begins,
            # PostgreSQL by a lock that ends with it.
            connection = connection.execution_options(sqlite_begin="IMMEDIATE")
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    connection.execute(text("SET LOCAL lock_timeout = 0"))  # a migration may take minutes
                    connection.execute(text("SELECT pg_advisory_xact_lock(827364)"))
                state = schema_state(connection)
                if state.state == "newer":
                    logger.warning(
                        "The database is at revision %s, newer than this version's %s, and stays as it is",
                        state.found,
                        state.newest,
                    )
                    return state
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                return state

    def fold_journal(self) -> None:
        """Brings what SQLite keeps beside its file into the file, which can then be copied alone. Nothing elsewhere.

        What another process uses meanwhile stays in the journal, where every process finds it.
        """
        if self.engine.dialect.name != "sqlite":
            return
        connection = self.engine.raw_connection()
        try:
            connection.cursor().execute(f"PRAGMA busy_timeout={FOLD_MS}")
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except DATABASE_AWAY as error:
            logger.warning("The journal of %s stays beside it: %s", self.url, error)
        finally:
            connection.invalidate()  # not back to the pool, with a patience of its own

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _commit(session: Session) -> Iterator[None]:
    try:
        yield
    except BaseException:
        session.rollback()
        raise
    session.commit()


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late; ours is below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")


def reason(error: Exception) -> str:
    """The driver's words in one line, without the statement and its parameters."""
    return " ".join(str(getattr(error, "orig", error)).split())[:600]
