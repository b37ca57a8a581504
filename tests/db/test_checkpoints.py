"""Checkpoints' rows, written by whoever tells of them."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import IntegrityError

from arkor_ray.db import checkpoints
from arkor_ray.db.tables import CheckpointRow
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest
from tests.db.databases import both
from tests.db.factories import create_job


def manifest(job_id: str) -> CheckpointManifest:
    return CheckpointManifest(
        adapter_id=f"{job_id}-step-1",
        job_id=job_id,
        step=1,
        base_model="/base",
        base_precision="fp32",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj"],
        files=[],
        created_at=utcnow(),
    )


def test_a_lost_attempt_and_its_successor_may_tell_of_one_adapter_at_the_same_moment(db):
    """On PostgreSQL both look before either has written; SQLite has them wait for each other."""
    found = manifest(create_job(db))
    looked = threading.Barrier(2)
    stored: list[str] = []

    def tell() -> None:
        with db.write() as session:
            if db.engine.dialect.name == "postgresql":

                @event.listens_for(session, "before_flush", once=True)
                def meet(*_):
                    looked.wait(60)

            stored.append(checkpoints.record(session, found).manifest_sha256)

    both_attempts = [threading.Thread(target=tell) for _ in range(2)]
    for thread in both_attempts:
        thread.start()
    for thread in both_attempts:
        thread.join(60)
    assert stored == [found.sha256] * 2
    with db.read() as session:
        assert session.scalar(select(func.count()).select_from(CheckpointRow)) == 1


@both
def test_an_adapter_of_a_job_that_is_gone_is_not_recorded(db):
    with pytest.raises(IntegrityError), db.write() as session:
        checkpoints.record(session, manifest("00000000-0000-0000-0000-000000000000"))
