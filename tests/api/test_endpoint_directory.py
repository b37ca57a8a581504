"""The directory of the public route: no read of the database on a request's path, no key that outlives its revocation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from arkor_ray.api import endpoint_directory
from arkor_ray.api.endpoint_directory import EndpointDirectory, ServedEndpoint
from arkor_ray.db.session import Database
from arkor_ray.errors import AuthenticationError, NotFoundError, ServiceUnavailableError
from arkor_ray.settings import Settings
from tests.api.conftest import Training, User
from tests.db.databases import both

pytestmark = pytest.mark.anyio

LOOK_S = 0.01
NEVER_S = 3600.0  # looks only when the test says so


@pytest.fixture
def open_directory(db: Database, settings: Settings) -> Iterator[Callable[..., EndpointDirectory]]:
    opened: list[EndpointDirectory] = []

    def open_one(look_s: float = LOOK_S) -> EndpointDirectory:
        opened.append(EndpointDirectory(db, settings, look_s=look_s))
        return opened[-1]

    yield open_one
    for directory in opened:
        directory.close()


@pytest.fixture
def directory(user: User) -> EndpointDirectory:
    """The one of the application, which is told of changes."""
    found: EndpointDirectory = user.app.state.services.endpoints
    found._look_s = NEVER_S
    return found


@pytest.fixture
def remote(open_directory: Callable[..., EndpointDirectory]) -> EndpointDirectory:
    """That of another process, which learns of changes through the database alone."""
    return open_directory()


@contextmanager
def counted_statements(db: Database) -> Iterator[list[str]]:
    """Statements to the database other than those of the thread that looks for changes."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if threading.current_thread().name != "endpoint-changes":
            statements.append(statement)

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(db.engine, "before_cursor_execute", note)


