"""Endpoints: one of a slug on the whole server, adapters that stay while they are served, keys that are only hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import delete, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db import checkpoints, endpoints, identities, jobs, projects
from arkor_ray.db.session import Database
from arkor_ray.db.tables import CheckpointRow, EndpointKeyRow, EndpointRow, OrgRow
from arkor_ray.errors import ArkorError, ConflictError, NotFoundError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest

BASE = {"kind": "base_model", "baseModel": "tiny"}


@dataclass
class Place:
    """A project, and the verbs of a test in it."""

    org_id: str
    project_id: str

    def publish(self, session: Session, slug: str = "triage", **values: Any) -> EndpointRow:
        given = {"target": BASE, "adapter_id": None, "auth_mode": "fixed_api_key", "retention": ("days", 7), **values}
        return endpoints.create(session, org_id=self.org_id, project_id=self.project_id, slug=slug, **given)

    def save_adapter(self, session: Session) -> str:
        job = jobs.create(
            session,
            org_id=self.org_id,
            project_id=self.project_id,
            name="x",
            config={"model": "tiny"},
            dataset_token=None,
        )
        manifest = CheckpointManifest(
            adapter_id=f"{job.id}-step-2", job_id=job.id, step=2, base_model="tiny", base_precision="fp32", r=8,
            lora_alpha=8, target_modules=["q_proj"], files=[], created_at=utcnow(),
        )  # fmt: skip
        return checkpoints.record(session, manifest).adapter_id


@pytest.fixture
def place(db: Database) -> Place:
    return new_place(db)


def new_place(db: Database) -> Place:
    with db.write() as session:
        org = identities.create_anonymous(session, days=90).org
        return Place(org.id, projects.create(session, org.id, name="x", slug="x").id)


def version(db: Database) -> int:
    with db.read() as session:
        return endpoints.version(session)


def test_slug_is_unique_over_all_organisations(db: Database, place: Place) -> None:
    with db.write() as session:
        place.publish(session, "triage")
    other = new_place(db)
    with pytest.raises(ConflictError, match="Deployment slug is already taken"), db.write() as session:
        other.publish(session, "triage")


def test_of_many_publishers_of_one_slug_at_once_one_wins(db: Database) -> None:
    places = [new_place(db) for _ in range(8)]

    def publish(place: Place) -> bool:
        try:
            with db.write() as session:
                place.publish(session, "triage")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(publish, places)) == 1


def test_database_itself_refuses_a_second_row_of_a_slug(db: Database, place: Place) -> None:
    with db.write() as session:
        place.publish(session, "triage")
    copy = "INSERT INTO endpoints SELECT 'other', " + ", ".join(
        column.name for column in EndpointRow.__table__.columns if column.name != "id"
    )
    with pytest.raises(IntegrityError), db.write() as session:
        session.execute(text(f"{copy} FROM endpoints"))


def test_disabled_endpoint_keeps_its_slug_and_a_deleted_one_frees_it(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
        endpoints.change(session, place.project_id, endpoint.id, enabled=False)
        with pytest.raises(ConflictError):
            endpoints.refuse_taken(session, "triage")
        endpoints.create_key(session, place.project_id, endpoint.id, "x")
    with db.write() as session:
        endpoints.delete(session, place.project_id, endpoint.id)
    with db.write() as session:
        assert session.scalars(select(EndpointKeyRow)).all() == []
        assert place.publish(session).id != endpoint.id


@pytest.mark.parametrize("endpoint_id", ["", "none", "\x00", "a" * 500, "../x"])
def test_unknown_and_foreign_endpoints_are_not_found(db: Database, place: Place, endpoint_id: str) -> None:
    elsewhere = new_place(db)
    with db.write() as session:
        own = place.publish(session)
    calls: list[Callable[[Session, str, str], Any]] = [
        endpoints.get,
        endpoints.delete,
        endpoints.list_keys,
        endpoints.change,
        lambda s, project_id, id: endpoints.create_key(s, project_id, id, "x"),
        lambda s, project_id, id: endpoints.revoke_key(s, project_id, id, "x"),
    ]
    for call in calls:
        for project_id, id in ((place.project_id, endpoint_id), (elsewhere.project_id, own.id)):
            with pytest.raises(NotFoundError), db.write() as session:
                call(session, project_id, id)


def test_adapter_that_is_served_cannot_be_deleted(db: Database, place: Place) -> None:
    with db.write() as session:
        adapter_id = place.save_adapter(session)
        endpoint = place.publish(session, adapter_id=adapter_id)
    with pytest.raises(IntegrityError), db.write() as session:
        session.execute(delete(CheckpointRow).where(CheckpointRow.adapter_id == adapter_id))
    with db.write() as session:
        endpoints.change(session, place.project_id, endpoint.id, target=BASE, adapter_id=None)
    with db.write() as session:
        session.execute(delete(CheckpointRow).where(CheckpointRow.adapter_id == adapter_id))


def test_organisation_can_be_deleted_with_all_it_serves(db: Database, place: Place) -> None:
    with db.write() as session:
        place.publish(session, adapter_id=place.save_adapter(session))
    with db.write() as session:
        session.execute(delete(OrgRow).where(OrgRow.id == place.org_id))
        assert session.scalars(select(EndpointRow)).all() == []


def test_adapter_that_was_deleted_in_the_meantime_cannot_be_served(db: Database, place: Place) -> None:
    with pytest.raises(NotFoundError, match="deleted in the meantime"), db.write() as session:
        place.publish(session, adapter_id="gone")
    with db.write() as session:
        endpoint = place.publish(session)
    with pytest.raises(NotFoundError, match="deleted in the meantime"), db.write() as session:
        endpoints.change(session, place.project_id, endpoint.id, adapter_id="gone")
    with db.read() as session:
        assert endpoints.get(session, place.project_id, endpoint.id).adapter_id is None


def test_key_is_long_random_and_stored_as_a_hash_only(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
        issued = endpoints.create_key(session, place.project_id, endpoint.id, "ci")
        other = endpoints.create_key(session, place.project_id, endpoint.id, "ci")
    assert issued.plaintext.startswith("ark_live_") and len(issued.plaintext) >= len("ark_live_") + 43
    assert issued.row.prefix == issued.plaintext[:17] and issued.plaintext != other.plaintext
    with db.read() as session:
        rows = session.execute(text("SELECT * FROM endpoint_keys")).all()
    assert issued.plaintext not in str(rows)
    assert hashlib.sha256(issued.plaintext.encode()).hexdigest() in str(rows)


def test_revoked_key_stays_listed_and_opens_nothing(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
        kept, revoked = (
            endpoints.create_key(session, place.project_id, endpoint.id, label).row for label in ("kept", "revoked")
        )
    for _ in range(2):  # a second time changes nothing
        with db.write() as session:
            endpoints.revoke_key(session, place.project_id, endpoint.id, revoked.id)
    with db.read() as session:
        published = endpoints.find_published(session, "triage")
        assert published is not None and published.keys == {kept.sha256: kept.id}
        listed = endpoints.list_keys(session, place.project_id, endpoint.id)
        assert {key.label: key.revoked_at is None for key in listed} == {"kept": True, "revoked": False}


def test_key_of_another_endpoint_cannot_be_revoked(db: Database, place: Place) -> None:
    with db.write() as session:
        one, two = place.publish(session, "one"), place.publish(session, "two")
        key = endpoints.create_key(session, place.project_id, one.id, "x").row
    for key_id in (key.id, "\x00", "none"):
        with pytest.raises(NotFoundError), db.write() as session:
            endpoints.revoke_key(session, place.project_id, two.id, key_id)


def test_disabled_endpoint_is_not_published(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
        endpoints.change(session, place.project_id, endpoint.id, enabled=False)
    with db.read() as session:
        assert endpoints.find_published(session, "triage") is None
        assert endpoints.versions(session, ["triage", "other"]) == {}


def test_every_change_is_counted_and_what_fails_is_not(db: Database, place: Place) -> None:
    seen = [version(db)]

    def step(change: Callable[[Session], Any]) -> Any:
        with db.write() as session:
            result = change(session)
        seen.append(version(db))
        return result

    project_id = place.project_id
    endpoint = step(place.publish)
    step(lambda s: endpoints.change(s, project_id, endpoint.id, auth_mode="none"))
    key = step(lambda s: endpoints.create_key(s, project_id, endpoint.id, "x")).row
    step(lambda s: endpoints.revoke_key(s, project_id, endpoint.id, key.id))
    with db.read() as session:
        assert endpoints.versions(session, ["triage"]) == {"triage": seen[-1]}
    step(lambda s: endpoints.delete(s, project_id, endpoint.id))
    assert seen == sorted(set(seen))
    with pytest.raises(ArkorError):
        step(lambda s: endpoints.change(s, project_id, endpoint.id, enabled=False))
    assert version(db) == seen[-1]


def test_use_of_a_key_is_no_change(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
        key = endpoints.create_key(session, place.project_id, endpoint.id, "x").row
    before = version(db)
    with db.write() as session:
        endpoints.touch_key(session, key.id)
    with db.read() as session:
        assert endpoints.list_keys(session, place.project_id, endpoint.id)[0].last_used_at is not None
    assert version(db) == before


def test_changes_at_once_neither_block_each_other_for_ever_nor_lose_one(db: Database, place: Place) -> None:
    with db.write() as session:
        endpoint = place.publish(session)
    project_id, changes = place.project_id, 12

    def change(number: int) -> bool:
        try:
            with db.write() as session:
                if number == changes // 2:
                    endpoints.delete(session, project_id, endpoint.id)
                elif number % 2:
                    key = endpoints.create_key(session, project_id, endpoint.id, "x")
                    endpoints.revoke_key(session, project_id, endpoint.id, key.row.id)
                else:
                    endpoints.change(session, project_id, endpoint.id, run_retention_days=number)
        except NotFoundError:
            return False
        return True

    before = version(db)
    with ThreadPoolExecutor(changes) as pool:
        done = list(pool.map(change, range(changes)))
    assert done[changes // 2]
    with db.read() as session:
        assert session.scalars(select(EndpointKeyRow)).all() == []
    counted = sum((2 if number % 2 else 1) for number, happened in enumerate(done) if happened)
    assert version(db) - before == counted
