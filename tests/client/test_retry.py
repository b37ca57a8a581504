"""Which calls are sent again, after which failures, and how often. Waiting is replaced by zero, or looked at as a number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from arkor_ray.client import AsyncClient, Client, calls, retry
from arkor_ray.client.calls import Call
from arkor_ray.client.inference import iter_text, text_of
from arkor_ray.client.retry import Retries
from arkor_ray.errors import (
    ArkorError,
    InternalError,
    NotFoundError,
    RateLimitError,
    ServiceUnavailableError,
)
from tests.client.fake_service import URL

MESSAGES = [{"role": "user", "content": "hello"}]
READ, CREATE, CHAT = calls.list_jobs(), calls.create_job("run", {}), calls.chat(MESSAGES)


@pytest.fixture
def client(fake, home, project_dir):
    with Client(URL, home=home, project_dir=project_dir, transport=fake) as client:
        client.list_jobs()
        fake.requests.clear()
        yield client


def unanswered(reason: httpx.HTTPError) -> ArkorError:
    error = ServiceUnavailableError("Cannot reach it")
    error.__cause__ = reason
    return error


UNSENT = unanswered(httpx.ConnectError("refused"))
BROKEN = unanswered(httpx.ReadError("reset"))
LATE = unanswered(httpx.ReadTimeout("no answer in time"))
AWAY = ServiceUnavailableError("starting")
AWAY_FOR_TEN = ServiceUnavailableError("loading", retry_after=10)


@pytest.mark.parametrize(
    ("call", "error", "again"),
    [
        *[(call, UNSENT, True) for call in (READ, CREATE, CHAT, calls.delete_endpoint("e"))],
        *[(call, error, True) for call in (READ, CHAT, calls.revoke_token("t")) for error in (BROKEN, AWAY)],
        *[(CREATE, error, False) for error in (BROKEN, AWAY, RateLimitError("full", retry_after=1))],
        *[(call, LATE, False) for call in (READ, CREATE, CHAT)],
        (calls.update_endpoint("e", None, enabled=False), AWAY, False),
        (CHAT, RateLimitError("full", retry_after=5), True),
        (CHAT, RateLimitError("full"), False),
        (READ, ArkorError("bad gateway", status=502), True),
        (READ, ServiceUnavailableError("from a proxy", status=500), True),
        *[(READ, error, False) for error in (NotFoundError("no"), InternalError("a fault"))],
        *[(call, UNSENT, False) for call in (calls.job_events("j", {}), calls.health("/readyz"))],
    ],
)  # fmt: skip
def test_what_is_sent_again(call: Call[Any], error: ArkorError, again: bool) -> None:
    if again:
        assert Retries(call, 1).after(error) > 0
    else:
        with pytest.raises(type(error)) as raised:
            Retries(call, 1).after(error)
        assert raised.value is error


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_no_more_often_than_allowed(limit: int) -> None:
    retries = Retries(READ, limit)
    for _ in range(limit):
        retries.after(AWAY)
    with pytest.raises(ServiceUnavailableError):
        retries.after(AWAY)


@pytest.mark.parametrize(("chance", "expected"), [(0.0, [0.5, 1.0, 2.0]), (1.0, [0.375, 0.75, 1.5])])
def test_pauses_grow_and_are_left_to_chance_in_part(chance: float, expected: list[float]) -> None:
    retries = Retries(READ, 3, lambda: chance)
    assert [retries.after(AWAY) for _ in range(3)] == expected


def test_a_service_that_says_when_is_asked_no_earlier_and_one_that_says_much_later_not_at_all() -> None:
    for chance in (0.0, 1.0):
        assert 10 <= Retries(READ, 1, lambda chance=chance: chance).after(AWAY_FOR_TEN) <= 12.5  # type: ignore[misc]
    with pytest.raises(ServiceUnavailableError):
        Retries(READ, 1).after(ServiceUnavailableError("full", retry_after=retry.LONGEST_WAIT + 1))


def test_retry_after_comes_from_the_header_where_the_body_has_none() -> None:
    request = httpx.Request("GET", URL)
    for status, text in ((503, ""), (429, '{"error": "slow down"}')):
        for value, seconds in (("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)):
            response = httpx.Response(status, text=text, headers={"Retry-After": value}, request=request)
            assert calls.error_of(response).retry_after == seconds


def test_a_reader_does_not_notice_two_failures(client, fake) -> None:
    fake.refuse("/jobs", 503)
    fake.be_unreachable("/jobs")
    assert client.list_jobs() == []
    assert len(fake.asked("GET", "/jobs")) == 3


def test_a_third_failure_is_told(client, fake) -> None:
    fake.refuse("/jobs", 503, times=3)
    with pytest.raises(ServiceUnavailableError, match="refused with 503"):
        client.list_jobs()
    assert len(fake.requests) == 3


def test_a_job_is_created_once(client, fake) -> None:
    fake.be_unreachable("/jobs", times=2)
    client.create_job("run", {"model": "tiny"})
    assert (len(fake.asked("POST", "/jobs")), len(fake.jobs)) == (3, 1)
    fake.refuse("/jobs", 503)
    with pytest.raises(ServiceUnavailableError):
        client.create_job("run", {"model": "tiny"})
    assert len(fake.asked("POST", "/jobs")) == 4


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_asked_for_again_before_its_first_byte(client, fake, stream: bool) -> None:
    fake.refuse("/inference/chat", 429, retry_after=0)
    fake.be_unreachable("/inference/chat")
    answer = client.chat(MESSAGES, base_model="tiny", stream=stream)
    assert ("".join(iter_text(answer)) if stream else text_of(answer)) == "fine"
    assert len(fake.requests) == 3


def breaking(times: int) -> Callable[[httpx.Request], httpx.Response]:
    """Answers whose bodies break off, then one that is whole."""

    class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self):
            nonlocal times
            yield b'{"a": '
            times -= 1
            if times >= 0:
                raise httpx.ReadError("connection reset by peer")
            yield b"1}"

        async def __aiter__(self):
            for piece in self:
                yield piece

    return lambda request: httpx.Response(200, stream=Body())


def test_a_body_that_breaks_off_is_fetched_again_unless_it_was_handed_on(fake, home) -> None:
    with Client(URL, token="t", org="o", home=home, transport=httpx.MockTransport(breaking(2))) as client:
        assert client.cli_config() == {"a": 1}
    with Client(URL, token="t", org="o", project="p", home=home, transport=httpx.MockTransport(breaking(1))) as client:
        pieces = client.follow_logs("job")
        assert next(pieces) == '{"a": '
        with pytest.raises(ServiceUnavailableError, match="connection reset"):
            next(pieces)


def test_the_async_client_does_the_same(fake, home, project_dir) -> None:
    async def main() -> None:
        async with AsyncClient(URL, home=home, project_dir=project_dir, transport=fake) as client:
            await client.list_jobs()
            fake.refuse("/jobs", 503)
            fake.be_unreachable("/jobs")
            assert await client.list_jobs() == []
            fake.refuse("/inference/chat", 503, times=3)
            with pytest.raises(ServiceUnavailableError):
                await client.chat(MESSAGES, base_model="tiny", stream=False)
            fake.refuse("/jobs", 503)
            with pytest.raises(ServiceUnavailableError):
                await client.create_job("run", {"model": "tiny"})
        async with AsyncClient(URL, token="t", home=home, transport=httpx.MockTransport(breaking(2))) as client:
            assert await client.cli_config() == {"a": 1}

    asyncio.run(main())
    assert (len(fake.asked("GET", "/jobs")), len(fake.asked("POST", "/chat"))) == (4, 3)
    assert len(fake.asked("POST", "/jobs")) == 1
