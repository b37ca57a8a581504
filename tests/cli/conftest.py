from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from arkor_ray.cli import connection
from arkor_ray.cli.main import app
from arkor_ray.client import Client
from tests.client.conftest import fake, home, project_dir  # noqa: F401
from tests.client.fake_service import URL, FakeJob, FakeService

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """`up` takes the process that it runs in for its own: signals, environment and log lines."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    root, ours = logging.getLogger(), logging.getLogger("arkor_ray")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def run(fake: FakeService, home: Path, project_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811
    """`arkor-ray` with these arguments, against the fake service."""
    client = functools.partial(Client, home=home, project_dir=project_dir, transport=fake)
    monkeypatch.setattr(connection, "Client", client)
    monkeypatch.setenv("ARKOR_CLOUD_API_URL", URL)
    return lambda *arguments, input=None: CliRunner().invoke(app, [str(each) for each in arguments], input=input)


@pytest.fixture
def job(run: Run, fake: FakeService, tmp_path: Path) -> FakeJob:  # noqa: F811
    """A completed job with checkpoints at 2 and 4 and a final adapter."""

    def happen(job: FakeJob) -> None:
        fake.emit_started(job)
        for step in range(1, 5):
            fake.emit_log(job, step)
            if step % 2 == 0:
                fake.emit_checkpoint(job, step)
        fake.complete(job)

    fake.on_create(happen)
    file = tmp_path / "job.yaml"
    file.write_text("name: run\nmodel: tiny\ndataset: a/b\nmax_steps: 4\n")
    assert run("jobs", "create", "-f", file).exit_code == 0
    return next(iter(fake.jobs.values()))
