"""A base model's files on this node: what `from_pretrained` is called with, fetched first where they are in S3.

A prefix in S3 is fetched once per node, whoever needs it first, and taken to be immutable: a new version of a model goes under
a new prefix.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from arkor_ray.errors import ModelError, StorageError
from arkor_ray.schemas.model import split_reference
from arkor_ray.storage.atomic_file import alone, sync
from arkor_ray.storage.object_store import ObjectInfo, ObjectStore, open_store

logger = logging.getLogger(__name__)

# Weights in a form that runs code when it is read, or that another engine reads; only safetensors are used here.
_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}
_WEIGHTS = ".safetensors"


class LoadOptions(TypedDict):
    """Keyword arguments of everything here that loads a base model; `name` is what messages call it."""

    revision: str | None
    trust_remote_code: bool
    name: str


@dataclass(frozen=True)
class BaseFiles:
    """`source` is where the model is for everyone, `path` for this node: a Hub id or a directory."""

    source: str
    path: str
    options: LoadOptions


def base_files(
    reference: str,
    cache: Path,
    *,
    name: str,
    trust_remote_code: bool = False,
    endpoint_url: str | None = None,
    weights: bool = True,
) -> BaseFiles:
    """Blocks while the model is fetched, if it must be. Without `weights` only for its tokenizer and configuration.

    Raises ModelError when there is no model under an S3 prefix, StorageError when it cannot be read or does not fit here.
    """
    source, revision = split_reference(reference)
    path = source
    if source.startswith("s3://"):
        path = str(_fetched(source, cache, name, endpoint_url, weights))
    return BaseFiles(source, path, {"revision": revision, "trust_remote_code": trust_remote_code, "name": name})


def _fetched(url: str, cache: Path, name: str, endpoint_url: str | None, weights: bool) -> Path:
    whole, small = _folder(url, cache, endpoint_url, "whole"), _folder(url, cache, endpoint_url, "small")
    if whole.is_dir():
        return whole
    target = whole if weights else small
    with alone(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            logger.info("Fetching base model %s from %s", name, url)
            _download(open_store(url, endpoint_url=endpoint_url), target, name, weights)
    return target


def _folder(url: str, cache: Path, endpoint_url: str | None, what: str) -> Path:
    digest = hashlib.sha256(f"{endpoint_url}\n{url}\n{what}".encode()).hexdigest()[:16]
    return cache / f"{re.sub(r'[^A-Za-z0-9]+', '-', url.rpartition('/')[2])[:60]}-{digest}"


def _download(store: ObjectStore, target: Path, name: str, weights: bool) -> None:
    """Puts a model's files into the folder `target`, which appears when all of them are there."""
    files = [info for info in store.list("") if _is_needed(info.key, weights)]
    if "config.json" not in (info.key for info in files):
        raise ModelError(f"Base model {name!r}: there is no {store.url}/config.json", param="config.model")
    temporary = target.with_name(f".{target.name}.incoming")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process's: of those that live, only we hold the lock
    _check_room(files, target.parent, name)
    temporary.mkdir()
    try:
        for info in files:
            path = temporary / info.key
            store.get_file(info.key, path)
            size = path.stat().st_size
            if size != info.size:
                raise StorageError(f"{store.url}/{info.key}: got {size} bytes, but it was listed with {info.size}.")
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def _is_needed(key: str, weights: bool) -> bool:
    if key.endswith("/") or any(part.startswith(".") for part in key.split("/")):  # folder markers, .gitattributes
        return False
    suffix = Path(key).suffix
    return suffix not in _OTHER_WEIGHTS and (weights or suffix != _WEIGHTS)


def _check_room(files: Iterable[ObjectInfo], folder: Path, name: str) -> None:
    size, free = sum(info.size for info in files), shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"Base model {name!r} has {size / 2**30:.1f} GiB of files, and {folder} has room for {free / 2**30:.1f}; "
            "make room there, or set ARKOR_RAY_CACHE_DIR to a larger disk"
        )
