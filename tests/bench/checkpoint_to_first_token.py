"""From a committed checkpoint to its first token: pushed to the replica, on its disk, only in S3; against a warm one.

    python -m tests.bench.checkpoint_to_first_token [--quick] [--out FILE]

A replica in this process, S3 by moto on the loopback. Every cold measurement uses an adapter that the replica has never
seen. The tiers take turns within each round; a ratio is taken to the warm first token of its round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.serving.app import InferenceArgs
from arkor_ray.serving.llm_server import LLMServer
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore, open_store
from tests.servers.s3 import running_moto
from tests.serving.tiny import SavedAdapter, commit_adapter, make_adapter, make_model, save_base

LAYERS = {512: 8, 1024: 6, 128: 2}
TIERS = ("pushed", "disk", "s3")
ASK = [{"role": "user", "content": "the weather is fine and the answer is"}]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = arguments.parse_args()
    sizes = [128] if options.quick else [512, 1024]
    with running_moto() as endpoint:
        os.environ.update(endpoint.environment)
        rounds, bucket = 2 if options.quick else options.rounds, endpoint.make_bucket()
        results = [asyncio.run(measure(h, rounds, f"s3://{bucket}/{h}", endpoint.endpoint_url)) for h in sizes]
    for result in results:
        show(result)
    if options.out:
        options.out.write_text(json.dumps({"benchmark": "checkpoint_to_first_token", "results": results}, indent=1))


async def measure(hidden: int, rounds: int, storage_url: str, endpoint_url: str) -> dict[str, Any]:
    model = make_model(
        "llama", vocab=512, hidden=hidden, layers=LAYERS[hidden], head_dim=64, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, intermediate_size=int(hidden * 2.75) // 8 * 8,
        max_position_embeddings=4096, initializer_range=0.02,
    )  # fmt: skip
    store = open_store(storage_url, endpoint_url=endpoint_url)
    with tempfile.TemporaryDirectory() as folder:
        base = str(save_base(model, Path(folder, "base")))
        pattern = make_adapter(model, Path(folder, "adapter"), seed=0, r=16)
        server = LLMServer(
            InferenceArgs(
                base_model=base,
                base_precision="fp32",
                storage_url=storage_url,
                storage_endpoint_url=endpoint_url,
                cache_dir=str(Path(folder, "cache")),
                slots=4,
                rows=4,
                max_len=256,
                cpu_threads=1,
            )
        )
        milliseconds: dict[str, list[float]] = {tier: [] for tier in ("warm", *TIERS, "admission of pushed bytes")}
        warm, data = commit(store, pattern, base, 0)
        await server.admit(warm.model_dump(mode="json"), data)
        await first_token(server, warm.adapter_id)
        for number in range(rounds + 1):  # the first warms up
            found = {"warm": min([await first_token(server, warm.adapter_id) for _ in range(2)])}
            for index, tier in enumerate(TIERS):
                manifest, data = commit(store, pattern, base, 1 + number * len(TIERS) + index)
                if tier == "pushed":
                    start = time.perf_counter()
                    await server._loader.admit(manifest, data)
                    found["admission of pushed bytes"] = (time.perf_counter() - start) * 1e3
                elif tier == "disk":
                    keep_on_disk(server, store, manifest)
                found[tier] = await first_token(server, manifest.adapter_id)
            await first_token(server, warm.adapter_id)  # back into a slot
            if number:
                for name, value in found.items():
                    milliseconds[name].append(value)
        stats = await server.stats()
        server.close()
    ratios = {}
    for tier in TIERS:
        each = sorted(c / w for c, w in zip(milliseconds[tier], milliseconds["warm"], strict=True))
        ratios[tier] = {
            "median": round(statistics.median(each), 3),
            "min": round(each[0], 3),
            "max": round(each[-1], 3),
        }
    return {
        "hidden": hidden, "rounds": rounds, "adapter_mb": round(len(pattern.data) / 1e6, 1),
        "milliseconds": {name: round(statistics.median(values), 2) for name, values in milliseconds.items()},
        "ratios_to_warm": ratios, "tiers": stats["tiers"],
    }  # fmt: skip


async def first_token(server: LLMServer, adapter_id: str) -> float:
    """Milliseconds from the call to its first event, which comes with the first token."""
    start = time.perf_counter()
    async with aclosing(server.chat({"messages": ASK, "max_tokens": 4, "temperature": 0}, adapter_id)) as events:
        await anext(events)
        return (time.perf_counter() - start) * 1e3


def commit(store: ObjectStore, pattern: SavedAdapter, base: str, step: int) -> tuple[CheckpointManifest, bytes]:
    """A checkpoint with weights of its own, in storage with its manifest."""
    data = save({name: tensor * (1 + step * 1e-4) for name, tensor in load(pattern.data).items()})
    (pattern.path / "adapter_model.safetensors").write_bytes(data)
    return commit_adapter(store, pattern, "bench", step, base_model=base), data


def keep_on_disk(server: LLMServer, store: ObjectStore, manifest: CheckpointManifest) -> None:
    """What a replica finds that was restarted on this node."""
    prefix = layout.adapter_prefix(manifest.adapter_id)
    for file in manifest.files:
        server._loader._disk.put(file.sha256, store.get(prefix + file.path))
    (server._loader._manifest_dir / f"{manifest.adapter_id}.json").write_bytes(manifest.to_bytes())


def show(result: dict[str, Any]) -> None:
    print(f"\nhidden {result['hidden']}, adapter of {result['adapter_mb']} MB")
    for name, value in result["milliseconds"].items():
        ratio = result["ratios_to_warm"].get(name)
        note = f"{ratio['median']:.2f} of warm  ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        print(f"  {name:28s} {value:9.2f} ms  {note}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
