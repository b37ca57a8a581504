"""Answers every row of a data set with a base model and an adapter, many rows at a time.

ray job submit --working-dir jobs -- python batch_inference.py --data examples/data/translate.heldout.jsonl \\
    --adapter /data/arkor/adapters/translate-final --output /data/answers.jsonl

Started again after it was ended, it asks only what has no answer yet. A row that cannot be answered has an `error` instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
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
    parser.add_argument("--output", required=True, help="an absolute path or s3://bucket/file.jsonl")
    parser.add_argument("--replicas", type=int, help="actors; absent: one for each GPU, or one")
    parser.add_argument("--rows", type=int, default=16, help="answers that an actor decodes at a time")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of prompt and answer together")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "nf4"), help="absent: as it was trained")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--json-schema", type=Path, help="a file; every answer keeps to it")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ArkorError as error:
        print(f"batch_inference: {error.message}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    import ray

    from arkor_ray.demo.base_model import base_reference
    from arkor_ray.serving.batch import Engine, Sampling, answer_all, check_sampling, read_json_schema, read_speaker
    from arkor_ray.serving.result_file import ResultFile
    from arkor_ray.storage.locations import open_file
    from arkor_ray.training.questions import questions_of, read_rows

    store, name = open_file(args.output, param="--output")
    speaker = read_speaker(args.adapter, base_reference(args.model) if args.model else None, args.precision)
    schema = read_json_schema(args.json_schema) if args.json_schema else None
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed, args.stop, schema)
    check_sampling(sampling)
    rows = read_rows(args.data, split=args.split)
    questions, refused = questions_of(rows)
    file = ResultFile(store, name, {**speaker.identity(rows), "sampling": asdict(sampling)})
    if refused:
        file.add({"index": index, "error": reason} for index, reason in refused.items())
    open_rows = file.missing(questions)
    print(f"{len(rows)} rows; {len(open_rows)} to be answered by {speaker.name}", flush=True)
    if open_rows:
        ray.init(ignore_reinit_error=True)
        asked = [(index, questions[index].request()) for index in open_rows]
        engine, done = Engine(args.rows, args.max_length), 0
        for results in answer_all(asked, speaker, sampling, engine=engine, replicas=args.replicas):
            file.add({**result, "messages": questions[result["index"]].messages} for result in results)
            done += len(results)
            print(f"answered {done}/{len(open_rows)}", flush=True)
    file.finish()
    errors = sum("error" in result for result in file.results.values())
    print(json.dumps({"output": f"{store.url}/{name}", "rows": len(rows), "errors": errors}))
    return 1 if rows and errors == len(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
