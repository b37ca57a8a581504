"""Fine-tunes a model without the service: the same job file and the same training, with a folder for its output.

ray job submit --working-dir jobs -- python finetune.py examples/translate.yaml --output /data/arkor

Started again with the same --job-id (by default the job's name) and --output, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from arkor_ray.cli.progress import event_line
from arkor_ray.client.job_file import load_job_file
from arkor_ray.errors import ArkorError
from arkor_ray.schemas.event import Event


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a YAML job file; its data set may be a file, relative to it")
    parser.add_argument(
        "--output", required=True, help="an absolute directory that every node has, or s3://bucket/prefix"
    )
    parser.add_argument("--job-id", help="letters, digits and dashes; names the job's folders in --output")
    parser.add_argument("--model", help="instead of the job file's: a Hub id, a directory or s3://bucket/prefix")
    parser.add_argument(
        "--events", type=Path, help="a file by its absolute path; each event is added as a line of JSON"
    )
    args = parser.parse_args(argv)
    if args.events is not None and not args.events.is_absolute():
        parser.error(
            f"--events {args.events}: say an absolute path; a relative one lies in the job's copy of its files"
        )
    try:
        return run(args)
    except ArkorError as error:
        print(f"finetune: {error.message}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    request = load_job_file(args.job)

    import ray

    from arkor_ray.demo.base_model import base_reference
    from arkor_ray.training.standalone import job_id_of, run_standalone, standalone_spec

    config = {**request.config, "model": base_reference(args.model or request.config["model"])}
    spec = standalone_spec(args.job_id or job_id_of(request.name), config, args.output)
    print(f"job {spec.job_id} on {spec.base_model}, into {spec.storage_url}", flush=True)
    ray.init(ignore_reinit_error=True)
    with ExitStack() as stack:
        file = stack.enter_context(args.events.open("a")) if args.events else None

        def show(event: Event) -> None:
            print(event_line(event), flush=True)
            if file is not None:
                print(json.dumps({"id": event.id, **event.data}), file=file, flush=True)

        return 0 if run_standalone(spec, show) else 1


if __name__ == "__main__":
    raise SystemExit(main())
