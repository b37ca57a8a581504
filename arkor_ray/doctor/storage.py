"""The storage: every request that the service makes of it, on objects of the check's own, which it removes.

The one that matters most is the conditional put. A checkpoint exists by a manifest that exactly one writer may make; a
service that takes `If-None-Match` without heeding it, or heeds it only most of the time, passes every other test.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from arkor_ray.doctor.findings import Finding, fail, ok, warning
from arkor_ray.doctor.machine import nearest_existing
from arkor_ray.errors import ObjectExistsError, StorageError
from arkor_ray.storage import ObjectStore, Upload, layout, open_store
from arkor_ray.storage.retry import RetryPolicy

NAME = "storage"
HASTY = RetryPolicy(budget_seconds=3.0)
SMALL = b"written by arkor-ray doctor"
LARGE_BYTES = (16 << 20) + 1  # one more than goes in a single request
WRITERS, ROUNDS = 8, 5

CHECK_SETTINGS = (
    "check ARKOR_RAY_STORAGE_URL, ARKOR_RAY_S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that the bucket "
    "exists"
)


def check_storage(url: str, endpoint_url: str | None) -> Iterator[Finding]:
    if url.startswith("file:"):
        root = Path(unquote(urlsplit(url).path))
        if not root.exists():
            yield _not_made_yet(root)
            return
    try:
        store = open_store(url, endpoint_url=endpoint_url, retry=HASTY)
    except ImportError as error:
        yield fail(NAME, str(error), "pip install 'arkor-ray[s3]'")
        return
    except ValueError as error:
        yield fail(NAME, str(error), CHECK_SETTINGS)
        return
    yield from check_store(store)


def check_store(store: ObjectStore) -> Iterator[Finding]:
    prefix = layout.doctor_prefix(uuid.uuid4().hex)
    refused = _try("put", lambda: store.put(prefix + "small", SMALL))
    if refused is not None:
        yield refused
        if refused.remedy == CHECK_SETTINGS:  # else only this is not permitted, and an operator mends a policy once
            return
    try:
        faults = list(_check_requests(store, prefix, with_objects=refused is None))
        yield from faults
        if refused is None and not faults:
            begun = time.perf_counter()
            store.put(prefix + "small", SMALL)  # again: the first one also had to connect
            latency = time.perf_counter() - begun
            yield ok(NAME, f"{store.url}: put, get, list and parts; {1000 * latency:.0f} ms for a small put")
            yield check_race(store, prefix)
    finally:
        yield from _clean_up(store, prefix)


def check_race(store: ObjectStore, prefix: str) -> Finding:
    """Several writers, one key, many times: each time exactly one may succeed, and its bytes must be there."""
    broken = 0
    for number in range(ROUNDS):
        key = f"{prefix}race-{number}"
        try:
            winners = _race(store, key)
            broken += winners != [store.get(key)]
        except StorageError as error:
            return _refusal("conditional put", error)
    if broken:
        return fail(
            "conditional put", f"not atomic: in {broken} of {ROUNDS} races of {WRITERS} writers not exactly one won",
            "use a storage that heeds If-None-Match: * (AWS, Ceph, MinIO, R2 do); with this one a checkpoint may be damaged",
        )  # fmt: skip
    return ok("conditional put", f"of {WRITERS} writers exactly one wins, {ROUNDS} times of {ROUNDS}")


def _race(store: ObjectStore, key: str) -> list[bytes]:
    """What the writers wrote who were told that they had won. Raises StorageError if one of them met a fault."""
    start = threading.Barrier(WRITERS)
    winners: list[bytes] = []
    faults: list[StorageError] = []

    def write(writer: int) -> None:
        content = f"writer {writer} of {key}".encode()
        start.wait()
        try:
            store.put(key, content, if_absent=True)
        except ObjectExistsError:
            return
        except StorageError as error:
            faults.append(error)
            return
        winners.append(content)

    # Not a pool: its threads would be waited for at the end of the process, also those that hang.
    threads = [threading.Thread(target=write, args=(writer,), daemon=True) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return winners


def _check_requests(store: ObjectStore, prefix: str, *, with_objects: bool) -> Iterator[Finding]:
    """What goes wrong of list, get and the transfer in parts; only of list where there is no object to get."""

    def get() -> None:
        if store.get(prefix + "small") != SMALL:
            raise StorageError("gave other bytes than were put.")

    def list_() -> None:
        if [info.key for info in store.list(prefix)] != [prefix + "small"] * with_objects:
            raise StorageError("does not show an object that was put.")

    def parts() -> None:
        with tempfile.TemporaryDirectory(prefix="arkor-doctor-") as folder:
            there, back = Path(folder) / "there", Path(folder) / "back"
            there.write_bytes(os.urandom(LARGE_BYTES))
            store.put_file(prefix + "large", there)
            store.get_file(prefix + "large", back)
            if there.read_bytes() != back.read_bytes():
                raise StorageError("gave other bytes than were put in parts.")

    for action, request in (("list", list_), ("get", get), ("transfer in parts", parts)):
        refused = _try(action, request) if with_objects or action == "list" else None
        if refused is not None:
            yield refused
            if action == "get":  # what was put in parts could not be got either
                return


def _clean_up(store: ObjectStore, prefix: str) -> Iterator[Finding]:
    names = ["small", "large", *(f"race-{number}" for number in range(ROUNDS))]
    if refused := _try("delete", lambda: store.delete_all(prefix + name for name in names)):
        yield refused
    # One that does not exist: whether it may be aborted is asked first.
    none = Upload(prefix + "small", "none", datetime.now(UTC))
    if refused := _try("abort of an upload", lambda: store.abort(none)):
        yield refused
    try:
        next(iter(store.uploads()), None)
    except StorageError as error:
        yield warning(
            "storage uploads", f"unfinished ones cannot be listed: {error.message}",
            "permit s3:ListBucketMultipartUploads, or give the bucket a lifecycle rule AbortIncompleteMultipartUpload",
        )  # fmt: skip


PERMISSIONS = {
    "put": "s3:PutObject",
    "conditional put": "s3:PutObject",
    "get": "s3:GetObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "transfer in parts": "s3:PutObject and s3:GetObject",
    "abort of an upload": "s3:AbortMultipartUpload",
}


def _try(action: str, request: Callable[[], object]) -> Finding | None:
    try:
        request()
    except StorageError as error:
        return _refusal(action, error)
    return None


def _refusal(action: str, error: StorageError) -> Finding:
    remedy = CHECK_SETTINGS
    if _is_denied(error):
        remedy = f"permit {PERMISSIONS[action]} in the policy of this user or role"
    return fail(f"storage {action}", error.message, remedy)


def _is_denied(error: StorageError) -> bool:
    """Whether S3 said that it knows us and that we may not."""
    answer = getattr(error.__cause__, "response", {})
    return answer.get("Error", {}).get("Code") in ("AccessDenied", "403", "Forbidden")


def _not_made_yet(root: Path) -> Finding:
    folder = nearest_existing(root)
    if os.access(folder, os.W_OK):
        return ok(NAME, f"{root} is not there yet; it is made with the first object")
    return fail(NAME, f"{root} cannot be made: {folder} is not writable", f"chown or chmod {folder}")
