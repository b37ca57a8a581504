"""Training time lost to checkpoints: the same bare run with one every 50 steps and with none.

    python -m tests.bench.checkpoint_cost [--quick] [--out FILE]

Gathering the state is the only stall; writing, hashing and uploading happen beside the next steps. The runs alternate in one
process on one thread, so that the writer's thread has the other core, as the worker's node would; ratios are taken within a
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from arkor_ray.schemas.job import JobConfig
from arkor_ray.training.bare import run_bare
from arkor_ray.training.callbacks import ListEventSink
from arkor_ray.training.job_spec import DatasetPolicy, JobSpec
from tests.bench.jobs import make_job

EVERY = 50


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    steps, every, rounds = (12, 4, 1) if options.quick else (200, EVERY, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, config = make_job(folder, steps=steps)
        seconds_of(folder, "warm", {**config, "maxSteps": 4})
        measured = []
        for i in range(rounds):
            pair = [("none", {}), ("saved", {"saveSteps": every})]
            # The order changes from round to round: whoever runs second finds warmer caches, or a hotter core.
            times = {key: seconds_of(folder, f"{key}-{i}", config | more) for key, more in pair[:: 1 if i % 2 else -1]}
            measured.append(times)
    # A checkpoint at the last step falls out of the clock, which stops with the last step.
    lost = [(times["saved"] / times["none"] - 1) * 100 for times in measured]
    saves = steps // every - 1
    print(f"{steps} steps, {saves} checkpoints while training goes on; seconds by round:")
    for times in measured:
        print(f"  without {times['none']:7.2f}   with {times['saved']:7.2f}")
    print(f"training time lost: median {statistics.median(lost):.2f} % ({min(lost):.2f} to {max(lost):.2f})")
    if options.out:
        result = {"benchmark": "checkpoint_cost", "steps": steps, "every": every, "rounds": measured}
        options.out.write_text(json.dumps(result | {"lost_percent": statistics.median(lost)}, indent=1))


def seconds_of(folder: Path, job_id: str, config: dict[str, Any]) -> float:
    """Seconds of training of one run, from the first step's begin to the last one's end."""
    policy = DatasetPolicy(allow_local_paths=True)
    spec = JobSpec(
        job_id,
        JobConfig.parse(config),
        config["model"],
        (folder / "store").as_uri(),
        dataset_policy=policy,
        scratch_dir=folder / "scratch",
    )
    result = run_bare(spec, ListEventSink())
    assert result is not None
    assert result.step == config["maxSteps"]
    total = result.metrics["total_time"]
    assert total is not None
    return total


if __name__ == "__main__":
    main()
