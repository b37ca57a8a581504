"""The database's URL in the form that people write, with one server or several."""

from __future__ import annotations

from typing import Any

import pytest

from arkor_ray.db.session import Database
from arkor_ray.db.url import check_hosts, for_sqlalchemy


def what_libpq_gets(url: str) -> dict[str, Any]:
    engine = Database(url).engine
    _, given = engine.dialect.create_connect_args(engine.url)
    return {name: value for name, value in given.items() if name != "context"}


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("postgresql://u:p@db/arkor", ("db", None)),
        ("postgresql://u:p@db:5433/arkor", ("db", 5433)),
        ("postgresql://u:p@one:5432,two:5433/arkor", ("one,two", "5432,5433")),
        ("postgres://u:p@one:5432,two:5433,three:5434/arkor", ("one,two,three", "5432,5433,5434")),
        ("postgresql+psycopg://u:p@one,two:5433/arkor", ("one,two", ",5433")),
        ("postgresql://u:p@[::1]:5432,[fd00::2]:5433/arkor", ("::1,fd00::2", "5432,5433")),
        ("postgresql://u:p@one:1,two:2/arkor?host=three,four&port=3,4", ("three,four", "3,4")),
        ("postgresql://u:p@/arkor?host=one:5432&host=two:5433", ("one,two", "5432,5433")),
    ],
)
def test_servers_are_found_in_every_form(url: str, servers: tuple[str, Any]) -> None:
    given = what_libpq_gets(url)
    assert (given["host"], given.get("port")) == servers
    assert (given["user"], given["password"], given["dbname"]) == ("u", "p", "arkor")


def test_what_else_a_url_of_several_servers_says_stays() -> None:
    given = what_libpq_gets("postgresql://u:a%40b%2C@one,two/arkor?target_session_attrs=primary&sslmode=require")
    assert given["password"] == "a@b,"
    assert (given["target_session_attrs"], given["sslmode"]) == ("primary", "require")


@pytest.mark.parametrize(
    "url", ["sqlite:////data/a,b@c:d.db", "postgresql:///arkor?host=/run/postgresql", "postgresql://u:p/,?#w@db/arkor"]
)
def test_what_needs_no_change_has_none(url: str) -> None:
    assert for_sqlalchemy(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:SEC@RET@db/arkor",
        "postgresql://u:SEC@RET:x@db/arkor",
        "postgresql://u:p@db:SECRET/arkor",
        "postgresql://u:p@one:5432,two:SECRET/arkor",
        "postgresql://u:p@[::1:SECRET/arkor",
    ],
)
def test_one_that_cannot_be_read_is_not_shown_but_what_it_should_be(url: str) -> None:
    for read in (check_hosts, Database):
        with pytest.raises(ValueError, match=r"ARKOR_RAY_DATABASE_URL.*HOST1:5432,HOST2:5432/DATABASE.*%40") as raised:
            read(url)
        assert "SEC" not in str(raised.value) and "RET" not in str(raised.value)
