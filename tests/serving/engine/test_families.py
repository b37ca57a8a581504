"""Model families: either exactly what transformers says, or refused."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from arkor_ray.errors import ModelError
from arkor_ray.serving.engine.base_model import load_base
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.slot_engine import EngineConfig, SlotEngine
from tests.own_code import give_own_code
from tests.serving.conftest import MemorySource
from tests.serving.tiny import VOCAB, make_adapter, make_model, peft_answer, save_base

pytestmark = pytest.mark.anyio

EXACT: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma": {},
    "gemma2": {
        "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "smollm3": {},
    "phi3": {},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4},  # attention sinks
    "llama4_text": {},  # chunked attention
    "mamba": {},
    "bloom": {},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("family", EXACT)
async def test_family_is_exact(family, make_engine):
    model = make_model(family, **EXACT[family])
    engine = make_engine(model, rows=5, prefill_budget=11)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 50))] for _ in range(8)]

    async def answer(prompt: list[int]) -> list[int]:
        request = GenRequest("x", tuple(prompt), 20)
        return [event.token_id async for batch in engine.generate(request) for event in batch]

    found = await asyncio.gather(*map(answer, prompts))
    assert found == [peft_answer(model, None, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("family", REFUSED)
def test_family_is_refused(family, make_engine):
    with pytest.raises(ModelError):
        make_engine(make_model(family, **REFUSED[family]))


def test_wrong_arithmetic_is_found_at_load(make_engine, monkeypatch):
    """If the engine's attention masked one token too many, it would refuse to start."""
    import arkor_ray.serving.engine.attention as attention

    right = attention._decode

    def wrong(batch: attention.DecodeBatch, *rest: Any) -> torch.Tensor:
        batch.masks.setdefault(None, (torch.arange(batch.longest) < batch.positions[:, None])[:, None, None, :])
        return right(batch, *rest)

    monkeypatch.setattr(attention, "_decode", wrong)
    with pytest.raises(ModelError, match="differ"):
        make_engine(make_model("llama"))


def test_missing_directory_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        load_base(str(tmp_path), "fp32")


def test_unknown_hub_model_is_a_model_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing"):
        load_base("nobody/nothing", "fp32")


async def test_code_of_a_models_own_runs_only_where_the_operator_trusts_it(tmp_path, monkeypatch, llama):
    path = give_own_code(save_base(llama, tmp_path / "base"), monkeypatch)
    with pytest.raises(ModelError, match=r"'house' brings code of its own.* trust_remote_code: true"):
        load_base(path, "fp32", name="house")
    assert not (tmp_path / "modules").exists(), "not even copied for import"
    base = load_base(path, "fp32", trust_remote_code=True, device="cpu")
    assert type(base.model).__name__ == "HouseForCausalLM"
    engine = SlotEngine(base, MemorySource({}), EngineConfig(rows=2, slots=2, max_len=64))
    try:
        request = GenRequest("x", (5, 9, 200), 10)
        found = [event.token_id async for batch in engine.generate(request) for event in batch]
    finally:
        engine.close()
    assert found == peft_answer(llama, None, [5, 9, 200], 10)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
async def test_adapter_over_low_precision_base(precision, tmp_path, llama):
    """Not token by token: other batch shapes round otherwise. The log-probabilities must be PEFT's on the same base."""
    from peft import PeftModel

    adapter = make_adapter(llama, tmp_path / "a", seed=1)
    path = str(save_base(llama, tmp_path / "base"))
    ids = [5, 9, 200, 31, 77, 12, 150, 4]
    reference = PeftModel.from_pretrained(load_base(path, precision, device="cpu").model, adapter.path)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    source = MemorySource({"a": adapter})
    engine = SlotEngine(load_base(path, precision, device="cpu"), source, EngineConfig(rows=2, slots=2, max_len=64))
    source.linears = engine.linears
    try:
        found = await engine.score(tuple(ids), "a")
        base = await engine.score(tuple(ids), None)
    finally:
        engine.close()
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert found == pytest.approx(expected, abs=0.25 if precision == "bf16" else 1e-3)
    assert max(abs(a - b) for a, b in zip(found, base, strict=True)) > 0.5, "the adapter must matter"
