"""Clocks: leases and retention compare times of several machines, and S3 refuses requests that are 15 minutes off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from arkor_ray.doctor.findings import Finding, fail, ok, warning

WARNING = timedelta(seconds=5)  # the controller's lease
FAIL = timedelta(minutes=15)
REMEDY = "let every machine keep its time by NTP (timedatectl set-ntp true)"


@dataclass(frozen=True)
class Skew:
    """How far another clock is ahead of ours, give or take `margin`."""

    ahead: timedelta
    margin: timedelta


def measure(ask: Callable[[], datetime]) -> Skew:
    """`ask` asks another machine for its time; how long that took is the margin."""
    begun = datetime.now(UTC)
    theirs = ask()
    ended = datetime.now(UTC)
    half = (ended - begun) / 2
    return Skew(theirs - (begun + half), half)


def check_clocks(skews: Mapping[str, Skew]) -> Iterator[Finding]:
    """Findings about the clocks of `skews`, by whose they are."""
    good = []
    for whose, skew in skews.items():
        off = abs(skew.ahead) - skew.margin
        seconds = f"{abs(skew.ahead).total_seconds():.1f} s {'ahead' if skew.ahead > timedelta() else 'behind'}"
        if off > FAIL:
            yield fail("clock", f"that of the {whose} is {seconds}; S3 refuses requests that far off", REMEDY)
        elif off > WARNING:
            yield warning("clock", f"that of the {whose} is {seconds}; leases last no longer than that", REMEDY)
        else:
            good.append(f"{whose} {skew.ahead.total_seconds():+.1f} s")
    if good:
        yield ok("clock", ", ".join(good))


def measure_clocks(database_url: str, storage_url: str, endpoint_url: str | None) -> Iterator[Finding]:
    """Of the database and the storage, where they have clocks of their own. What is away is told by its own check."""
    skews = {}
    if database_url.startswith("postgres"):
        skews["database"] = _unless_away(lambda: _of_database(database_url))
    if storage_url.startswith("s3:"):
        skews["storage"] = _unless_away(lambda: _of_storage(storage_url, endpoint_url))
    yield from check_clocks({whose: skew for whose, skew in skews.items() if skew is not None})


def _unless_away(ask: Callable[[], Skew]) -> Skew | None:
    try:
        return ask()
    except Exception:  # the check of the database, or of the storage, says what is wrong with it
        return None


def _of_database(url: str) -> Skew:
    from sqlalchemy import text

    from arkor_ray.db.session import Database

    question = text("SELECT extract(epoch FROM clock_timestamp())")
    db = Database(url)
    try:
        with db.engine.connect() as connection:
            return measure(lambda: datetime.fromtimestamp(float(connection.scalar(question) or 0), UTC))
    finally:
        db.close()


def _of_storage(url: str, endpoint_url: str | None) -> Skew:
    from arkor_ray.doctor.storage import HASTY
    from arkor_ray.storage import open_store

    store = open_store(url, endpoint_url=endpoint_url, retry=HASTY)
    store.now()  # so that connecting does not count
    return measure(lambda: store.now() + timedelta(seconds=0.5))  # it tells whole seconds
