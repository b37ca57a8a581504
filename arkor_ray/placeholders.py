"""Secrets of the settings: those that everybody knows, from examples, images and tutorials, which a cluster must not be
started with, and the passwords in a database's URL, which are shown to nobody.

Only what is given is looked at. A database URL without a password is one for which libpq knows another way (a peer, a
certificate, .pgpass, a token of the cloud), and S3 without keys has profiles and roles of machines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qs, unquote, unquote_plus

from arkor_ray.db.url import SCHEME_AND_LOGIN

_WORDS = frozenset({
    "1234", "12345", "123456", "1234567", "12345678", "123456789", "1234567890", "abc123", "admin", "arkor", "arkorray",
    "awssecretaccesskey", "change", "changeit", "changeme", "changethis", "default", "demo", "dev", "dummy", "example",
    "foo", "foobar", "guest", "letmein", "minio", "minio123", "minioadmin", "mypassword", "mysecret", "none", "null",
    "pass", "passw0rd", "passwd", "password", "password1", "password123", "placeholder", "postgres", "postgresql",
    "qwerty", "redacted", "replaceme", "replacethis", "root", "rustfsadmin", "s3cr3t", "secret", "secretkey",
    "secretaccesskey", "test", "testtest", "todo", "token", "user", "wjalrxutnfemi/k7mdeng/bpxrficyexamplekey", "xxx",
    "xxxx", "xxxxxxxx", "yourpassword", "yoursecret", "yourtoken",
})  # fmt: skip

_LOGIN = re.compile(SCHEME_AND_LOGIN)
_PARAMETER = re.compile(r"[?&](?P<name>[^&=]*)=(?P<value>[^&]*)")
_SECRET_PARAMETERS = ("password", "sslpassword")


def is_placeholder(secret: str, *names: str) -> bool:
    """Whether anybody would guess it: a known word in any spelling, `<PASSWORD>`, `${PASSWORD}`, or one of `names`."""
    plain = secret.strip().strip("<>{}[]()$%'\"").translate(str.maketrans("", "", "-_ .!")).lower()
    return not plain or plain in _WORDS or secret.lower() in (name.lower() for name in names if name)


def weak_secrets(database_url: str, *, s3: bool, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A sentence for each secret of a cluster that is a placeholder. It names the variable and never the value."""
    login = _LOGIN.match(database_url)
    user = unquote(login["user"] or "") if login is not None else ""
    query = database_url[login.end() if login is not None else 0 :].partition("?")[2]
    given = parse_qs(query, keep_blank_values=True).get("password", [None])[-1]
    if login is not None and login["password"] is not None:
        given = unquote(login["password"])
    if given is not None and is_placeholder(given, user):
        yield (
            "ARKOR_RAY_DATABASE_URL has a password that anybody would guess; choose another, or leave the colon and the "
            "password out where PostgreSQL knows its users by other means"
        )
    elif given is None and is_placeholder(environment.get("PGPASSWORD", "unset or a good one"), user):
        yield "PGPASSWORD is a password that anybody would guess; choose another for the database of ARKOR_RAY_DATABASE_URL"
    key = environment.get("AWS_ACCESS_KEY_ID", "")
    if s3 and key and is_placeholder(environment.get("AWS_SECRET_ACCESS_KEY", ""), key):
        yield (
            "AWS_SECRET_ACCESS_KEY is one that anybody would guess; give the storage of ARKOR_RAY_STORAGE_URL a user with "
            "a secret of its own"
        )
    if environment.get("RAY_AUTH_TOKEN") is not None and is_placeholder(environment["RAY_AUTH_TOKEN"]):
        yield "RAY_AUTH_TOKEN is one that anybody would guess; make one with `ray get-auth-token --generate`"


def shown_database_url(url: str) -> str:
    """A database's URL for people to read: *** in place of every password, also of those in its query."""
    for start, end in reversed(_password_spans(url)):
        url = f"{url[:start]}***{url[end:]}"
    return url


def database_passwords(url: str) -> set[str]:
    """Those in a database's URL, as they stand there and as they are meant."""
    given = {url[start:end] for start, end in _password_spans(url)}
    return given | {unquote(password) for password in given} | {unquote_plus(password) for password in given}


def _password_spans(url: str) -> list[tuple[int, int]]:
    login = _LOGIN.match(url)
    spans = [login.span("password")] if login is not None and login["password"] is not None else []
    query = url.find("?", login.end() if login is not None else 0)
    if query >= 0:
        parameters = _PARAMETER.finditer(url, query)
        spans += [p.span("value") for p in parameters if unquote_plus(p["name"]).lower() in _SECRET_PARAMETERS]
    return spans
