"""The database's URL as people write it, and as SQLAlchemy takes it. They differ where it names several servers.

libpq, PostgreSQL's own client, has them as HOST1:5432,HOST2:5432; SQLAlchemy as parameters, ?host=HOST1,HOST2&port=5432,5432.
No error here shows any part of a URL: where it is not written as it should be, anything in it may be a password.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlencode

# As SQLAlchemy reads them, which differs from urlsplit where a password has a "/", "?" or "#" that is not escaped.
SCHEME_AND_LOGIN = r"(?P<scheme>[\w+]+)://(?:(?P<user>[^:/]*)(?::(?P<password>[^@]*))?@)?"
_PARTS = re.compile(rf"(?P<login>{SCHEME_AND_LOGIN})(?P<hosts>[^/?]*)(?P<database>[^?]*)\??(?P<query>.*)", re.DOTALL)
_HOST = re.compile(r"(?P<name>\[[^\[\]@]+\]|[^\[\]:@]*)(?::(?P<port>[0-9]*))?")


def check_hosts(url: str) -> None:
    """Raises ValueError with a sentence unless each server in it is HOST or HOST:PORT."""
    parts = _PARTS.match(url)
    if parts is None or not all(map(_HOST.fullmatch, parts["hosts"].split(","))):
        raise ValueError(
            "ARKOR_RAY_DATABASE_URL cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with several "
            "servers postgresql://USER:PASSWORD@HOST1:5432,HOST2:5432/DATABASE; an @ in USER or PASSWORD is %40, "
            "a colon %3A"
        )


def for_sqlalchemy(url: str) -> str:
    """`url` with its several servers as parameters; host and port that it has as such stay as they are, as with libpq.

    Raises ValueError as `check_hosts`.
    """
    check_hosts(url)
    parts = _PARTS.match(url)
    if parts is None or "," not in parts["hosts"]:
        return url
    servers = [match for each in parts["hosts"].split(",") if (match := _HOST.fullmatch(each))]
    given = {"host": ",".join(server["name"].strip("[]") for server in servers)}
    if any(server["port"] for server in servers):
        given["port"] = ",".join(server["port"] or "" for server in servers)
    own = parse_qs(parts["query"])
    added = urlencode({name: value for name, value in given.items() if name not in own})
    return parts["login"] + parts["database"] + "?" + "&".join(filter(None, (parts["query"], added)))
