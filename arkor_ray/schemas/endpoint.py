"""Endpoints: an adapter or a base model published under a name of its own, and the keys that open it.

The wire calls an endpoint a deployment, which is Ray Serve's word; this module and the envelopes of answers alone say so.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from arkor_ray.schemas.base import Timestamp, WireModel
from arkor_ray.schemas.chat import AdapterTarget, CheckpointAdapter

SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,48}[a-z0-9]")
# A slug is the first label of a host name; these are names that people expect to belong to the service itself.
# fmt: off
RESERVED_SLUGS = frozenset((
    "www", "api", "admin", "app", "studio", "docs", "auth", "login", "static", "assets", "status", "mail", "ftp", "ns1",
    "ns2", "localhost", "root", "support", "billing", "dashboard", "health", "metrics", "v1",
))
# fmt: on
MAX_RETENTION_DAYS = 36_500

AuthMode = Literal["none", "fixed_api_key"]
RetentionMode = Literal["unlimited", "disabled", "days"]
RetentionDays = Annotated[int, Field(strict=True, ge=1, le=MAX_RETENTION_DAYS)]

DEFAULT_RETENTION: tuple[RetentionMode, int] = ("days", 7)


class ServedAdapter(WireModel):
    kind: Literal["adapter"]
    adapter: AdapterTarget

    @property
    def model(self) -> str:
        """The name that answers carry: the job, with `:<step>` for a checkpoint."""
        adapter = self.adapter
        return f"{adapter.job_id}:{adapter.step}" if isinstance(adapter, CheckpointAdapter) else adapter.job_id


class ServedBaseModel(WireModel):
    kind: Literal["base_model"]
    base_model: str = Field(min_length=1, description="A name of the server's catalogue; compared case-insensitively.")

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.base_model


def _branch(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return {"adapter": "ServedAdapter", "base_model": "ServedBaseModel"}.get(kind) if isinstance(kind, str) else None


# Branches are named as their classes, since "adapter" as a branch could not be told from the field in an error.
EndpointTarget = Annotated[
    Annotated[ServedAdapter, Tag("ServedAdapter")] | Annotated[ServedBaseModel, Tag("ServedBaseModel")],
    Discriminator(
        _branch,
        custom_error_type="target_kind",
        custom_error_message="must be an object whose kind is 'adapter' or 'base_model'",
    ),
]


class EndpointCreate(WireModel):
    """What publishes an endpoint. Without a retention mode, runs are kept for `DEFAULT_RETENTION`."""

    slug: str = Field(description="The endpoint's name on this whole server, and the first label of its host name.")
    target: EndpointTarget
    auth_mode: AuthMode
    run_retention_mode: RetentionMode | None = None
    run_retention_days: RetentionDays | None = Field(default=None, description="Needed with mode `days`, else absent.")

    @field_validator("slug")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not SLUG.fullmatch(value):
            raise ValueError("must be 2 to 50 of a-z, 0-9 and '-', neither starting nor ending with '-'")
        if value in RESERVED_SLUGS:
            raise ValueError("is reserved for the service itself; choose another")
        return value

    @model_validator(mode="after")
    def _retention(self) -> EndpointCreate:
        _check_retention(self.run_retention_mode, self.run_retention_days)
        return self

    @property
    def retention(self) -> tuple[RetentionMode, int | None]:
        """Mode and days, the default where nothing was said."""
        return (
            DEFAULT_RETENTION if self.run_retention_mode is None else (self.run_retention_mode, self.run_retention_days)
        )


class EndpointPatch(WireModel):
    """What to change; an absent field stays as it is. Retention is changed as a whole."""

    target: EndpointTarget | None = None
    auth_mode: AuthMode | None = None
    enabled: bool | None = Field(default=None, strict=True)
    run_retention_mode: RetentionMode | None = None
    run_retention_days: RetentionDays | None = Field(default=None, description="Needed with mode `days`, else absent.")

    @field_validator("*", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("must not be null; leave it out to keep what is there")
        return value

    @model_validator(mode="after")
    def _possible(self) -> EndpointPatch:
        if "slug" in (self.model_extra or {}):
            raise ValueError("slug: is immutable, clients have it in their URLs; publish another endpoint instead")
        _check_retention(self.run_retention_mode, self.run_retention_days)
        return self


def _check_retention(mode: RetentionMode | None, days: int | None) -> None:
    if mode == "days" and days is None:
        raise ValueError("runRetentionDays: is needed with runRetentionMode 'days', a positive whole number")
    if mode != "days" and days is not None:
        told = "without runRetentionMode" if mode is None else f"with runRetentionMode {mode!r}"
        raise ValueError(f"runRetentionDays: must be absent {told}; only mode 'days' takes it (got {days})")


class Endpoint(WireModel):
    """An endpoint as the wire shows it."""

    id: str
    slug: str
    org_id: str
    project_id: str
    target: EndpointTarget
    auth_mode: AuthMode
    url_format: Literal["openai_compat"]
    enabled: bool
    custom_domain: str | None
    # Clients accept a value or nothing here, never null.
    run_retention_mode: str | None = Field(default=None, exclude_if=lambda mode: mode is None)
    run_retention_days: int | None = Field(default=None, exclude_if=lambda days: days is None)
    created_at: Timestamp
    updated_at: Timestamp
    url: str | None = Field(default=None, description="The `base_url` for an OpenAI client.")


class EndpointKeyCreate(WireModel):
    label: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]


class EndpointKey(WireModel):
    """A key as listed: never its plaintext, which is returned once, on creation."""

    id: str
    label: str
    prefix: str
    enabled: bool
    created_at: Timestamp
    last_used_at: Timestamp | None = None


class IssuedEndpointKey(WireModel):
    """A key just created, with its plaintext."""

    id: str
    label: str
    plaintext: str
    prefix: str
    created_at: Timestamp
