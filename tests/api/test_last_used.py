"""Last uses: written rarely, in another thread, and never at the cost of a request."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from arkor_ray.api import last_used
from arkor_ray.api.last_used import LastUsed
from arkor_ray.db.session import Database
from arkor_ray.schemas.base import utcnow


class Touched(list[str]):
    """Ids whose last use was written; `failures` of the next writes fail."""

    failures = 0

    def touch(self, _session: Session, id: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OperationalError("UPDATE", {}, Exception("away"))
        self.append(id)


@pytest.fixture
def touched() -> Touched:
    return Touched()


@pytest.fixture
def notes(db: Database, touched: Touched) -> LastUsed:
    return LastUsed(db, touched.touch)


def written(notes: LastUsed) -> None:
    notes._writer.submit(lambda: None).result()


def test_many_uses_are_written_once(notes: LastUsed, touched: Touched) -> None:
    for _ in range(5):
        notes.note("a")
        notes.note("b")
        written(notes)
    notes.close()
    assert touched == ["a", "b"]


def test_use_that_the_database_knows_is_not_written(notes: LastUsed, touched: Touched) -> None:
    notes.note("recent", utcnow() - last_used.PRECISION / 2)
    notes.note("old", utcnow() - last_used.PRECISION * 2)
    notes.close()
    assert touched == ["old"]


def test_use_is_written_again_after_a_while(notes: LastUsed, touched: Touched, monkeypatch: pytest.MonkeyPatch) -> None:
    notes.note("a")
    monkeypatch.setattr(last_used, "PRECISION", timedelta(0))
    notes.note("a")
    notes.close()
    assert touched == ["a", "a"]


def test_write_that_fails_is_tried_by_the_next_use(notes: LastUsed, touched: Touched) -> None:
    touched.failures = 1
    notes.note("a")
    written(notes)
    notes.note("a")
    notes.close()
    assert touched == ["a"]


def test_only_so_many_ids_are_remembered(notes: LastUsed, touched: Touched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_used, "REMEMBERED", 3)
    for number in range(10):
        notes.note(str(number))
    assert len(notes._noted) == 3
    notes.close()
    assert len(touched) == 10
