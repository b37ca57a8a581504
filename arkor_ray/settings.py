"""What the server side reads from `ARKOR_RAY_*`, validated once at start.

The embedded default (SQLite, a local directory, local Ray) needs nothing set. A cluster sets a PostgreSQL database, an S3
storage and its catalogue; combinations that would lose data are refused here with a sentence that says what to set.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from arkor_ray.catalogue import Catalogue, read_catalogue
from arkor_ray.db.url import check_hosts
from arkor_ray.errors import InvalidRequestError, ModelError
from arkor_ray.placeholders import weak_secrets
from arkor_ray.schemas.address import check_s3_endpoint, check_web_address, is_loopback
from arkor_ray.schemas.model import HUB_ID, CatalogueEntry

DEMO_BASE = "arkor-ray/demo-base"  # `arkor-ray up` makes it and puts it into the embedded catalogue
DATABASE_SCHEME = re.compile(r"(?P<name>[\w+]+)://")
DOMAIN = re.compile(r"(?=.{1,200}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class Settings(BaseSettings):
    """One object for every process of the service. `environment()` turns it back into variables for a child process."""

    # Values are shown nowhere, neither by repr nor in a ValidationError's traceback: the database's URL holds a password.
    model_config = SettingsConfigDict(
        env_prefix="ARKOR_RAY_", extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    data_dir: Path = Field(
        default=Path(".arkor-ray"), description="Database, objects and caches of the embedded default."
    )
    database_url: str = Field(
        default="",
        repr=False,
        description="sqlite:///PATH or postgresql://…; empty: SQLite in data_dir. Of several PostgreSQL servers, "
        "HOST1:5432,HOST2:5432, the one that takes writes is used.",
    )
    storage_url: str = Field(default="", description="file:///DIR or s3://BUCKET/PREFIX; empty: a folder in data_dir.")
    s3_endpoint_url: str | None = Field(default=None, description="For S3 other than AWS: MinIO, Ceph, R2.")
    cache_dir: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arkor-ray",
        description="Made once per machine and shared by instances: the demo base model, base models out of S3.",
    )

    cluster: bool = Field(default=False, description="Several nodes: SQLite and local directories are refused.")
    node_roles: bool = Field(
        default=False,
        description="Nodes carry the Ray label arkor-ray/role (control-plane, training or serving), and each part runs only "
        "on its own; off: anywhere.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port that the API listens on.")
    public_url: str | None = Field(default=None, description="How clients reach the API; empty: http://HOST:PORT.")
    endpoints_domain: str | None = Field(
        default=None,
        description="A domain whose subdomains lead to the API too: an endpoint answers at SLUG.DOMAIN; "
        "empty: by path only.",
    )
    host_names: str = Field(
        default="",
        description="Other names by which clients reach the API, separated by commas; where anonymous tokens are given, a "
        "request to any other name is refused.",
    )
    anonymous: bool | None = Field(
        default=None,
        description="Whether POST /v1/auth/anonymous mints tokens for whoever asks; unset: on one machine, where the API "
        "listens on loopback, yes; with `cluster` no; anything else must say.",
    )
    allow_ray_without_token: bool = Field(
        default=False,
        description="With `cluster`: start also on a Ray whose ports anybody may use, because nobody else reaches them.",
    )
    token_days: int = Field(default=90, ge=1, description="Life of an anonymous token.")

    models: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict,
        description="Base models, `NAME` or `NAME=MODEL` separated by commas; MODEL is a Hub id, also with @REVISION, an "
        "absolute directory or s3://BUCKET/PREFIX. `*` admits every Hub id.",
    )
    catalogue: Annotated[Catalogue, NoDecode] = Field(
        default_factory=Catalogue,
        description="A YAML file of base models with aliases, revisions and resources, besides those of `models`.",
    )
    models_allow_local_paths: bool = Field(default=False, description="Jobs may name an absolute directory as model.")
    datasets_allow_private_hosts: bool = Field(default=False, description="Dataset URLs may lead to private addresses.")
    datasets_allow_local_paths: bool = Field(default=False, description="Dataset URLs may be file:///….")
    datasets_max_bytes: int = Field(default=2 * 2**30, ge=1, description="Largest data set that is fetched.")
    datasets_timeout_s: float = Field(default=600.0, gt=0, description="Longest time for fetching one.")

    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines of every process; json: one object per line."
    )
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Largest request body.")
    max_queued_jobs: int = Field(default=1000, ge=1, description="Unfinished jobs per organisation.")
    max_workers_per_job: int = Field(default=64, ge=1, description="Highest numWorkers that a job may ask for.")
    training_cpus_per_worker: float = Field(
        default=0.5, gt=0, description="CPUs that Ray reserves for a training worker; small, so that a laptop has room."
    )
    max_running_jobs: int = Field(default=8, ge=1, description="Jobs launched at a time; the others wait as queued.")
    job_max_retries: int = Field(
        default=5, ge=0, description="Relaunches of a job lost to infrastructure since its newest checkpoint."
    )
    resume_state_days: float = Field(
        default=7, ge=0, description="How long an ended job's resume states and data are kept; 0: about an hour."
    )
    adapter_days: float | None = Field(
        default=None,
        gt=0,
        description="How long an ended job's logs and adapters are kept, besides its last adapter and those served; empty: "
        "for ever.",
    )
    job_silence_timeout_s: float = Field(
        default=60.0, ge=10, description="An attempt at a job that gives no sign of life for so long is lost."
    )
    cancel_grace_s: float = Field(
        default=20.0, gt=0, description="Time for a cancelled job to save and stop by itself."
    )
    checkpoint_ready_timeout_s: float = Field(
        default=240.0,
        gt=0,
        le=540,
        description="How long checkpoint.saved waits for serving before it goes out with ready false.",
    )
    default_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Of base models where a job says nothing; auto: bf16 with GPUs, fp32 without."
    )
    serving_slots: int = Field(default=8, ge=1, description="Adapters on the device at a time, per replica.")
    serving_rows: int = Field(default=16, ge=1, description="Requests decoded at a time, per replica.")
    serving_max_length: int = Field(default=4096, ge=16, description="Longest prompt plus answer, in tokens.")
    serving_replicas: int = Field(default=1, ge=1, description="Replicas of each base model.")

    @field_validator("models", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        models: dict[str, str] = {}
        for entry in filter(None, map(str.strip, value.split(","))):
            name, _, model = (part.strip() for part in entry.partition("="))
            if models.setdefault(name, model or name) != (model or name):
                raise ValueError(f"{name} is there twice, for {models[name]} and for {model or name}")
        return models

    @field_validator("catalogue", mode="before")
    @classmethod
    def _read_catalogue(cls, value: Any) -> Any:
        return read_catalogue(value) if isinstance(value, str | Path) else value

    @field_validator("endpoints_domain", mode="after")
    @classmethod
    def _domain(cls, value: str | None) -> str | None:
        if value is None:
            return None
        domain = value.strip(".").lower()
        if not DOMAIN.fullmatch(domain):
            raise ValueError(f"must be a domain such as models.example.com, without scheme or port (got {value!r})")
        return domain

    @field_validator("s3_endpoint_url", mode="after")
    @classmethod
    def _s3_address(cls, value: str | None) -> str | None:
        return value and check_s3_endpoint(value)

    @field_validator("public_url", mode="after")
    @classmethod
    def _public_address(cls, value: str | None) -> str | None:
        return value and check_web_address(value, example="https://arkor.example.com")

    @field_validator("data_dir", "cache_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="before")
    @classmethod
    def _no_empty_strings(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v != ""} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _defaults_and_combinations(self) -> Settings:
        fill = object.__setattr__
        if not self.database_url:
            fill(self, "database_url", f"sqlite:///{self.data_dir / 'arkor.db'}")
        if not self.storage_url:
            fill(self, "storage_url", (self.data_dir / "storage").as_uri())
        found = DATABASE_SCHEME.match(self.database_url)
        scheme = found["name"] if found else ""
        if scheme.split("+")[0] not in ("sqlite", "postgresql", "postgres"):
            raise ValueError(
                f"ARKOR_RAY_DATABASE_URL: {scheme}:// is not supported; use sqlite:///PATH or postgresql://…"
            )
        check_hosts(self.database_url)
        storage = urlsplit(self.storage_url)
        if storage.scheme not in ("file", "s3") or (storage.scheme == "s3" and not storage.netloc):
            raise ValueError("ARKOR_RAY_STORAGE_URL: use file:///absolute/dir or s3://bucket/prefix")
        if storage.scheme == "file" and (storage.netloc or not storage.path.startswith("/")):
            raise ValueError("ARKOR_RAY_STORAGE_URL: a local directory is file:///absolute/dir, with three slashes")
        if self.cluster and scheme.startswith("sqlite"):
            raise ValueError(
                "ARKOR_RAY_CLUSTER=1 with SQLite: processes on other nodes cannot reach a file on this one; "
                "set ARKOR_RAY_DATABASE_URL=postgresql://…"
            )
        if self.cluster and storage.scheme == "file":
            raise ValueError(
                "ARKOR_RAY_CLUSTER=1 with a local directory: checkpoints would stay on the node that wrote them; "
                "set ARKOR_RAY_STORAGE_URL=s3://bucket/prefix"
            )
        if self.cluster and (weak := next(weak_secrets(self.database_url, s3=storage.scheme == "s3"), None)):
            raise ValueError(f"ARKOR_RAY_CLUSTER=1: {weak}")
        if self.anonymous is None:
            if not self.cluster and not self.listens_on_loopback:
                raise ValueError(
                    f"ARKOR_RAY_HOST={self.host} lets other machines in, and whoever gets in would get a token: set "
                    "ARKOR_RAY_ANONYMOUS=0 (`arkor-ray tokens issue` makes tokens), or 1 if that is what you want"
                )
            fill(self, "anonymous", not self.cluster)
        sources = [entry.source for entry in self.base_models.models]
        if self.s3_endpoint_url and storage.scheme != "s3" and not any(s.startswith("s3://") for s in sources):
            raise ValueError("ARKOR_RAY_S3_ENDPOINT_URL is set, but ARKOR_RAY_STORAGE_URL is not s3://bucket/prefix")
        for entry in self.base_models.models:
            if entry.source.startswith("/") and not _is_model_directory(entry.source):
                raise ValueError(
                    f"base model {entry.name}: {entry.source} is not a model directory, it has no config.json; "
                    "correct it where the model is listed, ARKOR_RAY_CATALOGUE, ARKOR_RAY_MODELS or --alias"
                )
        return self

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """From the environment, `overrides` first. Raises InvalidRequestError with one sentence."""
        known = {f"ARKOR_RAY_{name.upper()}" for name in cls.model_fields}
        for name in os.environ:
            if name.startswith("ARKOR_RAY_") and not name.startswith("ARKOR_RAY_TEST_") and name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise InvalidRequestError(f"{name} is no setting{hint}", param=name)
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = f"ARKOR_RAY_{str(first['loc'][0]).upper()}: " if first["loc"] else ""
            raise InvalidRequestError(name + first["msg"].removeprefix("Value error, ")) from error

    def environment(self) -> dict[str, str]:
        """Variables under which `load()` in another process gives the same settings."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Catalogue):
                if not value.models:
                    continue
                value = value.model_dump_json(exclude_defaults=True)
            elif isinstance(value, dict):
                value = ",".join(f"{k}={v}" for k, v in value.items())
            elif isinstance(value, bool):
                value = int(value)
            values[f"ARKOR_RAY_{name.upper()}"] = str(value)
        return values

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only processes of this machine reach the API, browsers with any page in them included."""
        return is_loopback(self.host)

    @property
    def api_url(self) -> str:
        """How clients reach the API. A server that listens everywhere is shown as on this machine; set public_url."""
        return (self.public_url or self.local_url).rstrip("/")

    @property
    def local_url(self) -> str:
        """How this machine reaches the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def endpoint_url(self, slug: str) -> str:
        """The `base_url` for an OpenAI client of that endpoint: by host where there is a domain, else by path."""
        if self.endpoints_domain is None:
            return f"{self.api_url}/e/{slug}/v1"
        api = urlsplit(self.api_url)
        port = f":{api.port}" if api.port else ""
        return f"{api.scheme}://{slug}.{self.endpoints_domain}{port}/v1"

    @property
    def database_file(self) -> Path | None:
        """Where an SQLite database is; None for any other."""
        if not self.database_url.startswith("sqlite"):
            return None
        return Path(self.database_url.partition(":///")[2].partition("?")[0]).absolute()

    @property
    def demo_base_cache(self) -> Path:
        return self.cache_dir / "demo-base"

    @property
    def model_cache(self) -> Path:
        """Where nodes keep base models that they fetched from S3."""
        return self.cache_dir / "models"

    @cached_property
    def base_models(self) -> Catalogue:
        """The catalogue's file and `models` in one. Raises ValueError where they contradict each other."""
        return self.catalogue.with_names({name: model for name, model in self.models.items() if name != "*"})

    def model_names(self) -> list[str]:
        """What the catalogue accepts, aliases included, for error messages and `GET /v1/models`."""
        return self.base_models.names()

    def resolve_model(self, name: str) -> str:
        """The reference of the base model that a user's name stands for; raises like `find_model`."""
        return self.find_model(name).reference

    def find_model(self, name: str) -> CatalogueEntry:
        """What the catalogue says about a user's name; names compare case-insensitively, as the contract asks.

        Raises ModelError that lists what is accepted.
        """
        found = self.base_models.named(name)
        if found is not None:
            return found
        if name.startswith("/"):
            return self.base_models.of_base(self._local_model(name))
        # A name that is a directory here as well would be loaded from there.
        if "*" in self.models and HUB_ID.fullmatch(name) and not Path(name).exists():
            return self.base_models.of_base(name)
        raise ModelError(
            f"model {name!r} is not in this server's catalogue; it has {', '.join(self.model_names()) or 'none'}. "
            "The operator adds one with --alias NAME=MODEL, ARKOR_RAY_MODELS=NAME=MODEL or in the file of "
            "ARKOR_RAY_CATALOGUE",
            param="config.model",
        )

    def _local_model(self, name: str) -> str:
        if not self.models_allow_local_paths:
            raise ModelError(
                f"model {name!r} is a local path, which this server does not accept; "
                "the operator allows it with ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS=1",
                param="config.model",
            )
        if not _is_model_directory(name):
            raise ModelError(f"model {name!r} is not a model directory: it has no config.json", param="config.model")
        return str(Path(name))


def _is_model_directory(path: str) -> bool:
    return (Path(path) / "config.json").is_file()
