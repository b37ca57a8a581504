"""LLMServer behind a real Ray Serve handle: admitted, streamed, read through, killed, and answering again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arkor_ray.errors import InvalidRequestError, NotFoundError
from arkor_ray.serving.app import InferenceArgs, application_name, build_app
from arkor_ray.storage.local import LocalStore
from tests.serving.tiny import commit_adapter, make_adapter, make_model, peft_chat, probe_of, save_base

pytestmark = pytest.mark.integration

ASK = [{"role": "user", "content": "is the weather fine?"}]
TOKENS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Ray of our own with one replica; adapters 0 and 1 are in storage, nothing is admitted."""
    import ray
    from ray import serve

    folder: Path = tmp_path_factory.mktemp("replica")
    model = make_model()
    base = str(save_base(model, folder / "base"))
    store = LocalStore(folder / "store")
    adapters = [make_adapter(model, folder / f"a{i}", seed=i) for i in range(2)]
    probe = probe_of(model, adapters[0], list(range(5, 40)))
    manifests = [
        commit_adapter(store, a, "job", i, base_model=base, probe=None if i else probe) for i, a in enumerate(adapters)
    ]
    args = InferenceArgs(
        base_model=base, base_precision="fp32", storage_url=f"file://{folder / 'store'}", cache_dir=str(folder / "cache"),
        slots=2, rows=4, max_len=256, cpu_threads=1,
    )  # fmt: skip
    name = application_name(base, "fp32")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        serve.start(http_options={"location": "NoServer"})
        serve.run(build_app(args), name=name, route_prefix=None)
        handle = serve.get_deployment_handle("LLMServer", name)
        yield SimpleNamespace(handle=handle, model=model, adapters=adapters, manifests=manifests)
        serve.shutdown()
    finally:
        ray.shutdown()


async def chat(world: SimpleNamespace, adapter_id: str | None, **request: Any) -> SimpleNamespace:
    handle = world.handle.options(stream=True, session_id=adapter_id or "base")
    body = {"messages": ASK, "max_tokens": TOKENS, "temperature": 0} | request
    events = [event async for event in handle.chat.remote(body, adapter_id)]
    text = "".join(e["text"] for e in events if e["type"] == "delta")
    return SimpleNamespace(text=text.rstrip("\ufffd"), start=events[0], end=events[-1])


def expected(world: SimpleNamespace, index: int | None) -> str:
    adapter = None if index is None else world.adapters[index]
    return peft_chat(world.model, adapter, ASK, TOKENS).rstrip("\ufffd")


def test_replica_answers_before_and_after_its_death(world):
    async def story() -> None:
        admitted = await world.handle.options(session_id="job-step-0").admit.remote(
            world.manifests[0].model_dump(mode="json"), world.adapters[0].data
        )
        assert admitted["tier"] == "slot"
        assert admitted["parity"]["max_abs_diff"] < admitted["parity"]["tolerance"]
        names: list[int | None] = [0, 1, None]  # pushed, read through from storage, base
        ids = [None if n is None else f"job-step-{n}" for n in names]
        answers = await asyncio.gather(*(chat(world, i) for i in ids))
        assert [a.text for a in answers] == [expected(world, n) for n in names]
        assert answers[0].start["system_fingerprint"] == f"job-step-0@{world.manifests[0].sha256[:16]}"
        assert answers[0].end["finish_reason"] == "length"

        old = (await world.handle.stats.remote())["pid"]
        os.kill(old, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            try:
                again = await asyncio.gather(*(chat(world, i) for i in ids))
                break
            except Exception as error:  # the dead replica's requests fail until Serve has started another
                assert time.monotonic() < deadline, error
                await asyncio.sleep(0.3)
        assert [a.text for a in again] == [expected(world, n) for n in names]
        assert (await world.handle.stats.remote())["pid"] != old

    asyncio.run(asyncio.wait_for(story(), 120))


def test_errors_cross_ray_as_themselves(world):
    async def story() -> None:
        with pytest.raises(NotFoundError, match="job-step-7"):
            await chat(world, "job-step-7")
        with pytest.raises(InvalidRequestError, match="256") as error:
            await chat(world, None, max_tokens=1000)
        assert error.value.http_status == 400

    asyncio.run(asyncio.wait_for(story(), 60))


def test_reader_that_leaves_frees_the_row(world):
    async def story() -> None:
        before = (await world.handle.stats.remote())["engine"]["generated_tokens"]
        stream = world.handle.options(stream=True).chat.remote(
            {"messages": ASK, "max_tokens": 200, "temperature": 1.0, "seed": 1}, None
        )
        await anext(stream)
        stream.cancel()
        async with asyncio.timeout(20):
            while (await world.handle.stats.remote())["engine"]["rows_busy"]:
                await asyncio.sleep(0.05)
        after = (await world.handle.stats.remote())["engine"]["generated_tokens"]
        assert after - before < 200, "the answer was generated to its end for nobody"

    asyncio.run(asyncio.wait_for(story(), 60))
