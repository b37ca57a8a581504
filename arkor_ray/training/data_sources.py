"""Getting a job's rows, once: from a URL, a file, or the Hub, into storage, where every later attempt finds them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arkor_ray.errors import DatasetError, ObjectNotFoundError
from arkor_ray.schemas.base import without_url_secrets
from arkor_ray.schemas.dataset import BlobSource, HuggingFaceSource
from arkor_ray.schemas.job import JobConfig
from arkor_ray.schemas.model import HUB_ID
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.training.data_url import FETCH_ATTEMPTS, fetch_blob
from arkor_ray.training.job_spec import DatasetPolicy
from arkor_ray.training.own_process import run_within

logger = logging.getLogger(__name__)

Row = Any

_REMEDY = "Name another data set or subset, or give its rows as one file: a source of type blob, with a url."


def load_rows(job_id: str, config: JobConfig, store: ObjectStore, policy: DatasetPolicy) -> dict[str, list[Row]]:
    """The raw rows: "train", and "eval" when the source has an evaluation split of its own that the job wants.

    The first attempt reads the source and keeps the rows under the job's dataset prefix; later ones read them there.
    Raises DatasetError when the user must act, ServiceUnavailableError when trying later may help.
    """
    prefix = layout.dataset_prefix(job_id)
    index_key = prefix + layout.DATASET_INDEX_NAME  # written last: without it, nothing else counts
    try:
        names = json.loads(store.get(index_key))
        return {name: _stored_rows(store.get(f"{prefix}{name}.jsonl")) for name in names}
    except ObjectNotFoundError:
        pass
    source = config.dataset_source
    if isinstance(source, BlobSource):
        splits = {"train": list(parse_rows(fetch_blob(source, policy)))}
    else:
        splits = fetch_from_hub(source, config, policy)
    for name, rows in splits.items():
        lines = b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows)
        store.put(f"{prefix}{name}.jsonl", lines)
    store.put(index_key, json.dumps(sorted(splits)).encode())
    return splits


def parse_rows(data: bytes) -> Iterator[Row]:
    """Rows of JSONL, of a JSON array, or of an object with the array under `data` or `train`.

    A line that is no JSON comes out as itself, for the row checks to reject by number. Raises DatasetError when
    nothing is there.
    """
    text = data.decode("utf-8-sig", errors="replace")
    stripped = text.lstrip()
    if stripped[:1] in ("[", "{"):
        try:
            whole = json.loads(stripped)
        except (ValueError, RecursionError):
            whole = None  # several values, one a line
        if isinstance(whole, dict) and not any(isinstance(whole.get(key), list) for key in ("data", "train")):
            whole = [whole]
        if isinstance(whole, dict):
            whole = whole["data"] if isinstance(whole.get("data"), list) else whole["train"]
        if isinstance(whole, list):
            yield from whole
            return
    empty = True
    for line in text.split("\n"):
        if line.strip():
            empty = False
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line
    if empty:
        raise DatasetError("The data set is empty.")


def _stored_rows(data: bytes) -> list[Row]:
    """What `load_rows` stored: a row on each line, as it was read from its source, whatever it looks like."""
    return [json.loads(line) for line in data.splitlines()]


def fetch_from_hub(source: HuggingFaceSource, config: JobConfig, policy: DatasetPolicy) -> dict[str, list[Row]]:
    """`load_from_hub` within the policy's time, whatever its libraries wait for. Raises DatasetError."""
    try:
        return run_within(policy.timeout_s, load_from_hub, source, config, policy)
    except TimeoutError as error:
        raise DatasetError(
            f"datasetSource.name: data set {source.name!r} could not be fetched from the Hub within {policy.timeout_s:g} s, "
            f"the limit that this server has by ARKOR_RAY_DATASETS_TIMEOUT_S. Submit the job anew when the Hub answers "
            f"faster, or have the operator raise the limit. {_REMEDY}"
        ) from error


def load_from_hub(source: HuggingFaceSource, config: JobConfig, policy: DatasetPolicy) -> dict[str, list[Row]]:
    """`datasets.load_dataset` with name, subset and split untouched; private ones by the server's own Hub token.

    An evaluation split without rows counts as none.
    """
    split = source.split or (config.dataset_split if isinstance(config.dataset_split, str) else None) or "train"
    splits = {"train": load_split(source, split, policy)}
    if config.dataset_split is None and config.eval_steps is not None:
        import datasets

        try:
            with _own_files_only(source.name):
                available = datasets.get_dataset_split_names(source.name, source.subset)
        except Exception as error:  # only a convenience: without the names, rows are held out
            logger.warning("Cannot list the splits of %s: %s", source.name, error)
            available = []
        own = next((name for name in ("validation", "test") if name in available and not split.startswith(name)), None)
        if own is not None and (rows := load_split(source, own, policy)):
            splits["eval"] = rows
    return splits


