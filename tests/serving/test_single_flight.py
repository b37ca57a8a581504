from __future__ import annotations

import asyncio

import pytest

from arkor_ray.serving.single_flight import SingleFlight

pytestmark = pytest.mark.anyio


async def test_all_who_ask_meanwhile_share_one_run():
    flights: SingleFlight[int] = SingleFlight()
    go, runs = asyncio.Event(), []

    async def work() -> int:
        runs.append(1)
        await go.wait()
        return 7

    asked = [asyncio.create_task(flights.run("k", work)) for _ in range(5)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*asked[1:]) == [7] * 4
    assert asked[0].cancelled()
    assert len(runs) == 1


async def test_other_keys_run_beside():
    flights: SingleFlight[str] = SingleFlight()
    both = asyncio.Barrier(2)

    async def work(key: str) -> str:
        await both.wait()
        return key

    assert await asyncio.gather(*(flights.run(k, lambda k=k: work(k)) for k in "ab")) == ["a", "b"]


async def test_failure_reaches_the_waiters_and_is_forgotten():
    flights: SingleFlight[int] = SingleFlight()
    fail = True

    async def work() -> int:
        await asyncio.sleep(0)
        if fail:
            raise OSError("down")
        return 1

    results = await asyncio.gather(*(flights.run("k", work) for _ in range(3)), return_exceptions=True)
    assert [type(r) for r in results] == [OSError] * 3
    fail = False
    assert await flights.run("k", work) == 1
