"""Tokens per second of 16 requests on 16 adapters in one batch, against the engine's own base model and against PEFT.

    python -m tests.bench.serving_mixed_adapters [--quick] [--out FILE]

All variants run in turn within each round; a ratio is taken within its round, and the table shows medians of ratios.
Random weights: what is measured does not depend on what the model says. Greedy answers are compared with PEFT's.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from arkor_ray.serving.engine.base_model import prepare_base
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.lora_weights import LoraWeights, parse_adapter
from arkor_ray.serving.engine.slot_engine import EngineConfig, SlotEngine
from tests.serving.tiny import SavedAdapter, make_adapter, make_model

REQUESTS = 16
LAYERS = {512: 8, 1024: 6, 128: 2}


class HostMemory:
    """Adapters as parsed bytes, as the loader's RAM tier would give them."""

    def __init__(self, adapters: dict[str, SavedAdapter]) -> None:
        self._adapters = adapters
        self.linears: dict[str, tuple[int, int]] = {}

    async def weights(self, adapter_id: str) -> LoraWeights:
        adapter = self._adapters[adapter_id]
        return await asyncio.to_thread(
            parse_adapter, adapter_id, adapter.data, adapter.config, self.linears, max_rank=64
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    sizes = [128] if options.quick else [512, 1024]
    rounds = 2 if options.quick else options.rounds
    results = [measure(hidden, rounds, prompt=32, tokens=16 if options.quick else 48) for hidden in sizes]
    for result in results:
        show(result)
    if options.out:
        options.out.write_text(json.dumps({"benchmark": "serving_mixed_adapters", "results": results}, indent=1))


def measure(hidden: int, rounds: int, *, prompt: int, tokens: int) -> dict[str, Any]:
    model = make_model(
        "llama", vocab=512, hidden=hidden, layers=LAYERS[hidden], head_dim=64, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, intermediate_size=int(hidden * 2.75) // 8 * 8,
        max_position_embeddings=4096, initializer_range=0.02,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        names = [f"a{i}" for i in range(REQUESTS)]
        adapters = {n: make_adapter(model, Path(folder, n), seed=i, r=16) for i, n in enumerate(names)}
        source = HostMemory(adapters)
        length = prompt + tokens + 8
        engine = SlotEngine(
            prepare_base(copy.deepcopy(model)), source, EngineConfig(rows=REQUESTS, slots=REQUESTS, max_len=length)
        )
        half = SlotEngine(
            prepare_base(copy.deepcopy(model)),
            source,
            EngineConfig(rows=REQUESTS // 2, slots=REQUESTS // 2, max_len=length),
        )
        resident = SlotEngine(
            prepare_base(copy.deepcopy(model)), source, EngineConfig(rows=REQUESTS // 2, slots=REQUESTS, max_len=length)
        )
        source.linears = engine.linears
        peft = PeftModel.from_pretrained(model, Path(folder, names[0]), adapter_name=names[0])
        for name in names[1:]:
            peft.load_adapter(Path(folder, name), adapter_name=name)
        peft.eval()
        prompts = torch.randint(3, 500, (REQUESTS, prompt), generator=torch.Generator().manual_seed(0))

        def ask(on: SlotEngine, choice: list[str | None]) -> list[list[int]]:
            return asyncio.run(_ask_all(on, prompts.tolist(), choice, tokens))

        def ask_peft(choice: list[str]) -> list[list[int]]:
            with torch.no_grad():
                out = peft.generate(
                    input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
                    min_new_tokens=tokens, do_sample=False, pad_token_id=0, adapter_names=choice,
                )  # fmt: skip
            return out[:, prompt:].tolist()

        variants: dict[str, Callable[[], list[list[int]]]] = {
            "engine, base": lambda: ask(engine, [None] * REQUESTS),
            "engine, 1 adapter": lambda: ask(engine, [names[0]] * REQUESTS),
            "engine, 16 adapters": lambda: ask(engine, list(names)),
            "engine, 8 adapters and base": lambda: ask(engine, [n if i % 2 else None for i, n in enumerate(names)]),
            "PEFT adapter_names, 16 adapters": lambda: ask_peft(names),
            "8 rows, 16 adapters, 16 slots": lambda: ask(resident, list(names)),
            "8 rows, 16 adapters, 8 slots": lambda: ask(half, list(names)),
        }
        same = sum(a == b for a, b in zip(ask(engine, list(names)), ask_peft(names), strict=True))
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):  # the first warms up
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - start)
        for each in (engine, half, resident):
            each.close()
    total = REQUESTS * tokens
    ratios = {
        "16 adapters / own base": _ratio(seconds, "engine, base", "engine, 16 adapters"),
        "16 adapters / PEFT": _ratio(seconds, "PEFT adapter_names, 16 adapters", "engine, 16 adapters"),
        "working set of 2x slots / all resident": _ratio(
            seconds, "8 rows, 16 adapters, 16 slots", "8 rows, 16 adapters, 8 slots"
        ),
    }
    return {
        "hidden": hidden, "rounds": rounds, "identical_to_peft": f"{same}/{REQUESTS}",
        "tokens_per_second": {name: round(total / statistics.median(times), 1) for name, times in seconds.items()},
        "ratios": ratios,
    }  # fmt: skip


async def _ask_all(
    engine: SlotEngine, prompts: list[list[int]], names: list[str | None], tokens: int
) -> list[list[int]]:
    async def one(prompt: list[int], name: str | None) -> list[int]:
        request = GenRequest("bench", tuple(prompt), tokens, name)
        return [event.token_id async for batch in engine.generate(request) for event in batch]

    return await asyncio.gather(*(one(p, n) for p, n in zip(prompts, names, strict=True)))


def _ratio(seconds: dict[str, list[float]], reference: str, measured: str) -> dict[str, float]:
    each = sorted(r / m for r, m in zip(seconds[reference], seconds[measured], strict=True))
    return {"median": round(statistics.median(each), 3), "min": round(each[0], 3), "max": round(each[-1], 3)}


def show(result: dict[str, Any]) -> None:
    print(f"\nhidden {result['hidden']}: greedy tokens identical to PEFT in {result['identical_to_peft']} requests")
    for name, rate in result["tokens_per_second"].items():
        print(f"  {name:34s} {rate:9.1f} tokens/s")
    for name, ratio in result["ratios"].items():
        print(f"  {name:40s} {ratio['median']:.2f}  ({ratio['min']:.2f} to {ratio['max']:.2f})")


if __name__ == "__main__":
    main()