class Outage:
    """A database that does not answer from `begin` to `end`."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.refused = threading.Event()

    def begin(self) -> None:
        event.listen(self._db.engine, "before_cursor_execute", self._refuse)

    def end(self) -> None:
        event.remove(self._db.engine, "before_cursor_execute", self._refuse)

    def _refuse(self, *_: Any) -> None:
        self.refused.set()
        raise OperationalError("SELECT", {}, Exception("connection refused"))


@pytest.fixture
def outage(db: Database) -> Outage:
    return Outage(db)


async def create_key(user: User, endpoint: dict[str, Any]) -> dict[str, Any]:
    answer = await user.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "x"})
    return answer.json()["key"]


async def until(happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not await happened():
            await asyncio.sleep(LOOK_S)


async def kept(directory: EndpointDirectory, slug: str) -> ServedEndpoint:
    """The endpoint, once the directory has it in memory: a read that meets its first look is not kept."""

    async def twice_the_same() -> bool:
        return await directory.find(slug) is await directory.find(slug)

    await until(twice_the_same)
    return await directory.find(slug)


@both
async def test_endpoint_is_found_with_all_that_a_request_needs(
    user: User, directory: EndpointDirectory, training: Training
) -> None:
    job_id = await user.create_job()
    training.save(job_id, 2)
    training.complete(job_id)
    for slug, adapter, model, adapter_id in (
        ("final", {"kind": "final", "jobId": job_id}, job_id, f"{job_id}-final"),
        ("step", {"kind": "checkpoint", "jobId": job_id, "step": 2}, f"{job_id}:2", f"{job_id}-step-2"),
    ):
        made = await user.create_endpoint(slug, target={"kind": "adapter", "adapter": adapter}, authMode="none")
        found = await directory.find(slug)
        assert (found.id, found.slug, found.org_id, found.project_id) == (
            made["id"], slug, made["orgId"], made["projectId"],
        )  # fmt: skip
        assert (found.model, found.adapter_id) == (model, adapter_id)
        assert (found.base_model, found.base_precision) == ("base/model", "fp32")
        assert (found.run_retention_mode, found.run_retention_days) == ("days", 7)
    await user.create_endpoint("base", target={"kind": "base_model", "baseModel": "tINY"})
    base = await directory.find("base")
    assert (base.model, base.base_model, base.base_precision, base.adapter_id) == ("tINY", "base/tiny", None, None)


@both
async def test_later_requests_read_nothing_from_the_database(
    user: User, directory: EndpointDirectory, db: Database
) -> None:
    key = (await create_key(user, await user.create_endpoint()))["plaintext"]
    directory.authorize(await directory.find("triage"), key)
    with pytest.raises(NotFoundError):
        await directory.find("unknown")
    await asyncio.to_thread(directory._last_used._writer.submit(lambda: None).result)  # the first use is written
    with counted_statements(db) as statements:
        for _ in range(100):
            directory.authorize(await directory.find("triage"), key)
            with pytest.raises(NotFoundError):
                await directory.find("unknown")
    assert statements == []


async def test_first_requests_at_once_read_the_database_once(
    user: User, directory: EndpointDirectory, db: Database
) -> None:
    await user.create_endpoint()
    with counted_statements(db) as alone:
        await directory.find("triage")
    directory.invalidate()
    with counted_statements(db) as together:
        await asyncio.gather(*(directory.find("triage") for _ in range(50)))
    assert len(together) == len(alone) > 0


@pytest.mark.parametrize("slug", ["", "a", "\x00\x00", "UPPER", "x" * 500, "a.b", "../x"])
async def test_what_is_no_slug_is_not_looked_for(remote: EndpointDirectory, db: Database, slug: str) -> None:
    with counted_statements(db) as statements, pytest.raises(NotFoundError):
        await remote.find(slug)
    assert statements == []


async def test_keys_open_their_endpoint_only(user: User, directory: EndpointDirectory) -> None:
    one, two = await user.create_endpoint("one"), await user.create_endpoint("two")
    key = await create_key(user, one)
    assert directory.authorize(await directory.find("one"), key["plaintext"]) == key["id"]
    assert (await create_key(user, two))["id"] != key["id"]
    for endpoint, given in (
        ("two", key["plaintext"]),
        ("one", None),
        ("one", ""),
        ("one", "x\udc80"),
        ("one", user.token),
    ):
        with pytest.raises(AuthenticationError):
            directory.authorize(await directory.find(endpoint), given)


async def test_open_endpoint_ignores_keys(user: User, directory: EndpointDirectory) -> None:
    await user.create_endpoint(authMode="none")
    for given in (None, "", "sk-dummy"):
        assert directory.authorize(await directory.find("triage"), given) is None


async def test_plaintext_is_nowhere_in_the_directory(user: User, directory: EndpointDirectory) -> None:
    key = await create_key(user, await user.create_endpoint())
    assert key["plaintext"] not in repr(await directory.find("triage"))


@both
async def test_changes_made_by_this_process_are_seen_at_once(user: User, directory: EndpointDirectory) -> None:
    with pytest.raises(NotFoundError):
        await directory.find("triage")
    endpoint = await user.create_endpoint()
    key = await create_key(user, endpoint)
    path = f"/v1/endpoints/{endpoint['id']}"
    assert directory.authorize(await directory.find("triage"), key["plaintext"])
    assert (await user.delete(f"{path}/keys/{key['id']}")).status_code == 204
    with pytest.raises(AuthenticationError):
        directory.authorize(await directory.find("triage"), key["plaintext"])
    await user.patch(path, {"authMode": "none"})
    assert directory.authorize(await directory.find("triage"), None) is None
    await user.patch(path, {"enabled": False})
    with pytest.raises(NotFoundError):
        await directory.find("triage")
    await user.patch(path, {"enabled": True})
    await directory.find("triage")
    await user.delete(path)
    with pytest.raises(NotFoundError):
        await directory.find("triage")


@both
async def test_changes_made_by_another_process_are_seen_by_looking(user: User, remote: EndpointDirectory) -> None:
    async def unknown() -> bool:
        try:
            await remote.find("triage")
        except NotFoundError:
            return True
        return False

    async def found() -> bool:
        return not await unknown()

    async def revoked() -> bool:
        try:
            remote.authorize(await remote.find("triage"), key["plaintext"])
        except AuthenticationError:
            return True
        return False

    assert await unknown()
    endpoint = await user.create_endpoint()
    await until(found)
    key = await create_key(user, endpoint)
    path = f"/v1/endpoints/{endpoint['id']}"

    async def opened() -> bool:
        return not await revoked()

    await until(opened)
    await user.delete(f"{path}/keys/{key['id']}")
    await until(revoked)
    await user.patch(path, {"enabled": False})
    await until(unknown)
    await user.patch(path, {"enabled": True})
    await until(found)
    await user.delete(path)
    await until(unknown)
    await user.create_endpoint(authMode="none")
    await until(found)


async def test_unchanged_endpoints_stay_when_another_changes(
    user: User, open_directory: Callable[..., EndpointDirectory], db: Database
) -> None:
    remote = open_directory(look_s=NEVER_S)
    await user.create_endpoint("one")
    two = await user.create_endpoint("two")
    remote._look()
    kept = await remote.find("one")
    await remote.find("two")
    await user.patch(f"/v1/endpoints/{two['id']}", {"authMode": "none"})
    remote._look()
    with counted_statements(db) as statements:
        assert await remote.find("one") is kept
        assert statements == []
        assert (await remote.find("two")).auth_mode == "none"
        assert statements != []


class SlowRead:
    """Holds a directory's next read of the database between the reading and the handing over."""

    def __init__(self, directory: EndpointDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reads, self._go = threading.Event(), threading.Event()
        read = directory._read

        def slow(slug: str) -> Any:
            entry = read(slug)
            if not self._reads.is_set():
                self._reads.set()
                assert self._go.wait(20)
            return entry

        monkeypatch.setattr(directory, "_read", slow)

    async def is_held(self) -> None:
        assert await asyncio.to_thread(self._reads.wait, 20)

    def release(self) -> None:
        self._go.set()


@pytest.mark.parametrize("seen_by", ["invalidate", "look"])
async def test_read_that_a_change_overtakes_is_neither_kept_nor_joined(
    user: User,
    open_directory: Callable[..., EndpointDirectory],
    monkeypatch: pytest.MonkeyPatch,
    seen_by: str,
) -> None:
    directory = open_directory(look_s=NEVER_S)
    endpoint = await user.create_endpoint()
    key = await create_key(user, endpoint)
    directory._look()
    slow = SlowRead(directory, monkeypatch)
    early = asyncio.create_task(directory.find("triage"))
    await slow.is_held()
    await user.delete(f"/v1/endpoints/{endpoint['id']}/keys/{key['id']}")
    if seen_by == "invalidate":
        directory.invalidate("triage")
    else:
        directory._look()
    assert (await directory.find("triage")).keys == {}, "asked after the change: not the answer from before it"
    slow.release()
    assert (await early).keys != {}, "asked before the change"
    assert (await directory.find("triage")).keys == {}


@both
async def test_database_that_is_away_is_bridged_for_a_while_only(
    user: User, remote: EndpointDirectory, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await user.create_endpoint()
    found = await kept(remote, "triage")
    outage.begin()
    assert await asyncio.to_thread(outage.refused.wait, 20), "the directory goes on looking"
    assert await remote.find("triage") is found
    with pytest.raises(ServiceUnavailableError) as raised:
        await remote.find("other")
    assert raised.value.retry_after
    monkeypatch.setattr(endpoint_directory, "TRUSTED_S", 0.0)
    with pytest.raises(ServiceUnavailableError):
        await remote.find("triage")
    outage.end()
    assert (await remote.find("triage")).id == found.id


async def test_looks_that_succeed_keep_entries_alive(
    user: User, open_directory: Callable[..., EndpointDirectory], outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(endpoint_directory, "monotonic", lambda: now)
    directory = open_directory(look_s=NEVER_S)
    await user.create_endpoint()
    found = await directory.find("triage")
    now += 50
    directory._look()
    outage.begin()
    now += endpoint_directory.TRUSTED_S
    assert await directory.find("triage") is found
    now += 1
    with pytest.raises(ServiceUnavailableError):
        await directory.find("triage")
    outage.end()


async def test_flood_of_unknown_slugs_is_forgotten_and_pushes_out_no_endpoint(
    user: User, directory: EndpointDirectory, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_directory, "KEPT", 5)
    await user.create_endpoint()
    found = await directory.find("triage")
    for number in range(20):
        with pytest.raises(NotFoundError):
            await directory.find(f"unknown-{number}")
    assert len(directory._unknown) == 5
    assert await directory.find("triage") is found


async def test_more_reads_than_may_wait_are_turned_away(
    user: User, open_directory: Callable[..., EndpointDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_directory, "MAX_WAITING", 1)
    directory = open_directory()
    await user.create_endpoint()
    slow = SlowRead(directory, monkeypatch)
    first = asyncio.create_task(directory.find("triage"))
    await slow.is_held()
    with pytest.raises(ServiceUnavailableError, match="Too many"):
        await directory.find("other")
    slow.release()
    assert (await first).slug == "triage"

    async def room() -> bool:
        try:
            await directory.find("other")
        except NotFoundError:
            return True
        except ServiceUnavailableError:
            return False
        raise AssertionError("found what is not there")

    await until(room)


async def test_read_that_hangs_is_given_up(
    user: User, remote: EndpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_directory, "READ_LIMIT_S", 0.05)
    slow = SlowRead(remote, monkeypatch)
    with pytest.raises(ServiceUnavailableError):
        await remote.find("triage")
    slow.release()


async def test_base_model_that_left_the_catalogue_is_not_served(user: User, settings: Settings, db: Database) -> None:
    await user.create_endpoint(target={"kind": "base_model", "baseModel": "Tiny"})
    smaller = EndpointDirectory(db, Settings.load(data_dir=settings.data_dir))
    with pytest.raises(NotFoundError):
        await smaller.find("triage")
    smaller.close()


async def test_use_of_a_key_is_noted(user: User, remote: EndpointDirectory) -> None:
    endpoint = await user.create_endpoint()
    key = await create_key(user, endpoint)
    remote.authorize(await remote.find("triage"), key["plaintext"])
    remote.close()  # writes what it holds
    [listed] = (await user.get(f"/v1/endpoints/{endpoint['id']}/keys")).json()["keys"]
    assert listed["lastUsedAt"] is not None
