"""Rows with a grammar: their tokens are the grammar's, and nobody else notices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from arkor_ray.errors import InternalError, InvalidRequestError
from arkor_ray.serving.engine import grammar_masks
from arkor_ray.serving.engine.interface import FinishReason, GenRequest
from arkor_ray.serving.engine.slot_engine import SlotEngine
from tests.serving.conftest import MemorySource
from tests.serving.tiny import VOCAB, make_adapter, peft_answer

pytestmark = pytest.mark.anyio

PROMPT = (5, 6, 7)
END = 2


class Script:
    """A grammar that allows one set of tokens after another, then the end. It can be slow, and fail."""

    def __init__(self, *steps: set[int], closed: bool = True) -> None:
        self.steps = steps
        self.closed = closed
        self.accepted: list[int] = []
        self.before_mask: Callable[[int], Any] = lambda step: None
        self.before_accept: Callable[[int], Any] = lambda token: None

    def mask(self) -> np.ndarray:
        self.before_mask(len(self.accepted))
        bits = np.zeros(VOCAB, dtype=np.uint8)
        at = len(self.accepted)
        bits[list(self.steps[at]) if at < len(self.steps) else [END]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        self.before_accept(token)
        assert token in self.steps[len(self.accepted)]
        self.accepted.append(token)
        return self.closed and len(self.accepted) == len(self.steps)


async def answer(
    engine: SlotEngine, grammar: Script | None, tokens: int = 20, adapter: str | None = None, **options: Any
) -> tuple[list[int], FinishReason | None]:
    request = GenRequest("r", PROMPT, tokens, adapter, eos_ids=frozenset({END}), grammar=grammar, **options)
    events = [event async for batch in engine.generate(request) for event in batch]
    return [event.token_id for event in events], events[-1].finish_reason


STEPS = [{10, 20}, {30}, {40, 41, 42}, {50}]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_tokens_are_the_grammars(llama, make_engine, temperature):
    engine = make_engine(llama)
    found, reason = await answer(engine, Script(*STEPS), temperature=temperature, seed=1)
    assert len(found) == len(STEPS) and all(token in step for token, step in zip(found, STEPS, strict=True))
    assert reason == "stop"


async def test_open_grammar_ends_with_an_end_token(llama, make_engine):
    found, reason = await answer(make_engine(llama), Script(*STEPS, closed=False))
    assert found[-1] == END and len(found) == len(STEPS) + 1 and reason == "stop"


async def test_token_limit_cuts_a_grammar_short(llama, make_engine):
    engine = make_engine(llama)
    assert (await answer(engine, Script(*STEPS), 3))[1] == "length"
    assert (await answer(engine, Script(*STEPS), len(STEPS)))[1] == "stop", "complete with the last token"


async def test_neighbours_without_a_grammar_say_what_they_would_have_said(llama, tmp_path, make_engine):
    adapter = make_adapter(llama, tmp_path / "a", seed=1)
    engine = make_engine(llama, MemorySource({"a": adapter}))
    request = GenRequest("free", PROMPT, 60, "a")

    async def free() -> list[int]:
        return [event.token_id async for batch in engine.generate(request) for event in batch]

    found, *bound = await asyncio.gather(
        free(), *(answer(engine, Script(*STEPS * 5), 40, name) for name in (None, "a") * 3)
    )
    assert found == peft_answer(llama, adapter, list(PROMPT), 60)
    assert {reason for _, reason in bound} == {"stop"}


async def test_late_mask_delays_its_own_row_only(llama, make_engine):
    """The row sits steps out; what it says in the end is what it would have said at once."""
    engine = make_engine(llama)
    at_once, _ = await answer(engine, Script(*STEPS))
    for late in range(len(STEPS)):
        grammar, release = Script(*STEPS), threading.Event()
        grammar.before_mask = lambda step, late=late, release=release: step != late or release.wait(10)
        slow = asyncio.create_task(answer(engine, grammar))
        assert len((await answer(engine, None, 15))[0]) == 15
        assert len(grammar.accepted) <= late and not slow.done()
        release.set()
        assert await slow == (at_once, "stop")


async def test_mask_that_never_comes_fails_its_own_request(llama, make_engine, monkeypatch):
    monkeypatch.setattr(grammar_masks, "LIMIT_S", 0.05)
    engine, release, grammar = make_engine(llama), threading.Event(), Script(*STEPS)
    grammar.before_mask = lambda step: step != 2 or release.wait(10)
    with pytest.raises(InvalidRequestError, match="too complex"):
        await answer(engine, grammar)
    release.set()
    assert (await answer(engine, Script(*STEPS)))[1] == "stop"
    assert engine.stats().rows_busy == 0


def refuse(_: int) -> None:
    raise InvalidRequestError("structuredOutputs.regex: became too complex")


def break_down(_: int) -> None:
    raise RuntimeError("a fault")


@pytest.mark.parametrize("when", ["before_mask", "before_accept"])
@pytest.mark.parametrize(("fault", "error"), [(refuse, InvalidRequestError), (break_down, InternalError)])
async def test_failing_grammar_fails_its_own_request(llama, make_engine, when, fault, error):
    engine, grammar = make_engine(llama), Script(*STEPS)
    setattr(grammar, when, lambda at: fault(at) if len(grammar.accepted) == 2 else None)
    free = asyncio.create_task(answer(engine, None, 40))
    with pytest.raises(error):
        await answer(engine, grammar)
    assert len((await free)[0]) == 40
    engine.check_health()


async def test_cancelled_generation_frees_its_row(llama, make_engine):
    engine = make_engine(llama, rows=1)
    request = GenRequest("r", PROMPT, 100, grammar=Script(*[{10, 20}] * 100))
    async with aclosing(engine.generate(request)) as batches:
        await anext(batches)
    assert (await answer(engine, Script(*STEPS)))[1] == "stop"
