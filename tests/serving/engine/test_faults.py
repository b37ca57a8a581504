"""What fails in the engine fails for whom it concerns, and leaves nobody else with other weights or another's cache."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from arkor_ray.errors import AdapterError, InternalError, ServiceUnavailableError
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.slot_engine import SlotEngine
from tests.serving.conftest import MemorySource
from tests.serving.tiny import VOCAB, SavedAdapter, make_adapter, peft_answer

pytestmark = pytest.mark.anyio

PROMPT = [5, 6, 7]
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


async def answer(
    engine: SlotEngine, prompt: list[int], tokens: int, adapter: str | None = None, **options: Any
) -> list[int]:
    request = GenRequest("r", tuple(prompt), tokens, adapter, **options)
    return [event.token_id async for batch in engine.generate(request) for event in batch]


async def until(condition: Any, *, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def healthy(engine: SlotEngine) -> bool:
    try:
        engine.check_health()
    except InternalError:
        return False
    return True


class Device:
    """Memory that can run out at any of the allocations on the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._zeros = torch.zeros
        self._left: int | None = None
        monkeypatch.setattr(torch, "zeros", self._allocate)

    def run_out(self, *, after: int) -> None:
        """`after` allocations from now; those that fail take nothing, so that each attempt gets as far as the first."""
        self._left = self._each = after

    def recover(self) -> None:
        self._left = None

    def _allocate(self, *size: Any, **options: Any) -> torch.Tensor:
        if "device" in options and self._left is not None:
            if not self._left:
                self._left = self._each
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.")
            self._left -= 1
        return self._zeros(*size, **options)


