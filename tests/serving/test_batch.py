"""One replica of the pool, in this process; `integration/test_job_scripts.py` has the pool."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arkor_ray.errors import AdapterError, InvalidRequestError, ModelError
from arkor_ray.serving.batch import (
    Engine,
    Sampling,
    Speaker,
    _Replica,
    _result,
    check_sampling,
    read_json_schema,
    read_speaker,
)
from arkor_ray.storage.adapter_files import read_adapter
from tests.serving.tiny import make_adapter, peft_chat, save_base

ASK = [{"role": "user", "content": "is the weather fine?"}]
SMALL = Engine(rows=4, max_length=512, cpu_threads=1)


def ask(replica: _Replica, *questions: dict[str, Any]) -> list[str]:
    """What the replica yields for one block of rows."""
    texts = np.array([json.dumps(question) for question in questions], dtype=object)

    async def collect() -> list[str]:
        batches = [each async for each in replica({"index": np.arange(len(questions)), "question": texts})]
        return [text for each in batches for text in each["result"]]

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def world(llama, tmp_path_factory) -> tuple[Path, Any, _Replica]:
    """A base, an adapter on it that came without a tokenizer, and a replica of both."""
    root = tmp_path_factory.mktemp("batch")
    base, adapter = save_base(llama, root / "base"), make_adapter(llama, root / "adapter", seed=3)
    found = read_adapter(str(adapter.path))
    assert not found.has_tokenizer
    return base, adapter, _Replica(Speaker(str(base), found, "fp32"), Sampling(0.0, max_tokens=20), SMALL)


def test_the_adapter_and_its_base_answer_in_one_block(world, llama):
    _, adapter, replica = world
    with_adapter, as_base = map(_result, ask(replica, {"messages": ASK}, {"messages": ASK, "as_base": True}))
    assert with_adapter["answer"].rstrip("\ufffd") == peft_chat(llama, adapter, ASK, 20).rstrip("\ufffd")
    assert as_base["answer"].rstrip("\ufffd") == peft_chat(llama, None, ASK, 20).rstrip("\ufffd")
    assert with_adapter["answer"] != as_base["answer"]
    assert (with_adapter["index"], as_base["index"]) == (0, 1)
    assert with_adapter["usage"]["completion_tokens"] == 20 and with_adapter["finish_reason"] == "length"


def test_a_row_that_cannot_be_answered_has_an_error_and_its_neighbours_an_answer(world):
    _, _, replica = world
    long = [{"role": "user", "content": "weather " * 900}]
    refused, answered, empty = map(_result, ask(replica, {"messages": long}, {"messages": ASK}, {"messages": []}))
    assert "more than the 512 that fit" in refused["error"]
    assert answered["answer"]
    assert empty["error"].startswith("messages: ")


def test_a_forced_call_is_put_together(world):
    _, _, replica = world
    schema = {
        "type": "object",
        "properties": {"ok": {"const": True}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "tell", "parameters": schema}}]
    question = {"messages": ASK, "tools": tools, "tool_choice": "required"}
    replica = copy.copy(replica)
    replica._sampling = Sampling(0.0, max_tokens=440)
    [result] = map(_result, ask(replica, question))
    [call] = result["tool_calls"]
    assert call["function"]["name"] == "tell" and json.loads(call["function"]["arguments"]) == {"ok": True}
    assert result["finish_reason"] == "tool_calls"


def test_a_base_that_cannot_be_loaded_ends_the_run_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    replica = _Replica(Speaker(str(tmp_path), None, "fp32"), Sampling(), SMALL)
    [text] = ask(replica, {"messages": ASK}, {"messages": ASK})
    with pytest.raises(ModelError, match="cannot be loaded as fp32"):
        _result(text)


def test_an_adapter_of_another_base_ends_the_run_with_the_reason(world, tmp_path):
    from tests.serving.tiny import make_model

    base, _, _ = world
    other = make_adapter(make_model("llama", hidden=32), tmp_path / "other", seed=1)
    replica = _Replica(Speaker(str(base), read_adapter(str(other.path)), "fp32"), Sampling(), SMALL)
    [text] = ask(replica, {"messages": ASK})
    with pytest.raises(AdapterError, match="the base model needs"):
        _result(text)


def test_the_precision_is_that_of_training_unless_somebody_says_another(world):
    found = read_adapter(str(world[1].path))
    assert Speaker("b", found).resolved_precision(gpu=True) == "bf16"
    assert Speaker("b", found).resolved_precision(gpu=False) == "fp32"
    assert Speaker("b", found, "nf4").resolved_precision(gpu=True) == "nf4"


def test_what_answers_depend_on_tells_one_run_from_another(world):
    base, adapter, _ = world
    with_adapter = read_speaker(str(adapter.path), str(base), None)
    identities = [
        with_adapter.identity([1]),
        with_adapter.identity([2]),
        read_speaker(None, str(base), None).identity([1]),
        read_speaker(str(adapter.path), "other", None).identity([1]),
        read_speaker(str(adapter.path), str(base), "bf16").identity([1]),
    ]
    assert len({json.dumps(identity) for identity in identities}) == 5
    with pytest.raises(InvalidRequestError, match="--adapter, --model or both"):
        read_speaker(None, None, None)


def test_sampling_that_no_question_could_have_is_refused_once(tmp_path):
    check_sampling(Sampling(0.5, 0.9, 10, 1, ["\n"], {"type": "object"}))
    for sampling, sentence in ((Sampling(top_p=2.0), "top_p"), (Sampling(json_schema={"type": "nonesuch"}), "json")):
        with pytest.raises(InvalidRequestError, match=sentence):
            check_sampling(sampling)
    (tmp_path / "schema.json").write_text("[]")
    with pytest.raises(InvalidRequestError, match="must hold a JSON object"):
        read_json_schema(tmp_path / "schema.json")