def load_split(source: HuggingFaceSource, split: str, policy: DatasetPolicy) -> list[Row]:
    """The rows of one split, which may be a slice. Raises DatasetError."""
    if not HUB_ID.fullmatch(source.name) or Path(source.name).exists():
        raise DatasetError(f"{source.name!r} is no data set name of the Hub; write owner/name.")
    import datasets
    from huggingface_hub.utils import httpx  # the one whose errors it raises

    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            with _own_files_only(source.name):
                builder = datasets.load_dataset_builder(source.name, source.subset)
            _check_files(source, builder, policy)
            # The one that was checked: by its name alone, the repository might be another by now.
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
            if rows.data.nbytes > policy.max_bytes:
                raise DatasetError(
                    f"Data set {source.name!r} has {rows.data.nbytes} bytes when it is unpacked, more than the limit of "
                    f"{policy.max_bytes}."
                )
            # As stored: read one by one, columns of images or sounds would fetch what they name. And as JSON, times and
            # bytes as text: so will every later attempt read them.
            return json.loads(json.dumps(rows.to_list(), default=str))
        except DatasetError:
            raise
        except (ConnectionError, httpx.TransportError, TimeoutError) as error:
            if attempt == FETCH_ATTEMPTS or "offline" in str(error).lower() or _was_tried_long(error):
                raise DatasetError(f"The Hub cannot be reached for data set {source.name!r}: {_said(error)}") from error
            time.sleep(2 ** (attempt - 1))
        except Exception as error:
            raise DatasetError(
                f"Data set {source.name!r} (split {split!r}) cannot be loaded: {_said(error)}"
            ) from error
    raise AssertionError("unreachable")


def _was_tried_long(error: BaseException | None) -> bool:
    """Whether the Hub's own client has given up, which tries as long as we do: both, one in the other, take minutes."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__
    return error is not None


@contextmanager
def _own_files_only(name: str) -> Iterator[None]:
    """A repository's card names its files by patterns, and `datasets` looks those up anywhere: on this machine, in its
    network, in storage with our credentials. In the block, any but those within the repository raise DatasetError.

    `datasets` has no setting for it, and afterwards is too late: the request was made.
    """
    from datasets import data_files

    anywhere = data_files.resolve_pattern

    def within(pattern: str, base_path: str, *rest: Any, **named: Any) -> list[str]:
        hops = [part for part in pattern.split("::") if not part.startswith(f"hf://datasets/{name}@")]
        if any(urlsplit(part).scheme or part.startswith("/") or ".." in part.split("/") for part in hops):
            raise DatasetError(f"Data set {name!r} names files outside its own repository, such as {pattern[:200]!r}.")
        return anywhere(pattern, base_path, *rest, **named)

    data_files.resolve_pattern = within
    try:
        yield
    finally:
        data_files.resolve_pattern = anywhere


def _check_files(source: HuggingFaceSource, builder: Any, policy: DatasetPolicy) -> None:
    """Raises DatasetError unless what would be downloaded is of the repository alone and within the limit.

    The repository's card may name files anywhere, this machine's and its network's included, and the size that it tells is its
    author's word: what counts is what the Hub says of each file.
    """
    files = [str(file) for found in (builder.config.data_files or {}).values() for file in found]
    own = f"hf://datasets/{source.name}@".lower()
    if foreign := [file for file in files if not file.lower().startswith(own)]:
        raise DatasetError(f"Data set {source.name!r} names files outside its own repository, such as {foreign[0]!r}.")
    size = 0
    for file in dict.fromkeys(files):  # none: a data set of the cache, with the Hub out of reach
        found = _size_of(file)
        if found is None:
            raise DatasetError(
                f"datasetSource.name: the Hub does not say how large {file!r} of data set {source.name!r} is, so that it "
                f"cannot be held to the limit of {policy.max_bytes} bytes. {_REMEDY}"
            )
        size += found
        if size > policy.max_bytes:
            raise DatasetError(
                f"datasetSource.name: the files of data set {source.name!r} have {size} bytes or more, and the limit is "
                f"{policy.max_bytes}. {_REMEDY}"
            )


def _size_of(file: str) -> int | None:
    """In bytes. `datasets` has just found the file, and its list of the folder is still known: that is what is asked."""
    import fsspec

    file_system, path = fsspec.url_to_fs(file)
    return file_system.size(path)


def _said(error: Exception) -> str:
    """An error of a library, which may name a URL with a signature in it."""
    return without_url_secrets(str(error))
