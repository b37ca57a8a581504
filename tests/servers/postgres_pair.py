"""A PostgreSQL and its standby, which has every transaction that was acknowledged and can take over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.servers.postgres import PostgresServer, make_data, serving_data

STANDBY_S = 60


@dataclass(frozen=True)
class PostgresPair:
    """`url` names both, as libpq takes it."""

    primary: PostgresServer
    standby: PostgresServer

    @property
    def url(self) -> str:
        return f"postgresql://test@{self.primary.address},{self.standby.address}/postgres"

    def set_primary_aside(self) -> None:
        """It takes no more writes; connections to it stay as they are."""
        _execute(self.primary, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")

    def take_primary_back(self) -> None:
        _execute(self.primary, "ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")

    def promote(self) -> None:
        """The standby is the primary when this returns, whatever the other is."""
        _execute(self.standby, "SELECT pg_promote()")


@contextmanager
def running_pair(base: Path) -> Iterator[PostgresPair]:
    """Both with their data below `base`, on the conditions of `running_postgres`."""
    make_data(base)
    with serving_data(base) as primary:
        make_data(base / "standby", primary)
        # After the standby's settings were copied: it is to wait for nobody once it is promoted.
        _execute(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        with serving_data(base / "standby") as standby:
            deadline = time.monotonic() + STANDBY_S
            while _execute(primary, "SELECT sync_state FROM pg_stat_replication") != [("sync",)]:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"The standby does not follow: {_log(base / 'standby')}")
                time.sleep(0.05)
            yield PostgresPair(primary, standby)


def _execute(server: PostgresServer, *statements: str) -> list[Any]:
    """Rows of the last statement."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        for statement in statements:
            rows = connection.execute(statement.encode())
        return rows.fetchall()


def _log(base: Path) -> str:
    return (base / "postgres.log").read_text()[-800:]
