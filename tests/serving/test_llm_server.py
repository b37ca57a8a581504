"""The replica as its callers see it: chats in, dicts out, errors as themselves. In process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arkor_ray.errors import AdapterError, InvalidRequestError, NotFoundError
from arkor_ray.serving.app import InferenceArgs
from arkor_ray.serving.llm_server import LLMServer, _base_hash
from arkor_ray.storage.local import LocalStore
from tests.serving.tiny import (
    TEMPLATE,
    commit_adapter,
    make_adapter,
    make_model,
    make_tokenizer,
    peft_chat,
    probe_of,
    save_base,
)

pytestmark = pytest.mark.anyio

ASK = [{"role": "user", "content": "wie schön is the weather?"}]
PROBE = list(range(5, 60))


@pytest.fixture
def world(llama: Any, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A replica over a local store with four adapters, the last with a chat template of its own."""
    base = str(save_base(llama, tmp_path / "base"))
    store = LocalStore(tmp_path / "store")
    adapters = [make_adapter(llama, tmp_path / f"a{i}", seed=i) for i in range(4)]
    probes = [probe_of(llama, adapter, PROBE) for adapter in adapters]
    other = make_tokenizer(TEMPLATE.replace("assistant", "system"))
    manifests = [
        commit_adapter(store, a, "job", i, base_model=base, probe=probes[i], tokenizer=other if i == 3 else None)
        for i, a in enumerate(adapters)
    ]
    args = InferenceArgs(
        base_model=base, base_precision="fp32", storage_url=f"file://{tmp_path / 'store'}",
        cache_dir=str(tmp_path / "cache"), slots=2, rows=4, max_len=256, cpu_threads=1,
    )  # fmt: skip
    server = LLMServer(args)
    yield SimpleNamespace(
        server=server, adapters=adapters, manifests=manifests, probes=probes, store=store, model=llama
    )
    server.close()


async def chat(server: LLMServer, adapter_id: str | None, **request: Any) -> SimpleNamespace:
    body = {"messages": ASK, "max_tokens": 30, "temperature": 0} | request
    events = [event async for event in server.chat(body, adapter_id)]
    assert [e["type"] for e in events] == ["start", *["delta"] * (len(events) - 2), "end"]
    deltas = [e["text"] for e in events[1:-1]]
    assert all(deltas), "no empty deltas"
    return SimpleNamespace(text="".join(deltas), deltas=deltas, start=events[0], end=events[-1])


def expected(world: SimpleNamespace, index: int | None, tokens: int = 30) -> str:
    adapter = None if index is None else world.adapters[index]
    return peft_chat(world.model, adapter, ASK, tokens).rstrip("\ufffd")


async def test_each_answers_with_its_own_weights(world):
    names: list[int | None] = [0, 1, 2, None] * 2
    found = await asyncio.gather(*(chat(world.server, None if n is None else f"job-step-{n}") for n in names))
    for name, answer in zip(names, found, strict=True):
        assert answer.text.rstrip("\ufffd") == expected(world, name)
    assert len({answer.text for answer in found}) == 4


async def test_fingerprint_names_the_weights(world):
    answer = await chat(world.server, "job-step-1")
    assert answer.start["system_fingerprint"] == f"job-step-1@{world.manifests[1].sha256[:16]}"
    base = await chat(world.server, None)
    assert base.start["system_fingerprint"].startswith("base@")


async def test_usage_adds_up(world):
    answer = await chat(world.server, None, max_tokens=7)
    usage = answer.end["usage"]
    assert answer.end["finish_reason"] == "length"
    assert usage["completion_tokens"] == 7
    assert usage["prompt_tokens"] == answer.start["prompt_tokens"] > 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7


