"""Envelopes of requests and answers: what a route wraps around the vocabulary of `schemas/`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from arkor_ray.schemas.base import WireModel
from arkor_ray.schemas.checkpoint import Checkpoint, CheckpointManifest
from arkor_ray.schemas.endpoint import Endpoint, EndpointKey, IssuedEndpointKey
from arkor_ray.schemas.identity import Org, Token
from arkor_ray.schemas.job import Job
from arkor_ray.schemas.project import Project
from arkor_ray.schemas.run import Run


class ErrorBody(WireModel):
    """Every error, on every route. `error` is the whole sentence and begins with `code`."""

    error: str
    code: str | None = None
    param: str | None = Field(default=None, description="The request field at fault, where there is one.")


class OpenAIError(WireModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(WireModel):
    """Every error on the routes that OpenAI's clients use."""

    error: OpenAIError


class CliConfig(WireModel):
    """How the arkor CLI logs in. All null: there is no OAuth here, log in anonymously."""

    # Named as they are on the wire: an alias generator reads the digit differently from version to version.
    auth0_domain: str | None = Field(default=None, alias="auth0Domain")
    client_id: str | None = None
    audience: str | None = None
    callback_ports: list[int] = []


class TokenCreate(WireModel):
    label: str = Field(min_length=1, max_length=200)
    email: str | None = Field(default=None, max_length=320)
    expires_in_days: int | None = Field(default=None, ge=1, le=36_500, description="Absent: as long as your own token.")


class TokenList(WireModel):
    tokens: list[Token]


class ProjectList(WireModel):
    org: Org
    projects: list[Project]


class ProjectAnswer(WireModel):
    project: Project


class JobAnswer(WireModel):
    job: Job


class JobList(WireModel):
    jobs: list[Job]


class JobDetail(WireModel):
    """`events` holds the `data` objects of the event stream, in order: the one at index n has the number n + 1."""

    job: Job
    events: list[dict[str, Any]]


class Done(WireModel):
    ok: bool = True


class CheckpointList(WireModel):
    checkpoints: list[Checkpoint]


class CheckpointDetail(WireModel):
    checkpoint: Checkpoint
    manifest: CheckpointManifest


class EndpointAnswer(WireModel):
    endpoint: Endpoint = Field(alias="deployment")


class EndpointList(WireModel):
    endpoints: list[Endpoint] = Field(alias="deployments")


class EndpointKeyAnswer(WireModel):
    key: IssuedEndpointKey


class EndpointKeyList(WireModel):
    keys: list[EndpointKey]


class Model(WireModel):
    name: str = Field(description="What `config.model` and `baseModel` accept, in any case.")


class OpenAIModel(WireModel):
    """A model as OpenAI's clients list it; in snake_case, as they do."""

    id: str = Field(description="What `model` accepts: a base model, `<jobId>`, or `<jobId>:<step>`.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds; 0 for base models, which were not made here.")
    owned_by: str = Field(alias="owned_by", description="The organisation of an adapter.")


class OpenAIModelList(WireModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class ModelList(OpenAIModelList):
    """OpenAI's list, and besides it the base models alone, which are what jobs may name."""

    models: list[Model]


class Health(WireModel):
    status: str
    checks: dict[str, str] = {}


class RunList(WireModel):
    runs: list[Run]
