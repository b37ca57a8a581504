"""A tiny base model, adapters of several shapes on it, and an engine over them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from arkor_ray.serving.engine.base_model import prepare_base
from arkor_ray.serving.engine.lora_weights import LoraWeights, parse_adapter
from arkor_ray.serving.engine.slot_engine import EngineConfig, SlotEngine
from tests.serving.tiny import SavedAdapter, make_adapter, make_model

# Ranks, scalings and targets as users mix them.
SHAPES: list[dict[str, Any]] = [
    {"r": 8},
    {"r": 16, "use_rslora": True},
    {"r": 3, "lora_alpha": 5},
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 24},
    {"r": 8, "target_modules": "all-linear"},
    {"r": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 64}},
    {"r": 1},
    {"r": 8, "layers_to_transform": [1]},
    {"r": 8, "exclude_modules": ["layers.0.mlp.up_proj"]},
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(family: str) -> PreTrainedModel:
    """For PEFT; engines get copies."""
    return make_model(family)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def adapters(model: PreTrainedModel, family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SavedAdapter]:
    folder = tmp_path_factory.mktemp(f"adapters-{family}")
    return {f"a{i}": make_adapter(model, folder / f"a{i}", seed=i, **shape) for i, shape in enumerate(SHAPES)}


class MemorySource:
    """An adapter source that can be slow, fail, and counts."""

    def __init__(self, adapters: dict[str, SavedAdapter]) -> None:
        self.adapters = adapters
        self.linears: dict[str, tuple[int, int]] = {}
        self.reads: list[str] = []
        self.before: Callable[[str], Any] | None = None

    async def weights(self, adapter_id: str) -> LoraWeights:
        self.reads.append(adapter_id)
        if self.before is not None:
            await self.before(adapter_id)
        adapter = self.adapters[adapter_id]
        return parse_adapter(adapter_id, adapter.data, adapter.config, self.linears, max_rank=64)


EngineMaker = Callable[..., SlotEngine]


@pytest.fixture
def make_engine() -> Iterator[EngineMaker]:
    """Engines over a copy of a model; closed at the end."""
    engines: list[SlotEngine] = []

    def make(model: PreTrainedModel, source: MemorySource | None = None, **sizes: Any) -> SlotEngine:
        defaults = {"rows": 4, "slots": 4, "max_len": 128, "rank": 4, "prefill_budget": 11}
        source = source or MemorySource({})
        engine = SlotEngine(prepare_base(copy.deepcopy(model)), source, EngineConfig(**(defaults | sizes)))
        source.linears = engine.linears
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
