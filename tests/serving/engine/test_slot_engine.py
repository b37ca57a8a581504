"""The engine against PEFT: the same tokens, whatever else is in the batch, whatever comes and goes."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from peft import PeftModel

from arkor_ray.errors import AdapterError, InternalError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.slot_engine import SlotEngine
from tests.serving.conftest import MemorySource
from tests.serving.tiny import VOCAB, make_adapter, peft_answer

pytestmark = pytest.mark.anyio


async def answer(
    engine: SlotEngine, prompt: list[int], tokens: int, adapter: str | None = None, **options: Any
) -> list[int]:
    request = GenRequest(str(id(prompt)), tuple(prompt), tokens, adapter, **options)
    return [event.token_id async for batch in engine.generate(request) for event in batch]


def prompts(count: int, *, longest: int = 50, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


async def until(condition: Any, *, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def test_mixed_adapters_and_base_give_the_tokens_of_peft(model, adapters, make_engine):
    """Ten adapters of other ranks, targets and scalings and the base, ragged, coming and going in five rows."""
    source = MemorySource(adapters)
    engine = make_engine(model, source, rows=5, slots=len(adapters))
    draw = random.Random(1)
    names = [None, *adapters] * 3
    jobs = [(name, prompt, draw.randrange(1, 40)) for name, prompt in zip(names, prompts(len(names)), strict=True)]

    async def later(index: int, name: str | None, prompt: list[int], tokens: int) -> list[int]:
        await asyncio.sleep(0.003 * index)
        return await answer(engine, prompt, tokens, name)

    found = await asyncio.gather(*(later(i, *job) for i, job in enumerate(jobs)))
    expected = [peft_answer(model, adapters.get(name), prompt, tokens) for name, prompt, tokens in jobs]
    assert found == expected
    assert len({tuple(peft_answer(model, adapters.get(name), jobs[0][1], 8)) for name in [None, *adapters]}) > 8, (
        "the adapters must differ, or this test shows nothing"
    )


async def test_working_set_of_twice_the_slots(model, adapters, make_engine):
    source = MemorySource(adapters)
    engine = make_engine(model, source, rows=4, slots=len(adapters) // 2)
    jobs = [(name, prompt) for name, prompt in zip(list(adapters) * 3, prompts(30, longest=20), strict=True)]
    found = await asyncio.gather(*(answer(engine, prompt, 12, name) for name, prompt in jobs))
    assert found == [peft_answer(model, adapters[name], prompt, 12) for name, prompt in jobs]
    stats = engine.stats()
    assert stats.evictions >= len(adapters) // 2
    assert set(stats.resident.values()) == {0}, "every request must have let go of its slot"


async def test_rank_grows_while_others_decode(llama, tmp_path, make_engine):
    adapters = {
        "small": make_adapter(llama, tmp_path / "s", seed=1, r=2),
        "large": make_adapter(llama, tmp_path / "l", seed=2, r=40),
    }
    engine = make_engine(llama, MemorySource(adapters), rank=2)
    prompt = [5, 6, 7]
    small = asyncio.create_task(answer(engine, prompt, 60, "small"))
    base = asyncio.create_task(answer(engine, prompt, 60))
    await until(lambda: engine.stats().decode_steps > 3)
    assert await answer(engine, prompt, 20, "large") == peft_answer(llama, adapters["large"], prompt, 20)
    assert await small == peft_answer(llama, adapters["small"], prompt, 60)
    assert await base == peft_answer(llama, None, prompt, 60)
    assert engine.stats().rank == 40


async def test_concurrent_first_requests_read_the_adapter_once(llama, tmp_path, make_engine):
    source = MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)})
    source.before = lambda _: asyncio.sleep(0.02)
    engine = make_engine(llama, source)
    found = await asyncio.gather(*(answer(engine, [9, 8, 7], 6, "a") for _ in range(8)))
    assert len({tuple(tokens) for tokens in found}) == 1
    assert source.reads == ["a"]
    assert engine.stats().adapter_loads == 1


async def test_cancelled_reader_does_not_cancel_the_others(llama, tmp_path, make_engine):
    source = MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)})
    go = asyncio.Event()
    source.before = lambda _: go.wait()
    engine = make_engine(llama, source)
    first = asyncio.create_task(answer(engine, [9, 8], 4, "a"))
    second = asyncio.create_task(answer(engine, [9, 8], 4, "a"))
    await until(lambda: source.reads)
    first.cancel()
    await asyncio.sleep(0)
    go.set()
    assert len(await second) == 4
    assert source.reads == ["a"]


async def test_preload_whose_caller_left_or_that_fails_leaves_the_engine_well(
    llama, tmp_path, make_engine, monkeypatch
):
    source = MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)})
    engine = make_engine(llama, source)
    weights, release = await source.weights("a"), threading.Event()
    posted: list[Any] = []
    monkeypatch.setattr(engine, "_post", lambda command: posted.append(command))
    leaver = asyncio.create_task(engine.preload(weights))
    await until(lambda: posted)
    monkeypatch.undo()
    leaver.cancel()
    await asyncio.sleep(0)
    engine._post(posted[0])
    engine._post(release.set)
    await asyncio.to_thread(release.wait, 5)
    assert len(await answer(engine, [9, 8], 4, "a")) == 4

    def broken(*_: Any) -> None:
        raise RuntimeError("no room")

    other = dataclasses.replace(weights, adapter_id="b")
    monkeypatch.setattr(engine._runner.lora, "write", broken)
    with pytest.raises(RuntimeError, match="no room"):
        await engine.preload(other)
    monkeypatch.undo()
    assert await engine.preload(other)
    engine.check_health()


async def test_failed_read_is_not_remembered(llama, tmp_path, make_engine):
    async def broken(_: str) -> None:
        raise AdapterError("broken")

    source = MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)})
    engine = make_engine(llama, source)
    source.before = broken
    with pytest.raises(AdapterError, match="broken"):
        await answer(engine, [9, 8], 4, "a")
    source.before = None
    assert len(await answer(engine, [9, 8], 4, "a")) == 4


async def test_busy_slot_is_never_given_away(llama, tmp_path, make_engine):
    adapters = {name: make_adapter(llama, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    engine = make_engine(llama, MemorySource(adapters), slots=1)
    long = asyncio.create_task(answer(engine, [5, 6], 120, "a"))
    await until(lambda: engine.stats().resident.get("a") == 1)
    with pytest.raises(ServiceUnavailableError) as error:
        await answer(engine, [5, 6], 4, "b", queue_timeout=0.001)
    assert error.value.retry_after is not None
    assert len(await answer(engine, [5, 6], 4)) == 4, "the base needs no slot and must pass"
    waited = asyncio.create_task(answer(engine, [5, 6], 4, "b"))
    assert await long == peft_answer(llama, adapters["a"], [5, 6], 120)
    assert await waited == peft_answer(llama, adapters["b"], [5, 6], 4)


async def test_waiting_adapter_is_not_starved(llama, tmp_path, make_engine):
    """Requests for the resident adapter keep coming and overlap, yet the other one gets its turn."""
    adapters = {name: make_adapter(llama, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    engine = make_engine(llama, MemorySource(adapters), slots=1, rows=3)
    other = asyncio.Event()

    async def stream() -> None:
        while not other.is_set():
            await answer(engine, [5, 6], 40, "a")

    streams = [asyncio.create_task(stream()) for _ in range(3)]
    await until(lambda: engine.stats().resident.get("a"))
    await asyncio.wait_for(answer(engine, [5, 6], 4, "b"), 20)
    other.set()
    await asyncio.gather(*streams)


async def test_eviction_between_look_and_admission_is_read_again(llama, tmp_path, make_engine):
    """A request that saw its adapter resident finds it gone when a row is free at last."""
    adapters = {name: make_adapter(llama, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    source = MemorySource(adapters)
    engine = make_engine(llama, source, slots=1, rows=1)
    await answer(engine, [5], 1, "a")
    first = asyncio.create_task(answer(engine, [5], 120, "b"))  # waits for the read, then takes the row and a's slot
    await until(lambda: "b" in engine.stats().resident)
    second = asyncio.create_task(answer(engine, [5], 3, "b"))
    third = asyncio.create_task(answer(engine, [5], 3, "a"))
    await until(lambda: engine.stats().waiting == 2)
    fourth = asyncio.create_task(answer(engine, [5], 3, "b"))
    assert await first == peft_answer(llama, adapters["b"], [5], 120)
    for task, name in ((second, "b"), (third, "a"), (fourth, "b")):
        assert await task == peft_answer(llama, adapters[name], [5], 3)
    assert source.reads == ["a", "b", "a", "b"]


async def test_cancel_frees_row_and_slot(llama, tmp_path, make_engine):
    engine = make_engine(llama, MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)}), rows=2)
    stream = engine.generate(GenRequest("x", (5, 6, 7), 120, "a"))
    await anext(stream)
    assert engine.stats().rows_busy == 1
    await stream.aclose()
    await until(lambda: engine.stats().rows_busy == 0)
    assert engine.stats().resident == {"a": 0}
    assert engine.stats().generated_tokens < 100


async def test_leaving_neighbours_do_not_disturb(llama, make_engine):
    """Rows are moved when others are cancelled in the middle, also under a prompt that is half read."""
    engine = make_engine(llama, rows=6, prefill_budget=3, max_len=256)
    stay = [asyncio.create_task(answer(engine, prompt, 60)) for prompt in prompts(3, longest=30, seed=5)]
    goers = []
    for prompt in prompts(3, longest=30, seed=6):
        stream = engine.generate(GenRequest("g", tuple(prompt), 100))
        await anext(stream)
        goers.append(stream)
    late = asyncio.create_task(answer(engine, prompts(1, longest=60, seed=11)[0] * 2, 10))
    for stream in goers:
        await stream.aclose()
    for task, prompt in zip(stay, prompts(3, longest=30, seed=5), strict=True):
        assert await task == peft_answer(llama, None, prompt, 60)
    assert await late == peft_answer(llama, None, prompts(1, longest=60, seed=11)[0] * 2, 10)


async def test_seed_gives_the_same_tokens_in_any_company(llama, tmp_path, make_engine):
    engine = make_engine(llama, MemorySource({"a": make_adapter(llama, tmp_path / "a", seed=1)}), rows=8)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = await answer(engine, [5, 6, 7], 30, "a", **options)
    crowd = [answer(engine, p, 30, random.choice(["a", None]), temperature=1.0) for p in prompts(7)]
    together = (await asyncio.gather(answer(engine, [5, 6, 7], 30, "a", **options), *crowd))[0]
    assert alone == together
    assert alone != await answer(engine, [5, 6, 7], 30, "a", **(options | {"seed": 8}))
    assert alone != peft_answer(llama, None, [5, 6, 7], 30)


async def test_end_token_ends_the_answer(llama, make_engine):
    engine = make_engine(llama)
    whole = peft_answer(llama, None, [5, 6, 7], 20)
    end = whole[6]
    request = GenRequest("x", (5, 6, 7), 20, eos_ids=frozenset({end}))
    events = [event async for batch in engine.generate(request) for event in batch]
    assert [e.token_id for e in events] == whole[: whole.index(end) + 1]
    assert [e.finish_reason for e in events][-1] == "stop"
    assert Counter(e.finish_reason for e in events)[None] == len(events) - 1


async def test_overflow_names_the_numbers(llama, make_engine):
    engine = make_engine(llama, max_len=64)
    with pytest.raises(InvalidRequestError, match=r"60 tokens.*10.*64.*maxTokens 4") as error:
        await answer(engine, [5] * 60, 10)
    assert error.value.param == "maxTokens"
    with pytest.raises(InvalidRequestError, match="messages"):
        await answer(engine, [5] * 64, 1)
    with pytest.raises(InvalidRequestError, match=str(VOCAB)):
        await answer(engine, [VOCAB], 1)
    assert await answer(engine, [5] * 60, 4) == peft_answer(llama, None, [5] * 60, 4)


async def test_score_is_the_log_probability_of_the_model(model, adapters, make_engine):
    engine = make_engine(model, MemorySource(adapters))
    ids = prompts(1, longest=60, seed=3)[0] + [7, 8, 9]
    for name in (None, "a1"):
        speaker = model if name is None else PeftModel.from_pretrained(model, adapters[name].path)
        with torch.no_grad():
            logprobs = torch.log_softmax(speaker(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        if name is not None:
            speaker.unload()
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert await engine.score(tuple(ids), name) == pytest.approx(expected, abs=1e-4)


async def test_row_that_is_not_finite_fails_alone(llama, make_engine):
    broken = llama.model.embed_tokens.weight[300].clone()
    with torch.no_grad():
        llama.model.embed_tokens.weight[300] = float("nan")
    try:
        engine = make_engine(llama)
    finally:
        with torch.no_grad():
            llama.model.embed_tokens.weight[300] = broken
    good = asyncio.create_task(answer(engine, [5, 6], 30))
    with pytest.raises(InternalError, match="not finite"):
        await answer(engine, [5, 300], 30)
    assert await good == peft_answer(llama, None, [5, 6], 30)


async def test_failed_step_fails_its_requests_and_the_engine_goes_on(llama, make_engine, monkeypatch):
    engine = make_engine(llama)
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(engine._runner, "decode", broken)
        with pytest.raises(InternalError, match="out of memory"):
            await answer(engine, [5, 6], 30)
    assert await answer(engine, [5, 6], 30) == peft_answer(llama, None, [5, 6], 30)
    engine.check_health()


async def test_close_fails_what_is_running(llama, make_engine):
    engine = make_engine(llama)
    running = asyncio.create_task(answer(engine, [5, 6], 120))
    await until(lambda: engine.stats().rows_busy)
    await asyncio.to_thread(engine.close)
    with pytest.raises(ServiceUnavailableError):
        await running
    with pytest.raises(InternalError):
        engine.check_health()
