"""What only a GPU can show: the engine's tokens on CUDA, and a training run in bf16. `make test-gpu` runs them."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from arkor_ray.serving.engine.base_model import prepare_base
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.slot_engine import EngineConfig, SlotEngine
from arkor_ray.training.bare import run_bare
from arkor_ray.training.callbacks import ListEventSink
from tests.serving.conftest import MemorySource
from tests.serving.tiny import make_adapter, make_model, peft_answer
from tests.training.tiny import make_base_model, make_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_mixed_adapters_on_cuda_give_the_tokens_of_peft_on_cpu(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model("llama")
    adapters = {f"a{i}": make_adapter(model, tmp_path / f"a{i}", seed=i, r=4 + 4 * i) for i in range(8)}
    names, prompt = [None, *adapters], [5, 6, 7, 8]
    expected = [peft_answer(model, adapters.get(name), prompt, 24) for name in names]
    source = MemorySource(adapters)
    base = prepare_base(copy.deepcopy(model).to("cuda"))
    engine = SlotEngine(base, source, EngineConfig(rows=len(names), slots=len(adapters), max_len=64))
    source.linears = engine.linears

    async def answer(name: str | None) -> list[int]:
        request = GenRequest(str(name), tuple(prompt), 24, name)
        return [event.token_id async for batch in engine.generate(request) for event in batch]

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(answer(name) for name in names))

    try:
        assert asyncio.run(all_at_once()) == expected
    finally:
        engine.close()


@pytest.mark.parametrize("config", [{}, {"loadIn4bit": True, "optim": "paged_adamw_8bit"}], ids=["bf16", "qlora"])
def test_a_job_trains_on_the_gpu_and_its_adapter_loads(config, tmp_path):
    base = make_base_model(tmp_path / "base")
    sink = ListEventSink()
    result = run_bare(make_spec(tmp_path / "job", base, maxSteps=20, saveSteps=10, **config), sink)
    losses = [entry["loss"] for entry in sink.of("log") if "loss" in entry]
    assert result is not None
    assert losses[-1] < losses[0]
    assert sink.of("started")[0]["device"].startswith("cuda")
    folder = tmp_path / "job" / "store" / "adapters" / "job-1-final"
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).peft_config
