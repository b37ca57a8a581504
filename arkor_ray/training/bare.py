"""The train loop without Ray, database or serving, for debugging and as the yardstick of what the service costs.

torchrun --nproc-per-node 2 -m arkor_ray.training.bare job.json --storage file:///tmp/store

`job.json` is a job's `config` as it goes over the wire. Log entries are printed as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arkor_ray.schemas.job import JobConfig
from arkor_ray.training.callbacks import EventSink, NullEventSink
from arkor_ray.training.data import prepare_data
from arkor_ray.training.job_spec import DatasetPolicy, JobSpec
from arkor_ray.training.loop_config import LoopConfig, LoopResult
from arkor_ray.training.model import context_length, load_config, load_tokenizer
from arkor_ray.training.train_loop import train_loop_per_worker
from arkor_ray.training.workers import join_workers


class PrintingSink(NullEventSink):
    def log(self, entry: dict[str, Any]) -> None:
        print(json.dumps(entry), flush=True)


def run_bare(spec: JobSpec, sink: EventSink, **loop_options: Any) -> LoopResult | None:
    """Runs a job in this process group (or this process alone); `sink` is used on rank 0. `loop_options` go to LoopConfig."""
    worker = join_workers()
    if worker.is_first:  # it alone fetches; the others read what it stored
        data = _prepare(spec)
    worker.from_first(None)
    if not worker.is_first:
        data = _prepare(spec)
    return train_loop_per_worker(LoopConfig(spec, data.train, data.evaluation, make_sink=lambda: sink, **loop_options))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m arkor_ray.training.bare", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--storage", required=True, help="file:///dir or s3://bucket/prefix; a run in there goes on")
    parser.add_argument("--job-id", default="bare")
    args = parser.parse_args()
    config = JobConfig.parse(json.loads(args.config.read_text()))
    policy = DatasetPolicy(allow_private_hosts=True, allow_local_paths=True)
    run_bare(JobSpec(args.job_id, config, config.model, args.storage, dataset_policy=policy), PrintingSink())


def _prepare(spec: JobSpec) -> Any:
    files = spec.base_files()
    tokenizer = load_tokenizer(files.path, **files.options)
    return prepare_data(spec, tokenizer, context_length(load_config(files.path, **files.options)))


if __name__ == "__main__":
    main()
