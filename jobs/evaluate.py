"""Holds an adapter against rows it has not seen: its loss as training would have told it, and its answers.

ray job submit --working-dir jobs -- python evaluate.py --data examples/data/redaction.heldout.jsonl \\
    --adapter /data/arkor/adapters/redaction-final --against-base
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from arkor_ray.errors import ArkorError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL or JSON: a path, a URL, s3://…, or owner/name of the Hub")
    parser.add_argument("--split", help="of the Hub's data set, such as test or train[:500]")
    parser.add_argument(
        "--adapter", help="a PEFT folder, also in s3://…, or a job's output; absent: the base model alone"
    )
    parser.add_argument("--model", help="the base model, where it is not where the adapter says")
    parser.add_argument("--against-base", action="store_true", help="the base model beside the adapter")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "nf4"), help="absent: as it was trained")
    parser.add_argument("--max-length", type=int, help="tokens of a row, as in training; absent: the model's context")
    parser.add_argument("--all-tokens", action="store_true", help="loss on all tokens and not on the answers alone")
    parser.add_argument("--no-answers", action="store_true", help="the loss alone")
    parser.add_argument("--max-tokens", type=int, help="of an answer")
    parser.add_argument("--json-schema", type=Path, help="a file; every answer keeps to it")
    parser.add_argument("--replicas", type=int, help="actors that answer; absent: one for each GPU, or one")
    parser.add_argument("--output", help="an absolute path or s3://bucket/file.json for the figures as JSON")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ArkorError as error:
        print(f"evaluate: {error.message}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    import ray

    from arkor_ray.cli.output import print_table
    from arkor_ray.demo.base_model import base_reference
    from arkor_ray.serving.batch import Sampling, read_json_schema, read_speaker
    from arkor_ray.storage.locations import open_file
    from arkor_ray.training.evaluation import evaluate, table
    from arkor_ray.training.questions import read_rows

    target = open_file(args.output, param="--output") if args.output else None
    speaker = read_speaker(args.adapter, base_reference(args.model) if args.model else None, args.precision)
    schema = read_json_schema(args.json_schema) if args.json_schema else None
    rows = read_rows(args.data, split=args.split)
    ray.init(ignore_reinit_error=True)
    report = evaluate(
        rows,
        speaker,
        against_base=args.against_base,
        sampling=None if args.no_answers else Sampling(0.0, max_tokens=args.max_tokens, json_schema=schema),
        max_length=args.max_length,
        responses_only=not args.all_tokens,
        replicas=args.replicas,
    )
    print_table(["", *report], table(report), empty="nothing was measured")
    if target is not None:
        store, name = target
        store.put(name, json.dumps(report, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
