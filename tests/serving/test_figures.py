"""What a replica tells about its requests: counts that follow from what was asked, and spans of each stage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arkor_ray.errors import InvalidRequestError, NotFoundError, ServiceUnavailableError
from arkor_ray.serving.app import InferenceArgs
from arkor_ray.serving.figures import GenerationFigures
from arkor_ray.serving.llm_server import LLMServer
from arkor_ray.storage.local import LocalStore
from arkor_ray.telemetry import logs, metrics
from tests.serving.tiny import commit_adapter, make_adapter, save_base
from tests.telemetry.recorded import Recorded
from tests.telemetry.test_tracing import CALLER

pytestmark = pytest.mark.anyio

ASK = {"messages": [{"role": "user", "content": "how is the weather?"}], "temperature": 0}
BASE = {"base_model": "small"}


@pytest.fixture(scope="module")
def files(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base model and two adapters in storage."""
    folder = tmp_path_factory.mktemp("figures")
    base = str(save_base(llama, folder / "base"))
    store = LocalStore(folder / "store")
    for step in (0, 1):
        commit_adapter(store, make_adapter(llama, folder / f"a{step}", seed=step), "job", step, base_model=base)
    return {"base_model": base, "base_precision": "fp32", "storage_url": f"file://{folder / 'store'}"}


@pytest.fixture
def server(files: dict[str, Any], tmp_path: Path) -> Iterator[LLMServer]:
    made = LLMServer(
        InferenceArgs(**files, base_name="small", cache_dir=str(tmp_path), slots=1, rows=2, max_len=128, cpu_threads=1)
    )
    yield made
    made.close()


async def ask(server: LLMServer, adapter_id: str | None = None, **request: Any) -> dict[str, Any]:
    """The usage."""
    return [item async for item in server.chat({"max_tokens": 5, **ASK, **request}, adapter_id)][-1]["usage"]


async def test_tokens_and_requests_add_up(server: LLMServer, recorded: Recorded) -> None:
    usages = await asyncio.gather(ask(server), ask(server, max_tokens=3))
    for _ in range(2):
        server.tell_figures()
    assert recorded.total(metrics.SERVING_REQUESTS, outcome="ok", **BASE) == 2
    assert recorded.total(metrics.SERVING_GENERATED_TOKENS, **BASE) == sum(u["completion_tokens"] for u in usages)
    assert recorded.total(metrics.SERVING_PROMPT_TOKENS, **BASE) == sum(u["prompt_tokens"] for u in usages)
    assert len(recorded.all(metrics.SERVING_FIRST_TOKEN_SECONDS, **BASE)) == 2
    assert len(recorded.all(metrics.SERVING_INTER_TOKEN_SECONDS, **BASE)) == 2
    assert all(0 <= seconds < 60 for seconds in recorded.all(metrics.SERVING_QUEUE_SECONDS, **BASE))
    assert recorded.now(metrics.SERVING_ROWS, state="busy", **BASE) == 0
    assert recorded.now(metrics.SERVING_ROWS, state="free", **BASE) == 2
    assert recorded.now(metrics.SERVING_WAITING, **BASE) == 0


async def test_an_adapter_is_counted_where_it_was_found(server: LLMServer, recorded: Recorded) -> None:
    for adapter in ("job-step-0", "job-step-0", "job-step-1", "job-step-0"):  # one slot: each change evicts
        await ask(server, adapter)
    server.tell_figures()
    found = {
        tier: recorded.total(metrics.SERVING_ADAPTER_LOOKUPS, tier=tier, **BASE)
        for tier in ("store", "disk", "host", "device")
    }
    assert found == {"store": 2, "disk": 0, "host": 1, "device": 1}
    assert len(recorded.all(metrics.SERVING_ADAPTER_LOAD_SECONDS, **BASE)) == 3
    assert recorded.total(metrics.SERVING_EVICTIONS, **BASE) == 2
    assert recorded.now(metrics.SERVING_SLOTS, state="used", **BASE) == 1


async def test_masks_of_grammars_are_counted_with_their_time(server: LLMServer, recorded: Recorded) -> None:
    from arkor_ray.schemas.chat import ChatRequest

    constrained = ChatRequest.model_validate(
        {"messages": ASK["messages"], "baseModel": "small", "structuredOutputs": {"choice": ["yes", "no"]}}
    ).for_engine()
    await ask(server, constraint=constrained["constraint"])
    server.tell_figures()
    assert recorded.total(metrics.SERVING_MASKS, **BASE) >= 1
    assert recorded.total(metrics.SERVING_MASK_SECONDS, **BASE) > 0


async def test_rows_and_memory_in_use_show_while_a_request_runs(server: LLMServer, recorded: Recorded) -> None:
    async with aclosing(server.chat({"max_tokens": 60, **ASK}, None)) as items:  # type: ignore[type-var]
        await anext(items)
        server.tell_figures()
    assert recorded.now(metrics.SERVING_ROWS, state="busy", **BASE) == 1
    used, free = (recorded.now(metrics.SERVING_KV_BYTES, state=state, **BASE) for state in ("used", "free"))
    assert 0 < used < free
    assert recorded.total(metrics.SERVING_REQUESTS, outcome="cancelled", **BASE) == 1


async def test_a_request_that_cannot_be_served_is_counted_as_refused(server: LLMServer, recorded: Recorded) -> None:
    with pytest.raises(NotFoundError):
        await ask(server, "job-step-9")
    assert recorded.total(metrics.SERVING_REQUESTS, outcome="refused", **BASE) == 1
    assert not recorded.all(metrics.SERVING_QUEUE_SECONDS)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (InvalidRequestError("too long"), "refused"),
        (ServiceUnavailableError("full"), "unavailable"),
        (RuntimeError("a fault"), "failed"),
    ],
)
def test_every_end_has_its_outcome(recorded: Recorded, error: BaseException | None, outcome: str) -> None:
    GenerationFigures("small", {}, None).end(error)
    assert recorded.total(metrics.SERVING_REQUESTS, outcome=outcome) == 1


async def test_the_stages_of_a_request_are_spans_below_its_own(server: LLMServer, spans: Any) -> None:
    usage = await ask(server, "job-step-0", context={"traceparent": CALLER, "request_id": "r-1"})
    assert logs.subject()["request_id"] == "r-1"
    found = {span.name: span for span in spans()}
    assert set(found) == {"generate", "load adapter", "queue", "prefill", "decode"}
    generate = found["generate"]
    assert f"{generate.parent.span_id:016x}" == CALLER.split("-")[2]
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {CALLER.split("-")[1]}
    assert all(span.parent.span_id == generate.context.span_id for span in found.values() if span is not generate)
    assert found["load adapter"].attributes["arkor.adapter.tier"] == "store"
    assert generate.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert generate.attributes["arkor.adapter.id"] == "job-step-0"
    stages = [found[name] for name in ("queue", "prefill", "decode")]
    clocks_ns = 50_000_000  # two clocks are read one after the other
    assert all(earlier.end_time <= later.start_time + clocks_ns for earlier, later in pairwise(stages))
