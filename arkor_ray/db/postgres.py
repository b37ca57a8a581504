"""Connections to PostgreSQL: one server, or several of which one takes writes and another may take its place.

Whichever takes writes is the database. Connections go to no other, and one that finds its server has become a standby, or
read-only, counts as lost: its user tries again as after a crash, by then perhaps on the server that was promoted.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidatePoolError

CONNECT_S = 10  # servers that do not answer at all, together
SHORTEST_S = 2  # libpq waits for none less long
# One whose machine has vanished in the middle of a statement, or while a connection waits in the pool: libpq's words, where the
# system's defaults are 15 minutes and two hours.
GONE = {"tcp_user_timeout": 30_000, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}

# The same for the server, which would keep the locks of whoever has vanished in the middle of a transaction for two hours, and
# everybody who needs these rows waiting.
SERVERS_LIMITS = {
    "idle_in_transaction_session_timeout": "30s",
    "lock_timeout": "10s",
    "tcp_keepalives_idle": "15s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}
# Those that the server knows: PostgreSQL before 12 has no tcp_user_timeout.
SET_LIMITS = """\
SELECT set_config(name, value, false)
FROM unnest(%s::text[], %s::text[]) AS limits (name, value) JOIN pg_settings USING (name)"""
WRITABLE = "read-write"  # libpq's word for the servers that a connection may go to
READ_ONLY = "25006"  # the SQLSTATE of a write that a standby, or a read-only server, refuses
# Servers tell when they change, since PostgreSQL 14.
READ_ONLY_SIGNS = ("in_hot_standby", "default_transaction_read_only")
# What psycopg takes for errors of its own user, among those about transactions, and is the server's doing: it takes no writes,
# or it ended the connection of somebody who was slow.
SERVERS_DOING = ("ReadOnlySqlTransaction", "IdleInTransactionSessionTimeout", "TransactionTimeout")
DEFAULT_PORT = 5432


def postgres_engine(url: URL) -> Engine:
    """`url` may name several servers. What it says itself, such as target_session_attrs, goes before what is said here."""
    ours = {
        "connect_timeout": max(SHORTEST_S, CONNECT_S // _count_hosts(url)),
        "target_session_attrs": WRITABLE,
        **GONE,
    }
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        connect_args={name: value for name, value in ours.items() if name not in url.query},
        hide_parameters=True,  # or an error that is logged would show the values of rows, a data set's token too
    )
    _limit_what_the_server_waits_for(engine)
    _count_read_only_as_lost(engine)
    if url.query.get("target_session_attrs", WRITABLE) == WRITABLE:
        _leave_read_only_servers(engine)
    if _count_hosts(url) > 1:
        _begin_with_the_last_server(engine)
    return engine


def _count_hosts(url: URL) -> int:
    return sum(len(hosts.split(",")) for hosts in url.normalized_query.get("host", ("",)))


def _limit_what_the_server_waits_for(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        # Not as libpq's `options`, which poolers such as PgBouncer refuse; committed, or a rollback would take them back.
        connection.execute(SET_LIMITS, [list(SERVERS_LIMITS), list(SERVERS_LIMITS.values())])
        connection.commit()


def _count_read_only_as_lost(engine: Engine) -> None:
    engine.dialect.dbapi_exception_translation_map = dict.fromkeys(SERVERS_DOING, "OperationalError")

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
            context.is_disconnect = True


def _leave_read_only_servers(engine: Engine) -> None:
    """Those who only read would never be refused, and go on reading what the new primary has long changed."""

    @event.listens_for(engine, "checkout")
    def on_checkout(connection: Any, _record: Any, _proxy: Any) -> None:
        if any(connection.info.parameter_status(sign) == "on" for sign in READ_ONLY_SIGNS):
            raise InvalidatePoolError


def _begin_with_the_last_server(engine: Engine) -> None:
    """A machine that is gone would otherwise cost each new connection its timeout, for as long as it is named first."""
    last: tuple[str, int] | None = None

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        nonlocal last
        last = (connection.info.host, connection.info.port)

    @event.listens_for(engine, "do_connect")
    def on_connecting(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        hosts, ports = (str(parameters.get(name, "")).split(",") for name in ("host", "port"))
        if "hostaddr" in parameters:  # which has an order of its own
            return
        servers = list(zip(hosts, ports, strict=True))  # SQLAlchemy has seen to it that there are as many
        servers.sort(key=lambda server: (server[0], int(server[1] or DEFAULT_PORT)) != last)
        parameters["host"], parameters["port"] = (",".join(each) for each in zip(*servers, strict=True))
