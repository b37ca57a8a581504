"""What must hold before a job is accepted. Whatever could only fail later is refused here, by the field's name."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from arkor_ray.errors import DatasetError, InvalidRequestError
from arkor_ray.schemas.dataset import BlobSource, HuggingFaceSource, is_public_address
from arkor_ray.schemas.job import JobConfig, JobCreate, hide_token
from arkor_ray.schemas.model import CatalogueEntry
from arkor_ray.settings import Settings

# `datasets` takes a name that is a path for a local directory, so only what can be a name of the Hub may pass.
# A name without an owner may be one of its file readers ("json", "text"), which read the directory they run in.
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


MAX_CONFIG_BYTES = 64 * 2**10


@dataclass(frozen=True)
class AcceptedJob:
    """A job that may be stored: `config` is what was sent, without the data set's token."""

    name: str
    config: dict[str, Any]
    dataset_token: str | None


def accept(settings: Settings, body: JobCreate) -> AcceptedJob:
    """Raises InvalidRequestError (DatasetError, ModelError) that names the first field at fault and the remedy."""
    _check_size(body.config)
    config = JobConfig.parse(body.config)
    _check_workers(config.num_workers, settings.find_model(config.model), settings.max_workers_per_job)
    source = config.dataset_source
    if isinstance(source, BlobSource):
        _check_url(settings, source.url)
        return AcceptedJob(body.name, hide_token(body.config), source.token)
    _check_hub_name(source)
    return AcceptedJob(body.name, hide_token(body.config), None)


def _check_size(config: dict[str, Any]) -> None:
    """What is kept is shown again with every list of jobs; fields that nobody knows are kept as well."""
    size = len(json.dumps(config))
    if size > MAX_CONFIG_BYTES:
        raise InvalidRequestError(
            f"config: has {size} bytes as JSON, more than {MAX_CONFIG_BYTES}; give data by datasetSource",
            param="config",
        )


def _check_workers(workers: int, base: CatalogueEntry, usual_limit: int) -> None:
    limit, setting = usual_limit, "ARKOR_RAY_MAX_WORKERS_PER_JOB"
    if base.training.max_workers is not None:
        limit, setting = base.training.max_workers, f"training.max_workers of {base.name} in its catalogue"
    if workers > limit:
        raise InvalidRequestError(
            f"config.numWorkers: {workers} is more than this server allows, {limit}; the operator raises it with {setting}",
            param="config.numWorkers",
        )


def _check_hub_name(source: HuggingFaceSource) -> None:
    if not _HUB_DATASET.fullmatch(source.name) or ".." in source.name:
        raise DatasetError(
            f"config.datasetSource.name: must be the name of a data set on the Hub, owner/name (got {source.name!r})",
            param="config.datasetSource.name",
        )


def _check_url(settings: Settings, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "file":
        if not settings.datasets_allow_local_paths:
            raise _url_error(
                "file:// URLs are not accepted by this server; "
                "the operator allows them with ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS=1"
            )
        return
    try:
        _ = parts.port
    except ValueError as error:
        raise _url_error("the port must be a number from 0 to 65535") from error
    if not settings.datasets_allow_private_hosts and is_private_host(parts.hostname or ""):
        raise _url_error(
            f"{parts.hostname} is a private address, which this server does not fetch from; "
            "the operator allows it with ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS=1"
        )


def _url_error(reason: str) -> DatasetError:
    return DatasetError(f"config.datasetSource.url: {reason}", param="config.datasetSource.url")


def is_private_host(host: str) -> bool:
    """Whether `host`, without a look-up, leads elsewhere than to the public internet.

    Names other than localhost are not resolved: they are checked when the data is fetched, by address.
    """
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and not is_public_address(address)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` spells, also as `127.1`, `0x7f000001` or `2130706433`, which C libraries understand."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)) if host and " " not in host else None
    except (OSError, UnicodeEncodeError):
        return None
