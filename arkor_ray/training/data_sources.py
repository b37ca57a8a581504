"""Getting a job's rows, once: from a URL, a file, or the Hub, into storage, where every later attempt finds them.

A dataset URL is a request made by our machine on a stranger's behalf. So: http and https only, every hop's host
resolved here and refused unless all its addresses are public, the connection made to the address that was checked,
redirects followed by hand, the token sent to the first origin only, and limits on size and time.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import httpx

from arkor_ray.errors import DatasetError, ObjectNotFoundError, ServiceUnavailableError
from arkor_ray.schemas.dataset import BlobSource, HuggingFaceSource, is_public_address
from arkor_ray.schemas.job import JobConfig
from arkor_ray.schemas.model import HUB_ID
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.training.job_spec import DatasetPolicy

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
FETCH_ATTEMPTS = 5  # with pauses of 1, 2, 4 and 8 s: an address that is wrong should not keep its job waiting

Row = Any


def load_rows(job_id: str, config: JobConfig, store: ObjectStore, policy: DatasetPolicy) -> dict[str, list[Row]]:
    """The raw rows: "train", and "eval" when the source has an evaluation split of its own that the job wants.

    The first attempt reads the source and keeps the rows under the job's dataset prefix; later ones read them there.
    Raises DatasetError when the user must act, ServiceUnavailableError when trying later may help.
    """
    prefix = layout.dataset_prefix(job_id)
    index_key = prefix + "index.json"  # written last: without it, nothing else counts
    try:
        names = json.loads(store.get(index_key))
        return {name: list(parse_rows(store.get(f"{prefix}{name}.jsonl"))) for name in names}
    except ObjectNotFoundError:
        pass
    source = config.dataset_source
    if isinstance(source, BlobSource):
        splits = {"train": list(parse_rows(fetch_blob(source, policy)))}
    else:
        splits = load_from_hub(source, config, policy)
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
        except ValueError:
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
            except ValueError:
                yield line
    if empty:
        raise DatasetError("The data set is empty.")


def load_from_hub(source: HuggingFaceSource, config: JobConfig, policy: DatasetPolicy) -> dict[str, list[Row]]:
    """`datasets.load_dataset` with name, subset and split untouched; private ones by the server's own Hub token."""
    split = source.split or (config.dataset_split if isinstance(config.dataset_split, str) else None) or "train"
    splits = {"train": load_split(source, split, policy)}
    if config.dataset_split is None and config.eval_steps is not None:
        import datasets

        try:
            available = datasets.get_dataset_split_names(source.name, source.subset)
        except Exception as error:  # only a convenience: without the names, rows are held out
            logger.warning("Cannot list the splits of %s: %s", source.name, error)
            available = []
        own = next((name for name in ("validation", "test") if name in available and not split.startswith(name)), None)
        if own is not None:
            splits["eval"] = load_split(source, own, policy)
    return splits


def load_split(source: HuggingFaceSource, split: str, policy: DatasetPolicy) -> list[Row]:
    """The rows of one split, which may be a slice. Raises DatasetError."""
    if not HUB_ID.fullmatch(source.name) or Path(source.name).exists():
        raise DatasetError(f"{source.name!r} is no data set name of the Hub; write owner/name.")
    import datasets

    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            _check_files(source, datasets.load_dataset_builder(source.name, source.subset), policy)
            return list(datasets.load_dataset(source.name, source.subset, split=split))
        except DatasetError:
            raise
        except (ConnectionError, httpx.TransportError, TimeoutError) as error:
            if attempt == FETCH_ATTEMPTS or "offline" in str(error).lower():
                raise DatasetError(f"The Hub cannot be reached for data set {source.name!r}: {error}") from error
            time.sleep(2 ** (attempt - 1))
        except Exception as error:
            raise DatasetError(f"Data set {source.name!r} (split {split!r}) cannot be loaded: {error}") from error
    raise AssertionError("unreachable")


def _check_files(source: HuggingFaceSource, builder: Any, policy: DatasetPolicy) -> None:
    """A repository's card may name files anywhere, this machine's and its network's included: only its own may be read."""
    files = [str(file) for found in (builder.config.data_files or {}).values() for file in found]
    own = f"hf://datasets/{source.name}@".lower()
    if foreign := [file for file in files if not file.lower().startswith(own)]:
        raise DatasetError(f"Data set {source.name!r} names files outside its own repository, such as {foreign[0]!r}.")
    size = builder.info.download_size or 0
    if size > policy.max_bytes:
        raise DatasetError(f"Data set {source.name!r} has {size} bytes, more than the limit of {policy.max_bytes}.")