async def test_stop_text_ends_the_answer_and_is_not_in_it(world):
    whole = (await chat(world.server, None)).text
    pairs = [whole[i : i + 2] for i in range(6, len(whole))]
    stop = next(pair for i, pair in enumerate(pairs, 6) if whole.find(pair) == i and "\ufffd" not in pair)
    answer = await chat(world.server, None, stop=["never there", stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.end["finish_reason"] == "stop"
    assert answer.end["usage"]["completion_tokens"] < 30
    stats = await world.server.stats()
    assert stats["engine"]["rows_busy"] <= 1, "the row is given back at once"


async def test_seed_repeats_and_differs(world):
    hot = {"temperature": 1.0, "top_p": 0.9}
    first = await chat(world.server, "job-step-0", seed=5, **hot)
    company = [chat(world.server, f"job-step-{n}", seed=n, **hot) for n in (1, 2)]
    again, *_ = await asyncio.gather(chat(world.server, "job-step-0", seed=5, **hot), *company)
    assert first.text == again.text
    assert first.text != (await chat(world.server, "job-step-0", seed=6, **hot)).text


async def test_admission_answers_with_parity(world):
    admitted = await world.server.admit(world.manifests[0].model_dump(mode="json"), world.adapters[0].data)
    assert admitted["adapter_id"] == "job-step-0"
    assert admitted["manifest_sha256"] == world.manifests[0].sha256
    assert admitted["tier"] == "slot"
    assert admitted["parity"]["max_abs_diff"] < admitted["parity"]["tolerance"] == 1e-3
    assert (await chat(world.server, "job-step-0")).text.rstrip("\ufffd") == expected(world, 0)


async def test_parity_tells_another_adapters_weights(world, caplog):
    manifest = world.manifests[0].model_copy(update={"probe": world.probes[1]})
    admitted = await world.server.admit(manifest.model_dump(mode="json"), world.adapters[0].data)
    assert admitted["parity"]["max_abs_diff"] > 0.1
    assert "does not answer as it was trained" in caplog.text


async def test_parity_tells_a_lost_scale(world):
    """What a wrong lora_alpha or a base that was quantised otherwise would look like."""
    wrong = [value * 1.05 for value in world.probes[0].logprobs]
    manifest = world.manifests[0].model_copy(update={"probe": world.probes[0].model_copy(update={"logprobs": wrong})})
    admitted = await world.server.admit(manifest.model_dump(mode="json"), world.adapters[0].data)
    assert admitted["parity"]["max_abs_diff"] > admitted["parity"]["tolerance"]


async def test_admission_of_wrong_bytes_is_refused(world):
    with pytest.raises(AdapterError, match="SHA-256"):
        await world.server.admit(world.manifests[0].model_dump(mode="json"), world.adapters[1].data)
    with pytest.raises(AdapterError, match="manifest"):
        await world.server.admit({"adapter_id": "x"}, None)


async def test_unknown_adapter_is_not_the_base(world):
    with pytest.raises(NotFoundError):
        await chat(world.server, "job-step-9")


async def test_prompt_is_built_with_the_adapters_own_template(world):
    """The fourth adapter's template is another one, so its prompt is longer or shorter than the base's."""
    lengths = [(await chat(world.server, name, max_tokens=1)).start["prompt_tokens"] for name in (None, "job-step-3")]
    assert lengths[0] != lengths[1]


async def test_template_that_training_did_not_use_is_refused(world, tmp_path):
    manifest = world.manifests[0].model_copy(update={"template_sha256": "0" * 64})
    with pytest.raises(AdapterError, match="template"):
        await world.server.admit(manifest.model_dump(mode="json"), world.adapters[0].data)


async def test_messages_the_template_cannot_take_are_the_callers_fault(world):
    with pytest.raises(InvalidRequestError) as error:
        await chat(world.server, None, messages=[{"role": "user", "content": {"no": "text"}}, 3])
    assert error.value.param == "messages"


async def test_overflow_is_the_callers_fault(world):
    with pytest.raises(InvalidRequestError, match="256"):
        await chat(world.server, None, max_tokens=4000)
    with pytest.raises(InvalidRequestError, match="messages"):
        await chat(world.server, None, messages=[{"role": "user", "content": "x" * 400}], max_tokens=None)


async def test_without_max_tokens_the_context_is_the_limit(world):
    answer = await chat(world.server, None, max_tokens=None)
    assert answer.end["finish_reason"] in ("stop", "length")
    assert answer.end["usage"]["total_tokens"] <= 256


async def test_disconnect_frees_the_row(world):
    async with aclosing(world.server.chat({"messages": ASK, "max_tokens": 200, "temperature": 0}, None)) as events:
        await anext(events)
    async with asyncio.timeout(5):
        while (await world.server.stats())["engine"]["rows_busy"]:
            await asyncio.sleep(0.002)
    assert (await world.server.stats())["engine"]["generated_tokens"] < 200


def test_fingerprint_of_the_base_depends_on_its_weights(tmp_path):
    hashes = []
    for name, seed in (("one", 1), ("two", 2), ("copy", 1)):
        model = make_model(seed=seed)
        hashes.append(_base_hash(str(save_base(model, tmp_path / name)), model.config))
    assert hashes[0] == hashes[2] != hashes[1]
