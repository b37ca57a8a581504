"""Where a person says that something is or shall be: a path, file:///… or s3://bucket/…, as a store and a key in it; and base
models by their reference.

For programs that run without the service. S3 services other than AWS are named by ARKOR_RAY_S3_ENDPOINT_URL.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.address import check_s3_endpoint
from arkor_ray.storage.base_files import BaseFiles, base_files
from arkor_ray.storage.object_store import ObjectStore, open_store


def endpoint_url() -> str | None:
    """Of the S3 service, where it is not AWS. Raises InvalidRequestError for what is no URL."""
    url = os.environ.get("ARKOR_RAY_S3_ENDPOINT_URL")
    if not url:
        return None
    try:
        return check_s3_endpoint(url)
    except ValueError as error:
        raise InvalidRequestError(f"ARKOR_RAY_S3_ENDPOINT_URL: {error}", param="ARKOR_RAY_S3_ENDPOINT_URL") from error


def folder_url(text: str, *, param: str) -> str:
    """A storage URL. Raises InvalidRequestError for a relative path: a Ray job runs in a copy of its folder, and what it
    writes there goes when it ends. `param` is what messages call the location."""
    if text.startswith(("s3://", "file:///")):
        return text.rstrip("/")
    path = Path(text).expanduser()
    if "://" in text or not path.is_absolute():
        raise InvalidRequestError(
            f"{param}: {text!r} must be an absolute path, file:///… or s3://bucket/prefix; a relative path would be in the "
            "job's own copy of its folder, which goes when it ends",
            param=param,
        )
    return path.as_uri()


def open_folder(text: str, *, param: str) -> ObjectStore:
    """The folder as a store; see `folder_url`."""
    return open_store(folder_url(text, param=param), endpoint_url=endpoint_url())


def open_file(text: str, *, param: str) -> tuple[ObjectStore, str]:
    """A file as its folder and its name there; see `folder_url`. Raises InvalidRequestError where it names no file."""
    parent, _, name = folder_url(text, param=param).rpartition("/")
    if not name or name.startswith(".") or parent in ("s3:/", "file://"):
        raise InvalidRequestError(f"{param}: {text!r} names no file", param=param)
    return open_store(parent, endpoint_url=endpoint_url()), name


def model_cache() -> Path:
    """Where a node keeps base models that it fetched from S3."""
    return Path(tempfile.gettempdir()) / "arkor-ray-models"


def fetch_base(reference: str) -> BaseFiles:
    """The files of a base model (see schemas/model.py) on this node. Raises ModelError or StorageError."""
    return base_files(reference, model_cache(), name=reference, endpoint_url=endpoint_url())
