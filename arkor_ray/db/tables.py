"""Every table. Times are UTC; ids are UUID strings; JSON columns hold what the wire holds."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from arkor_ray.schemas.base import utcnow


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite forgets time zones; every time that leaves the database is aware and in UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    # Named constraints, so that migrations can change them on both databases.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[Any]: JSON}


ID = re.compile(r"[A-Za-z0-9-]{1,64}")  # what may be one; anything else that a user sends is not asked for


def new_id() -> str:
    return str(uuid.uuid4())


class IdentityRow(Base):
    """A caller: anonymous, or a user the operator issued a token to."""

    __tablename__ = "identities"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(16))  # "anonymous" | "operator"
    email: Mapped[str | None] = mapped_column(String(320))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class OrgRow(Base):
    __tablename__ = "orgs"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    slug: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class MemberRow(Base):
    __tablename__ = "members"

    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id", ondelete="CASCADE"), primary_key=True)
    identity_id: Mapped[str] = mapped_column(ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    __table_args__ = (Index(None, "identity_id"),)


class TokenRow(Base):
    """A bearer token; only its SHA-256 is kept."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    identity_id: Mapped[str] = mapped_column(ForeignKey("identities.id", ondelete="CASCADE"), index=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(24))
    label: Mapped[str] = mapped_column(String(200), default="")
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class ProjectRow(Base):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id", ondelete="CASCADE"))
    slug: Mapped[str] = mapped_column(String(40))
    name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=utcnow)

    __table_args__ = (UniqueConstraint("org_id", "slug"),)


class JobRow(Base):
    """A job. `attempt` fences: whoever writes for an older attempt is refused (db/jobs.py, events/publisher.py)."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id", ondelete="CASCADE"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(16), index=True)
    config: Mapped[dict[str, Any]]  # as sent, without the data set's token
    dataset_token: Mapped[str | None] = mapped_column(Text)  # dropped once the data is fetched, and when the job ends
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]

    attempt: Mapped[int] = mapped_column(Integer, default=0)  # 0: never launched
    submission_id: Mapped[str | None] = mapped_column(String(80))  # of the current attempt, in Ray Jobs
    retries: Mapped[int] = mapped_column(Integer, default=0)  # infrastructure failures charged to the budget
    forgotten: Mapped[int] = mapped_column(Integer, default=0, server_default="0")  # attempts in a row that Ray lost
    lost_at_step: Mapped[int | None]  # of the newest checkpoint when an attempt was last lost
    retry_at: Mapped[datetime | None]  # not launched before this moment
    last_event: Mapped[int] = mapped_column(Integer, default=0)  # number of the newest event
    stopped_at: Mapped[datetime | None]  # a terminal job whose submission is known to have ended

    __table_args__ = (Index("ix_jobs_scope", "project_id", "created_at"),)


class EventRow(Base):
    """One event. `key` names what it reports, so that reporting it again after a restart changes nothing."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    key: Mapped[str] = mapped_column(String(120))
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    __table_args__ = (UniqueConstraint("job_id", "key"),)


class CheckpointRow(Base):
    """A committed adapter. The manifest in storage is the truth; this row makes it listable and scoped."""

    __tablename__ = "checkpoints"

    adapter_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int] = mapped_column(Integer)
    final: Mapped[bool] = mapped_column(default=False)
    ready: Mapped[bool] = mapped_column(default=False)  # a replica had loaded it when it was announced
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    base_model: Mapped[str] = mapped_column(Text)
    base_precision: Mapped[str] = mapped_column(String(8))
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utcnow)


class EndpointRow(Base):
    """A published adapter or base model. `version` is that of `CounterRow` at the last change of it or of a key."""

    __tablename__ = "endpoints"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id", ondelete="CASCADE"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    slug: Mapped[str] = mapped_column(String(50), unique=True)  # over the whole server: it is a host name
    target: Mapped[dict[str, Any]]
    # Without ON DELETE: it pins the adapter. Whatever removes one deletes its row first, and the database refuses that
    # while an endpoint serves it.
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.adapter_id"), index=True)
    auth_mode: Mapped[str] = mapped_column(String(16))
    enabled: Mapped[bool] = mapped_column(default=True)
    run_retention_mode: Mapped[str] = mapped_column(String(16))
    run_retention_days: Mapped[int | None] = mapped_column(Integer)
    version: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(default=utcnow)


class EndpointKeyRow(Base):
    """A key that opens one endpoint; only its SHA-256 is kept. Revoked ones stay, to be listed."""

    __tablename__ = "endpoint_keys"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("endpoints.id", ondelete="CASCADE"), index=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(24))
    label: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class RunRow(Base):
    """One completed answer of an endpoint. `key_id` is None where the endpoint asked for no key."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("endpoints.id", ondelete="CASCADE"))
    key_id: Mapped[str | None] = mapped_column(String(36))
    model: Mapped[str] = mapped_column(Text)
    messages: Mapped[list[Any]]
    tools: Mapped[list[Any] | None]
    answer: Mapped[dict[str, Any]]
    finish_reason: Mapped[str] = mapped_column(String(32))
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    latency_ms: Mapped[int] = mapped_column(Integer)
    first_token_ms: Mapped[int | None] = mapped_column(Integer)
    system_fingerprint: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utcnow)

    __table_args__ = (Index(None, "endpoint_id", "created_at", "id"),)


class CounterRow(Base):
    """A number that only grows, raised in the transaction whose change it counts; the rows are made by migrations."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


class LeaseRow(Base):
    """At most one holder at a time: the controller that acts."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime]
