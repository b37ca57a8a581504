"""Stored runs: pages that neither skip nor repeat, and a sweep that takes what is too old and nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from arkor_ray.db import endpoints, runs
from arkor_ray.db.runs import NewRun
from arkor_ray.db.session import Database
from arkor_ray.db.tables import EndpointRow
from arkor_ray.errors import NotFoundError
from tests.db.endpoint_rows import NOW, publish, run_of


def store(db: Database, *stored: NewRun) -> None:
    with db.write() as session:
        runs.add_all(session, stored)


def ids_of(db: Database, endpoint: EndpointRow, **page: Any) -> list[str]:
    with db.read() as session:
        return [row.id for row in runs.list_runs(session, endpoint.id, **{"limit": 100, **page})]


def test_run_comes_back_as_it_was_stored(db: Database) -> None:
    endpoint = publish(db, "one")
    answer = {"role": "assistant", "content": "NUL \0, half \ud83d and ü"}
    sent = run_of(endpoint, key_id="key", answer=answer, tools=[{"type": "function"}], first_token_ms=None)
    store(db, sent)
    with db.read() as session:
        [row] = runs.list_runs(session, endpoint.id, limit=2)
    assert {name: getattr(row, name) for name in vars(sent)} == vars(sent)


def test_pages_are_newest_first_and_neither_skip_nor_repeat(db: Database) -> None:
    endpoint, other = publish(db, "one"), publish(db, "other")
    moments = [NOW - timedelta(microseconds=n // 3) for n in range(10)]  # three at a time share their moment
    stored = [run_of(endpoint, at) for at in moments]
    store(db, *stored, run_of(other))
    expected = [run.id for run in sorted(stored, key=lambda run: (run.created_at, run.id), reverse=True)]
    pages: list[str] = []
    while page := ids_of(db, endpoint, limit=4, before=pages[-1] if pages else None):
        pages += page
    assert pages == expected


@pytest.mark.parametrize("before", ["nonesuch", "", "\0"])
def test_page_after_an_unknown_run_is_not_found(db: Database, before: str) -> None:
    with pytest.raises(NotFoundError, match="before"):
        ids_of(db, publish(db, "one"), before=before)


def test_page_after_a_run_of_another_endpoint_is_not_found(db: Database) -> None:
    endpoint, other = publish(db, "one"), publish(db, "other")
    foreign = run_of(other)
    store(db, foreign)
    with pytest.raises(NotFoundError):
        ids_of(db, endpoint, before=foreign.id)


def test_every_run_comes_oldest_first_whatever_the_page(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = publish(db, "one")
    stored = [run_of(endpoint, NOW - timedelta(microseconds=n // 2)) for n in range(9)]
    store(db, *stored)
    expected = [run.id for run in sorted(stored, key=lambda run: (run.created_at, run.id))]
    for page in (1, 2, 3, 9, 100):
        monkeypatch.setattr(runs, "PAGE", page)
        assert [row.id for row in runs.every_run(db, endpoint.id)] == expected


def test_sweep_takes_what_is_older_than_its_endpoint_keeps(db: Database) -> None:
    short, long = publish(db, "short", "days", 1), publish(db, "long", "days", 7)
    unlimited, disabled = publish(db, "unlimited"), publish(db, "disabled", "disabled")
    everywhere = [short, long, unlimited, disabled]
    old = {each.id: run_of(each, NOW - timedelta(days=2)) for each in everywhere}
    older = {each.id: run_of(each, NOW - timedelta(days=8)) for each in everywhere}
    new = {each.id: run_of(each, NOW - timedelta(days=1) + timedelta(seconds=1)) for each in everywhere}
    store(db, *old.values(), *older.values(), *new.values())
    with db.write() as session:
        assert runs.sweep(session, NOW, limit=100) == 3
    assert ids_of(db, short) == [new[short.id].id]
    assert ids_of(db, long) == [new[long.id].id, old[long.id].id]
    for kept in (unlimited, disabled):
        assert ids_of(db, kept) == [new[kept.id].id, old[kept.id].id, older[kept.id].id]


def test_sweep_goes_by_what_is_set_now_and_by_its_limit(db: Database) -> None:
    endpoint = publish(db, "one", "days", 30)
    store(db, *(run_of(endpoint, NOW - timedelta(days=5)) for _ in range(5)))
    with db.write() as session:
        assert runs.sweep(session, NOW, limit=3) == 0
        endpoints.change(session, endpoint.project_id, endpoint.id, run_retention_days=2)
    swept = []
    for _ in range(3):
        with db.write() as session:
            swept.append(runs.sweep(session, NOW, limit=3))
    assert swept == [3, 2, 0] and ids_of(db, endpoint) == []


def test_runs_go_with_their_endpoint(db: Database) -> None:
    endpoint = publish(db, "one")
    late = run_of(endpoint)
    store(db, run_of(endpoint))
    with db.write() as session:
        endpoints.delete(session, endpoint.project_id, endpoint.id)
    assert ids_of(db, endpoint) == []
    with pytest.raises(IntegrityError):
        store(db, late)


def test_run_is_stored_once(db: Database) -> None:
    run = run_of(publish(db, "one"))
    store(db, run)
    with pytest.raises(IntegrityError):
        store(db, run)
