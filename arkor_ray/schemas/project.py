"""Projects: the second half of every scope."""

from __future__ import annotations

import re

from pydantic import field_validator

from arkor_ray.schemas.base import Timestamp, WireModel

SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


class Project(WireModel):
    id: str
    slug: str
    name: str
    org_id: str
    created_at: Timestamp
    updated_at: Timestamp


class ProjectCreate(WireModel):
    name: str
    slug: str

    @field_validator("slug")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not SLUG.fullmatch(value):
            raise ValueError("must be 1 to 40 of a-z, 0-9 and '-', not starting with '-'")
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not 1 <= len(value) <= 200:
            raise ValueError("must have 1 to 200 characters")
        return value
