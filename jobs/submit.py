"""Submits a job file to arkor-ray, follows it, and asks every checkpoint the same question while training goes on.

python jobs/submit.py jobs/examples/triage.yaml "Where is my parcel? I ordered it three weeks ago."
"""

from __future__ import annotations

import sys

from arkor_ray.client.job_file import load_job_file
from arkor_ray.client.trainer import Trainer

QUESTION = "Where is my parcel? I ordered it three weeks ago."


def main(path: str, question: str = QUESTION) -> int:
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
    raise SystemExit(main(*sys.argv[1:]))
