"""The logs of a job: by attempt, while they are written, and when the Ray that has them is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from arkor_ray.api import job_logs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.errors import StorageError
from arkor_ray.printed import newest
from arkor_ray.storage import layout
from tests.api.conftest import FakeLogs, Training, User

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "LOOK_S", 0.01)


@pytest.fixture
def logs(app: FastAPI) -> FakeLogs:
    return app.state.services.logs


def launch(db: Database, job_id: str, attempt: int) -> None:
    with db.write() as session:
        session.get_one(JobRow, job_id).attempt = attempt


async def read(user: User, job_id: str, **query: Any) -> httpx.Response:
    return await user.get(f"/v1/jobs/{job_id}/logs", params={name: str(value) for name, value in query.items()})


async def test_an_attempt_is_asked_for_by_its_number(user: User, db: Database) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 3)
    assert (await read(user, job_id)).text == f"output of {job_id}-3\n"
    assert (await read(user, job_id, attempt=1)).text == f"output of {job_id}-1\n"


@pytest.mark.parametrize("follow", [False, True])
async def test_an_attempt_that_was_not_made_is_refused_with_those_that_were(
    user: User, db: Database, follow: bool
) -> None:
    job_id = await user.create_job()
    refused = await read(user, job_id, attempt=1, follow=follow)
    assert refused.status_code == 404 and "none yet" in refused.json()["error"]
    launch(db, job_id, 2)
    refused = await read(user, job_id, attempt=3, follow=follow)
    assert refused.status_code == 404 and "attempts 1 to 2" in refused.json()["error"]
    assert refused.json()["param"] == "attempt"
    assert (await read(user, job_id, attempt=0, follow=follow)).status_code == 400


async def test_what_ray_has_forgotten_comes_from_storage(
    user: User, db: Database, app: FastAPI, logs: FakeLogs
) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 2)
    logs.forget(f"{job_id}-1")
    lost = await read(user, job_id, attempt=1)
    assert lost.status_code == 410 and "is lost" in lost.json()["error"]
    app.state.services.store.put(layout.log_key(job_id, 1), "half a é".encode()[:-1])
    assert (await read(user, job_id, attempt=1)).text == "half a \ufffd"


async def test_storage_stands_in_while_ray_is_away(user: User, db: Database, app: FastAPI, logs: FakeLogs) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    logs.go_away()
    assert (await read(user, job_id)).status_code == 503
    app.state.services.store.put(layout.log_key(job_id, 1), b"copied\n")
    assert (await read(user, job_id)).text == "copied\n"


async def test_a_follower_gets_what_is_printed_over_all_attempts_to_the_jobs_end(
    user: User, db: Database, logs: FakeLogs, training: Training
) -> None:
    job_id = await user.create_job()
    following = asyncio.create_task(read(user, job_id, follow=True))
    await asyncio.sleep(0.05)
    launch(db, job_id, 1)
    await asyncio.sleep(0.05)  # launched, and not yet known to Ray
    logs.say(f"{job_id}-1", "one ")
    await asyncio.sleep(0.05)
    logs.say(f"{job_id}-1", "two")
    logs.end(f"{job_id}-1")
    await asyncio.sleep(0.05)
    assert not following.done(), "the next attempt is waited for"
    launch(db, job_id, 2)
    logs.say(f"{job_id}-2", "three")
    logs.end(f"{job_id}-2")
    training.fail(job_id)
    answer = await asyncio.wait_for(following, 30)
    assert answer.text == "one two\n=== attempt 2 ===\nthree"
    assert answer.headers["content-type"].startswith("text/plain")


async def test_a_given_attempt_is_followed_to_its_own_end(user: User, db: Database, logs: FakeLogs) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 2)
    logs.say(f"{job_id}-1", "one")
    logs.end(f"{job_id}-1")
    assert (await read(user, job_id, attempt=1, follow=True)).text == "one"


async def test_a_restart_of_ray_repeats_nothing(
    user: User, db: Database, app: FastAPI, logs: FakeLogs, training: Training
) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    logs.say(f"{job_id}-1", "one ")
    following = asyncio.create_task(read(user, job_id, follow=True))
    await asyncio.sleep(0.1)
    logs.go_away()
    await asyncio.sleep(0.05)
    logs.go_away(away=False)
    logs.say(f"{job_id}-1", "two ")
    await asyncio.sleep(0.1)
    app.state.services.store.put(layout.log_key(job_id, 1), b"one two three")
    logs.forget(f"{job_id}-1")
    training.fail(job_id)
    assert (await asyncio.wait_for(following, 30)).text == "one two three"


async def test_an_attempt_without_a_log_is_told_and_the_next_one_follows(
    user: User, db: Database, logs: FakeLogs, training: Training
) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    logs.forget(f"{job_id}-1")  # claimed, and never submitted
    following = asyncio.create_task(read(user, job_id, follow=True))
    await asyncio.sleep(0.05)
    launch(db, job_id, 2)
    logs.say(f"{job_id}-2", "two")
    logs.end(f"{job_id}-2")
    training.fail(job_id)
    lost, _, rest = (await asyncio.wait_for(following, 30)).text.partition("\n")
    assert "attempt 1" in lost and "is lost" in lost
    assert rest == "\n=== attempt 2 ===\ntwo"


async def test_a_follower_waits_for_a_storage_that_is_away(
    user: User, db: Database, app: FastAPI, logs: FakeLogs, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    logs.forget(f"{job_id}-1")
    store = app.state.services.store
    store.put(layout.log_key(job_id, 1), b"copied\n")
    really, failures = store.get, iter(range(3))

    def get(key: str) -> bytes:
        if next(failures, None) is not None:
            raise StorageError("storage is down")
        return really(key)

    monkeypatch.setattr(store, "get", get)
    training.fail(job_id)
    assert (await asyncio.wait_for(read(user, job_id, follow=True), 30)).text == "copied\n"


async def test_the_end_of_a_long_log_is_not_lost_when_ray_forgets_it_in_the_middle(
    user: User, db: Database, app: FastAPI, logs: FakeLogs, training: Training
) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    printed = "".join(f"line {number} é\n" for number in range(100))
    logs.say(f"{job_id}-1", printed[:900])
    following = asyncio.create_task(read(user, job_id, follow=True))
    await asyncio.sleep(0.1)
    app.state.services.store.put(layout.log_key(job_id, 1), newest(printed.encode(), 500))
    logs.forget(f"{job_id}-1")
    training.fail(job_id)
    assert (await asyncio.wait_for(following, 30)).text == printed


async def test_a_job_that_was_cancelled_before_its_first_attempt_has_no_log(user: User) -> None:
    job_id = await user.create_job()
    following = asyncio.create_task(read(user, job_id, follow=True))
    await asyncio.sleep(0.05)
    await user.post(f"/v1/jobs/{job_id}/cancel")
    assert (await asyncio.wait_for(following, 30)).text == ""


async def test_the_logs_of_others_are_as_missing_as_their_jobs(user: User, login, db: Database) -> None:
    job_id = await user.create_job()
    launch(db, job_id, 1)
    other = await login()
    for follow in (False, True):
        assert (await read(other, job_id, follow=follow)).status_code == 404