def fetch_blob(source: BlobSource, policy: DatasetPolicy) -> bytes:
    """The content behind a data set URL, within the policy. The token appears in no message."""
    parts = urlsplit(source.url)
    if parts.scheme == "file":
        return _read_local(Path(unquote(parts.path)), policy)
    deadline = time.monotonic() + policy.timeout_s
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            return _fetch(source, policy, deadline)
        except (httpx.TransportError, ServiceUnavailableError) as error:
            shown = error if isinstance(error, ServiceUnavailableError) else f"{type(error).__name__}: {error}"
            if attempt == FETCH_ATTEMPTS or time.monotonic() + 2 ** (attempt - 1) > deadline:
                raise DatasetError(
                    f"The data set at {_shown(source.url)} cannot be fetched, after {attempt} attempts: {shown}"
                ) from error
            time.sleep(2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _read_local(path: Path, policy: DatasetPolicy) -> bytes:
    if not policy.allow_local_paths:
        raise DatasetError(
            "This server does not read data sets from file:// URLs; the operator allows it with "
            "ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS=1."
        )
    try:
        size = path.stat().st_size
        if size > policy.max_bytes:
            raise DatasetError(f"{path} has {size} bytes, more than the limit of {policy.max_bytes}.")
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error


def _fetch(source: BlobSource, policy: DatasetPolicy, deadline: float) -> bytes:
    url, origin = source.url, _origin(source.url)
    timeout = httpx.Timeout(30.0, connect=10.0)
    # trust_env=False: through a proxy, the check of the address would check the wrong machine.
    with httpx.Client(follow_redirects=False, timeout=timeout, trust_env=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Accept": "*/*"}
            if source.token and _origin(url) == origin:
                headers["Authorization"] = f"Bearer {source.token}"
            with client.stream("GET", **_pinned(url, headers, policy)) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status_code >= 500 or response.status_code == 429:
                    raise ServiceUnavailableError(f"HTTP {response.status_code} from {_shown(url)}")
                if response.status_code != 200:
                    raise DatasetError(f"The data set at {_shown(url)} cannot be fetched: HTTP {response.status_code}.")
                return _read_limited(response, policy, deadline)
    raise DatasetError(f"The data set at {_shown(source.url)} redirects more than {MAX_REDIRECTS} times.")


def _pinned(url: str, headers: dict[str, str], policy: DatasetPolicy) -> dict[str, Any]:
    """Arguments of a request that goes to a checked address of the URL's host, whatever DNS says a moment later."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise DatasetError(f"The data set leads to {_shown(url)}, which is no plain http or https URL.")
    if policy.allow_private_hosts:
        return {"url": url, "headers": headers}
    address = _public_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    host = f"[{address}]" if ":" in address else address
    pinned = urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host))
    return {
        "url": pinned,
        "headers": {**headers, "Host": parts.netloc},
        "extensions": {"sni_hostname": parts.hostname},
    }


def _public_address(host: str, port: int) -> str:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise ServiceUnavailableError(f"The host name {host!r} cannot be resolved: {error.strerror}") from error
    for text in sorted(found):
        address = ipaddress.ip_address(text.partition("%")[0])
        if not is_public_address(address):
            raise DatasetError(
                f"The host {host!r} of the data set is at a private address, which this server does not fetch from; the "
                "operator allows it with ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS=1."
            )
    return min(found, key=lambda text: (":" in text, text))


def _read_limited(response: httpx.Response, policy: DatasetPolicy, deadline: float) -> bytes:
    data = bytearray()
    for chunk in response.iter_bytes():  # after decompression, so that a small bomb is counted at its full size
        data += chunk
        if len(data) > policy.max_bytes:
            raise DatasetError(f"The data set is larger than the limit of {policy.max_bytes} bytes.")
        if time.monotonic() > deadline:
            raise DatasetError(f"The data set could not be fetched within {policy.timeout_s:g} s.")
    return bytes(data)


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _shown(url: str) -> str:
    """For messages: without the query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.hostname or "", parts.path, "", ""))