class Copies:
    """The copying of adapters into slots, which can be made to fail for some of them, or for all."""

    def __init__(self, engine: SlotEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._errors: dict[str | None, str] = {}
        self._write = engine._runner.lora.write
        self.tried: list[str] = []
        monkeypatch.setattr(engine._runner.lora, "write", self._copy)

    def fail(self, adapter_id: str | None = None, error: str = "no room") -> None:
        self._errors[adapter_id] = error

    def recover(self) -> None:
        self._errors.clear()

    def _copy(self, slot: int, weights: Any, *packed: Any) -> None:
        self.tried.append(weights.adapter_id)
        error = self._errors.get(weights.adapter_id) or self._errors.get(None)
        if error:
            raise RuntimeError(error)
        self._write(slot, weights, *packed)


@pytest.fixture
def make_adapters(llama: Any, tmp_path: Any) -> Callable[..., dict[str, SavedAdapter]]:
    def make(**ranks: int) -> dict[str, SavedAdapter]:
        return {name: make_adapter(llama, tmp_path / name, seed=i, r=r) for i, (name, r) in enumerate(ranks.items())}

    return make


# An adapter whose rank does not fit.


@pytest.mark.parametrize("after", [0, 1], ids=["slots", "rows"])
async def test_rank_without_room_is_refused_and_everybody_else_answers_as_before(
    llama, make_adapters, make_engine, monkeypatch, after
):
    adapters = make_adapters(small=4, other=3, large=24, late=2)
    source = MemorySource(adapters)
    engine, device = make_engine(llama, source, rank=4, slots=2), Device(monkeypatch)
    expected = {name: peft_answer(llama, adapters.get(name), PROMPT, 60) for name in [None, *adapters]}
    running = {name: asyncio.create_task(answer(engine, PROMPT, 60, name)) for name in (None, "small", "other")}
    await until(lambda: engine.stats().decode_steps > 5)
    device.run_out(after=after)
    remedy = r"large has rank 24.* 2 slots and 4 rows .*rank 4.*loraR 4 or less.*ARKOR_RAY_SERVING_SLOTS"
    for _ in range(3):  # the second attempt must not take the first one's half for done
        with pytest.raises(AdapterError, match=remedy):
            await answer(engine, PROMPT, 8, "large")
        with pytest.raises(AdapterError, match=remedy):
            await engine.preload(await source.weights("large"))
    for name, task in running.items():
        assert await task == expected[name]
    assert engine.stats().rank == 4 and engine.stats().evictions == 0, "nobody leaves for one without room"
    alone = {name: await answer(engine, PROMPT, 60, name) for name in (None, "small", "other", "late")}
    assert alone == {name: expected[name] for name in alone}
    assert await asyncio.gather(*(answer(engine, PROMPT, 60, name) for name in ("late", None))) == [
        expected["late"],
        expected[None],
    ]
    engine.check_health()
    device.recover()
    assert await answer(engine, PROMPT, 60, "large") == expected["large"]
    assert engine.stats().rank == 24


async def test_rank_that_has_room_once_others_leave_the_device_is_not_refused_for_good(
    llama, make_adapters, make_engine, monkeypatch
):
    source = MemorySource(make_adapters(large=24))
    lora, device = make_engine(llama, source, rank=4)._runner.lora, Device(monkeypatch)
    weights = await source.weights("large")
    device.run_out(after=0)
    monkeypatch.setattr(lora, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    for total, refusal in ((2**31, ServiceUnavailableError), (2**30 + 2**10, AdapterError)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, total=total: (0, total))
        with pytest.raises(refusal, match="large has rank 24"):
            lora.reserve(weights)


# Adapters that cannot be copied.


async def test_adapter_that_cannot_be_copied_fails_alone(llama, make_adapters, make_engine, monkeypatch):
    adapters = make_adapters(bad=8, good=8)
    engine = make_engine(llama, MemorySource(adapters))
    copies = Copies(engine, monkeypatch)
    copies.fail("bad")
    running = asyncio.create_task(answer(engine, PROMPT, 100))
    await until(lambda: engine.stats().decode_steps)
    for _ in range(4):
        with pytest.raises(InternalError, match=r"Adapter bad cannot be placed.*no room"):
            await asyncio.wait_for(answer(engine, PROMPT, 8, "bad"), 20)
    assert await answer(engine, PROMPT, 8, "good") == peft_answer(llama, adapters["good"], PROMPT, 8)
    assert await running == peft_answer(llama, None, PROMPT, 100)
    engine.check_health()
    copies.recover()
    assert await answer(engine, PROMPT, 8, "bad") == peft_answer(llama, adapters["bad"], PROMPT, 8)
    assert engine.stats().waiting == 0 and set(engine.stats().resident.values()) == {0}


async def test_replica_that_can_copy_no_adapter_is_unhealthy(llama, make_adapters, make_engine, monkeypatch):
    source = MemorySource(make_adapters(a=4, b=4, c=4, d=4, e=4))
    engine = make_engine(llama, source)
    copies = Copies(engine, monkeypatch)
    for name in "abcde":
        if name == "c":  # one that succeeds: it was not the replica
            copies.recover()
            await answer(engine, PROMPT, 1, "a")
        copies.fail()
        assert healthy(engine)
        with pytest.raises((InternalError, RuntimeError), match="no room"):
            await (answer(engine, PROMPT, 4, name) if name != "d" else engine.preload(await source.weights(name)))
    assert not healthy(engine)
    with pytest.raises(ServiceUnavailableError, match="None of the last 3 adapters") as error:
        await answer(engine, PROMPT, 4)
    assert error.value.retry_after is not None, "another replica will answer"


async def test_device_that_fails_is_not_the_adapters_fault(llama, make_adapters, make_engine, monkeypatch):
    """Whoever waits is not told, so that the gateway sends it to another replica when this one is replaced."""
    engine = make_engine(llama, MemorySource(make_adapters(a=8)))
    copies = Copies(engine, monkeypatch)
    copies.fail(error=ILLEGAL_ACCESS)
    waiting = asyncio.create_task(answer(engine, PROMPT, 8, "a"))
    await until(lambda: not healthy(engine))
    assert not waiting.done()
    waiting.cancel()


async def test_turns_without_work_between_failed_steps_do_not_make_a_replica_well(llama, make_engine, monkeypatch):
    engine = make_engine(llama)

    def broken(*_: Any, **options: Any) -> None:
        raise RuntimeError(ILLEGAL_ACCESS)

    monkeypatch.setattr(engine._runner, "decode", broken)
    monkeypatch.setattr(engine._runner, "prefill", broken)
    for _ in range(3):
        assert healthy(engine)
        with pytest.raises(InternalError, match="illegal memory access"):
            await answer(engine, PROMPT, 8)
        turned = threading.Event()
        engine._post(turned.set)
        await asyncio.to_thread(turned.wait, 20)
    await until(lambda: not healthy(engine))


# Requests that fail among others.


async def test_prompt_that_cannot_be_read_fails_alone(llama, make_engine, monkeypatch):
    engine = make_engine(llama)
    prefill = engine._runner.prefill

    def short_of_memory(row: int, start: int, ids: Any, *args: Any, **options: Any) -> torch.Tensor:
        if start:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return prefill(row, start, ids, *args, **options)

    running = asyncio.create_task(answer(engine, PROMPT, 60))
    await until(lambda: engine.stats().decode_steps)
    monkeypatch.setattr(engine._runner, "prefill", short_of_memory)
    with pytest.raises(InternalError, match="out of memory"):
        await answer(engine, [5] * 40, 8)
    assert await answer(engine, [8, 9], 30) == peft_answer(llama, None, [8, 9], 30)
    assert await running == peft_answer(llama, None, PROMPT, 60)
    engine.check_health()


class Failing:
    """A grammar that allows every token, until it is told to fail."""

    def __init__(self) -> None:
        self._failed = False

    def fail(self) -> None:
        self._failed = True

    def mask(self) -> Any:
        if self._failed:
            raise InternalError("the grammar failed")
        return np.full(VOCAB // 32, -1, dtype=np.int32)

    def accept(self, token: int) -> bool:
        return False


async def test_neighbour_of_a_failing_grammar_keeps_all_it_has_read(llama, make_engine):
    """It moves into the row that is free now, in the middle of the step in which it gets its next token."""
    draw = random.Random(4)
    prompt = [draw.randrange(3, VOCAB) for _ in range(9)]
    engine, grammar = make_engine(llama, prefill_budget=64, max_len=512), Failing()
    failing = asyncio.create_task(answer(engine, PROMPT * 3, 500, grammar=grammar))
    await until(lambda: engine.stats().rows_busy)
    neighbour = asyncio.create_task(answer(engine, prompt, 300))
    await until(lambda: engine.stats().rows_busy == 2)
    grammar.fail()
    with pytest.raises(InternalError, match="the grammar failed"):
        await failing
    assert await neighbour == peft_answer(llama, None, prompt, 300)


async def test_values_that_are_not_finite_do_not_outlive_their_request(llama, make_engine):
    """A row's next sequence is shorter than the last one, and a longer neighbour has the step look that far."""
    broken = llama.model.embed_tokens.weight[300].clone()
    with torch.no_grad():
        llama.model.embed_tokens.weight[300] = float("nan")
    try:
        engine = make_engine(llama, prefill_budget=64)
    finally:
        with torch.no_grad():
            llama.model.embed_tokens.weight[300] = broken
    bad = [5] * 30 + [300] * 3
    with pytest.raises(InternalError, match="not finite"):
        await answer(engine, bad, 8)
    await engine.score(tuple(bad), None)
    found = await asyncio.gather(answer(engine, PROMPT, 20), answer(engine, [9] * 50, 20))
    assert found == [peft_answer(llama, None, PROMPT, 20), peft_answer(llama, None, [9] * 50, 20)]


async def test_fault_while_a_client_leaves_does_not_end_the_engine(llama, make_engine, monkeypatch):
    engine = make_engine(llama, max_len=512)

    def broken(*_: Any) -> None:
        raise RuntimeError("row not moved")

    leaver = engine.generate(GenRequest("g", tuple(PROMPT), 500))
    await anext(leaver)
    stays = asyncio.create_task(answer(engine, PROMPT, 500))
    await until(lambda: engine.stats().rows_busy == 2)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner.cache, "move_row", broken)
        await leaver.aclose()
        with pytest.raises(InternalError, match="row not moved"):  # what its row holds is not known
            await asyncio.wait_for(stays, 20)
    assert await answer(engine, PROMPT, 20) == peft_answer(llama, None, PROMPT, 20)
    engine.check_health()
