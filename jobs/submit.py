"""Submits a job file to arkor-ray, follows it, and asks every checkpoint the same question while training goes on.

python jobs/submit.py jobs/examples/triage.yaml "Where is my parcel? I ordered it three weeks ago."
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arkor_ray.client.job_file import load_job_file
from arkor_ray.client.trainer import Trainer
from arkor_ray.errors import ArkorError

QUESTION = "Where is my parcel? I ordered it three weeks ago."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a YAML job file; its data set may be a file, relative to it")
    parser.add_argument("question", nargs="?", default=QUESTION, help="what every checkpoint is asked")
    args = parser.parse_args(argv)
    try:
        return run(args.job, args.question)
    except ArkorError as error:
        print(f"submit: {error.message}", file=sys.stderr)
        return 1


def run(path: Path, question: str) -> int:
    def on_log(entry):
        if entry.loss is not None:
            print(f"step {entry.step}: loss {entry.loss:.3f}")

    def on_checkpoint(context):
        answer = context.infer(messages=[{"role": "user", "content": question}], stream=False)
        print(f"step {context.step}: {answer.json()['content']!r}")

    callbacks = {"on_log": on_log, "on_checkpoint": on_checkpoint}
    result = Trainer(load_job_file(path), callbacks=callbacks).wait()
    print(f"{result.job.id} is {result.status}")
    return 0 if result.status == "completed" else 1


if __name__ == "__main__":
    raise SystemExit(main())
