"""Base models: the one string that names one everywhere, and what the operator says about it in the catalogue.

A reference is `owner/name` or `owner/name@revision` of the Hub, an absolute directory, or `s3://bucket/prefix`. Manifests,
serving applications and requests to them carry it: two revisions of one repository are two base models.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from arkor_ray.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_S3_PREFIX = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\s.][^/\s]*)+")

# What loading a model may raise for reasons that lie in the model: the last two mostly come from code of its own, written for
# another version of transformers.
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError)

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class _OwnFile(BaseModel):
    """A part of the operator's own file: a key that nobody knows is a mistake, and "yes" is no boolean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ServingResources(_OwnFile):
    """Of this base model's serving application; what is absent is as the settings say."""

    gpus: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Per replica: a share of one GPU, or 0; absent: one, or 0.4 of the only one.",
    )
    replicas: int | None = Field(default=None, ge=1, description="Absent: ARKOR_RAY_SERVING_REPLICAS.")
    slots: int | None = Field(
        default=None, ge=1, description="Adapters on the device; absent: ARKOR_RAY_SERVING_SLOTS."
    )
    rows: int | None = Field(default=None, ge=1, description="Requests at a time; absent: ARKOR_RAY_SERVING_ROWS.")
    max_length: int | None = Field(
        default=None, ge=16, description="Tokens of prompt and answer; absent: ARKOR_RAY_SERVING_MAX_LENGTH."
    )


class TrainingResources(_OwnFile):
    """Of jobs on this base model."""

    max_workers: int | None = Field(
        default=None, ge=1, description="Highest numWorkers, one GPU each; absent: ARKOR_RAY_MAX_WORKERS_PER_JOB."
    )


class CatalogueEntry(_OwnFile):
    """One base model and the names that jobs and chats may call it."""

    name: Name
    source: str = Field(description="A Hub id, an absolute directory or s3://bucket/prefix; absent: the name.")
    revision: str | None = Field(default=None, description="Of the Hub: a commit, or a tag or branch; absent: main.")
    aliases: list[Name] = Field(default=[], description="Other names for it.")
    trust_remote_code: bool = Field(default=False, description="Whether code in the model's own files may run here.")
    serving: ServingResources = ServingResources()
    training: TrainingResources = TrainingResources()

    @model_validator(mode="before")
    @classmethod
    def _source_is_the_name(cls, values: Any) -> Any:
        return {**values, "source": values["name"]} if isinstance(values, dict) and _lacks_source(values) else values

    @field_validator("source", mode="after")
    @classmethod
    def _known_kind(cls, source: str) -> str:
        source = source.strip()
        if source.startswith("s3://"):
            source = source.rstrip("/")
            if not _S3_PREFIX.fullmatch(source):
                raise ValueError("must be s3://bucket/prefix, the folder with the model's config.json")
        elif not (source.startswith("/") or HUB_ID.fullmatch(source)):
            raise ValueError(
                "must be a Hub id (owner/name), an absolute directory or s3://bucket/prefix; "
                "the name is taken where there is none"
            )
        return source

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> CatalogueEntry:
        if self.revision is not None:
            if not HUB_ID.fullmatch(self.source):
                raise ValueError(f"revision {self.revision!r} is for Hub ids; {self.source} has none, remove it")
            if not _REVISION.fullmatch(self.revision) or ".." in self.revision:
                raise ValueError(f"revision {self.revision!r} must be a commit, a tag or a branch of the Hub")
        return self

    @classmethod
    def unlisted(cls, reference: str) -> CatalogueEntry:
        """For a base that the catalogue does not name, or no longer: the defaults, and no code of its own."""
        source, revision = split_reference(reference)
        return cls.model_construct(name=reference, source=source, revision=revision)

    @property
    def reference(self) -> str:
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    @property
    def names(self) -> list[str]:
        return [self.name, *self.aliases]


def split_reference(reference: str) -> tuple[str, str | None]:
    """Where a base model is, and its revision. Only Hub ids have one; a directory may have an "@" in its name."""
    if reference.startswith(("/", "s3://")):
        return reference, None
    source, _, revision = reference.partition("@")
    return source, revision or None


def wants_remote_code(error: Exception) -> bool:
    """Whether transformers refused a model because it would have to run code of the model's own."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def needs_remote_code(name: str) -> ModelError:
    """For a base model that does not load without code of its own."""
    return ModelError(
        f"Base model {name!r} brings code of its own, which is not run here. If the operator trusts it, its entry in the "
        f"catalogue (the file of ARKOR_RAY_CATALOGUE) gets trust_remote_code: true",
        param="config.model",
    )


def _lacks_source(values: dict[Any, Any]) -> bool:
    return isinstance(values.get("name"), str) and "source" not in values
