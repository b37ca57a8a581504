"""What the trainer tests share: a trainer, a job that runs through, callbacks that write down what they got."""

from __future__ import annotations

import functools

from arkor_ray.client import create_trainer

MESSAGES = [{"role": "user", "content": "hello"}]


def trainer_of(client, create=create_trainer, **arguments):
    return create(**{"name": "run", "model": "tiny", "dataset": "owner/data", "client": client, **arguments})


def short_run(fake, *, checkpoints=(2, 4)):
    """Every job: started, four steps, checkpoints, completed. Events are numbered 1 to 8."""

    def happen(job):
        fake.emit_started(job)
        for step in range(1, 5):
            fake.emit_log(job, step)
            if step in checkpoints:
                fake.emit_checkpoint(job, step)
        fake.complete(job)

    fake.on_create(happen)


def recorder(calls):
    names = ("on_started", "on_log", "on_checkpoint", "on_completed", "on_failed")
    return {name: functools.partial(lambda name, ctx: calls.append((name, ctx.event.id)), name) for name in names}
