"""Fetching a data set's URL: a request made by our machine on a stranger's behalf.

So: http and https only, every hop's host resolved here and refused unless all its addresses are public, the connection made
to the address that was checked, redirects followed by hand, the token sent to the first origin only, and limits on size,
unpacked, and on time, in all.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import httpx

from arkor_ray.errors import DatasetError, ServiceUnavailableError
from arkor_ray.schemas.base import without_url_secrets
from arkor_ray.schemas.dataset import BlobSource, is_metadata_address, is_public_address
from arkor_ray.training.job_spec import DatasetPolicy

MAX_REDIRECTS = 5
FETCH_ATTEMPTS = 5  # with pauses of 1, 2, 4 and 8 s: an address that is wrong should not keep its job waiting


def fetch_blob(source: BlobSource, policy: DatasetPolicy) -> bytes:
    """The content behind a data set URL, within the policy. The token appears in no message."""
    parts = urlsplit(source.url)
    if parts.scheme == "file":
        return _read_local(Path(unquote(parts.path)), policy)
    deadline = time.monotonic() + policy.timeout_s
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            return asyncio.run(_fetch(source, policy, deadline - time.monotonic()))
        except TimeoutError as error:
            raise DatasetError(
                f"The data set at {_shown(source.url)} could not be fetched within {policy.timeout_s:g} s, the limit that "
                "this server has by ARKOR_RAY_DATASETS_TIMEOUT_S."
            ) from error
        except (httpx.TransportError, ServiceUnavailableError) as error:
            said = without_url_secrets(str(error))
            shown = said if isinstance(error, ServiceUnavailableError) else f"{type(error).__name__}: {said}"
            if attempt == FETCH_ATTEMPTS or time.monotonic() + 2 ** (attempt - 1) > deadline:
                raise DatasetError(
                    f"The data set at {_shown(source.url)} cannot be fetched, after {attempt} attempts: {shown}"
                ) from error
            time.sleep(2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _read_local(path: Path, policy: DatasetPolicy) -> bytes:
    if not policy.allow_local_paths:
        raise DatasetError(
            "Data sets are not read from file:// URLs on the node of this job's driver; the operator allows it with "
            "ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS=1, set before Ray is started on every node."
        )
    try:
        size = path.stat().st_size
        if size > policy.max_bytes:
            raise DatasetError(f"{path} has {size} bytes, more than the limit of {policy.max_bytes}.")
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error


async def _fetch(source: BlobSource, policy: DatasetPolicy, limit_s: float) -> bytes:
    """One attempt. Raises TimeoutError after `limit_s`, however busy a server looks that sends byte after byte."""
    url, origin = source.url, _origin(source.url)
    timeout = httpx.Timeout(30.0, connect=10.0)
    # trust_env=False: through a proxy, the check of the address would check the wrong machine.
    async with asyncio.timeout(limit_s), httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Accept": "*/*", "Accept-Encoding": "gzip"}
            if source.token and _origin(url) == origin:
                headers["Authorization"] = f"Bearer {source.token}"
            async with client.stream("GET", **await asyncio.to_thread(_pinned, url, headers, policy)) as response:
                if response.has_redirect_location:
                    url = _redirected(url, response.headers["location"])
                    continue
                if response.status_code >= 500 or response.status_code == 429:
                    raise ServiceUnavailableError(f"HTTP {response.status_code} from {_shown(url)}")
                if response.status_code != 200:
                    raise DatasetError(f"The data set at {_shown(url)} cannot be fetched: HTTP {response.status_code}.")
                return await _read_limited(response, policy)
    raise DatasetError(f"The data set at {_shown(source.url)} redirects more than {MAX_REDIRECTS} times.")


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises DatasetError when that is no URL."""
    try:
        joined = urljoin(url, location)
        _ = urlsplit(joined).port
    except ValueError as error:
        raise DatasetError(f"The data set at {_shown(url)} redirects to what is no URL.") from error
    return joined


def _pinned(url: str, headers: dict[str, str], policy: DatasetPolicy) -> dict[str, Any]:
    """Arguments of a request that goes to a checked address of the URL's host, whatever DNS says a moment later."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise DatasetError(f"The data set leads to {_shown(url)}, which is no plain http or https URL.")
    address = _allowed_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), policy)
    host = f"[{address}]" if ":" in address else address
    pinned = urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host))
    return {
        "url": pinned,
        "headers": {**headers, "Host": parts.netloc},
        "extensions": {"sni_hostname": parts.hostname},
    }


def _allowed_address(host: str, port: int, policy: DatasetPolicy) -> str:
    """One address of the host, all of whose addresses are allowed."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise ServiceUnavailableError(f"The host name {host!r} cannot be resolved: {error.strerror}") from error
    except UnicodeError as error:
        raise DatasetError(f"{host!r} cannot be the name of a host.") from error
    for text in sorted(found):
        address = ipaddress.ip_address(text.partition("%")[0])
        if is_metadata_address(address):
            raise DatasetError(
                f"The host {host!r} of the data set is where clouds keep credentials: nothing is fetched there."
            )
        if not (policy.allow_private_hosts or is_public_address(address)):
            raise DatasetError(
                f"The host {host!r} of the data set is at a private address, which this server does not fetch from; the "
                "operator allows it with ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS=1."
            )
    return min(found, key=lambda text: (":" in text, text))


async def _read_limited(response: httpx.Response, policy: DatasetPolicy) -> bytes:
    """The body, unpacked here: httpx would unpack a whole chunk, and then another packing within it, before we could count."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise DatasetError(f"The data set is sent with Content-Encoding {encoding[:100]!r}; only gzip is understood.")
    data, unpack = bytearray(), _Gunzip() if "gzip" in encoding else None
    async for chunk in response.aiter_raw():
        room = policy.max_bytes + 1 - len(data)
        data += unpack(chunk, room) if unpack else chunk
        if len(data) > policy.max_bytes:
            raise DatasetError(f"The data set is larger than the limit of {policy.max_bytes} bytes.")
    if unpack and not unpack.at_end:
        raise DatasetError("The data set arrived damaged: its gzip stream breaks off.")
    return bytes(data)


class _Gunzip:
    """Unpacks a stream of one or more gzip members, never further than asked."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def __call__(self, packed: bytes, room: int) -> bytes:
        """At most `room` (1 or more) bytes; when it is that many, there may be more that is dropped."""
        out = bytearray()
        try:
            while packed and len(out) < room:
                if self._member.eof:
                    self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
                out += self._member.decompress(packed, room - len(out))
                packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        except zlib.error as error:
            raise DatasetError(f"The data set arrived damaged: it is no gzip stream ({error}).") from error
        return bytes(out)

    @property
    def at_end(self) -> bool:
        return self._member.eof


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _shown(url: str) -> str:
    """For messages: without the query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.hostname or "", parts.path, "", ""))
