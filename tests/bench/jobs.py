"""The training job that benchmarks run: one model, one data set, sized so that a step is no shorter than real small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arkor_ray.demo.testing import make_tiny_model
from tests.integration.stories import write_rows


def make_job(folder: Path, *, steps: int, **config: Any) -> tuple[Path, dict[str, Any]]:
    """A base model with hidden size 128 in `folder`, and the wire's config of a LoRA job of `steps` steps on it."""
    model = make_tiny_model(folder / "model", "llama", hidden=128, layers=4, vocab=1024)
    rows = write_rows(folder / "rows.jsonl", rows=240)
    return model, {
        "model": str(model),
        "datasetSource": {"type": "blob", "url": rows},
        "maxSteps": steps,
        "saveSteps": 0,
        "batchSize": 4,
        "loraR": 16,
        "learningRate": 1e-4,
        **config,
    }
