"""What becomes of writes that a database does not take, with one that is told what to raise."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import DataError, IntegrityError, InternalError, StatementError

from arkor_ray.errors import ArkorError, GoneError, ServiceUnavailableError
from arkor_ray.errors import InternalError as OurFault
from arkor_ray.events.publisher import StaleAttemptError
from arkor_ray.training.job_writer import JobWriter


class FakeDatabase:
    @contextmanager
    def write(self):
        yield None


def raising(error: Exception):
    def operation(_session):
        raise error

    return operation


def write(*operations):
    """Their results or errors, of one batch."""

    async def story():
        writer = JobWriter(FakeDatabase())
        return await asyncio.gather(*map(writer.write, operations), return_exceptions=True), writer.ended

    return asyncio.run(asyncio.wait_for(story(), 20))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("INSERT", {}, ValueError("integer out of range")), OurFault),
        (StatementError("not JSON", "INSERT", {}, TypeError("a set")), OurFault),
        (IntegrityError("INSERT", {}, ValueError("duplicate key")), ServiceUnavailableError),
        (InternalError("INSERT", {}, ValueError("cannot execute in a read-only transaction")), ServiceUnavailableError),
    ],
)
def test_an_error_of_the_database_says_whether_trying_again_may_mend_it(error, told):
    (raised, neighbour), ended = write(raising(error), lambda _session: 1)
    assert type(raised) is told and neighbour == 1 and not ended
    assert "INSERT" not in raised.message, "the statement has what users sent"


def test_errors_that_are_ours_are_raised_as_they_are():
    gone: ArkorError = GoneError("no such job")
    assert write(raising(gone)) == ([gone], False)


def test_a_newer_attempt_is_no_error():
    assert write(raising(StaleAttemptError("at attempt 2"))) == ([None], True)


def test_a_write_that_fails_after_its_caller_has_left_does_not_hold_up_the_next():
    async def story():
        writer = JobWriter(FakeDatabase())
        leaving = asyncio.create_task(writer.write(raising(GoneError("no such job"))))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        return await writer.write(lambda _session: 1)

    assert asyncio.run(asyncio.wait_for(story(), 20)) == 1
